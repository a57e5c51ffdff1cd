"""Two runs on one folder: whoever comes second is refused, and no dead run keeps anybody out."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from preprocess.run_folder import FolderError, RunFolder

HERE = socket.gethostname()

# Waits for its fellows, tries, and where it holds the folder, waits until all have tried.
CONTENDER = """
import sys, time
from pathlib import Path
from preprocess.run_folder import FolderError, RunFolder

folder, marks, number, count = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def wait_for(pattern, wanted):
    deadline = time.monotonic() + 50
    while len(list(marks.glob(pattern))) < wanted and time.monotonic() < deadline:
        time.sleep(0.001)

(marks / f"ready-{number}").touch()
wait_for("ready-*", count)
try:
    with RunFolder(folder).prepared("count", {}, shards=1):
        (marks / f"held-{number}").touch()
        wait_for("[hr]e[lf]*d-*", count)
except FolderError as error:
    assert "another run is at work" in str(error)
    (marks / f"refused-{number}").touch()
"""


@pytest.mark.parametrize("left", ["nothing", "a lock of a dead run"])
def test_of_runs_started_at_once_one_goes_on(tmp_path, left):
    folder, marks, count = tmp_path / "out", tmp_path / "marks", 3
    marks.mkdir()
    if left != "nothing":
        hold(folder, pid=pid_of_the_dead())
    command = [sys.executable, "-c", CONTENDER, str(folder), str(marks)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    runs = [
        subprocess.Popen([*command, str(number), str(count)], env=environment)
        for number in range(count)
    ]
    assert [run.wait(timeout=60) for run in runs] == [0] * count
    outcomes = [path.name.split("-")[0] for path in marks.iterdir()]
    assert outcomes.count("held") == 1 and outcomes.count("refused") == count - 1
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_a_run_that_begins_while_the_folder_is_looked_at_is_no_stranger(tmp_path, monkeypatch):
    folder = RunFolder(str(tmp_path / "out"))
    list_names = RunFolder.list_names

    def begin_beside(self):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/run.json").write_text('{"command": "count", "settings": {}}')
        return list_names(self)

    monkeypatch.setattr(RunFolder, "list_names", begin_beside)
    with folder.prepared("count", {}, shards=1):
        assert folder.read("run.json")["shards"] == 1


def hold(folder, name="lock.json", **fields):
    """A sign of life of another run."""
    sign = {"updated": time.time(), "host": HERE, "pid": os.getppid(), **fields}
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text('{"command": "count", "settings": {}}')
    (folder / name).write_text(json.dumps(sign))


def pid_of_the_dead():
    gone = subprocess.Popen(["true"])
    gone.wait()
    return gone.pid


def take(folder):
    with RunFolder(str(folder)).prepared("count", {}, shards=1):
        assert json.loads((folder / "lock.json").read_text())["pid"] == os.getpid()
    assert not (folder / "lock.json").exists()


@pytest.mark.parametrize("name", ["lock.json", "progress.json"])
@pytest.mark.parametrize(
    ("host", "seconds"), [(HERE, -50), (HERE, 5), ("elsewhere", -15), ("elsewhere", 15)]
)
def test_a_fresh_sign_of_life_keeps_others_out(tmp_path, name, host, seconds):
    hold(tmp_path, name, host=host, updated=time.time() + seconds)
    with pytest.raises(FolderError, match=f"another run is at work on it .{host}, process"):
        take(tmp_path)
    assert (tmp_path / name).exists()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("preprocess.run_folder.LISTEN_SECONDS", 0.1)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", ["lock.json", "progress.json"])
@pytest.mark.parametrize(
    ("host", "seconds"), [(HERE, -70), ("elsewhere", -25), ("elsewhere", 25), ("elsewhere", 9e6)]
)
def test_a_sign_of_life_that_is_old_or_of_the_future_keeps_nobody_out(
    tmp_path, name, host, seconds
):
    hold(tmp_path, name, host=host, updated=time.time() + seconds)
    take(tmp_path)


@pytest.mark.parametrize("seconds", [-9e6, -100, 100, 9e6])
def test_a_heartbeat_of_another_clock_is_believed_as_long_as_others_follow(tmp_path, seconds):
    """Clocks of two nodes may differ by anything; that a heart beats is seen without them."""
    folder, stop = RunFolder(str(tmp_path)), threading.Event()

    def beat():
        while not stop.wait(0.05):
            folder.write("progress.json", {**sign, "updated": time.time() + seconds})

    sign = {"host": "elsewhere", "pid": 1}
    hold(tmp_path, "progress.json", **sign, updated=time.time() + seconds)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(FolderError, match=r"another run is at work on it .elsewhere"):
            take(tmp_path)
        assert folder.is_at_work(folder.read("progress.json"))
    finally:
        stop.set()
        thread.join()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("host", [HERE, "elsewhere"])
@pytest.mark.parametrize("seconds", [100, 9e6])
def test_a_heartbeat_of_the_future_that_none_follows_is_no_sign_of_life(tmp_path, host, seconds):
    hold(tmp_path, "progress.json", host=host, updated=time.time() + seconds)
    folder = RunFolder(str(tmp_path))
    assert not folder.is_at_work(folder.read("progress.json"))


def test_a_lock_of_a_process_that_is_gone_keeps_nobody_out(tmp_path):
    hold(tmp_path, pid=pid_of_the_dead())
    take(tmp_path)


def test_a_lock_that_was_cut_short_keeps_others_out_as_long_as_it_is_new(tmp_path):
    hold(tmp_path)
    lock = tmp_path / "lock.json"
    lock.write_text("")
    with pytest.raises(FolderError, match="another run"):
        take(tmp_path)
    os.utime(lock, (time.time() - 25,) * 2)
    take(tmp_path)


def test_a_run_that_fails_lets_go_of_its_lock_and_of_no_other(tmp_path):
    folder = RunFolder(str(tmp_path / "out"))
    with pytest.raises(RuntimeError), folder.prepared("count", {}, shards=1):
        raise RuntimeError
    assert not (tmp_path / "out" / "lock.json").exists()
    with folder.prepared("count", {}, shards=1):
        hold(tmp_path / "out")
    assert (tmp_path / "out" / "lock.json").exists()


def test_taking_marks_away_does_not_list_the_folder(tmp_path, monkeypatch):
    """Which is done several times a shard, and takes as long as there are shards."""
    folder = RunFolder(str(tmp_path))
    folder.write("00000.running.json", {})

    def refuse(*_, **__):
        raise AssertionError("the folder was listed")

    with monkeypatch.context() as patch:
        for name in ("os.scandir", "os.listdir", "glob.glob"):
            patch.setattr(name, refuse)
        folder.remove("00000.running.json", "00000.error.json")
    assert not list(tmp_path.iterdir())
