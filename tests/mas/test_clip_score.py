"""The CLIP score in `mas evaluate`, with a CLIP of random weights."""

import json
import shutil

import numpy as np
import pytest
from park_shards import write_shard
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mas import evaluate as command
from mas.__main__ import main
from mas.cases import Case
from mas.examiner import Examiner, Made
from mas.figures import measure_clip
from mas.model_folder import ModelError

COUNT = 4


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Scene shards that are not of the park world."""
    return write_shard(tmp_path_factory.mktemp("shards") / "photos", count=COUNT, park=False)


@pytest.fixture
def run(photos, tiny_folder, tmp_path):
    def start(**options):
        output = tmp_path / "report.json"
        values = {"input": photos, "model": str(tiny_folder), "count": COUNT, "seeds": 2}
        command.evaluate(output=output, **values | {"batch": 3} | options)
        return output, json.loads(output.read_text())

    return start


@pytest.fixture
def examined(monkeypatch):
    """What was examined, as `show` gets it: the cases and all that was painted for them."""
    seen = []
    show = command.show
    monkeypatch.setattr(command, "show", lambda *given: seen.append(given) or show(*given))
    return seen


@pytest.fixture(scope="module")
def clip_towards(clip_folder, tmp_path_factory):
    """A CLIP whose cosines are positive; those of the other are negative."""
    folder = shutil.copytree(clip_folder, tmp_path_factory.mktemp("clip") / "towards")
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"] *= -1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def by_transformers(folder, captions, pictures):
    """100 max(cosine, 0) of each pair, from the forward pass of transformers."""
    network = CLIPModel.from_pretrained(folder).eval().requires_grad_(False)
    parts = [part.from_pretrained(folder) for part in (CLIPImageProcessorPil, CLIPTokenizer)]
    processor = CLIPProcessor(*parts)
    scores = []
    for caption, picture in zip(captions, pictures, strict=True):
        inputs = processor(
            text=[caption],
            images=Image.fromarray(picture),
            truncation=True,
            max_length=16,
            return_tensors="pt",
        )
        cosine = network(**inputs).logits_per_image.item() / network.logit_scale.exp().item()
        scores.append(100 * max(cosine, 0))
    return scores


def test_the_scores_are_the_mean_cosines_of_the_pairs(run, clip_towards, examined):
    output, figures = run(clip=str(clip_towards))
    [(asked, answers)] = examined
    captions = [case.caption for case in asked]
    sets = {
        "clip_score": (captions, answers.made.pictures),
        "clip_score_scene": (captions, answers.followed.pictures),
        "clip_score_real": (captions, answers.real.pictures),
        "clip_score_shuffled": (captions[2:] + captions[:2], answers.real.pictures),
    }
    assert figures["clip"].keys() == {*sets, "model"}
    for name, pairs in sets.items():
        expected = by_transformers(clip_towards, *pairs)
        assert min(expected) > 0
        assert figures["clip"][name] == pytest.approx(np.mean(expected), abs=1e-4), name
    assert len({figures["clip"][name] for name in sets}) == len(sets)
    assert figures["clip"]["model"] == str(clip_towards)
    text = output.with_suffix(".md").read_text()
    assert f"| clip score real | {figures['clip']['clip_score_real']:.3f} |" in text


class Fixed:
    """Scores pictures by their first byte, in hundredths; even ones below zero."""

    def scores(self, captions, images):
        values = [np.asarray(image)[0, 0, 0] / 100 for image in images]
        return [float(x if round(100 * x) % 2 else -x) for x in values]


def test_each_pair_is_cut_at_zero_before_the_mean(tiny_model):
    case = Case(key="", caption="a dog", jpg=b"", scene_png=b"")
    pictures = [np.full((2, 2, 3), value, np.uint8) for value in (11, 40, 31)]
    examiner = Examiner(tiny_model, None, seed=0, batch=2)
    figures = measure_clip(Fixed(), examiner, [case] * 3, {"_real": Made(pictures=pictures)})
    assert figures["clip_score_real"] == pytest.approx((11 + 0 + 31) / 3)


def test_other_figures_are_the_same_with_and_without_clip(run, clip_folder):
    without, with_clip = run()[1], run(clip=str(clip_folder))[1]
    assert "clip" not in without and with_clip.pop("clip")
    del without["seconds"], with_clip["seconds"]
    assert without == with_clip


def test_the_bar_counts_what_clip_sees(run, clip_folder, monkeypatch):
    bars = []

    class Bar(command.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False})

        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(command, "tqdm", Bar)
    run(clip=str(clip_folder))
    assert bars[0][0] == bars[0][1] == (9 + 2) * COUNT


def test_a_clip_that_is_not_there_is_said_before_anything_is_painted(run, monkeypatch, photos):
    monkeypatch.setattr(Examiner, "paint", lambda *_, **__: pytest.fail("painted"))
    monkeypatch.setattr(Examiner, "look", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(ModelError, match=r"no/such/folder: no such folder with a CLIP"):
        run(clip="no/such/folder")
    with pytest.raises(
        ModelError, match=r"some/clip is not on this machine.*hf download some/clip"
    ):
        run(clip="some/clip")


def test_the_command_line_takes_the_name_and_says_the_score(
    photos, tiny_folder, clip_folder, tmp_path, capsys
):
    words = ["evaluate", "--input", photos, "--model", str(tiny_folder), "--count", "2"]
    words += ["--seeds", "2", "--clip", str(clip_folder), "--output", str(tmp_path / "r.json")]
    assert main(words) == 0
    score = json.loads((tmp_path / "r.json").read_text())["clip"]["clip_score"]
    assert f"CLIP score {score:.1f}" in capsys.readouterr().out
