"""The progress bar of a run, and its heartbeat for `mas preprocess-status` on another machine."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

from preprocess.run_folder import PROGRESS, RunFolder

HEARTBEAT_SECONDS = 5.0
SHOW_SECONDS = 0.5
SETTLED_SECONDS = 2.0  # before that a rate means nothing


class ProgressBar:
    """Shards done and failed, items a second, time left; on stderr.

    A thread shows it and writes the heartbeat, for a single shard may take an hour.
    """

    def __init__(self, folder: RunFolder, shards: int, *, unit: str, failed: int = 0) -> None:
        self.folder = folder
        self.unit = unit
        self.items = 0
        self.failed = failed
        self.made = 0  # shards of this run
        self.pull: Callable[[], int | None] = lambda: None  # what workers elsewhere have seen
        self._start = 0.0  # of the first shard; workers need time to come up
        self._beat = 0.0
        self._bar = tqdm(total=shards, initial=failed, unit="shard", dynamic_ncols=True)
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
        self._show()
        self._bar.close()
        with contextlib.suppress(OSError):  # the output may be what broke
            self.folder.remove(PROGRESS)

    def skip(self, shards: int) -> None:
        """Shards that were done before; they do not count for the time left."""
        self._bar.initial += shards
        self._bar.n += shards

    def add(self, items: int | None) -> None:
        """Items that workers have seen since the last call; 0 when one begins, None = no word."""
        if items is not None:
            self._start = self._start or time.time()
            self.items += items

    @property
    def seconds(self) -> float:
        """Since the first word from a worker."""
        return time.time() - self._start if self._start else 0.0

    def shard_done(self, *, failed: bool) -> None:
        self.failed += failed
        self.made += not failed
        self._bar.update(1)

    def _loop(self) -> None:
        while not self._stop.wait(SHOW_SECONDS):
            self.add(self.pull())
            self._show()
            if time.time() - self._beat > HEARTBEAT_SECONDS:
                self._beat_now()

    def _show(self) -> None:
        settled = self.seconds > SETTLED_SECONDS
        rate = f"{self.items / self.seconds:.1f} {self.unit}s/s, " if settled else ""
        self._bar.set_postfix_str(f"{rate}{self.failed} failed", refresh=False)
        self._bar.refresh()

    def _beat_now(self) -> None:
        self._beat = time.time()
        content = {
            "updated": self._beat,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "items": self.items,
            "made": self.made,
            "seconds": round(self.seconds, 1),
        }
        with contextlib.suppress(OSError):  # a full disk stops the workers, which tell why
            self.folder.write(PROGRESS, content)
