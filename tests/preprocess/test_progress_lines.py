"""How far a run is: a bar on a terminal, now and then a line in a log."""

import io
import logging
import time
from types import SimpleNamespace

import pytest

from preprocess.progress import ProgressBar, counting
from preprocess.run_folder import RunFolder


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("preprocess.progress.SHOW_SECONDS", 0.001)
    monkeypatch.setattr("preprocess.progress.SETTLED_SECONDS", 0.0)


def run_until(folder, condition):
    """Ten shards: two done before, one failed before; three are made and one fails."""
    with ProgressBar(RunFolder(str(folder)), 10, unit="photo") as bar:
        bar.skip(2, failed=1)
        bar.add(0)
        for failed in (False, False, True, False):
            bar.add(50)
            bar.shard_done(failed=failed)
        deadline = time.monotonic() + 20
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.001)


def test_a_log_gets_lines_at_a_distance_and_no_bar(tmp_path, monkeypatch, caplog):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    caplog.set_level(logging.INFO, logger="preprocess.progress")
    monkeypatch.setattr("preprocess.progress.LINE_SECONDS", 0.2)
    start = time.monotonic()
    run_until(tmp_path, lambda: len(caplog.messages) > 1)
    assert time.monotonic() - start > 0.4 and not log.getvalue()
    assert caplog.messages[-1].startswith("5 of 10 shards done, 2 failed, ")
    assert " photos/s, 00:00 left" in caplog.messages[-1]


def test_a_short_run_writes_no_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    caplog.set_level(logging.INFO, logger="preprocess.progress")
    run_until(tmp_path, lambda: True)
    assert not caplog.messages


def test_a_terminal_gets_a_bar_and_no_lines(tmp_path, monkeypatch, caplog):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("preprocess.progress.LINE_SECONDS", 0.0)
    caplog.set_level(logging.INFO, logger="preprocess.progress")
    run_until(tmp_path, lambda: "7/10" in terminal.getvalue())
    assert "\r" in terminal.getvalue() and "2 failed" in terminal.getvalue()
    assert not caplog.messages


def test_a_clock_that_is_set_back_stops_neither_lines_nor_heartbeat(tmp_path, monkeypatch, caplog):
    """Without a heartbeat the run would pass for dead, and another one begin on its folder."""
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr("preprocess.progress.LINE_SECONDS", 0.01)
    monkeypatch.setattr("preprocess.progress.HEARTBEAT_SECONDS", 0.01)
    caplog.set_level(logging.INFO, logger="preprocess.progress")
    clock = SimpleNamespace(time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr("preprocess.progress.time", clock)
    folder, begin = RunFolder(str(tmp_path)), time.time()
    with ProgressBar(folder, 10, unit="photo") as bar:
        bar.add(50)
        bar.shard_done(failed=False)
        clock.time = lambda: time.time() - 3600
        count, deadline = len(caplog.messages), time.monotonic() + 20
        while time.monotonic() < deadline and (
            folder.read("progress.json")["updated"] > begin - 1800
            or len(caplog.messages) < count + 2
        ):
            time.sleep(0.001)
        assert bar.seconds >= 0 and folder.read("progress.json")["updated"] < begin - 1800
    assert len(caplog.messages) >= count + 2 and "-" not in caplog.messages[-1]


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to."""
    clock = SimpleNamespace(now=1000.0)
    clock.time = clock.monotonic = lambda: clock.now
    monkeypatch.setattr("preprocess.progress.time", clock)
    return clock


def count_slowly(clock, count, more):
    """Four times `more`, eleven seconds for each: one line is due."""
    for _ in range(4):
        clock.now += 11
        count(more)


@pytest.mark.parametrize(
    ("total", "said"),
    [(100, "park: 66 of 100, 2.00 pictures/s, 00:17 left"), (None, "park: 66, 2.00 pictures/s")],
)
def test_a_count_is_told_in_a_log_at_a_distance(clock, monkeypatch, caplog, total, said):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    caplog.set_level(logging.INFO, logger="preprocess.progress")
    with counting(total, name="park", unit=" pictures") as count:
        count_slowly(clock, count, 22)
    assert caplog.messages == [said] and not log.getvalue()


def test_bytes_that_were_there_before_count_but_do_not_make_it_faster(clock, monkeypatch, caplog):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    caplog.set_level(logging.INFO, logger="preprocess.progress")
    scale = {"unit_scale": True, "unit_divisor": 1024}
    with counting(100 << 20, name="a.pth", unit="B", initial=20 << 20, **scale) as count:
        count_slowly(clock, count, 22 << 20)
    assert caplog.messages == ["a.pth: 86.0M of 100M, 2.10MB/s, 00:07 left"]


def test_a_count_is_a_bar_on_a_terminal(monkeypatch, caplog):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("preprocess.progress.LINE_SECONDS", -1.0)
    caplog.set_level(logging.INFO, logger="preprocess.progress")
    with counting(3, name="park", unit=" pictures") as count:
        count(3)
    assert "park: 100%" in terminal.getvalue() and "3/3" in terminal.getvalue()
    assert not caplog.messages
