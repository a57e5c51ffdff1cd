import json

import fsspec
import pytest
from photo_world import make_shards, photo_sample, write_photos
from PIL import Image

from mas.shards import Sample
from preprocess.inspect import choose, inspect
from preprocess.photo import PhotoConfig
from preprocess.run import PreprocessConfig, preprocess
from preprocess.segment import FaceConfig, HumanConfig


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    preprocess(
        PreprocessConfig(
            input=str(make_shards(folder / "photos", shards=3, photos=5)),
            output=str(folder / "out"),
            photo=PhotoConfig(size=32, min_side=16),
            human=HumanConfig(source="none"),
            face=FaceConfig(source="none"),
            executor="serial",
        )
    )
    return folder / "out"


def test_the_sheet_has_a_row_a_sample_and_the_histogram_adds_up(scenes, tmp_path, capsys):
    sizes = {}
    for count in (2, 4):
        inspect(str(scenes), output=str(tmp_path / "s.png"), count=count, as_json=True)
        report = json.loads(capsys.readouterr().out)
        assert report["samples"] == count
        shares = sum(entry["share"] for entry in report["classes"].values())
        assert abs(shares + report["void"] - 1) < 0.01
        sizes[count] = Image.open(tmp_path / "s.png").size
    assert sizes[2][0] == sizes[4][0] and sizes[4][1] > 1.8 * sizes[2][1]


def test_the_table_names_the_classes(scenes, tmp_path, capsys):
    inspect(str(scenes / "00000.tar"), output=str(tmp_path / "s.png"))
    printed = capsys.readouterr().out
    assert printed.startswith("5 samples") and "sky-other-merged" in printed


def test_the_folder_of_the_sheet_is_made(scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for output in (f"{tmp_path}/some/new/s.png", "another/s.png", "s.png", "memory://new/s.png"):
        inspect(str(scenes), output=output, count=1)
        assert fsspec.open(output).fs.exists(output)
    assert not (tmp_path / "memory:").exists()


def test_samples_are_spread_over_the_shards(scenes):
    paths = [str(path) for path in sorted(scenes.glob("*.tar"))]
    keys = [sample.key for sample in choose(paths, 3)]
    assert [key[:5] for key in keys] == ["00000", "00001", "00002"]
    assert len(list(choose(paths, 100))) == 15


def test_remote_shards_give_the_same_sheet_and_only_a_few_are_copied(scenes, tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    for path in scenes.glob("*.tar"):
        memory.pipe(f"/inspected/{path.name}", path.read_bytes())
    inspect("memory://inspected", output=str(tmp_path / "remote.png"), count=3)
    inspect(str(scenes), output=str(tmp_path / "local.png"), count=3)
    assert (tmp_path / "remote.png").read_bytes() == (tmp_path / "local.png").read_bytes()
    monkeypatch.setattr("preprocess.inspect.REMOTE_SHARDS", 1)
    paths = [f"memory://inspected/{i:05d}.tar" for i in range(3)]
    assert {sample.key[:5] for sample in choose(paths, 9)} == {"00000"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"jpg": b"x"}, "mas preprocess"),
        ({"jpg": b"x", "scene.png": b"x", "txt": b"", "json": b"{}"}, "x"),
        (None, "no samples"),
    ],
)
def test_what_is_no_scene_shard_is_named(tmp_path, files, words):
    path = write_photos(tmp_path / "0.tar", [] if files is None else [Sample("key-x", files)])
    with pytest.raises(ValueError, match=words):
        inspect(path, output=str(tmp_path / "s.png"))
    assert not (tmp_path / "s.png").exists()


def test_a_broken_shard_is_not_taken_for_one_of_another_kind(scenes, tmp_path):
    content = next(scenes.glob("*.tar")).read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[:5000])
    with pytest.raises(ValueError, match=r"cut\.tar: truncated") as caught:
        inspect(str(tmp_path / "cut.tar"), output=str(tmp_path / "s.png"))
    assert "mas preprocess" not in str(caught.value)


def test_wrong_flags_are_named(scenes, tmp_path):
    with pytest.raises(ValueError, match="--count"):
        inspect(str(scenes), output=str(tmp_path / "s.png"), count=0)
    with pytest.raises(ValueError, match=r"\.png"):
        inspect(str(scenes), output=str(tmp_path / "s.jpg"))


def test_remote_shards_of_one_name_are_not_taken_for_one_another(tmp_path):
    paths = [f"memory://one-name/{key}/00000.tar" for key in "ab"]
    for key, path in zip("ab", paths, strict=True):
        local = write_photos(tmp_path / "00000.tar", [photo_sample(key, **{"scene.png": b""})])
        fsspec.filesystem("memory").put_file(local, path)
    assert [sample.key for sample in choose(paths, 2)] == ["a", "b"]
