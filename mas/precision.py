"""Where and how exactly the GPT computes while sampling: device, number format, memory.

In: the float32 GPT. Out: a decoder for the loop in mas/generate.py.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Literal, get_args

import torch

from mas.generate import Decoder
from mas.gpt import GPT, GPTConfig
from mas.quantize import Bfloat16Linear, Int8Linear, with_linears

Precision = Literal["auto", "float32", "bfloat16", "int8"]
MEMORY_INFO = Path("/proc/meminfo")
SPARE = 300 * 2**20  # bytes left for everything that is not the cache


def choose_device(name: str) -> torch.device:
    """`auto` is a CUDA device where there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device, dtype=torch.float64)  # the draw of tokens needs it
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {name!r} cannot be used here ({reason}); use auto or cpu"
        ) from error
    return device


def make_decoder(gpt: GPT, precision: Precision) -> Decoder:
    """The network in the number format asked for; `gpt` itself stays float32.

    Raises:
        ValueError: a precision that is unknown, or int8 on another device than the CPU.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}, use one of {', '.join(get_args(Precision))}")
    on_cpu = gpt.device.type == "cpu"
    if precision == "auto":
        precision = "float32" if on_cpu else "bfloat16"
    if precision == "float32":
        return gpt
    if on_cpu:
        return with_linears(gpt, Int8Linear if precision == "int8" else Bfloat16Linear)
    if precision == "int8":
        raise ValueError(f"int8 runs on the CPU only, not on {gpt.device}; use bfloat16 there")
    return copy.deepcopy(gpt).to(torch.bfloat16)


def pictures_that_fit(decoder: Decoder, config: GPTConfig) -> int:
    """How many pictures' caches, with guidance, fit into the memory that is free now."""
    per_row = 2 * config.layers * config.layout.length * config.width
    bytes_each = 2 * per_row * torch.finfo(decoder.dtype).bits // 8
    return max(0, free_memory(decoder.device) - SPARE) // bytes_each


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if MEMORY_INFO.is_file():
        for line in MEMORY_INFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
