"""How much memory there is, and the most that a process has held.

In: nothing. Out: bytes, or megabytes of 2^20 bytes, whatever the system counts in.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def total_memory() -> int | None:
    """Bytes of memory of this machine; None where the system does not tell, as Windows."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_rss_mb() -> float:
    """What this process held at once at most, so far.

    On Linux `getrusage` in a fresh process still shows the peak of the one that started it.
    """
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    import resource  # here, because Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, kilobytes elsewhere
