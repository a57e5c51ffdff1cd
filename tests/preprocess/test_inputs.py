"""Loose files as shard jobs: every file that is no sample is told of, and costs no other one."""

import errno
import json
import logging
import os
import time
from datetime import UTC, datetime

import pytest
from photo_world import photo_sample, write_photos

from mas.shards import ShardError, read_shard
from preprocess.inputs import FilesSource, TarSource, find_jobs


def fill(folder, *names):
    """Files that hold their own names; a name may be bytes."""
    for name in names:
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(os.fsencode(name))
    return str(folder)


def read(jobs):
    """Keys with what was kept of each, and the rejects, of all jobs."""
    samples, rejects = [], []
    for job in jobs:
        samples += job.source.read(on_reject=lambda *reject: rejects.append(reject))
    return {sample.key: sample.files for sample in samples}, rejects


@pytest.mark.parametrize(
    ("names", "key"),
    [
        (["a.jpg", "a.png"], "a"),
        (["a.JPG", "a.jpg"], "a"),
        (["v1.6.jpg", "v1_6.jpg"], "v1_6"),
        (["sub/a.b.webp", "sub/a_b.gif"], "sub/a_b"),
    ],
)
def test_of_photos_that_share_a_key_the_first_is_kept_and_both_are_named(tmp_path, names, key):
    samples, rejects = read(find_jobs(fill(tmp_path, *names, "other.jpg")))
    first, second = names
    assert samples.keys() == {key, "other"}
    assert list(samples[key].values()) == [first.encode()]
    ((told, reason, detail),) = rejects
    assert (told, reason) == (key, "duplicate_key") and first in detail and second in detail


def test_each_photo_keeps_the_caption_of_its_own_name(tmp_path):
    names = ["v1.6.jpg", "v1.6.txt", "v1_6.jpg", "v1_6.txt", "b.png", "b.txt", "b.TXT"]
    samples, rejects = read(find_jobs(fill(tmp_path, *names)))
    assert samples["v1_6"] == {"jpg": b"v1.6.jpg", "txt": b"v1.6.txt"}
    assert samples["b"] == {"png": b"b.png", "txt": b"b.TXT"}
    assert [(key, reason) for key, reason, _ in rejects] == [
        ("b", "duplicate_key"),
        ("v1_6", "duplicate_key"),
        ("v1_6", "duplicate_key"),
    ]


def test_a_caption_without_photo_is_told_with_what_lies_beside_it(tmp_path):
    names = ["a.heic", "a.txt", "a.json", "b.tif", "b.txt", "README.txt", "photo.jpg", "photo.heic"]
    samples, rejects = read(find_jobs(fill(tmp_path, *names, "notes.pdf", "LICENSE")))
    assert samples.keys() == {"photo"}
    assert [(key, reason) for key, reason, _ in rejects] == [
        ("README", "no_photo"),
        ("a", "no_photo"),
        ("b", "no_photo"),
    ]
    assert all(word in rejects[1][2] for word in ("heic", "txt", "json"))
    assert "tif" in rejects[2][2]


