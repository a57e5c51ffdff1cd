"""Where and how exactly the GPT computes while sampling: device, number format, memory.

In: the float32 GPT, or the folder it lies in. Out: a decoder for the loop in mas/generate.py.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from mas.cuda_decoder import CUDADecoder
from mas.decoder import CPUDecoder
from mas.errors import first_line
from mas.fast_decoder import FastDecoder, can_step
from mas.generate import Decoder
from mas.gpt import GPT, GPTConfig
from mas.machine import total_memory
from mas.quantize import FloatLinear, make_int8
from mas.rounding import has_float64
from mas.storage import CONFIG_FILE, StoredTensors, parse_config, read_json

Precision = Literal["auto", "float32", "bfloat16", "int8"]
MEMORY_INFO = Path("/proc/meminfo")
LARGE = 20_000_000  # parameters from which int8 is a good default without the fast step
SPARE = 300 * 2**20  # bytes left for everything that is not the cache


@dataclass(frozen=True)
class StoredGPT:
    """A GPT folder of which only the config is read; sampling needs no more of it at once."""

    folder: Path
    device: torch.device  # where it shall compute

    @cached_property
    def config(self) -> GPTConfig:
        """Sizes of the GPT; StorageError when they are missing or illegal."""
        path = self.folder / CONFIG_FILE
        return parse_config(GPTConfig, read_json(path), path)

    @cached_property
    def tensors(self) -> StoredTensors:
        """Its weights, each read from the disk when asked for."""
        return StoredTensors(self.folder, GPT, self.config)

    def load(self) -> GPT:
        """The whole network in float32."""
        return GPT.from_pretrained(self.folder).to(self.device)


def choose_device(name: str) -> torch.device:
    """`auto` is a CUDA device where there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        kind = torch.float64 if has_float64(device) else torch.float32  # for the draw of tokens
        torch.zeros(1, device=device, dtype=kind).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device {name!r} cannot be used here ({first_line(error)}); use auto or cpu"
        ) from error
    return device


def choose_precision(gpt: GPT | StoredGPT, precision: Precision) -> Precision:
    """Resolves `auto` for the network and the device it lies on.

    Raises:
        ValueError: a precision that is unknown, or int8 on another device than the CPU.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}, use one of {', '.join(get_args(Precision))}")
    on_cpu = gpt.device.type == "cpu"
    if precision == "int8" and not on_cpu:
        raise ValueError(f"int8 runs on the CPU only, not on {gpt.device}; use bfloat16 there")
    if precision != "auto":
        return precision
    if not on_cpu:
        return "bfloat16"
    if can_step(gpt.config):
        return "int8"  # faster at every size
    numbers = gpt.tensors.numbers if isinstance(gpt, StoredGPT) else count_parameters(gpt)
    return "int8" if numbers >= LARGE else "float32"


def make_decoder(gpt: GPT | StoredGPT, precision: Precision) -> Decoder:
    """The network in one number format (not `auto`); `gpt` itself stays as it is.

    On a CPU a stored GPT is converted tensor by tensor, so that no more than the result and one
    float32 matrix exist at a time; on another device float32 weights never get there unasked.
    """
    if gpt.device.type != "cpu":
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        if isinstance(gpt, StoredGPT):
            network = GPT.from_pretrained(gpt.folder).to(dtype).to(gpt.device)
        else:
            network = gpt if gpt.dtype == dtype else copy.deepcopy(gpt).to(dtype)
        return (
            CUDADecoder(network, kernels="persistent") if network.device.type == "cuda" else network
        )
    tensors = tensors_of(gpt)
    if precision == "float32":
        make_linear = partial(FloatLinear, dtype=torch.float32)
        return CPUDecoder(gpt.config, tensors, make_linear=make_linear, stored=torch.float32)
    if precision == "int8" and can_step(gpt.config):
        return FastDecoder(gpt.config, tensors)
    make_linear = partial(FloatLinear, dtype=torch.bfloat16)
    return CPUDecoder(
        gpt.config,
        tensors,
        make_linear=make_int8 if precision == "int8" else make_linear,
        stored=torch.bfloat16,
    )


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Keeps away what a program has set up for its own work: autocast and a default device."""
    with ExitStack() as stack:
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def count_parameters(gpt: GPT) -> int:
    return sum(parameter.numel() for parameter in gpt.parameters())


def tensors_of(gpt: GPT | StoredGPT) -> Mapping[str, Tensor]:
    """The state of a GPT by name."""
    return gpt.tensors if isinstance(gpt, StoredGPT) else gpt.state_dict()


def pictures_that_fit(decoder: Decoder, config: GPTConfig) -> int:
    """How many pictures' caches, with guidance, fit into the memory that is free now."""
    per_row = 2 * config.layers * config.layout.length * config.width
    bytes_each = 2 * per_row * torch.finfo(decoder.dtype).bits // 8
    free = free_memory(decoder.device)
    if isinstance(decoder, CUDADecoder):
        free += decoder.idle_bytes
    return max(0, free - SPARE) // bytes_each


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on `device`; as many as can be counted where nobody knows."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if MEMORY_INFO.is_file():
        for line in MEMORY_INFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return total_memory() or sys.maxsize
