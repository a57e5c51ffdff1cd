"""A store that does not answer, or knows no account, raises errors of its own package."""

import time
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from photo_world import make_shards, preprocess_scenes

from mas.shards import StoreError, expand_shards, read_shard, write_file
from preprocess.progress import ProgressBar
from preprocess.run_folder import RunFolder
from preprocess.runner import Job, Runner
from preprocess.status import preprocess_status


class NoCredentialsError(Exception):
    """As of botocore: no OSError."""


class Store(MemoryFileSystem):
    """Objects in memory, which cannot be reached while it is `down`."""

    protocol = ("lost",)
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    down = False


def answering(name):
    """The method of a store, as long as it is up."""
    answer = getattr(MemoryFileSystem, name)

    def ask(self, *arguments, **options):
        if Store.down:
            raise NoCredentialsError("Unable to locate credentials\nmore")
        return answer(self, *arguments, **options)

    return ask


for name in ("info", "ls", "isdir", "_open", "rm_file"):
    setattr(Store, name, answering(name))


@pytest.fixture(autouse=True)
def store(monkeypatch):
    fsspec.register_implementation("lost", Store, clobber=True)
    monkeypatch.setattr(Store, "store", {})
    monkeypatch.setattr(Store, "down", False)


def test_a_run_whose_input_or_output_is_lost_ends_in_one_line(tmp_path):
    photos = make_shards(tmp_path / "in", shards=1, photos=1)
    Store.down = True
    for input, output in (("lost://b/{0..3}.tar", tmp_path / "out"), (photos, "lost://b/out")):
        with pytest.raises(OSError, match=r"^lost://b.*: cannot be reached: Unable .*s$"):
            preprocess_scenes(input, output)


def test_a_store_in_which_nothing_is_yet_is_no_lost_one(tmp_path):
    photos = make_shards(tmp_path / "in", shards=1, photos=1)
    assert preprocess_scenes(photos, "lost://b/out") == 0
    assert RunFolder("lost://b/out").read("00000.stats.json")["photos_out"] == 1


def test_whatever_is_asked_of_a_lost_store_says_so():
    write_file("lost://b/00000.tar", b"")
    folder = RunFolder("lost://b")
    Store.down = True
    for ask in (
        lambda: preprocess_status("lost://b"),
        lambda: expand_shards("lost://b/*.tar"),
        lambda: list(read_shard("lost://b/00000.tar")),
        lambda: write_file("lost://b/x", b""),
        lambda: folder.remove("x"),
        folder.list_names,
    ):
        with pytest.raises(StoreError, match=r"^lost://b.*: cannot be reached: Unable"):
            ask()


def test_a_worker_that_has_lost_the_output_names_its_machine():
    Store.down = True
    runner = Runner(lambda: lambda job, report: {}, RunFolder("lost://b/out"), {})
    outcome = runner.run(Job("00000", None, fingerprint=""), lambda count: None)
    assert outcome.fatal and " on " in outcome.error and "Unable" in outcome.error


def test_a_heartbeat_goes_on_when_the_store_is_back(monkeypatch):
    """Another run would begin on the folder of one whose heart has stopped."""
    monkeypatch.setattr("preprocess.progress.SHOW_SECONDS", 0.005)
    monkeypatch.setattr("preprocess.progress.HEARTBEAT_SECONDS", 0.005)
    folder = RunFolder("lost://b/out")
    with ProgressBar(folder, 1, unit="photo"):
        Store.down = True
        time.sleep(0.1)
        Store.down = False
        last, deadline = folder.read("progress.json"), time.monotonic() + 20
        while folder.read("progress.json") == last:
            assert time.monotonic() < deadline
            time.sleep(0.005)
