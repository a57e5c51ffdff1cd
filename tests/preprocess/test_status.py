"""`mas preprocess-status` tells from a run's files alone what it does, here or elsewhere."""

import json
import os
import socket
import subprocess
import time
from functools import partial

import pytest
from counted_world import NAMES
from counting_worker import CountingWorker

from preprocess.executor import ExecutorConfig, execute
from preprocess.run_folder import RunFolder
from preprocess.runner import Job
from preprocess.status import preprocess_status


def status_of(world, capsys):
    code = preprocess_status(str(world.output), as_json=True)
    return code, json.loads(capsys.readouterr().out)


def test_the_status_tells_done_failed_and_rejected(world, capsys):
    world.plan(n00002="data")
    world.run()
    code, status = status_of(world, capsys)
    assert code == 1 and status["failed"] == {"00002": "the data is bad"}
    assert (status["shards"], status["done"], status["running"]) == (6, 5, 0)
    assert status["rejected"] == {"no_caption": 5} and not status["alive"]
    assert (status["photos_in"], status["photos_out"]) == (15, 10)


def test_the_status_of_a_run_at_work_comes_from_its_files(world, capsys):
    class Peek(CountingWorker):
        def __call__(self, job, report):
            report(1)
            if job.name == "00003":
                seen.append(status_of(world, capsys))
            return super().__call__(job, report)

    seen = []
    execute(
        [Job(name, f"source {name}", fingerprint=name) for name in NAMES],
        partial(Peek, str(world.output), str(world.trouble)),
        str(world.output),
        command="count",
        settings={},
        config=ExecutorConfig(kind="serial"),
    )
    ((code, status),) = seen
    assert code == 0 and status["alive"] and status["running"] == 1 and status["done"] == 3
    ((name, mark),) = status["longest"].items()
    assert name == "00003" and (mark["attempt"], mark["pid"]) == (1, os.getpid())
    assert status["left"] == 3 and 0 <= mark["seconds"] < 60
    assert preprocess_status(str(world.output)) == 0
    assert "finished: 6 of 6 shards done" in capsys.readouterr().out


def test_the_status_tells_rate_and_time_left_of_a_run_on_another_machine(
    world, capsys, monkeypatch
):
    monkeypatch.setattr("preprocess.run_folder.LISTEN_SECONDS", 0.1)
    world.plan(n00005="data")
    world.run()
    folder = RunFolder(str(world.output))
    folder.remove("00003.stats.json", "00004.stats.json")
    now = time.time()
    beat = {"updated": now - 10, "host": "node7", "pid": 1, "items": 900, "seconds": 300.0}
    folder.write("progress.json", {**beat, "made": 3})
    mark = {"attempt": 2, "host": "node9", "pid": 77, "started": now - 125}
    folder.write("00004.running.json", mark)
    code, status = status_of(world, capsys)
    assert code == 1 and status["alive"] and status["failed"] == {"00005": "the data is bad"}
    assert (status["photos_per_second"], status["seconds_left"]) == (3.0, 200.0)
    preprocess_status(str(world.output))
    printed = capsys.readouterr().out
    assert "running: 3 of 6 shards done, 1 running, 1 failed, 2 left" in printed
    assert "3.0 photos/s, 03:20 left" in printed
    assert "00004, for 02:05, attempt 2, process 77 on node9" in printed
    folder.write("00004.running.json", {**mark, "started": now + 125})  # by that node's clock
    preprocess_status(str(world.output))
    assert "00004, for 00:00, attempt 2" in capsys.readouterr().out
    for seconds in (-600, 600):  # the clock may have been ahead
        folder.write("progress.json", {**beat, "made": 3, "updated": now + seconds})
        preprocess_status(str(world.output))
        assert "stopped: 3 of 6" in capsys.readouterr().out


def test_the_status_of_a_run_that_was_just_killed_is_not_running(world, capsys):
    world.run()
    gone = subprocess.Popen(["true"])
    gone.wait()
    beat = {"updated": time.time(), "host": socket.gethostname(), "pid": gone.pid}
    RunFolder(str(world.output)).write(
        "progress.json", beat | {"items": 1, "made": 1, "seconds": 1}
    )
    code, status = status_of(world, capsys)
    assert code == 0 and not status["alive"]


def test_a_shard_that_was_made_and_failed_before_counts_as_made(world, capsys):
    world.run()
    RunFolder(str(world.output)).write("00002.error.json", {"error": "an older attempt"})
    code, status = status_of(world, capsys)
    assert code == 0 and status["done"] == 6 and not status["failed"]


def test_shards_that_failed_and_are_no_part_of_the_last_run_are_not_missing_from_it(world, capsys):
    world.plan(n00005="data")
    world.run()
    world.run(jobs=[Job(name, f"source {name}", fingerprint=name) for name in NAMES[:5]])
    code, status = status_of(world, capsys)
    assert code == 1 and (status["shards"], status["done"], status["left"]) == (6, 5, 0)


def test_the_status_of_a_strange_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no run\.json"):
        preprocess_status(str(tmp_path))
