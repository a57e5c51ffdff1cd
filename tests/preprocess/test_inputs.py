"""Loose files as shard jobs: every file that is no sample is told of, and costs no other one."""

import json
import os

import pytest
from photo_world import photo_sample, write_photos

from mas.shards import read_shard
from preprocess.inputs import find_jobs


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
