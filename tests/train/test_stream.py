"""The sample stream: every sample once an epoch, and resuming goes on with exactly the next."""

import os
import signal
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch

from train.stream import Numbers, Stream, StreamLoader, mix, permute


class Items:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def item(self, index, rng):
        return {"index": index, "draw": float(rng.random())}


def make_loader(*, count=10, batch_size=3, workers=0, rank=0, world=1, seed=7):
    numbers = Numbers(batch_size, rank=rank, world=world)
    return StreamLoader(Stream(Items(count), seed=seed), numbers, workers=workers)


def take(loader, batches):
    return [(batch["index"].tolist(), batch["draw"].tolist()) for batch in islice(loader, batches)]


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000])
def test_permute_is_a_permutation(count):
    assert sorted(permute(i, count=count, seed=1) for i in range(count)) == list(range(count))


def test_permutations_differ_by_seed_and_mix_well():
    first, second = ([permute(i, count=1000, seed=seed) for i in range(1000)] for seed in (1, 2))
    assert first != second
    neighbours = sum(abs(a - b) == 1 for a, b in pairwise(first))
    assert neighbours < 10  # two expected


def test_epochs_hold_every_sample_once_in_different_orders():
    indices = [i for batch, _ in take(make_loader(), 10) for i in batch]  # three epochs of ten
    epochs = [indices[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("workers_before", "workers_after"), [(0, 0), (0, 2), (2, 1)])
def test_resumed_loader_goes_on_with_the_next_sample(workers_before, workers_after):
    expected = take(make_loader(), 8)
    loader = make_loader(workers=workers_before)
    assert take(loader, 5) == expected[:5]
    resumed = make_loader(workers=workers_after)
    resumed.load_state_dict(loader.state_dict())
    assert take(resumed, 3) == expected[5:]


def test_ranks_share_an_epoch_without_overlap_and_resume_together():
    ranks = [make_loader(batch_size=2, rank=rank, world=2) for rank in range(2)]
    seen = [i for loader in ranks for batch, _ in take(loader, 2) for i in batch]
    states = [loader.state_dict() for loader in ranks]
    assert states == [{"consumed": 8}] * 2
    for rank in range(2):
        resumed = make_loader(batch_size=2, rank=rank, world=2)
        resumed.load_state_dict(states[0])  # a checkpoint is written by rank 0
        (batch, _), *_ = take(resumed, 1)
        seen += batch
    assert sorted(seen[:8] + seen[8:10]) == list(range(10))  # rank 0 completes the epoch


READS = """
import signal, sys, time
from tests.train.test_stream import make_loader

batches = iter(make_loader(workers=2))
next(batches), next(batches)  # one of each worker
"""
NOTES_SIGNALS = """
answered = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: answered.append(number))
print("reads", flush=True)
while len(answered) < 3:
    time.sleep(0.01)
for _ in range(12):  # more than the workers have read ahead
    next(batches)
print("has read", flush=True)
del batches
"""


DIES = """
import os
os.kill(os.getpid(), signal.SIGKILL)
"""


def read(words, *, sent=()):
    """Starts a process with a loader in a group of its own; what it wrote, once all have ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )
    try:
        said = process.stdout.readline() if sent else ""
        for number in sent:
            os.killpg(process.pid, number)
        said += process.communicate(timeout=60)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


@pytest.mark.parametrize("words", ["", "raise ValueError('it fails')", "sys.exit(3)"])
def test_a_process_that_still_holds_an_iterator_ends_all_the_same(words):
    status, said = read(READS + words)
    assert status == {"": 0, "sys.exit(3)": 3}.get(words, 1)
    assert "DataLoader" not in said


# What Python has by default from 3.14 on, without a word from the program.
BY_FORK_SERVER = """
from multiprocessing import context
context._default_context._default_context = context._concrete_contexts["forkserver"]
"""


@pytest.mark.parametrize("default", ["", BY_FORK_SERVER], ids=["default", "fork server"])
def test_workers_leave_a_signal_to_the_whole_group_to_their_parent(default):
    sent = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    assert read(default + READS + NOTES_SIGNALS, sent=sent) == (0, "reads\nhas read\n")


def test_workers_of_a_fork_server_end_with_a_process_that_is_killed():
    """They write to the same pipe, which ends when the last of them has closed it."""
    start = "import multiprocessing; multiprocessing.set_start_method('forkserver')"
    assert read(start + READS + DIES)[0] == -signal.SIGKILL


def test_mix_separates_its_arguments():
    assert len({mix(a, b) for a in range(50) for b in range(50)}) == 2500
    torch.manual_seed(mix(2**40, 2**50))  # any result is a legal seed
