"""What a run of tens of thousands of shards must not do: hold all of them, or list all for each."""

import json
import tracemalloc

import pytest
from photo_world import photo_sample, write_photos

from preprocess.executor import ExecutorConfig, execute
from preprocess.inputs import find_jobs
from preprocess.run_folder import RunFolder
from preprocess.runner import Job, Runner
from preprocess.status import collect
from preprocess.worker import SceneConfig, SceneWorker

SHARDS, WEIGHT = 3000, 20_000  # bytes of a shard's statistics


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    (folder / "run.json").write_text('{"command": "count", "settings": {}, "shards": 3000}')
    stats = {"photos_in": 2, "photos_out": 1, "rejected": {"no_photo": 1}, "finished": 9e9}
    content = json.dumps({**stats, "input": "same", "versions": {"x": "x" * WEIGHT}})
    for number in range(SHARDS):
        (folder / f"{number:05d}.stats.json").write_text(content)
    return folder


def peak_of(function):
    tracemalloc.start()
    try:
        return function(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_sums_of_many_shards_do_not_hold_their_statistics(finished):
    totals, peak = peak_of(lambda: collect(RunFolder(str(finished))))
    assert (totals["shards"], totals["photos_in"]) == (SHARDS, 2 * SHARDS)
    assert totals["rejected"] == {"no_photo": SHARDS}
    assert peak < SHARDS * WEIGHT / 4


def test_a_run_over_many_finished_shards_does_not_hold_their_statistics(finished):
    jobs = [Job(f"{number:05d}", None, fingerprint="same") for number in range(SHARDS)]
    how = {"command": "count", "settings": {}, "config": ExecutorConfig(kind="serial")}
    summary, peak = peak_of(lambda: execute(jobs, lambda: None, str(finished), **how))
    assert summary.skipped == SHARDS and peak < SHARDS * WEIGHT / 4


@pytest.fixture
def work(tmp_path):
    """A worker, its job, and what a killed worker has left of the same shard and of another."""
    (job,) = find_jobs(write_photos(tmp_path / "00000.tar", [photo_sample("a")]))
    output = tmp_path / "out"
    output.mkdir()
    for name in ("00000.tar", "00000.rejects.jsonl", "00000.x.tar"):
        (output / f".{name}.0123abcd.tmp").write_text("half")
    return SceneWorker(SceneConfig(), str(output)), job, output


def test_a_first_attempt_does_not_list_the_output(work, monkeypatch):
    """Which takes as long as there are shards, and on a network disk longer than the shard."""
    worker, job, _ = work

    def refuse(*_, **__):
        raise AssertionError("the folder was listed")

    with monkeypatch.context() as patch:
        for name in ("os.scandir", "os.listdir", "glob.glob"):
            patch.setattr(name, refuse)
        assert worker(job, lambda count: None)["photos_in"] == 1


def test_a_later_attempt_removes_what_the_one_before_has_left_of_this_shard(work):
    worker, job, output = work
    (output / "00000.running.json").write_text('{"attempt": 1}')  # its process was killed
    outcome = Runner(lambda: worker, RunFolder(str(output)), {}).run(job, lambda count: None)
    assert not outcome.error
    assert [path.name for path in output.glob(".*")] == [".00000.x.tar.0123abcd.tmp"]


def test_the_worker_is_told_which_attempt_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("preprocess.runner.WAIT_SECONDS", (0.0, 0.0))
    told = []

    def work(job, report):
        told.append(job.attempt)
        if len(told) < 3:
            raise OSError("the network is gone")
        return {}

    folder = RunFolder(str(tmp_path))
    outcome = Runner(lambda: work, folder, {}).run(Job("a", None, fingerprint=""), print)
    assert told == [1, 2, 3] and not outcome.error
