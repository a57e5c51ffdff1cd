"""What was rejected is mended, its input with it: --retry-rejected makes the shard again, whole."""

import json

import pytest
from photo_world import photo_sample, preprocess_scenes, tar_bytes, write_photos

from mas.shards import ShardError, read_shard

CUT = 2  # samples a shard of loose files


class Folder:
    """Six photos as loose files; of three shards the second rejects its samples, the third one."""

    def __init__(self, folder):
        self.photos, self.output = folder / "photos", folder / "out"
        self.photos.mkdir()
        self.samples = {key: photo_sample(key, seed=ord(key)).files for key in "abcdef"}
        for key in self.samples:
            self.put(key)
        (self.photos / "c.panoptic.png").unlink()  # which is a passing reason
        (self.photos / "d.jpg").write_bytes(self.samples["d"]["jpg"][:500])  # which is none
        (self.photos / "f.txt").unlink()

    def put(self, key, *endings):
        for ending in endings or self.samples[key]:
            (self.photos / f"{key}.{ending}").write_bytes(self.samples[key][ending])

    def run(self, output=None, **options):
        options = {"samples_per_shard": CUT, **options}
        return preprocess_scenes(self.photos, output or self.output, **options)

    def assert_as_if_new(self):
        fresh = self.output.parent / "fresh"
        assert self.run(fresh) == 0 and tar_bytes(self.output) == tar_bytes(fresh)
        for path in fresh.glob("*.rejects.jsonl"):
            assert (self.output / path.name).read_bytes() == path.read_bytes()

    def contents(self):
        return {path.name: path.read_bytes() for path in self.output.glob("0*")}


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_files_that_were_mended_or_added_are_taken(folder, caplog):
    assert folder.run() == 0
    first = (folder.output / "00000.stats.json").stat().st_mtime_ns
    reasons = [
        json.loads(line)["reason"]
        for path in sorted(folder.output.glob("*.rejects.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert reasons == ["no_annotation", "broken_photo", "no_caption"]
    for key in "cdf":
        folder.put(key)
    caplog.clear()
    with pytest.raises(ShardError, match=r"00001\.stats\.json: .* add --retry-rejected if what it"):
        folder.run()
    assert folder.run(retry_rejected=True) == 0
    assert [s.key for s in read_shard(str(folder.output / "00001.tar"))] == ["c", "d"]
    assert (folder.output / "00000.stats.json").stat().st_mtime_ns == first
    folder.assert_as_if_new()
    assert folder.run(retry_rejected=True) == 0 and not caplog.messages


def test_one_that_is_mended_while_another_one_is_not_changes_nothing_else(folder):
    folder.run()
    folder.put("d")
    (folder.photos / "e.txt").write_text("another caption of a sample that was kept")
    assert folder.run(retry_rejected=True) == 0
    folder.assert_as_if_new()


def test_the_photo_of_a_caption_is_taken_where_it_moves_no_other_one(folder):
    (folder.photos / "g.txt").write_text("a caption whose photo comes late")
    options = {"samples_per_shard": 10}
    folder.run(**options)
    folder.samples["g"] = {"jpg": folder.samples["a"]["jpg"]} | folder.samples["f"]
    folder.put("g")
    assert folder.run(retry_rejected=True, **options) == 0
    assert [s.key for s in read_shard(str(folder.output / "00000.tar"))] == [*"abeg"]


@pytest.mark.parametrize(
    ("change", "per_shard", "said"),
    [
        ("add", CUT, "here bb is new in it"),
        ("remove", CUT, "here e is not in it any more"),
        ("cut", CUT + 1, "here c is new in it"),
    ],
)
def test_samples_that_would_move_or_go_are_refused(folder, change, per_shard, said):
    """One might come to lie in two shards, or in none."""
    (folder.photos / "a.txt").unlink()
    folder.run()
    before = folder.contents()
    if change == "remove":
        for path in folder.photos.glob("e.*"):
            path.unlink()
    elif change == "add":
        for ending, content in folder.samples["a"].items():
            (folder.photos / f"bb.{ending}").write_bytes(content)
    with pytest.raises(ShardError, match=said) as caught:
        folder.run(retry_rejected=True, samples_per_shard=per_shard)
    assert "a folder of its own" in str(caught.value) and folder.contents() == before


def test_a_shard_that_would_lose_a_sample_is_left_as_it_was(folder, capsys):
    folder.run()
    before = folder.contents()
    folder.put("f")
    (folder.photos / "e.jpg").write_bytes(b"no photo any more")
    assert folder.run(retry_rejected=True) == 1
    printed = capsys.readouterr().out
    assert "e is in the shard that was made before and would be lost (unknown_format" in printed
    after = folder.contents()
    assert all(after[name] == before[name] for name in before if name.startswith("00002."))
    folder.put("e")
    assert folder.run(retry_rejected=True) == 0
    folder.assert_as_if_new()
    assert "00002.error.json" not in folder.contents()


@pytest.mark.parametrize("moment", ["rejects", "stats"])
def test_a_try_that_is_cut_is_made_whole_by_the_next_run(folder, monkeypatch, moment):
    def cut(*_, **__):
        raise KeyboardInterrupt

    folder.run()
    folder.put("d")
    target = {"rejects": "preprocess.worker.write_file", "stats": "preprocess.tally.Tally.stats"}
    with monkeypatch.context() as patch:
        patch.setattr(target[moment], cut)
        with pytest.raises(KeyboardInterrupt):
            folder.run(retry_rejected=True)
    assert folder.run() == 0
    folder.assert_as_if_new()


def test_a_tar_may_be_written_anew_with_what_it_lacked(tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    samples = [photo_sample(key, seed=ord(key), width=200, height=150) for key in "abc"]
    lacking = [samples[0], photo_sample("b", jpg=None), samples[2]]
    write_photos(photos / "0.tar", lacking)
    assert preprocess_scenes(photos, output) == 0
    write_photos(photos / "0.tar", samples)
    assert preprocess_scenes(photos, output, retry_rejected=True) == 0
    assert preprocess_scenes(photos, tmp_path / "fresh") == 0
    assert tar_bytes(output) == tar_bytes(tmp_path / "fresh")
