"""The most memory that a process has held.

In: nothing. Out: megabytes of 2^20 bytes, for benchmarks and for the record of a shard.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_rss_mb() -> float:
    """What this process held at once at most, so far.

    On Linux `getrusage` in a fresh process still shows the peak of the one that started it.
    """
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, kilobytes elsewhere