def test_a_file_of_another_size_makes_another_input(tmp_path):
    fill(tmp_path, "a.jpg", "a.txt", "b.jpg", "b.txt", "c.jpg", "c.txt")
    before = [job.fingerprint for job in find_jobs(str(tmp_path), samples_per_shard=1)]
    (tmp_path / "b.txt").write_text("a mended caption")
    after = [job.fingerprint for job in find_jobs(str(tmp_path), samples_per_shard=1)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_what_is_no_sample_does_not_move_the_others(tmp_path):
    """Each is told of in the shard it would have been in."""
    fill(tmp_path, "b.jpg", "d.jpg", "f.jpg")
    before = find_jobs(str(tmp_path), samples_per_shard=2)
    fill(tmp_path, "a.txt", "c.txt", "e.txt", "g.txt")
    jobs = find_jobs(str(tmp_path), samples_per_shard=2)
    assert [job.fingerprint for job in jobs] == [job.fingerprint for job in before]
    assert [[key for key, _, _ in read([job])[1]] for job in jobs] == [["a", "c"], ["e", "g"]]


@pytest.mark.parametrize(
    "name", ["new\nline.jpg", "tab\t.jpg", "back\\slash.jpg", "._mac.jpg", b"latin-\xe9.jpg"]
)
def test_a_key_that_no_reader_takes_is_refused_at_once(tmp_path, name):
    samples, rejects = read(find_jobs(fill(tmp_path, name, "good.jpg")))
    assert samples.keys() == {"good"}
    assert [reason for _, reason, _ in rejects] == ["unsafe_name"]
    json.dumps(rejects, ensure_ascii=False).encode()


def test_every_key_that_is_kept_can_be_read_again(tmp_path):
    names = [f"at 9.41{space}AM.png" for space in ("\u202f", "\u00a0", "\u3000", " ")]
    names += ["é.jpg", "a..b.jpg", "x'\"$.jpg", ".album/c.jpg"]
    samples, rejects = read(find_jobs(fill(tmp_path / "in", *names)))
    assert len(samples) == len(names) and not rejects
    path = write_photos(tmp_path / "00000.tar", [photo_sample(key) for key in samples])
    assert [sample.key for sample in read_shard(path)] == list(samples)


def write_captions(path, names):
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    path.write_text(json.dumps({"images": images, "annotations": []}))
    return str(path)


def test_the_same_holds_for_the_entries_of_coco(tmp_path):
    fill(tmp_path / "in", "a.jpg", "a.b.jpg", "a_b.jpg")
    names = ["a.jpg", "a.b.jpg", "a_b.jpg", "../in/a.jpg", "/etc/passwd.jpg", "x\ny.jpg"]
    captions = write_captions(tmp_path / "captions.json", names)
    samples, rejects = read(find_jobs(str(tmp_path / "in"), captions=captions))
    assert samples.keys() == {"a", "a_b"} and samples["a_b"]["jpg"] == b"a.b.jpg"
    reasons = [reason for _, reason, _ in rejects]
    assert sorted(reasons) == ["duplicate_key"] + ["unsafe_name"] * 3
    (detail,) = (detail for _, reason, detail in rejects if reason == "duplicate_key")
    assert "a.b.jpg" in detail and "a_b.jpg" in detail


def source_of(folder, *names):
    """A source as a listing would give that saw all of `names`."""
    return FilesSource(str(folder), tuple((n[:9], {"jpg": f"{folder}/{n}"}, {}) for n in names))


def read_source(source):
    rejects = []
    samples = list(source.read(on_reject=lambda *reject: rejects.append(reject)))
    return [sample.key for sample in samples], [(key, reason) for key, reason, _ in rejects]


def test_files_that_cannot_be_read_are_rejected_alone(tmp_path):
    fill(tmp_path, "good.jpg", "also.jpg", "file")
    os.symlink("loop.jpg", tmp_path / "loop.jpg")
    os.symlink("nowhere", tmp_path / "broken.jpg")
    os.mkdir(tmp_path / "folder.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    bad = ["loop.jpg", "broken.jpg", "folder.jpg", "pipe.jpg", "file/x.jpg", f"{'x' * 300}.jpg"]
    keys, rejects = read_source(source_of(tmp_path, "good.jpg", *bad, "also.jpg"))
    assert keys == ["good.jpg", "also.jpg"]
    assert rejects == [
        ("loop.jpg", "no_photo"),
        ("broken.jp", "no_photo"),
        ("folder.jp", "not_a_file"),
        ("pipe.jpg", "not_a_file"),
        ("file/x.jp", "no_photo"),
        ("xxxxxxxxx", "no_photo"),
    ]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EISDIR])
def test_a_file_that_may_not_be_read_is_rejected_alone(tmp_path, monkeypatch, number):
    keys, rejects = read_with_error(tmp_path, monkeypatch, OSError(number, os.strerror(number)))
    assert keys == ["good.jpg"] and rejects == [("bad.jpg", "no_photo")]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EMFILE])
def test_a_disk_that_cannot_be_read_fails_the_shard(tmp_path, monkeypatch, number):
    with pytest.raises(OSError) as failure:
        read_with_error(tmp_path, monkeypatch, OSError(number, os.strerror(number)))
    assert failure.value.errno == number


def test_a_store_that_refuses_everything_fails_the_shard(tmp_path, monkeypatch):
    """Object stores answer so when a key has run out; their errors bear no number."""
    with pytest.raises(PermissionError):
        read_with_error(tmp_path, monkeypatch, PermissionError("Forbidden"))


