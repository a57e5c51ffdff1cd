"""A Ray that does not start or cannot be joined is told of in one line, whatever it raises."""

import os
import signal
import socket
import sys

import pytest

from preprocess.executor import ExecutorConfig
from preprocess.ray_executor import _explain as explain
from preprocess.ray_start import start_ray as start
from preprocess.termination import terminated_in_order

SLOW = "The current node timed out during startup. This could happen because …"


def has_ipv6():
    """Whether this machine can be reached by IPv6."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.fixture
def raising(monkeypatch):
    """Makes Ray's start raise an error."""
    ray = pytest.importorskip("ray")

    def set_error(error):
        def refuse(*_, **__):
            raise error

        monkeypatch.setattr(ray, "init", refuse)

    return set_error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Exception(SLOW), SLOW),  # as Ray raises on a machine that is overloaded
        (RuntimeError(f"\n{SLOW}\nmore"), SLOW),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_ray_that_does_not_start_says_why(raising, error, said):
    raising(error)
    with pytest.raises(OSError) as caught:
        start(ExecutorConfig())
    assert str(caught.value).startswith(f"Ray cannot start: {said}; it needs a HOME")


def test_a_cluster_that_gives_no_reason_is_told_of(raising):
    raising(RuntimeError())
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(OSError, match=rf"cannot join the Ray cluster {address}: RuntimeError;"):
            start(ExecutorConfig(address=address))


@pytest.mark.skipif(not has_ipv6(), reason="needs an IPv6 loopback")
def test_the_head_node_may_have_an_ipv6_address(monkeypatch):
    ray = pytest.importorskip("ray")
    joined = []
    monkeypatch.setattr(ray, "init", lambda **options: joined.append(options["address"]))
    monkeypatch.setattr(ray, "cluster_resources", dict)
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        address = f"[::1]:{server.getsockname()[1]}"
        start(ExecutorConfig(address=address))
    assert joined == [address]
    with pytest.raises(OSError, match=r"no Ray cluster answers at \[::1\]:\d+: .* refused"):
        start(ExecutorConfig(address=address))


@pytest.mark.parametrize("address", ["::1:6379", "[::1]", "[]:1", "host", ":1", "a/b:1"])
def test_what_is_no_address_is_refused_before_ray_sees_it(address):
    with pytest.raises(ValueError, match=r"give auto, or HOST:PORT .* as \[fd00::2\]:6379"):
        start(ExecutorConfig(address=address))


@pytest.mark.parametrize(("bound", "wanted"), [({1}, 1), ({0, 1, 2, 3}, None)])
def test_there_is_one_worker_for_each_cpu_that_the_run_may_use(monkeypatch, bound, wanted):
    """Not one for each of the node, of which SLURM has given eight; None leaves quotas to Ray."""
    ray = pytest.importorskip("ray")
    asked = []
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options["num_cpus"]))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: bound, raising=False)
    start(ExecutorConfig())
    start(ExecutorConfig(workers=3))
    assert asked == [wanted, 3]


def test_half_a_cpu_of_a_container_is_one(monkeypatch):
    """Ray rounds such a quota down to none, and no worker would ever start."""
    ray = pytest.importorskip("ray")
    done = []
    monkeypatch.setattr(ray, "init", lambda **options: done.append(options["num_cpus"]))
    monkeypatch.setattr(ray, "shutdown", lambda: done.append("end"))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0} if done[-1] else {})
    monkeypatch.setattr("preprocess.ray_start.usable_cores", os.cpu_count)
    start(ExecutorConfig())
    assert done == [None, "end", 1]


def test_workers_that_are_lost_without_a_word_are_told_of():
    assert explain(RuntimeError()) == "Ray has lost the workers: RuntimeError"


def test_a_run_that_is_ended_while_ray_starts_ends_as_at_any_other_time(monkeypatch, caplog):
    """Ray sets a handler of its own there, which ends the process with 15."""
    ray = pytest.importorskip("ray")

    def begin(*_, **__):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([], 1)  # lets the handler run

    monkeypatch.setattr(ray, "init", begin)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, terminated_in_order():
        start(ExecutorConfig())
    assert ended.value.code == 128 + signal.SIGTERM
    assert caplog.messages == ["ended by SIGTERM; the same command goes on where this one was"]
    assert signal.getsignal(signal.SIGTERM) == before
