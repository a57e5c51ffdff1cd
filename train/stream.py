"""Which sample comes when: an endless, seeded, shuffled stream that resumes to the sample.

In: anything with a length and items. Out: batches. Samples are numbered 0, 1, 2, … and never again
from 0: sample n lies in epoch n // N at place n % N of that epoch's permutation, and everything
random about it follows from (seed, n). So the whole state of data loading is one number, the
samples consumed; it does not depend on how many workers or ranks there are.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import struct
import sys
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # that end a run
ORPHANED = 2.0  # seconds after which a loader worker notices that its training process is gone
ENDLESS = 2**40  # batches; training stops by steps, never because a loader runs dry
FEISTEL_ROUNDS = 6


class Items(Protocol):
    """A sized collection whose items may draw at random (captions, flips)."""

    def __len__(self) -> int: ...

    def item(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        """Item `index`; `rng` is None where nothing may be random (validation)."""


def mix(*numbers: int) -> int:
    """64 well-mixed bits of some non-negative numbers: seeds for independent random draws."""
    content = struct.pack(f"<{len(numbers)}Q", *numbers)
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def permute(place: int, *, count: int, seed: int) -> int:
    """Entry `place` of a random permutation of range(count), without holding the permutation.

    A Feistel network permutes the smallest even-bit range that covers `count`; results outside are
    sent through again (cycle walking), which keeps it a permutation of range(count).
    """
    assert 0 <= place < count
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (mix(seed, turn, right) & mask)
        place = left << half | right
        if place < count:
            return place


class Stream(Dataset):
    """Sample number → item, in a new order every epoch."""

    def __init__(self, items: Items, *, seed: int) -> None:
        self.items = items
        self.seed = seed

    def __getitem__(self, number: int) -> dict[str, Any]:
        epoch, place = divmod(number, len(self.items))
        index = permute(place, count=len(self.items), seed=mix(self.seed, epoch))
        rng = np.random.default_rng([self.seed, number])
        return {"number": number, **self.items.item(index, rng)}


class Numbers(Sampler[list[int]]):
    """The sample numbers of this rank's batches, from the first sample not yet consumed."""

    def __init__(self, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.consumed = 0  # samples, all ranks together

    def __iter__(self) -> Iterator[list[int]]:
        start = self.consumed + self.rank * self.batch_size
        while True:
            yield list(range(start, start + self.batch_size))
            start += self.batch_size * self.world

    def __len__(self) -> int:
        return ENDLESS


class PlainLoader(DataLoader):
    """A loader whose workers' errors read like those of the training process."""

    def __init__(self, dataset: Dataset, *, workers: int, **options: Any) -> None:
        super().__init__(
            dataset,
            num_workers=workers,
            multiprocessing_context=start_method() if workers else None,
            pin_memory=torch.cuda.is_available(),  # from where a GPU takes batches by itself
            worker_init_fn=ignore_signals,
            **options,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # any iterator will do
        try:
            yield from super().__iter__()
        except (ValueError, OSError) as error:
            if not str(error).startswith("Caught "):
                raise
            # The text is the worker's traceback; its last line is `module.Error: message`.
            raise ValueError(str(error).strip().splitlines()[-1].partition(": ")[2]) from error


class StreamLoader(PlainLoader):
    """Loads a stream and remembers how much of it was handed out (not: prefetched)."""

    def __init__(self, stream: Stream, numbers: Numbers, *, workers: int) -> None:
        self.numbers = numbers
        super().__init__(stream, workers=workers, batch_sampler=numbers)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # any iterator will do
        for batch in super().__iter__():
            self.numbers.consumed += self.numbers.batch_size * self.numbers.world
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.numbers.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.numbers.consumed = state["consumed"]


def start_method() -> str | None:
    """How loader workers start: forked on Linux, unless the program has chosen; None = as it is.

    From Python 3.14 on a fork server would start them, which a signal to all processes of a run
    ends, and with it the loading.
    """
    if sys.platform == "linux" and multiprocessing.get_start_method(allow_none=True) is None:
        return "fork"
    return None


def ignore_signals(worker: int) -> None:
    """For loader workers: a signal to all processes is the training process's to answer.

    It stops after the step at hand and saves; a worker that died of the signal would spoil that.
    Only SIGTERM of the training process itself ends a worker: with it Python, as it exits, ends
    those that are left over (something still refers to their iterator, such as the traceback of
    an error) and waits until they have ended. So does its death, which torch does not see where
    workers are started by a fork server.
    """
    for number in set(STOPPING) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # macOS has none: there a worker dies of any SIGTERM
        # Blocked before any other thread is there to inherit it, so that all leave it to this one.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends the process at the first SIGTERM of the process that started it, or when that dies."""
    parent = multiprocessing.parent_process()  # not the fork server that may lie between them
    assert parent is not None
    while parent.is_alive():
        found = signal.sigtimedwait({signal.SIGTERM}, ORPHANED)
        if found is not None and found.si_pid == parent.pid:
            break
    os._exit(0)  # anything else would be reported as a worker that failed


class Fixed(Dataset):
    """Every `world`-th item in order, without chance: validation.

    Ranks step together, so all get as many; up to `world` - 1 items at the end are left out.
    """

    def __init__(self, items: Items, *, rank: int = 0, world: int = 1) -> None:
        self.items = items
        self.indices = range(rank, len(items) // world * world, world)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.items.item(self.indices[place], None)
