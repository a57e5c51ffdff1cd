"""`mas evaluate` on a tiny model, a tiny reader and a few park pictures."""

import errno
import io
import json
import os
import tempfile
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from park_shards import to_sample, write_shard
from PIL import Image
from torch import nn

import mas.examiner
from mas import evaluate as command
from mas.__main__ import main
from mas.cases import Case, read_cases
from mas.evaluate import choose_guidance, evaluate, spread_out
from mas.examiner import Examiner
from mas.filter import Sampling, StreamSampling
from mas.generate import generate
from mas.metrics import SceneMetrics
from mas.model import MakeAScene
from mas.model_folder import ModelError
from mas.obedience import CLAIMS
from mas.reader import Reader, ReaderConfig
from mas.report import draw_sweep
from mas.scene import VOID, SceneMap
from mas.shards import Sample, ShardWriter
from mas.storage import save_network
from mas.vqgan import VQGAN
from mas.weights_file import WeightsError
from preprocess.park_truth import picture

TIMES = ("morning", "day", "sunset", "night")
PLACES = ("park", "beach", "street", "snow", "mountains", "farm")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return {
        "park": write_shard(folder / "park"),
        "unseen": write_shard(folder / "unseen", held_out="only"),
        "photos": write_shard(folder / "photos", park=False),
    }


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = ReaderConfig(
        size=32, width=8, multipliers=(1, 2), groups=4, features=8, times=TIMES, places=PLACES
    )
    folder = tmp_path_factory.mktemp("reader")
    Reader(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(shards, reader_folder, tiny_folder, tmp_path_factory):
    def start(name="park", **options):
        output = tmp_path_factory.mktemp("report") / "report.json"
        values = {"reader": reader_folder, "count": 6, "seeds": 2, "batch": 4, **options}
        values = {"model": str(tiny_folder)} | values
        evaluate(**{"input": shards[name], "output": output, **values})
        return output, json.loads(output.read_text())

    return start


@pytest.fixture(scope="module")
def report(run, shards):
    return run(guidance=[1.0, 3.0], sweep_count=2, unseen=shards["unseen"])


def test_the_report_has_every_figure_of_the_contract(report):
    _, figures = report
    for name in ("caption", "caption_real", "caption_unseen", "caption_unseen_real"):
        assert figures[name].keys() == {*CLAIMS, "all", "captions"}
    assert {"miou", "miou_real", "miou_contradicted", "share_of_real"} <= figures["scene"].keys()
    assert {"miou", "face_iou", "edge_f1", "usage"} <= figures["vqseg"].keys()
    assert {"psnr", "ssim", "usage"} <= figures["vqgan"].keys()
    assert figures["distribution"].keys() == {"fid", "kid", "fid_real", "kid_real"}
    assert figures["diversity"].keys() == {"scene", "scene_real", "picture", "picture_real"}
    assert [entry["guidance"] for entry in figures["sweep"]] == [1.0, 3.0]
    assert figures["guidance"] in (1.0, 3.0)
    shares = [x for name in ("caption", "caption_real") for x in list(figures[name].values())[:-1]]
    shares += [x for name, x in figures["scene"].items() if "miou" in name]
    assert all(x is None or 0 <= x <= 1 for x in shares)


def test_every_share_says_what_it_was_counted_from(report):
    output, figures = report
    captions = ("caption", "caption_real", "caption_unseen", "caption_unseen_real")
    assert figures["claims"].keys() == {*captions}
    for holder, names in ((figures, captions), *((e, ["caption"]) for e in figures["sweep"])):
        for name in names:
            counted = holder["claims"][name]
            assert counted.keys() == {*CLAIMS, "all"}
            for claim, of in counted.items():
                share = holder[name][claim]
                assert share == (of["kept"] / of["count"] if of["count"] else None)
                assert (of["interval"] is None) == (share is None)
            assert counted["all"]["count"] == holder[name]["captions"]
    share, of = figures["caption"]["number"], figures["claims"]["caption"]["number"]
    low, high = of["interval"]
    text = output.with_suffix(".md").read_text()
    assert f"| number | {share:.3f} ({low:.2f}-{high:.2f}, n={of['count']}) |" in text
    assert "| relation | - |" in text or figures["claims"]["caption"]["relation"]["count"]


def test_true_scenes_keep_the_classes_they_are_asked_for(report):
    _, figures = report
    # At 32 px the smallest things have less pixels than a thing needs.
    assert figures["caption_real"]["class"] > 0.8
    assert figures["caption_real"]["number"] > figures["caption"]["number"]  # of random scenes


def test_without_a_guidance_each_stream_has_the_models_own(run, tiny_model, tmp_path):
    own = StreamSampling(scene=Sampling(guidance=1.5), image=Sampling(guidance=4, top_p=0.9))
    folder = tmp_path / "own"
    MakeAScene(
        tokenizer=tiny_model.tokenizer,
        vqseg=tiny_model.vqseg,
        vqgan=tiny_model.vqgan,
        gpt=tiny_model.gpt,
        sampling=own,
    ).save_pretrained(folder)
    output, figures = run(model=str(folder), count=2)
    assert figures["sampling"] == asdict(own) and figures["guidance"] is None
    text = output.with_suffix(".md").read_text()
    assert "guidance 1.5 for scenes and 4 for pictures" in text
    assert "of the picture: guidance 4, temperature 1, top-p 0.9." in text
    output, figures = run(model=str(folder), count=2, guidance=[0.0])
    assert figures["guidance"] == figures["sampling"]["scene"]["guidance"] == 0
    assert figures["sampling"]["image"] == asdict(Sampling(guidance=0, top_p=0.9))
    assert "guidance 0, seed" in output.with_suffix(".md").read_text()


def test_the_examiner_samples_with_the_settings_it_names(tiny_model, monkeypatch, shards):
    used = []

    def note(decoder, text_BT, *, scene, image, **options):
        used.append(StreamSampling(scene=scene, image=image))
        return generate(decoder, text_BT, scene=scene, image=image, **options)

    monkeypatch.setattr(mas.examiner, "generate", note)
    own = StreamSampling(scene=Sampling(guidance=1.5), image=Sampling(guidance=4, top_p=0.9))
    monkeypatch.setattr(tiny_model, "sampling", own)
    examiner = Examiner(tiny_model, None, seed=0, batch=2)
    cases = read_cases(shards["park"], 2).cases
    examiner.paint(cases, None)
    examiner.paint(cases, 2.0)
    both = StreamSampling(scene=Sampling(guidance=2), image=Sampling(guidance=2, top_p=0.9))
    assert used == [own, both] == [examiner.sampling(None), examiner.sampling(2.0)]


def test_the_report_is_written_for_people_too(report):
    output, figures = report
    text = output.with_suffix(".md").read_text()
    assert f"| class | {figures['caption']['class']:.3f} (" in text
    assert "not of Inception" in text
    for kind in ("samples", "sweep"):
        assert f"report.{kind}.png" in text
        with Image.open(output.with_name(f"report.{kind}.png")) as image:
            image.load()
    assert {path.name for path in output.parent.iterdir()} == {
        "report.json", "report.md", "report.samples.png", "report.sweep.png",
    }  # fmt: skip


def test_the_same_seed_gives_the_same_figures_in_any_batch(run):
    first, second = (run(seed=5, batch=batch)[1] for batch in (2, 6))
    other = run(seed=6)[1]
    for figures in (first, second, other):
        del figures["seconds"]
    differing = {name for name in first if first[name] != second[name]}
    assert differing <= {"distribution", "diversity"}  # sums in another order
    for name in differing:
        assert first[name] == pytest.approx(second[name], rel=1e-3, abs=1e-3)
    assert first["codes"] != other["codes"]


def test_a_model_that_paints_the_truth_reaches_the_ceiling(run, monkeypatch):
    def copy(self, cases, guidance, *, follow=None, seeds=None):
        return self.look(follow or cases)

    monkeypatch.setattr(Examiner, "paint", copy)
    monkeypatch.setattr(command, "count_codes", lambda examiner, made: {})
    _, figures = run()
    assert figures["caption"] == figures["caption_real"]
    assert figures["scene"]["miou"] == figures["scene"]["miou_real"]
    assert figures["scene"]["share_of_real"] == 1
    assert figures["distribution"]["fid"] == pytest.approx(0, abs=1e-6)


def test_other_shards_are_measured_without_the_facts_of_the_park(run):
    _, figures = run("photos")
    assert not figures.keys() & {"caption", "caption_real", "claims", "reader"}
    assert figures.keys() >= {"scene", "vqseg", "vqgan", "distribution", "diversity", "codes"}


def test_without_a_reader_nothing_is_said_of_what_pictures_show(run, caplog):
    _, figures = run(reader=None)
    assert not figures.keys() & {"scene", "distribution", "reader"}
    assert figures["caption"]["place"] is None and figures["caption"]["class"] is not None
    assert figures["diversity"].keys() == {"scene", "scene_real"}
    assert "train one with mas train reader" in caplog.text


class Means(nn.Module):
    """Means of the colours as features."""

    def forward(self, image_BCHW):
        return image_BCHW.mean((2, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_distances_on_features_of_a_file_say_what_they_were_measured_with(run, tmp_path):
    path = tmp_path / "means.pt"
    torch.jit.trace(Means(), torch.zeros(2, 3, 32, 32)).save(str(path))
    output, figures = run(extractor=path, trust_program=True)
    distance = figures["published_distance"]
    assert distance["count"] == distance["true_count"] == 6
    assert distance["extractor"] == "means.pt" and distance["fid"] > 0
    assert distance["sha256"] in output.with_suffix(".md").read_text()


def test_the_reader_beside_a_shipped_model_is_taken(reader_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SHIPPED", tmp_path)
    assert command.find_reader(None, tmp_path / "park") is None
    reader = Reader.from_pretrained(reader_folder)
    save_network(reader, tmp_path / "park-reader", weights="float16")
    found = command.find_reader(None, tmp_path / "park")
    assert found is not None and found.config == reader.config
    assert command.find_reader(None, tmp_path / "elsewhere" / "park") is None
    image_BCHW = torch.rand(2, 3, 32, 32)
    agree = found.read(image_BCHW).labels_BHW == reader.read(image_BCHW).labels_BHW
    assert agree.float().mean() > 0.95  # float16 rounds


def test_scenes_without_any_label_are_measured_as_far_as_they_can_be(run, tmp_path, capsys):
    nothing = io.BytesIO()
    SceneMap.from_labels(np.full((32, 32), VOID, np.uint8)).to_png(nothing)
    with ShardWriter(str(tmp_path / "00000.tar")) as writer:
        for i in range(3):
            sample = to_sample(picture(3, i, size=32), f"{i:05}", park=False)
            scene = {"scene.png": nothing.getvalue()}
            writer.write(Sample(sample.key, sample.files | scene))
    output, figures = run(input=str(tmp_path), count=3)
    assert figures["vqseg"]["miou"] is None and figures["scene"]["miou_real"] is None
    assert "say nothing" in output.with_suffix(".md").read_text()
    assert "VQ-SEG mIoU -" in capsys.readouterr().out


@pytest.fixture
def unpainted(monkeypatch):
    """Whoever paints fails."""
    monkeypatch.setattr(Examiner, "paint", lambda *_, **__: pytest.fail("painted"))


def test_a_sweep_needs_something_to_choose_by(run, unpainted):
    with pytest.raises(ValueError, match="needs shards with the park's facts, or a --reader"):
        run("photos", reader=None, guidance=[1.0, 2.0])


def test_scenes_smaller_than_the_models_are_refused(run, unpainted, monkeypatch):
    monkeypatch.setattr(Case, "side", 16)
    with pytest.raises(ValueError, match=r"has 16 pixels a side, .* preprocess with --photo\.size"):
        run("park")


def test_photos_smaller_than_the_models_pictures_are_refused(run, unpainted, tiny_folder, tmp_path):
    """Enlarged they would be measured as if the network had blurred them."""
    model = MakeAScene.from_pretrained(tiny_folder)
    before = model.vqgan.config
    multipliers = (*before.multipliers, before.multipliers[-1])
    model.vqgan = VQGAN(replace(before, size=2 * before.size, multipliers=multipliers))
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match=r"has 32 pixels a side, .* preprocess with .* 64$"):
        run("photos", reader=None, model=str(tmp_path / "large"))


def test_a_network_that_gives_no_features_is_refused(run, unpainted, tmp_path):
    torch.jit.script(nn.Identity()).save(tmp_path / "pictures.pt")
    with pytest.raises(WeightsError, match="one row of features each"):
        run(extractor=tmp_path / "pictures.pt", trust_program=True)


def test_one_picture_is_too_few(unpainted, run, shards, tmp_path):
    one = write_shard(tmp_path / "one", count=1)
    with pytest.raises(ValueError, match="one picture; an evaluation needs two"):
        run("park", input=one)


def test_three_pictures_without_facts_are_enough_for_a_sweep(run):
    _, figures = run("photos", count=3, guidance=[1.0, 2.0], sweep_count=2)
    assert [entry["distribution"].keys() for entry in figures["sweep"]] == [{"fid", "kid"}] * 2
    assert figures["distribution"].keys() == {"fid", "kid"}


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        command.evaluate(input="nowhere", output=tmp_path / "folder.json")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        command.evaluate(input="nowhere", output=tmp_path / "file" / "report.json")


def test_a_folder_that_takes_no_files_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "a name that nobody knows")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match=r"Read-only file system: '.*report\.json'"):
        command.evaluate(input="nowhere", output=tmp_path / "report.json")


def test_a_batch_that_does_not_fit_is_refused_before_anything_is_painted(
    run, unpainted, monkeypatch
):
    monkeypatch.setattr(MakeAScene, "pictures_that_fit", lambda _: 3)
    with pytest.raises(ModelError, match=r"4 pictures at a time .* use batch 3"):
        run("park", batch=4)
    with pytest.raises(pytest.fail.Exception, match="painted"):
        run("park", batch=3)


def test_a_memory_that_runs_out_all_the_same_is_said(run, monkeypatch):
    def run_out(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("mas.examiner.generate", run_out)
    with pytest.raises(ModelError, match="ran out with 4 pictures at a time: try batch 2"):
        run("park", batch=4)


@pytest.mark.parametrize("wrong", [{"count": 1}, {"seeds": 1}, {"sweep_count": 1}, {"batch": 0}])
def test_counts_that_cannot_be_are_refused_before_anything_is_read(wrong, tmp_path):
    with pytest.raises(ValueError, match=f"--{next(iter(wrong)).replace('_', '-')} is"):
        command.evaluate(input="nowhere", output=tmp_path / "r.json", **wrong)


@pytest.mark.parametrize("seed", [-1, 2**63 - 5])
def test_a_seed_that_cannot_be_is_refused_before_anything_is_read(seed, tmp_path):
    with pytest.raises(ValueError, match=rf"seed is {seed}.*, use a number from 0 to 2\^63 - 6"):
        command.evaluate(input="nowhere", output=tmp_path / "r.json", seed=seed, count=6)


def test_a_guidance_that_cannot_be_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"guidance is 2000\.0, use a number from 0 to 1000"):
        command.evaluate(input="nowhere", output=tmp_path / "r.json", guidance=[2.0, 2000.0])


@pytest.mark.parametrize("miou", [0.0, 0.002, 0.09, 0.1, 0.7])
def test_a_reader_that_hardly_sees_is_said_to_be_no_judge(miou, run, monkeypatch, caplog):
    original = SceneMetrics.compute
    monkeypatch.setattr(SceneMetrics, "compute", lambda self: original(self) | {"miou": miou})
    output, figures = run("park")
    assert figures["scene"]["share_of_real"] == (1.0 if miou else None)
    doubt = f"the reader's mIoU on real pictures is {miou:.3f}, and it needs 0.1 or more to judge"
    reached = "The model reaches 100.0% of what real pictures reach"
    text = output.with_suffix(".md").read_text()
    assert (doubt in text) == (doubt in caplog.text) == (miou < 0.1)
    assert (reached in text) == (miou >= 0.1)


@pytest.mark.parametrize("size", [16, 32])
def test_a_reader_of_other_pictures_gets_them_resized_and_that_is_said(
    run, reader_folder, tmp_path, caplog, size
):
    config = Reader.from_pretrained(reader_folder).config
    Reader(replace(config, size=size)).save_pretrained(tmp_path)
    _, figures = run(reader=tmp_path, count=2)
    assert figures["scene"]["miou_real"] is not None
    said = f"the reader was trained on pictures of {size} px, the model's have 32: they are resized"
    assert (said in caplog.text) == (size != 32)


def test_the_guidance_that_obeys_best_is_chosen():
    def entry(guidance, fid, **shares):
        caption = dict.fromkeys(CLAIMS, float("nan")) | shares
        return {"guidance": guidance, "caption": caption, "distribution": {"fid": fid}}

    sweep = [entry(1, 9, number=0.2, place=1.0), entry(3, 9, number=0.7, place=0.9), entry(5, 1)]
    assert choose_guidance(sweep[:2]) == 3
    assert choose_guidance([entry(1, 9), entry(5, 1)]) == 5


def test_the_command_prints_one_object_and_takes_several_guidances(
    shards, tiny_folder, tmp_path, capsys
):
    words = ["evaluate", "--input", shards["park"], "--model", str(tiny_folder), "--count", "2"]
    words += ["--seeds", "2", "--sweep-count", "2", "--guidance", "1", "2", "--json"]
    assert main([*words, "--output", str(tmp_path / "r.json")]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((tmp_path / "r.json").read_text())
    assert [entry["guidance"] for entry in figures["sweep"]] == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 1}, "--count is 1, use 2 or more"),
        ({"guidance": [2.0, 2.0]}, "--guidance names one twice"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message, run):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_the_report_must_be_json(shards, tmp_path):
    with pytest.raises(ValueError, match=r"--output must end in .json, got"):
        evaluate(input=shards["park"], output=tmp_path / "report.md")


