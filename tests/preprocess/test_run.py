import json
import os
import signal
import subprocess
import sys
import time

import pytest
from photo_world import (
    blocks,
    colour_of,
    encode,
    make_shards,
    panoptic_files,
    photo_sample,
    tar_bytes,
    write_photos,
)
from PIL import Image

from mas.shards import ShardError, read_shard
from preprocess.inputs import find_jobs
from preprocess.photo import PhotoConfig
from preprocess.run import PreprocessConfig, preprocess
from preprocess.segment import FaceConfig, HumanConfig, PanopticConfig

SETTINGS = {
    "photo": PhotoConfig(size=48, min_side=16),
    "human": HumanConfig(source="none"),
    "face": FaceConfig(source="none"),
}


def run(input, output, **options):
    settings = {**SETTINGS, "executor": "serial", **options}
    return preprocess(PreprocessConfig(input=str(input), output=str(output), **settings))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("photos") / "shards", shards=4, photos=6)


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """The tars of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run(shards, output) == 0
    return tar_bytes(output)


def leftovers(folder):
    return [p.name for p in folder.iterdir() if p.name.endswith(".tmp") or ".running." in p.name]


@pytest.mark.parametrize("executor", ["serial", "ray"])
def test_the_executor_does_not_change_a_byte(shards, undisturbed, tmp_path, executor, request):
    if executor == "ray":
        request.getfixturevalue("local_ray")
    output = tmp_path / "out"
    assert run(shards, output, executor=executor, workers=2, batch_size=5, threads=2) == 0
    assert tar_bytes(output) == undisturbed and not leftovers(output)
    for name in undisturbed:
        keys = [sample.key for sample in read_shard(str(output / name))]
        assert keys == [sample.key for sample in read_shard(str(shards / name))]


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path):
    photos = make_shards(tmp_path / "photos", shards=5, photos=40, width=480, height=320)
    output, whole = tmp_path / "out", tmp_path / "whole"
    command = [sys.executable, "-m", "mas", "preprocess", "--executor", "serial"]
    command += ["--photo.size", "48", "--photo.min-side", "16"]
    command += ["--human.source", "none", "--face.source", "none"]
    command += ["--input", str(photos), "--output"]
    process = subprocess.Popen([*command, str(output)], stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not (output / "00001.running.json").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {path.name for path in output.glob("*.stats.json")}
    assert "00000.stats.json" in done and len(done) < 5 and leftovers(output)

    subprocess.run([*command, str(output)], check=True, capture_output=True)
    assert run(photos, whole) == 0
    assert tar_bytes(output) == tar_bytes(whole) and not leftovers(output)


@pytest.mark.parametrize("executor", ["serial", "ray"])
def test_a_run_that_is_terminated_ends_in_order(tmp_path, executor):
    photos = make_shards(tmp_path / "photos", shards=8, photos=40, width=480, height=320)
    output = tmp_path / "out"
    command = [sys.executable, "-m", "mas", "preprocess", "--executor", executor, "--workers", "1"]
    command += ["--photo.size", "48", "--photo.min-side", "16", "--human.source", "none"]
    command += ["--face.source", "none", "--input", str(photos), "--output", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not (output / "00001.running.json").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.001)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on" in said.splitlines()[-1] and "Traceback" not in said
    assert "SIGTERM received" not in said
    names = {path.name for path in output.iterdir()}
    assert "00000.stats.json" in names and "00007.stats.json" not in names
    assert not {"lock.json", "progress.json"} & names and not leftovers(output)


def test_a_local_run_joins_no_cluster_unasked(shards, undisturbed, tmp_path):
    command = [sys.executable, "-m", "mas", "preprocess", "--workers", "1", "--input", str(shards)]
    command += ["--photo.size", "48", "--photo.min-side", "16", "--output", str(tmp_path / "out")]
    command += ["--human.source", "none", "--face.source", "none"]
    elsewhere = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    subprocess.run(command, check=True, capture_output=True, env=elsewhere, timeout=60)
    assert tar_bytes(tmp_path / "out") == undisturbed


@pytest.mark.parametrize(
    ("address", "said"),
    [("127.0.0.1:1", "no Ray cluster answers"), ("ray://head:10001", "give auto, or HOST:PORT")],
)
def test_a_cluster_that_cannot_be_joined_is_named_at_once(shards, tmp_path, address, said):
    command = [sys.executable, "-m", "mas", "preprocess", "--address", address]
    command += ["--input", str(shards), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("mas: error: ") and said in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("note", "variables", "said"),
    [
        (None, {}, "`ray start` was not called on this machine"),
        ("127.0.0.1:1", {}, "no Ray cluster answers at 127.0.0.1:1"),
        ("127.0.0.1:1", {"RAY_ADDRESS": "127.0.0.1:2"}, "no Ray cluster answers at 127.0.0.1:2"),
    ],
)
def test_auto_joins_what_ray_start_has_started_and_nothing_else(
    tmp_path, monkeypatch, note, variables, said
):
    from preprocess import ray_start

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if note:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"{note}\n")
    with pytest.raises(OSError, match=said):
        ray_start._find_cluster("auto")


def test_a_truncated_tar_fails_alone_and_can_be_mended(shards, undisturbed, tmp_path, capsys):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for path in shards.iterdir():
        (photos / path.name).write_bytes(path.read_bytes())
    os.truncate(photos / "00002.tar", 5000)
    assert run(photos, output) == 1
    printed = capsys.readouterr().out
    assert "00002.tar: truncated" in printed and "--retry-failed" in printed
    assert tar_bytes(output).keys() == undisturbed.keys() - {"00002.tar"}
    assert not leftovers(output)
    (photos / "00002.tar").write_bytes((shards / "00002.tar").read_bytes())
    assert run(photos, output, retry_failed=True) == 0
    assert tar_bytes(output) == undisturbed


@pytest.mark.parametrize("executor", ["serial", "ray"])
def test_failed_shards_are_named_while_the_run_goes_on(tmp_path, caplog, executor, request):
    if executor == "ray":
        request.getfixturevalue("local_ray")
    write_photos(tmp_path / "00000.tar", [photo_sample("a")])
    (tmp_path / "00001.tar").write_bytes(b"no tar")
    assert run(tmp_path, tmp_path / "out", executor=executor) == 1
    own = [record for record in caplog.records if record.name.startswith("preprocess")]
    (message,) = [record.getMessage() for record in own]  # Ray may have something to say as well
    assert message.startswith("shard 00001 failed: ") and "00001.tar: truncated" in message


def test_a_run_that_keeps_nothing_fails_and_says_why(tmp_path):
    bad = [photo_sample(key, jpg=b"") for key in "abc"] + [photo_sample("d", txt=None)]
    write_photos(tmp_path / "00000.tar", bad)
    said = r"not one of 4 samples could be used: unknown_format 3, no_caption 1; .*out/\*\.rejects"
    for _ in range(2):  # the second run finds all shards done
        with pytest.raises(ValueError, match=said):
            run(tmp_path / "00000.tar", tmp_path / "out")
    assert json.loads((tmp_path / "out/summary.json").read_text())["photos_out"] == 0


def test_photos_without_annotations_are_told_of_the_networks(tmp_path):
    plain = {end: None for end in ("panoptic.png", "segments.json")}
    write_photos(tmp_path / "00000.tar", [photo_sample("a", **plain)])
    with pytest.raises(ValueError, match=r"no_annotation 1; .*cc12m\.yaml"):
        run(tmp_path / "00000.tar", tmp_path / "out")


def test_the_summary_counts_photos_rejects_and_classes(tmp_path, capsys):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    samples = [photo_sample("a"), photo_sample("b", jpg=b""), photo_sample("c", txt=None)]
    write_photos(photos / "00000.tar", samples)
    assert run(photos, output) == 0
    printed = capsys.readouterr().out
    assert "3 photos in, 1 out, 2 rejected: " in printed
    assert "unknown_format 1" in printed and "no_caption 1" in printed
    summary = json.loads((output / "summary.json").read_text())
    assert summary["classes"]["sky-other-merged"]["photos"] == 1
    stats = json.loads((output / "00000.stats.json").read_text())
    assert stats["photos_in"] == 3 and stats["settings"] and stats["versions"]["pillow"]


def test_urls_are_read_and_written(shards, undisturbed):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(f"{shards}/", "/cloud/in/", recursive=True)
    assert run("memory://cloud/in", "memory://cloud/out") == 0
    assert run("memory://cloud/in", "memory://cloud/out") == 0  # nothing to do
    written = {n.rpartition("/")[2]: memory.cat(n) for n in memory.glob("/cloud/out/*.tar")}
    assert written == undisturbed
    assert not [n for n in memory.ls("/cloud/out", False) if "running" in n]


def test_a_folder_of_images_may_be_a_url(tmp_path):
    import fsspec

    write_folder(tmp_path / "images", ["b.jpg", "sub/a.png"])
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/images/", "/album/", recursive=True)
    assert run("memory://album", "memory://labelled") == 0
    assert run(tmp_path / "images", tmp_path / "out") == 0
    assert memory.cat("/labelled/00000.tar") == (tmp_path / "out" / "00000.tar").read_bytes()
    assert {"classes.png", "summary.json"} <= {
        n.rpartition("/")[2] for n in memory.find("labelled")
    }


def test_a_broken_shard_at_a_url_is_set_aside_and_tried_again(shards, undisturbed):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(f"{shards}/", "/mended/in/", recursive=True)
    whole = memory.cat("/mended/in/00001.tar")
    memory.pipe("/mended/in/00001.tar", whole[:5000] + bytes(len(whole) - 5000))
    assert run("memory://mended/in", "memory://mended/out") == 1
    memory.pipe("/mended/in/00001.tar", whole)
    assert run("memory://mended/in", "memory://mended/out") == 1
    assert run("memory://mended/in", "memory://mended/out", retry_failed=True) == 0
    written = {n.rpartition("/")[2]: memory.cat(n) for n in memory.glob("/mended/out/*.tar")}
    assert written == undisturbed


def test_other_settings_are_refused_by_name(shards, tmp_path):
    run(shards, tmp_path / "out")
    with pytest.raises(ValueError, match=r"photo\.quality is 95 there and 80 here"):
        run(shards, tmp_path / "out", photo=PhotoConfig(size=48, min_side=16, quality=80))


def test_workers_in_another_folder_find_what_the_config_names(tmp_path, monkeypatch):
    from preprocess.run import settings_of, with_absolute_paths
    from preprocess.worker import SceneConfig

    monkeypatch.chdir(tmp_path)
    for name in ("net.pth", "schp-lip"):
        (tmp_path / name).touch()
    given = SceneConfig(
        panoptic=PanopticConfig(json="panoptic.json", folder="memory://bucket/pngs"),
        human=HumanConfig(source="schp", options={"weights": "schp-lip"}),  # a known name
        face=FaceConfig(options={"weights": "net.pth", "batch": 3}),
    )
    config = with_absolute_paths(given)
    assert config.panoptic.json == str(tmp_path / "panoptic.json")
    assert config.panoptic.folder == "memory://bucket/pngs"
    assert config.human.options == {"weights": "schp-lip"}
    assert config.face.options == {"weights": str(tmp_path / "net.pth"), "batch": 3}
    assert with_absolute_paths(SceneConfig()) == SceneConfig()
    assert settings_of(given)["panoptic"]["json"] == "panoptic.json"


def test_where_a_network_runs_is_no_setting():
    from preprocess.run import settings_of
    from preprocess.worker import SceneConfig

    here, there = (
        settings_of(
            SceneConfig(panoptic=PanopticConfig(source="mask2former", options={"device": device}))
        )
        for device in ("cpu", "cuda")
    )
    assert here == there


def test_a_missing_remote_folder_of_shards_is_named(tmp_path):
    with pytest.raises(ShardError, match=r"10 of 10 shards do not exist"):
        run("memory://nowhere/{00000..00009}.tar", tmp_path / "out")


@pytest.mark.parametrize("input", ["nothing-here", "empty", "{00000..00009}.tar"])
def test_a_missing_input_leaves_no_output(tmp_path, input):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=input.partition(".")[0].replace("{", r"\{")):
        run(tmp_path / input, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_input_folder_is_never_written_to(shards, undisturbed):
    before = tar_bytes(shards)
    with pytest.raises(ValueError, match="something else"):
        run(shards, shards)
    assert tar_bytes(shards) == before


def write_folder(folder, names):
    for number, name in enumerate(names):
        ids, categories = blocks(96, 64, seed=number)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        format = {"jpg": "JPEG", "JPG": "JPEG", "png": "PNG", "webp": "WEBP"}[path.suffix[1:]]
        path.write_bytes(encode(Image.fromarray(colour_of(ids)), format))
        path.with_suffix(".txt").write_text(f"picture {name}")
        for ending, content in panoptic_files(ids, categories).items():
            path.with_suffix(f".{ending}").write_bytes(content)


def test_a_folder_of_images_becomes_shards(tmp_path):
    names = ["b.jpg", "a.png", "sub/c.webp", "sub/d.JPG", "v1.5 final.jpg"]
    write_folder(tmp_path / "images", names)
    (tmp_path / "images" / "notes.txt").write_text("no picture of this name")
    assert run(tmp_path / "images", tmp_path / "out", samples_per_shard=2) == 0
    keys = [
        [sample.key for sample in read_shard(str(path))]
        for path in sorted((tmp_path / "out").glob("*.tar"))
    ]
    assert keys == [["a", "b"], ["sub/c", "sub/d"], ["v1_5 final"]]
    first = next(read_shard(str(tmp_path / "out" / "00000.tar")))
    assert first.files["txt"] == b"picture a.png"
    with pytest.raises(ValueError, match="another input"):  # a new file moves the others
        write_folder(tmp_path / "images", ["0.jpg"])
        run(tmp_path / "images", tmp_path / "out", samples_per_shard=2)


@pytest.mark.parametrize("output", ["images", "images/out", "images/deep/out"])
def test_an_output_among_the_pictures_is_refused(tmp_path, output):
    """Its classes.png would be a picture of the next run."""
    write_folder(tmp_path / "images", ["a.jpg"])
    with pytest.raises(ValueError, match="lies in --input"):
        run(tmp_path / "images", tmp_path / output)
    assert run(tmp_path / "images", tmp_path / "images-out") == 0


def test_coco_as_it_is_downloaded_becomes_shards(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "panoptic").mkdir()
    images, sentences, annotations = [], [], []
    for number in (7, 3, 5):
        sample = photo_sample(f"{number:012d}", seed=number)
        name = f"{number:012d}"
        if number != 5:  # one photo was not downloaded
            (tmp_path / "images" / f"{name}.jpg").write_bytes(sample.files["jpg"])
        (tmp_path / "panoptic" / f"{name}.png").write_bytes(sample.files["panoptic.png"])
        images.append({"id": number, "file_name": f"{name}.jpg", "width": 96, "license": 4})
        info = json.loads(sample.files["segments.json"])["segments_info"]
        annotations.append({"image_id": number, "file_name": f"{name}.png", "segments_info": info})
        for i in (1, 0):
            caption = f"caption {i} of {number} "
            sentences.append({"id": 10 * number + i, "image_id": number, "caption": caption})
    captions, panoptic = tmp_path / "captions.json", tmp_path / "panoptic.json"
    captions.write_text(json.dumps({"images": images, "annotations": sentences}))
    panoptic.write_text(json.dumps({"annotations": annotations}))
    status = run(
        tmp_path / "images",
        tmp_path / "out",
        captions=str(captions),
        panoptic=PanopticConfig(
            source="coco-annotations", json=str(panoptic), folder=str(tmp_path / "panoptic")
        ),
    )
    assert status == 0
    three, seven = read_shard(str(tmp_path / "out" / "00000.tar"))
    fields = json.loads(three.files["json"])
    assert fields["captions"] == ["caption 0 of 3", "caption 1 of 3"]
    assert (fields["image_id"], fields["license"]) == (3, 4)
    assert three.files["txt"] == b"caption 0 of 3" and seven.key == "000000000007"
    reject = json.loads((tmp_path / "out" / "00000.rejects.jsonl").read_text())
    assert (reject["key"], reject["reason"]) == ("000000000005", "no_photo")


@pytest.mark.parametrize("content", ["{", "[]", '{"images": []}', '{"images": [{}]}'])
def test_what_is_no_captions_json_is_named(tmp_path, content):
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(ValueError, match=r"captions\.json: not COCO"):
        find_jobs(str(tmp_path), captions=str(tmp_path / "captions.json"))


def test_two_shards_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        make_shards(tmp_path / folder, shards=1, photos=1)
    said = r"several shards are called 00000\.tar, as .*/a/00000\.tar and .*/b/00000\.tar"
    with pytest.raises(ValueError, match=said):
        find_jobs(f"{tmp_path}/*/*.tar")
