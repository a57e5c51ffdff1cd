"""An output that can only be read: a finished one is told of, one with work left is an error."""

import errno
import os

import pytest
from photo_world import make_shards, photo_sample, preprocess_scenes, write_photos

from preprocess.run_folder import RunFolder


@pytest.fixture
def photos(tmp_path):
    return make_shards(tmp_path / "photos", shards=2, photos=2)


@pytest.fixture(params=[errno.EROFS, errno.EACCES], ids=["disk", "rights"])
def freeze(request, monkeypatch):
    """Makes everything read-only, as a mount or the rights of a folder do."""

    def refuse(path, *_, **__):
        raise OSError(request.param, os.strerror(request.param), path)

    def open_to_read(path, mode="r", *arguments, **options):
        return open(path, mode, *arguments, **options) if mode in ("r", "rb") else refuse(path)

    def freeze():
        for module in ("preprocess.run_folder", "mas.shard_files"):
            monkeypatch.setattr(f"{module}.open", open_to_read, raising=False)
        for name in ("remove", "rename", "replace", "mkdir"):
            monkeypatch.setattr(os, name, refuse)

    return freeze


def test_a_finished_run_says_so(photos, tmp_path, freeze, capsys):
    output = tmp_path / "out"
    assert preprocess_scenes(photos, output) == 0
    said = capsys.readouterr().out.splitlines()[1:]
    freeze()
    assert preprocess_scenes(photos, output) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[0].startswith("0 of 2 shards done, 2 were done before, 0 failed")
    assert again[1:] == said


def test_shards_that_failed_are_named_again(photos, tmp_path, freeze, capsys):
    (photos / "00001.tar").write_bytes(b"no tar")
    assert preprocess_scenes(photos, tmp_path / "out") == 1
    freeze()
    assert preprocess_scenes(photos, tmp_path / "out") == 1
    assert "failed: 00001: " in capsys.readouterr().out


def test_work_that_is_left_is_told_of_in_one_line(photos, tmp_path, freeze):
    output = tmp_path / "out"
    assert preprocess_scenes(photos, output) == 0
    write_photos(photos / "00002.tar", [photo_sample("more")])
    (output / "lock.json").write_text('{"updated": 0, "host": "gone", "pid": 1}')
    freeze()
    with pytest.raises(OSError) as caught:
        preprocess_scenes(photos, output)
    assert str(caught.value).startswith(f"{output}: cannot be written to (")
    assert "1 of 3 shards are still to be made" in str(caught.value)


def test_an_output_that_cannot_be_made_is_told_of_in_one_line(photos, tmp_path, freeze):
    freeze()
    with pytest.raises(OSError, match=r"out: cannot be written to .* 2 of 2 shards are still"):
        preprocess_scenes(photos, tmp_path / "out")


def test_a_finished_run_writes_nothing_but_when_it_was_asked(photos, tmp_path):
    output = tmp_path / "out"
    preprocess_scenes(photos, output)
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    preprocess_scenes(photos, output)
    after = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {"run.json"}
    assert after.keys() == before.keys()


@pytest.mark.parametrize("left", ["cut {", '{"shards": 5}'])
def test_a_last_word_that_is_wrong_is_written_anew(photos, tmp_path, left):
    output = tmp_path / "out"
    preprocess_scenes(photos, output)
    right = (output / "summary.json").read_bytes()
    (output / "summary.json").write_text(left)
    (output / "classes.png").unlink()
    assert preprocess_scenes(photos, output) == 0
    assert (output / "summary.json").read_bytes() == right and (output / "classes.png").exists()


def test_what_breaks_within_a_run_is_not_taken_for_its_start(tmp_path):
    def end():
        raise OSError(errno.EROFS, "Read-only file system")

    with pytest.raises(OSError, match=r"^\[Errno 30\] Read-only file system$"):
        with RunFolder(str(tmp_path / "out")).prepared("count", {}, shards=1):
            end()
