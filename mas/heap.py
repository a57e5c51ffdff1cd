"""Memory that is no longer used goes back to the system.

glibc keeps freed blocks of up to 32 MB once it has seen some of that size, and blocks that live on
between them split what is free: it is lost to larger blocks, yet counts as memory of the process.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def trim_heap() -> None:
    """Gives the free pages of the heap back where the C library is glibc; else does nothing."""
    trim = _find_trim()
    if trim is not None:
        trim(0)


@cache
def _find_trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # Windows: a library must have a name there
        return None
