"""What this machine has for a process: memory, CPUs, and the process that started it.

In: nothing. Out: bytes, or megabytes of 2^20 bytes, whatever the system counts in; numbers of CPUs.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
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


def usable_cores() -> int:
    """CPUs that this process may run on, which a batch system or a container may have limited."""
    if hasattr(os, "sched_getaffinity"):  # macOS does not say
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def end_with_parent() -> None:
    """Has this process end when the one that started it does, also by a signal."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
