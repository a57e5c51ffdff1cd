"""How far something is: a bar on a terminal, a line now and then where stderr is a file.

A run over shards has a heartbeat, too, for `mas preprocess-status` on another machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from tqdm import tqdm

from preprocess.run_folder import PROGRESS, RunFolder

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
SHOW_SECONDS = 0.5
LINE_SECONDS = 30.0  # between two lines where no terminal shows a bar
SETTLED_SECONDS = 2.0  # before that a rate means nothing


COUNT = "{desc}: {n_fmt}, {rate_noinv_fmt}"  # as tqdm writes it
COUNT_OF_TOTAL = "{desc}: {n_fmt} of {total_fmt}, {rate_noinv_fmt}, {remaining} left"


@contextlib.contextmanager
def counting(
    total: int | None, *, name: str, unit: str, initial: int = 0, **scale: Any
) -> Iterator[Callable[[int], Any]]:
    """Shows how far a count is; yields what is to be told of so many more.

    Args:
        total: where the count ends; None = not known.
        name: what the count is of.
        unit: of the count.
        initial: what it starts from.
        scale: options of tqdm for how numbers are written.
    """
    if sys.stderr.isatty():
        with tqdm(total=total, desc=name, unit=unit, initial=initial, **scale) as bar:
            yield bar.update
        return
    start = told = time.monotonic()
    count = initial

    def tell(more: int) -> None:
        nonlocal count, told
        count += more
        if time.monotonic() - told > LINE_SECONDS:
            told = time.monotonic()
            words: dict[str, Any] = {"prefix": name, "unit": unit, "initial": initial, **scale}
            words["bar_format"] = COUNT_OF_TOTAL if total else COUNT
            line = tqdm.format_meter(count, total or 0, told - start, **words)
            logger.info(" ".join(line.split()))  # it aligns numbers

    yield tell


class ProgressBar:
    """Shards done and failed, items a second, time left; on stderr, in a file as lines.

    A thread shows it and writes the heartbeat, for a single shard may take an hour; at a distance
    that does not change when the clock is set.
    """

    def __init__(self, folder: RunFolder, shards: int, *, unit: str) -> None:
        self.folder = folder
        self.shards = shards
        self.unit = unit
        self.items = 0
        self.failed = 0
        self.made = 0  # shards of this run
        self.skipped = 0  # shards of earlier runs
        self.workers = 1  # at work at once
        self.pull: Callable[[], int | None] = lambda: None  # what workers elsewhere have seen
        self._start = 0.0  # of the first shard; workers need time to come up
        self._beat = 0.0
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=shards, unit="shard", dynamic_ncols=True)
        self._told = time.monotonic()  # when the last line was written
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> ProgressBar:
        self._beat_now()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._bar is not None:
            self._paint(self._bar)
            self._bar.close()
        with contextlib.suppress(OSError):  # the output may be what broke
            self.folder.remove(PROGRESS)

    def skip(self, shards: int, *, failed: int) -> None:
        """Shards that were done or failed before; they do not count for the time left."""
        self.skipped += shards
        self.failed += failed
        if self._bar is not None:
            self._bar.initial += shards + failed
            self._bar.n += shards + failed

    def add(self, items: int | None) -> None:
        """Items that workers have seen since the last call; 0 when one begins, None = no word."""
        if items is not None:
            self._start = self._start or time.monotonic()
            self.items += items

    @property
    def seconds(self) -> float:
        """Since the first word from a worker."""
        return time.monotonic() - self._start if self._start else 0.0

    def shard_done(self, *, failed: bool) -> None:
        self.failed += failed
        self.made += not failed
        if self._bar is not None:
            self._bar.update(1)

    def _loop(self) -> None:
        while not self._stop.wait(SHOW_SECONDS):
            self.add(self.pull())
            if self._bar is not None:
                self._paint(self._bar)
            elif time.monotonic() - self._told > LINE_SECONDS:
                self._told = time.monotonic()
                logger.info(self.describe())
            if time.monotonic() - self._beat > HEARTBEAT_SECONDS:
                self._beat_now()

    def describe(self) -> str:
        """One line: how far the run is."""
        line = f"{self.skipped + self.made} of {self.shards} shards done, {self.failed} failed"
        if self.seconds > SETTLED_SECONDS:
            line += f", {self.items / self.seconds:.1f} {self.unit}s/s"
        if self.made:
            left = self.shards - self.skipped - self.made - self.failed
            line += f", {tqdm.format_interval(self.seconds / self.made * left)} left"
        return line

    def _paint(self, bar: tqdm) -> None:
        settled = self.seconds > SETTLED_SECONDS
        rate = f"{self.items / self.seconds:.1f} {self.unit}s/s, " if settled else ""
        bar.set_postfix_str(f"{rate}{self.failed} failed", refresh=False)
        bar.refresh()

    def _beat_now(self) -> None:
        self._beat = time.monotonic()
        content = {
            "updated": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "items": self.items,
            "made": self.made,
            "seconds": round(self.seconds, 1),
        }
        with contextlib.suppress(OSError):  # a full disk stops the workers, which tell why
            self.folder.write(PROGRESS, content)
