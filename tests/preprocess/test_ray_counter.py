"""When a worker that cannot work may give back the job it holds."""

import contextlib
import time

import pytest

from preprocess import ray_counter
from preprocess.ray_counter import Counter

LOST = "node-b", "host-b: the GPU is lost"
GOOD = "worker-a"


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when told to."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(ray_counter, "time", clock)
    return clock


@pytest.fixture
def counter(clock):
    return Counter(["1", "2", "3"])


def test_it_waits_while_others_are_at_work(counter, clock):
    counter.add(GOOD, 0)
    for _ in range(20):
        assert not counter.may_leave("worker-b", "2", *LOST)
        clock.now += ray_counter.IDLE_SECONDS + 1
        counter.add(GOOD, 5)
    counter.settle(GOOD, "1")
    counter.settle(GOOD, "3")
    assert counter.may_leave("worker-b", "2", *LOST)


def test_two_that_wait_do_not_wait_for_each_other(counter):
    assert not counter.may_leave("worker-b", "2", *LOST) and not counter.may_leave(
        "worker-c", "3", *LOST
    )
    counter.settle(GOOD, "1")
    assert counter.may_leave("worker-b", "2", *LOST) and counter.may_leave("worker-c", "3", *LOST)


def test_a_job_that_another_has_made_is_not_waited_for(counter):
    """A node goes with a worker that waits; Ray gives its job to another one."""
    counter.may_leave("worker-b", "2", *LOST)
    counter.settle(GOOD, "2")
    assert not counter.may_leave("worker-c", "3", *LOST)
    counter.settle(GOOD, "1")
    assert counter.may_leave("worker-c", "3", *LOST)


def test_none_waits_for_long_where_nobody_is_at_work(counter, clock):
    """As where all workers that there are have come up on nodes that fail."""
    assert not counter.may_leave("worker-b", "2", *LOST)
    clock.now += ray_counter.IDLE_SECONDS - 1
    assert not counter.may_leave("worker-b", "2", *LOST)
    clock.now += 1
    assert counter.may_leave("worker-b", "2", *LOST)


def test_one_that_is_given_a_job_in_time_is_at_work(counter, clock):
    counter.may_leave("worker-b", "2", *LOST)
    clock.now += ray_counter.IDLE_SECONDS - 1
    assert counter.begin(GOOD) == 1
    clock.now += 1
    assert not counter.may_leave("worker-b", "2", *LOST)


def test_one_that_has_gone_for_good_is_not_waited_for(counter, clock):
    """Its node is no more, and no other has room for it."""
    counter.add(GOOD, 3)
    clock.now += ray_counter.SILENT_SECONDS - 1
    assert not counter.may_leave("worker-b", "2", *LOST)
    clock.now += 1
    assert not counter.may_leave("worker-b", "2", *LOST)
    clock.now += ray_counter.IDLE_SECONDS
    assert counter.may_leave("worker-b", "2", *LOST)


def test_one_that_is_started_again_where_it_cannot_work_is_not_waited_for(counter, clock):
    """With another job than it had; Ray gives it that one later."""
    counter.add(GOOD, 3)
    counter.begin(GOOD)
    assert not counter.may_leave(GOOD, "2", *LOST)
    clock.now += ray_counter.IDLE_SECONDS
    assert counter.may_leave(GOOD, "2", *LOST)


def test_processes_are_counted_until_one_has_made_the_worker(counter):
    assert [counter.begin("a"), counter.begin("b"), counter.begin("a")] == [1, 1, 2]
    counter.ready("a")
    assert counter.begin("a") == 1 and counter.begin("b") == 2


def test_the_driver_is_told_what_was_seen_since_and_which_nodes_have_failed(counter):
    assert counter.take() == (None, False, {})
    counter.start()
    counter.add(GOOD, 2)
    counter.add(GOOD, 0)
    counter.may_leave("worker-b", "2", *LOST)
    assert counter.take() == (2, True, dict([LOST]))
    assert counter.take() == (None, True, dict([LOST]))


def test_one_that_was_killed_keeps_nobody_for_ever(local_ray):
    """It no longer knows what was made."""

    class Quick(Counter):
        def __init__(self, names):
            ray_counter.IDLE_SECONDS = 0.5
            super().__init__(names)

    counter = local_ray.remote(Quick).options(max_restarts=1, num_cpus=0).remote(["1", "2"])
    local_ray.get(counter.settle.remote(GOOD, "2"))
    local_ray.kill(counter, no_restart=False)
    deadline, free = time.monotonic() + 60, False
    while not free and time.monotonic() < deadline:
        with contextlib.suppress(local_ray.exceptions.RayError):  # it is being started again
            free = local_ray.get(counter.may_leave.remote("worker-b", "1", *LOST))
    assert free
