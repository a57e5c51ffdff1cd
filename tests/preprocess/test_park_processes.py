"""`mas park` draws in several processes, of which any may be killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_faults import DEADLINE, is_gone, wait_until

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks up processes in /proc")


def drawing(pid):
    """Processes of a run that draw."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


@pytest.fixture
def run(tmp_path):
    """A run amid its work, the processes that draw for it, and its output."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "mas", "park", "--output", str(output), "--count", "4000"]
    command += ["--size", "32", "--shard-size", "16", "--workers", "2"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    wait_until(lambda: (output / "00001.tar").exists() or process.poll() is not None)
    try:
        yield process, drawing(process.pid), output
    finally:
        process.kill()
        process.communicate()


def test_a_killed_process_ends_the_run_in_one_line(run):
    """As where the memory is too small; it would wait for ever for the pictures of that one."""
    process, workers, output = run
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    printed, _ = process.communicate(timeout=DEADLINE)
    (line,) = printed.splitlines()
    assert process.returncode == 1
    assert line.startswith("mas: error: a process that draws has been killed") and "again" in line
    wait_until(lambda: all(map(is_gone, workers)))
    assert not list(output.glob(".*"))


def test_a_run_that_is_ended_tidies_up(run):
    process, workers, output = run
    process.terminate()
    printed, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + signal.SIGTERM and "ended by SIGTERM" in printed
    wait_until(lambda: all(map(is_gone, workers)))
    assert not list(output.glob(".*"))


def test_of_a_killed_run_no_process_is_left(run):
    process, workers, _ = run
    process.kill()
    wait_until(lambda: all(map(is_gone, workers)))
