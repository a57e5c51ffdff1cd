"""The progress bar of a run, and its heartbeat for `mas preprocess-status` on another machine."""

from __future__ import annotations

import os
import socket
import time
from types import TracebackType

from tqdm import tqdm

from preprocess.run_folder import PROGRESS, RunFolder

HEARTBEAT_SECONDS = 5.0


class ProgressBar:
    """Shards done and failed, items a second, time left; on stderr."""

    def __init__(self, folder: RunFolder, shards: int, *, unit: str, failed: int = 0) -> None:
        self.folder = folder
        self.unit = unit
        self.items = 0
        self.failed = failed
        self.made = 0  # shards of this run
        self._start = 0.0  # of the first item; workers need time to come up
        self._beat = 0.0
        self._bar = tqdm(total=shards, initial=failed, unit="shard", dynamic_ncols=True)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._show()
        self._bar.close()

    def skip(self, shards: int) -> None:
        """Shards that were done before; they do not count for the time left."""
        self._bar.initial += shards
        self._bar.n += shards

    def add(self, items: int) -> None:
        """Items that workers have seen since the last call."""
        self._start = self._start or time.time() - 1e-3
        self.items += items
        self._show()

    @property
    def seconds(self) -> float:
        """Since the first word from a worker."""
        return time.time() - self._start if self._start else 0.0

    def shard_done(self, *, failed: bool) -> None:
        self.failed += failed
        self.made += not failed
        self._bar.update(1)
        self._show()

    def _show(self) -> None:
        rate = self.items / max(self.seconds, 1e-3)
        self._bar.set_postfix_str(f"{rate:.1f} {self.unit}s/s, {self.failed} failed", refresh=False)
        self._bar.refresh()
        if time.time() - self._beat > HEARTBEAT_SECONDS:
            self._beat = time.time()
            self.folder.write(
                PROGRESS,
                {
                    "updated": self._beat,
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "items": self.items,
                    "made": self.made,
                    "seconds": round(self.seconds, 1),
                },
            )
