"""A finished shard whose input has changed: refused or told of, and made again on demand."""

import os
import time

import pytest
from photo_world import photo_sample, preprocess_scenes, tar_bytes, write_photos

from mas.shards import ShardError, read_shard
from preprocess.inputs import find_jobs


def remake(photos, output):
    (output / "00001.stats.json").unlink()
    assert preprocess_scenes(photos, output) == 0


def test_an_input_written_anew_in_the_same_size_is_told_of_and_made_again_on_demand(
    tmp_path, caplog
):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in ("00000", "00001"):
        write_photos(photos / f"{name}.tar", [photo_sample(name, txt=b"a cat")])
    assert (
        preprocess_scenes(photos, output) == 0
        and preprocess_scenes(photos, output) == 0
        and not caplog.messages
    )
    write_photos(photos / "00001.tar", [photo_sample("00001", txt=b"a dog")])
    before = tar_bytes(output)
    assert preprocess_scenes(photos, output) == 0 and tar_bytes(output) == before
    (told,) = caplog.messages
    assert told.startswith("1 finished shards have an input that was written after they were made")
    assert "the first is 00001" in told and "remove 00001.stats.json" in told
    remake(photos, output)
    assert not caplog.messages[1:]
    (sample,) = read_shard(str(output / "00001.tar"))
    assert sample.files["txt"] == b"a dog"
    assert tar_bytes(output)["00000.tar"] == before["00000.tar"]


def test_each_input_that_was_written_later_is_told_of_once(tmp_path, caplog):
    """A folder that was copied after its run would otherwise be told of at each run for ever."""
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    names = [f"0000{i}" for i in range(3)]
    for name in names:
        write_photos(photos / f"{name}.tar", [photo_sample(name)])
    assert preprocess_scenes(photos, output) == 0
    before, now = tar_bytes(output), time.time()

    def told_of(*changed):
        """Touches these shards and runs twice: the first shard that the one line names."""
        caplog.clear()
        for name in changed:
            os.utime(photos / f"{name}.tar", (now + 60, now + 60 + len(told)))
        assert preprocess_scenes(photos, output) == 0 and preprocess_scenes(photos, output) == 0
        (line,) = caplog.messages
        told.append(line.split(" finished")[0] + line.partition("first is")[2][:6])

    told = []
    told_of("00000", "00001")
    told_of("00002")
    told_of("00001")
    assert told == ["2 00000", "1 00002", "1 00001"] and tar_bytes(output) == before


def test_an_input_of_another_size_is_refused_until_its_shard_may_be_made_again(tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in ("00000", "00001"):
        write_photos(photos / f"{name}.tar", [photo_sample(name)])
    assert preprocess_scenes(photos, output) == 0
    write_photos(photos / "00001.tar", [photo_sample("00001"), photo_sample("more")])
    with pytest.raises(ShardError, match=r"00001\.stats\.json: .* remove this file"):
        preprocess_scenes(photos, output)
    remake(photos, output)
    assert [sample.key for sample in read_shard(str(output / "00001.tar"))] == ["00001", "more"]


def test_a_tar_that_grows_during_the_run_fails_and_is_made_when_it_is_whole(
    tmp_path, monkeypatch, capsys
):
    """Its shard would bear the fingerprint of less than it holds, and the next run be refused."""
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in ("00000", "00001"):
        write_photos(photos / f"{name}.tar", [photo_sample(name)])

    def list_and_grow(*arguments, **options):
        jobs = find_jobs(*arguments, **options)
        write_photos(photos / "00001.tar", [photo_sample("00001"), photo_sample("more")])
        return jobs

    with monkeypatch.context() as patch:
        patch.setattr("preprocess.run.find_jobs", list_and_grow)
        assert preprocess_scenes(photos, output) == 1
    printed = capsys.readouterr().out
    assert "failed: 00001:" in printed and "bytes when the run began" in printed
    assert sorted(tar_bytes(output)) == ["00000.tar"]
    assert preprocess_scenes(photos, output, retry_failed=True) == 0
    assert [sample.key for sample in read_shard(str(output / "00001.tar"))] == ["00001", "more"]
    assert preprocess_scenes(photos, output) == 0


def test_a_caption_that_is_edited_during_the_run_fails_its_shard_alone(
    tmp_path, monkeypatch, capsys
):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for key in "abc":
        for ending, content in photo_sample(key).files.items():
            (photos / f"{key}.{ending}").write_bytes(content)

    def list_and_edit(*arguments, **options):
        jobs = find_jobs(*arguments, **options)
        (photos / "b.txt").write_bytes(b"a caption of another length")
        return jobs

    with monkeypatch.context() as patch:
        patch.setattr("preprocess.run.find_jobs", list_and_edit)
        assert preprocess_scenes(photos, output, samples_per_shard=1) == 1
    assert "photos: b to b: had " in capsys.readouterr().out
    assert sorted(tar_bytes(output)) == ["00000.tar", "00002.tar"]
    options = {"samples_per_shard": 1, "retry_failed": True}
    assert preprocess_scenes(photos, output, **options) == 0
    (sample,) = read_shard(str(output / "00001.tar"))
    assert sample.files["txt"] == b"a caption of another length"
    assert preprocess_scenes(photos, output, samples_per_shard=1) == 0