def test_cases_are_spread_and_take_turns_in_captions(shards):
    cases = read_cases(shards["park"], 3).cases
    assert [case.key for case in cases] == ["00000", "00002", "00005"]
    everything = read_cases(shards["park"], 6)
    captions = [json.loads(picture(3, i, size=32)["json"])["captions"] for i in range(6)]
    assert [c.caption for c in everything.cases] == [captions[i][i % 3] for i in range(6)]
    assert everything.has_facts and set(everything.lights) <= set(TIMES)
    assert len(spread_out(everything.cases, 4)) == 4


def test_names_in_the_plot_stay_inside_it():
    low = [{"guidance": g, "caption": dict.fromkeys(CLAIMS, 0.0)} for g in (1.0, 2.0)]
    high = [{"guidance": g, "caption": dict.fromkeys(CLAIMS, 1.0)} for g in (1.0, 2.0)]
    for sweep in (low, high):
        pixels = np.asarray(draw_sweep(sweep).convert("RGB")).astype(int)
        margin = np.abs(pixels - pixels[0, 0]).sum(-1) > 60
        assert not margin[:6].any() and not margin[-3:].any() and not margin[:, -3:].any()
        rows = np.flatnonzero(margin[:, -110:].any(1))  # of the names
        assert rows.max() - rows.min() > 5 * 14  # six names below one another