def read_with_error(folder, monkeypatch, error):
    def refuse(path, mode):
        if "bad" in path:
            raise error
        return open(path, mode)

    fill(folder, "good.jpg", "bad.jpg")
    monkeypatch.setattr("preprocess.inputs.open", refuse, raising=False)
    return read_source(source_of(folder, "good.jpg", "bad.jpg"))


@pytest.mark.parametrize("root", ["local", "memory"])
def test_a_file_that_would_fill_the_memory_is_rejected_unread(tmp_path, root):
    from fsspec import filesystem

    folder = str(tmp_path) if root == "local" else "memory://huge"
    if root == "local":
        fill(tmp_path, "a.jpg", "b.jpg")
        os.truncate(tmp_path / "a.jpg", 6 * 10**9)
        keys, rejects = read_source(source_of(folder, "a.jpg", "b.jpg"))
    else:
        filesystem("memory").pipe({"/huge/a.jpg": b"12345678901", "/huge/b.jpg": b"1"})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mas.shards.MAX_MEMBER_BYTES", 10)
            keys, rejects = read_source(source_of(folder, "a.jpg", "b.jpg"))
    assert keys == ["b.jpg"] and rejects == [("a.jpg", "member_too_large")]


def test_naming_many_tars_takes_time_by_their_number_only(monkeypatch):
    names = [f"memory://many/{number:06d}.tar" for number in range(20_000)]
    monkeypatch.setattr("preprocess.inputs.expand_shards", lambda _: names)
    info = "fsspec.implementations.memory.MemoryFileSystem.info"
    monkeypatch.setattr(info, lambda *_: {"size": 1, "type": "file"})
    start = time.process_time()
    jobs = find_jobs("memory://many/*.tar")
    assert time.process_time() - start < 3  # 0.4 s; a count for every name takes over 4 s more
    assert len(jobs) == 20_000 and isinstance(jobs[0].source, TarSource)


@pytest.mark.parametrize("name", ["a.jpg", "a.PNG", "b.webp"])
def test_a_single_picture_is_told_into_what_to_put_it(tmp_path, name):
    fill(tmp_path, name)
    said = f"{name}: is a single picture; --input takes tar shards, or a folder of pictures"
    with pytest.raises(ShardError, match=said):
        find_jobs(f"{tmp_path}/{name}")


def test_pictures_named_one_by_one_are_told_of_their_folder(tmp_path):
    fill(tmp_path, "a.jpg", "b.jpg", "c.txt")
    with pytest.raises(ShardError, match=r"\*\.jpg: names 2 pictures one by one, .* their folder"):
        find_jobs(f"{tmp_path}/*.jpg")


@pytest.mark.parametrize("name", ["a.zip", "a.parquet", "a.txt", "README"])
def test_what_is_no_tar_is_not_called_a_broken_one(tmp_path, name):
    fill(tmp_path, name)
    with pytest.raises(ShardError, match=f"{name}: is no tar; --input takes tar shards, or a fold"):
        find_jobs(f"{tmp_path}/{name}")


def test_a_tar_is_one_whatever_its_name(tmp_path):
    path = write_photos(tmp_path / "shard-1", [photo_sample("a")])
    (job,) = find_jobs(path)
    assert (job.name, read([job])[0].keys()) == ("shard-1", {"a"})


def test_of_tars_with_other_names_one_is_looked_into(tmp_path, monkeypatch):
    """A hundred thousand of them in a store would be hours before the run begins."""
    for number in range(3):
        write_photos(tmp_path / f"shard-{number}", [photo_sample("a")])
    opened = []
    monkeypatch.setattr("preprocess.inputs._open", lambda p: opened.append(p) or open(p, "rb"))
    assert len(find_jobs(f"{tmp_path}/*")) == 3
    assert opened == [f"{tmp_path}/shard-0"]


def test_a_pattern_that_names_folders_is_told_what_input_takes(tmp_path):
    (tmp_path / "x").mkdir()
    write_photos(tmp_path / "x" / "0.tar", [photo_sample("a")])
    with pytest.raises(ShardError, match="x: is no tar; --input takes tar shards, or a folder"):
        find_jobs(f"{tmp_path}/*")


