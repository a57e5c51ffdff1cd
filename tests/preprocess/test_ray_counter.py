"""When a worker that cannot work may give back the job it holds."""

import contextlib
import time

import pytest

from preprocess.ray_counter import Counter

LOST = "node-b", "host-b: the GPU is lost"


@pytest.fixture
def counter():
    return Counter(["1", "2", "3"])


def test_it_waits_while_others_have_something_to_do(counter):
    assert not counter.may_leave("2", *LOST)
    counter.settle("1")
    assert not counter.may_leave("2", *LOST)
    counter.settle("3")
    assert counter.may_leave("2", *LOST)


def test_two_that_wait_do_not_wait_for_each_other(counter):
    assert not counter.may_leave("2", *LOST) and not counter.may_leave("3", *LOST)
    counter.settle("1")
    assert counter.may_leave("2", *LOST) and counter.may_leave("3", *LOST)


def test_a_job_that_another_has_made_is_not_waited_for(counter):
    """A node goes with a worker that waits; Ray gives its job to another one."""
    counter.may_leave("2", *LOST)
    counter.settle("2")
    assert not counter.may_leave("3", *LOST)
    counter.settle("1")
    assert counter.may_leave("3", *LOST)


def test_none_waits_where_nobody_else_can_work(counter):
    counter.release()
    assert counter.may_leave("2", *LOST)


def test_the_driver_is_told_what_was_seen_since_and_which_nodes_have_failed(counter):
    assert counter.take() == (None, False, {})
    counter.start()
    counter.add(2)
    counter.add(0)
    counter.may_leave("2", *LOST)
    assert counter.take() == (2, True, dict([LOST]))
    assert counter.take() == (None, True, dict([LOST]))


def test_one_that_was_killed_keeps_nobody(local_ray):
    """It no longer knows what was made."""
    counter = local_ray.remote(Counter).options(max_restarts=1, num_cpus=0).remote(["1", "2"])
    assert not local_ray.get(counter.may_leave.remote("1", *LOST))
    local_ray.kill(counter, no_restart=False)
    deadline, free = time.monotonic() + 60, False
    while not free and time.monotonic() < deadline:
        with contextlib.suppress(local_ray.exceptions.RayError):  # it is being started again
            free = local_ray.get(counter.may_leave.remote("1", *LOST))
    assert free
