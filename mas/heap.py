"""Memory: given back to the system when it is no longer used, and taken in large pages.

glibc keeps freed blocks of up to 32 MB once it has seen some of that size, and blocks that live on
between them split what is free: it is lost to larger blocks, yet counts as memory of the process.
What a token step reads from end to end is read faster where pages are large (2 MB instead of 4 KB),
which Linux does for memory of which it is asked.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from functools import cache
from typing import Any

import torch
from torch import Tensor

LARGE_PAGE = 2**21  # bytes
SLAB = 2**26  # bytes of address space that are asked for at a time
LINE = 64  # bytes at a multiple of which pieces begin


def trim_heap() -> None:
    """Gives the free pages of the heap back where the C library is glibc; else does nothing."""
    trim = _find_trim()
    if trim is not None:
        trim(0)


def large_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU, in large pages where the system has them; untouched ones cost nothing.

    Raises:
        MemoryError: there is no room for so many.
    """
    size = math.prod(shape) * dtype.itemsize
    if not hasattr(mmap, "MADV_HUGEPAGE") or size == 0:
        return torch.zeros(shape, dtype=dtype)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        pages = mmap.mmap(-1, size + LARGE_PAGE, flags=private)
    except OSError as error:
        raise MemoryError(f"no room for {size} bytes in large pages") from error
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        pass
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    first = -memory.data_ptr() % LARGE_PAGE
    return memory[first : first + size].view(dtype).view(shape)


class Slabs:
    """Many pieces of memory in as few large pages as they fill; freed together."""

    def __init__(self) -> None:
        self.rest = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """A piece of `size` bytes, uint8."""
        room = math.ceil(size / LINE) * LINE
        if room > len(self.rest):
            self.rest = large_zeros((max(room, SLAB),), torch.uint8)
        piece, self.rest = self.rest[:size], self.rest[room:]
        return piece


@cache
def _find_trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # Windows: a library must have a name there
        return None