def test_shards_that_lie_deeper_are_told_how_to_be_named(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_photos(tmp_path / folder / f"{folder}.tar", [photo_sample("a")])
    with pytest.raises(ShardError, match=r"shards lie deeper, as x/x\.tar") as caught:
        find_jobs(str(tmp_path))
    named = str(caught.value).rpartition("name them: ")[2].strip("'")
    assert [job.name for job in find_jobs(named)] == ["x", "y"]


def test_pictures_beside_shards_are_told_of(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="preprocess.inputs")
    write_photos(tmp_path / "0.tar", [photo_sample("a")])
    fill(tmp_path, "0.parquet", "0_stats.json", "run.json", "classes.png")  # of a run's own
    assert len(find_jobs(str(tmp_path))) == 1 and not caplog.messages
    fill(tmp_path, "b.jpg", "b.txt")
    assert len(find_jobs(str(tmp_path))) == 1
    assert "beside them is passed over (pictures: 1, as b.jpg)" in caplog.text


def test_of_each_shard_is_known_when_its_newest_file_was_written(tmp_path):
    write_photos(tmp_path / "0.tar", [photo_sample("a")])
    os.utime(tmp_path / "0.tar", (1.0, 1000.5))
    (job,) = find_jobs(f"{tmp_path}/0.tar")
    assert job.modified == 1000.5
    names = ("a.jpg", "a.txt", "b.jpg", "b.txt")
    fill(tmp_path / "in", *names)
    for time_of, name in enumerate(names):
        os.utime(tmp_path / "in" / name, (1.0, float(time_of)))
    jobs = find_jobs(str(tmp_path / "in"), samples_per_shard=1)
    assert [job.modified for job in jobs] == [1.0, 3.0]


def test_a_store_may_tell_the_time_or_not(monkeypatch):
    when = datetime(2026, 1, 2, tzinfo=UTC)
    monkeypatch.setattr("preprocess.inputs.expand_shards", lambda _: ["memory://x/0.tar"])
    for details, modified in (({"LastModified": when}, when.timestamp()), ({"mtime": "?"}, 0.0)):
        info = "fsspec.implementations.memory.MemoryFileSystem.info"
        monkeypatch.setattr(info, lambda *_, about=details: {"size": 1, "type": "file", **about})
        (job,) = find_jobs("memory://x/*.tar")
        assert job.modified == modified


def test_photos_in_linked_folders_are_found_each_once(tmp_path, caplog):
    photos, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    fill(photos, "b/1.jpg")
    fill(elsewhere / "album", "2.jpg", "2.txt", "deep/3.jpg")
    fill(tmp_path / "more", "4.jpg")
    os.symlink(elsewhere / "album", photos / "a")
    os.symlink(tmp_path / "more", elsewhere / "album/further")
    os.symlink(tmp_path / "more/4.jpg", photos / "c.jpg")
    samples, rejects = read(find_jobs(str(photos)))
    assert list(samples) == ["a/2", "a/deep/3", "a/further/4", "b/1", "c"] and not rejects
    assert samples["a/2"] == {"jpg": b"2.jpg", "txt": b"2.txt"}
    assert not caplog.text

    os.symlink(photos, elsewhere / "album/circle")
    os.symlink(tmp_path, tmp_path / "more/above")
    os.symlink(photos / "b", photos / "d")
    os.symlink(tmp_path / "nowhere", photos / "e")
    assert read(find_jobs(str(photos))) == (samples, [])
    assert "3 linked folders are not entered" in caplog.text


PANOPTIC = {"images": [], "annotations": [{"image_id": 1, "segments_info": [], "file_name": "1"}]}
INSTANCES = {"images": [], "annotations": [{"id": 1, "image_id": 1, "category_id": 3}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": "' + b"x" * 999 + b'\xe9"}', r"not UTF-8 \(byte 0xe9 at 1011\): save it as"),
        (b"{", r"not COCO's captions JSON \(Expecting property name"),
        (b"[]", r"not COCO's captions JSON \(list indices"),
        (b'{"images": []}', r"not COCO's captions JSON \(it has no 'annotations'\)"),
        (json.dumps(PANOPTIC).encode(), r"is COCO's panoptic JSON; give captions_train2017\.json"),
        (json.dumps(INSTANCES).encode(), r"is COCO's instances JSON; give captions_train2017"),
    ],
)
def test_what_is_no_captions_json_is_told_in_a_line(content, message, tmp_path):
    (tmp_path / "captions.json").write_bytes(content)
    with pytest.raises(ShardError, match=f"captions.json: {message}") as caught:
        find_jobs(fill(tmp_path / "in", "a.jpg"), captions=str(tmp_path / "captions.json"))
    assert len(str(caught.value)) < len(str(tmp_path)) + 200
