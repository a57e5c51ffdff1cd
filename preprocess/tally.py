"""Counts of one shard: samples, rejects by reason, classes, seconds per stage."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL

from mas.scene import CLASS_NAMES
from mas.shards import Sample
from preprocess.rejects import Reject
from preprocess.runner import Report

REPORT_EVERY = 16  # photos between two words to the progress bar


class Tally:
    """Collects while a shard is worked on; threads may share it."""

    def __init__(self) -> None:
        self.samples = 0
        self.rejected: Counter[str] = Counter()
        self._rejects: list[tuple[int, dict[str, str]]] = []
        self._refused: set[str] = set()  # keys of which the reader refused something
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._pixels: Counter[str] = Counter()
        self._photos: Counter[str] = Counter()  # that show a class
        self._people = 0
        self._void = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Adds the seconds of the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[stage] += time.perf_counter() - start

    def counted(self, samples: Iterable[Sample], report: Report) -> Iterator[Sample]:
        """Counts and times what is read, and tells the progress bar now and then."""
        iterator, told = iter(samples), 0
        while True:
            with self.time("read"):
                sample = next(iterator, None)
            if sample is None:
                break
            yield sample
            self.samples += 1
            if self.samples - told >= REPORT_EVERY:
                report(self.samples - told)
                told = self.samples
        report(self.samples - told)

    def reject(self, key: str, reason: str, detail: str, *, index: int = -1) -> None:
        """Notes a dropped sample; `index` is its place in the shard, -1 what the reader refused."""
        reason = Reject(reason).value
        with self._lock:
            if reason == Reject.NO_PHOTO.value and key in self._refused:
                return  # the reader has said why
            if index < 0:
                self._refused.add(key)
            self.rejected[reason] += 1
            self._rejects.append((index, {"key": key, "reason": reason, "detail": detail}))

    def why_rejected(self, key: str) -> str:
        """Reason and detail of the first reject of a key."""
        rejects = [reject for _, reject in self._rejects if reject["key"] == key]
        return f"{rejects[0]['reason']}: {rejects[0]['detail']}" if rejects else "not in the input"

    def add_scene(self, summary: dict[str, Any]) -> None:
        """Counts the `scene` block of one written sample."""
        with self._lock:
            self._pixels.update(summary["classes"])
            self._photos.update(summary["classes"].keys())
            self._people += summary["people"]
            self._void += summary["void"]

    def reject_lines(self) -> bytes:
        """The content of rejects.jsonl, in the order of the shard."""
        rejects = sorted(self._rejects, key=lambda reject: reject[0])
        return "".join(json.dumps(reject) + "\n" for _, reject in rejects).encode()

    def stats(self, *, photos_out: int) -> dict[str, Any]:
        """What stats.json says of the shard."""
        return {
            "photos_in": self.samples,
            "photos_out": photos_out,
            "rejected": {r.value: self.rejected[r.value] for r in Reject if self.rejected[r.value]},
            "people": self._people,
            "versions": {"pillow": PIL.__version__, "numpy": np.__version__},
            "void": round(self._void / max(1, photos_out), 4),
            "seconds": {stage: round(seconds, 3) for stage, seconds in self._seconds.items()},
            "classes": {
                name: {"photos": self._photos[name], "pixels": self._pixels[name]}
                for name in CLASS_NAMES
                if name in self._photos
            },
        }
