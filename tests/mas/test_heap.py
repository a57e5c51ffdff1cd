"""Freed memory goes back to the system, a growing cache leaves none behind; large pages."""

import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from mas.cache import Cache
from mas.heap import Slabs, _find_trim, large_zeros, trim_heap

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")


def resident_mb() -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def run_alone(work: Callable[[], Any]) -> Any:
    """What `work` returns in a fresh process: this one has room left over from other tests."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work).result()


def trim() -> tuple[float, float, list[float]]:
    """MB that blocks took, that were left after trimming, and the sums of those in use."""
    trim_heap()
    before = resident_mb()
    blocks = [torch.ones(2**14) for _ in range(1000)]  # 64 kB: below every threshold
    kept = blocks[::10]
    del blocks
    held = resident_mb()
    trim_heap()
    return held - before, resident_mb() - before, [float(block.sum()) for block in kept]


@LINUX
def test_trimming_gives_back_what_lies_free_between_blocks_in_use():
    if _find_trim() is None:
        pytest.skip("needs glibc")
    held, left, sums = run_alone(trim)
    assert held > 40 and left < 20
    assert sums == [2**14] * 100


def test_trimming_without_glibc_does_nothing(monkeypatch):
    monkeypatch.setattr("mas.heap._find_trim", lambda: None)
    trim_heap()


def fill_caches() -> tuple[float, float]:
    """MB of a cache that grows to its whole length, and how much it took."""

    def fill() -> tuple[Cache, float]:
        cache = Cache(layers=8, rows=8, heads=8, length=576, head_width=64, dtype=torch.float32)
        before = resident_mb()
        for tokens in range(64, 577, 64):
            for layer in range(8):
                cache.attend(layer, vector, vector, vector, start=tokens - 1)
        return cache, resident_mb() - before

    vector = torch.ones(8, 8, 1, 64)
    fill()  # loads what attention needs
    trim_heap()
    cache, grown = fill()
    return sum(pair.nbytes for pair in cache.pairs) / 2**20, grown


@LINUX
def test_a_growing_cache_takes_no_more_than_its_keys_and_values():
    whole, grown = run_alone(fill_caches)
    assert whole == 144
    assert 0.5 * whole < grown < 1.05 * whole + 10


def test_unused_places_of_a_cache_that_grew_are_zero():
    cache = Cache(layers=1, rows=2, heads=2, length=80, head_width=4, dtype=torch.bfloat16)
    cache.pairs[0].fill_(torch.nan)  # as memory may hold anything
    vector = torch.ones(2, 2, 1, 4)
    for position in range(70):
        attended = cache.attend(0, vector, position * vector, vector, start=position)
        assert (attended == 1).all()
    keys = cache.keys[0]
    assert keys.shape == (2, 2, 80, 4) and keys.is_contiguous()
    assert (keys[:, :, :70] == torch.arange(70).view(-1, 1)).all() and (keys[:, :, 70:] == 0).all()


def test_large_pages_hold_zeros_and_slabs_pieces_that_do_not_overlap():
    zeros = large_zeros((3, 5), torch.bfloat16)
    assert zeros.shape == (3, 5) and (zeros == 0).all() and zeros.data_ptr() % 64 == 0
    assert large_zeros((0, 5), torch.float32).shape == (0, 5)
    slabs = Slabs()
    pieces = [slabs.take(size).fill_(i) for i, size in enumerate((100, 1, 2**26 + 1, 7))]
    assert all((piece == i).all() for i, piece in enumerate(pieces))
    assert all(piece.data_ptr() % 64 == 0 for piece in pieces)


def test_no_room_for_large_pages_is_out_of_memory():
    with pytest.raises(MemoryError, match="no room for"):
        large_zeros((2**62,), torch.uint8)
