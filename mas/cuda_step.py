"""A whole one-token step on a GPU as one kernel, mas/step.cu: compiled for a network, launched.

In: the tensors of a GPT in bfloat16, its cache, a token a row. Out: the state that predicts the
next token. NVRTC, which comes with PyTorch for CUDA, compiles the file in about a second for the
sizes of a network and a number of rows; cuda-bindings call it, and nothing is kept on the disk.
Only networks whose stages fit into the registers of a multiprocessor run this way, and few rows at
a time; the others run in the kernels of mas/cuda_kernels.py.
Axes: R rows, D width, T tokens, H width of a head, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mas.cache import Cache
from mas.cuda_blocks import Layer
from mas.gpt import GPTConfig, hidden_width

SOURCE = Path(__file__).with_name("step.cu")
THREADS = 512  # a program; what the file says
MOST_ROWS = 8  # that the tensor cores take at a time
MOST_LOADS = 12  # of 16 bytes, that a thread holds of the matrix of a stage
MOST_KEYS = 20  # likewise of keys and values
OLDEST = (8, 0)  # compute capability with tensor cores for bfloat16


class CUDAError(RuntimeError):
    """A call of the driver or the compiler failed."""


def sizes(
    config: GPTConfig, *, rows: int, processors: int, epsilons: tuple[float, float]
) -> dict[str, int | str] | None:
    """What mas/step.cu is compiled with, or None where such a network does not fit.

    Args:
        config: of the GPT.
        rows: pictures x guidance streams.
        processors: multiprocessors of the device.
        epsilons: of norms and of those of queries and keys.
    """
    programs = 2 ** (processors.bit_length() - 1)
    width, hidden, head_width = config.width, hidden_width(config), config.width // config.heads
    if width % 32 or hidden % 32 or head_width not in (16, 32, 64, 128, 256):
        return None
    if rows > MOST_ROWS or rows * config.heads > programs:
        return None
    loads = [
        _loads(3 * width, width, programs),
        _loads(hidden, width, programs) * (2 if config.gated else 1),
        _loads(width, hidden, programs),
    ]
    shares = min(programs // (rows * config.heads), head_width // 8)
    shares = 2 ** (shares.bit_length() - 1)
    keys = config.layout.length * head_width * 2 / (16 * THREADS)
    if max(loads) > MOST_LOADS or keys * (1 + 1 / shares) > MOST_KEYS:
        return None
    if -(-3 * width // programs) * rows > THREADS or -(-hidden // programs) * rows > THREADS:
        return None
    return {
        "LAYERS": config.layers,
        "ROWS": rows,
        "D": width,
        "F": hidden,
        "HEADS": config.heads,
        "H": head_width,
        "LENGTH": config.layout.length,
        "PROGRAMS": programs,
        "GATED": int(config.gated),
        "QK_NORM": int(config.qk_norm),
        "ROTARY": int(config.rotary),
        "NORM_EPSILON": f"{epsilons[0]!r}f",
        "QK_EPSILON": f"{epsilons[1]!r}f",
    }


def _loads(outputs: int, inputs: int, programs: int) -> int:
    """How often a thread loads 16 bytes for its part of a matrix."""
    share = -(-outputs // programs)
    groups = 2 ** (max(1, -(-share // 16)) - 1).bit_length()
    splits = THREADS // 32 // groups
    return -(-inputs // 32 // splits) * (1 if share <= 8 else 2) if splits else MOST_LOADS + 1


class Step:
    """Reads tokens into one cache; everything it needs lies at addresses that stay."""

    def __init__(
        self,
        defines: Mapping[str, int | str],
        layers: Sequence[Layer],
        cache: Cache,
        *,
        norm: Sequence[Tensor],
        positions_TD: Tensor,
        rotation: Sequence[Tensor],
    ) -> None:
        """Takes the addresses of weights and cache; who made them keeps them alive.

        Args:
            defines: of `sizes`, for as many rows as the cache has.
            layers: the tensors of the blocks.
            cache: of whole sequences.
            norm: weight and, for LayerNorm, bias of the last norm.
            positions_TD: what is added to the embedding of a token.
            rotation: cosine and sine for all positions, T H/2.
        """
        numbers = {name: int(defines[name]) for name in ("LAYERS", "ROWS", "D", "F", "PROGRAMS")}
        device, rows, width = positions_TD.device, numbers["ROWS"], numbers["D"]
        self.programs, self.shape = numbers["PROGRAMS"], (rows, width)
        addresses = [_addresses(*both) for both in zip(layers, cache.pairs, strict=True)]
        table = torch.tensor(addresses, dtype=torch.int64, device=device)
        blocks_R = numbers["LAYERS"] * rows
        zeros = partial(torch.zeros, dtype=torch.int64, device=device)  # of no launch
        self.before = (positions_TD, *rotation, norm[0], norm[-1])
        self.table = table
        self.scratch = (
            zeros((2 * blocks_R + rows) * width),  # states
            zeros(3 * blocks_R * width),  # queries, keys and values
            zeros(blocks_R * width // 2),  # what attention gave
            zeros(blocks_R * numbers["F"] // 2),  # between halves of the feedforward
        )
        self.launches = torch.zeros(1, dtype=torch.int32, device=device)
        self.kernel = _compile(tuple(defines.items()), device.index or 0)

    def read(self, tokens_R: Tensor, position_1: Tensor, embedding_VD: Tensor) -> Tensor:
        """The state that predicts what follows a token a row, R D.

        Args:
            tokens_R: long.
            position_1: long, where they stand.
            embedding_VD: of their stream.
        """
        state_RD = embedding_VD.new_empty(self.shape)
        tensors = (
            self.table,
            tokens_R.contiguous(),
            position_1,
            embedding_VD,
            *self.before,
            *self.scratch,
            state_RD,
            self.launches,
        )
        self.launches.add_(1)  # not by the kernel: no program knows whether all have read it
        self.kernel.launch(self.programs, tensors)
        return state_RD


def make_step(
    config: GPTConfig,
    layers: Sequence[Layer],
    cache: Cache,
    *,
    norm: Sequence[Tensor],
    positions_TD: Tensor,
    rotation: Sequence[Tensor],
    epsilons: tuple[float, float],
) -> Step | None:
    """A `Step` for a cache, or None where device, network or rows do not fit; arguments as there.

    Raises:
        ImportError: cuda-bindings are missing.
        CUDAError: the compiler or the driver failed.
    """
    pair = cache.pairs[0]
    properties = torch.cuda.get_device_properties(pair.device)
    capable = (properties.major, properties.minor) >= OLDEST
    if pair.dtype != torch.bfloat16 or not capable:
        return None
    defines = sizes(
        config,
        rows=pair.shape[1],
        processors=properties.multi_processor_count,
        epsilons=epsilons,
    )
    if defines is None:
        return None
    return Step(defines, layers, cache, norm=norm, positions_TD=positions_TD, rotation=rotation)


class _Kernel:
    """`read_token` on one device."""

    def __init__(self, code: bytes) -> None:
        from cuda.bindings import driver  # here, because not every machine has them

        self.driver = driver
        self.module = _check(driver.cuModuleLoadData(code))
        self.function = _check(driver.cuModuleGetFunction(self.module, b"read_token"))
        size = ctypes.c_int()
        address, length = _check(driver.cuModuleGetGlobal(self.module, b"shared_bytes"))
        _check(driver.cuMemcpyDtoH(ctypes.addressof(size), address, length))
        self.shared = size.value
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(self.function, attribute, self.shared))

    def launch(self, programs: int, tensors: Sequence[Tensor]) -> None:
        """On the current stream. The driver starts all programs together or none."""
        pointers = tuple(tensor.data_ptr() for tensor in tensors)
        arguments = (pointers, (ctypes.c_void_p,) * len(pointers))
        stream = torch.cuda.current_stream(tensors[0].device).cuda_stream
        sizes = (programs, 1, 1, THREADS, 1, 1, self.shared)
        _check(self.driver.cuLaunchCooperativeKernel(self.function, *sizes, stream, arguments))


@cache
def _compile(defines: tuple[tuple[str, int | str], ...], device: int) -> _Kernel:
    """The kernel for these sizes, loaded on a device."""
    from cuda.bindings import nvrtc  # here, because not every machine has them

    major, minor = torch.cuda.get_device_capability(device)
    options = [f"--gpu-architecture=sm_{major}{minor}", "-std=c++17"]
    options += [f"-D{name}={value}" for name, value in defines]
    program = _check(nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), b"step.cu", 0, [], []))
    try:
        encoded = [option.encode() for option in options]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CUDAError(f"{SOURCE.name} does not compile: {log.decode(errors='replace')}")
        code = bytearray(_check(nvrtc.nvrtcGetCUBINSize(program)))
        _check(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # the context of the device exists from here on
        return _Kernel(bytes(code))


def _check(result: tuple[Any, ...]) -> Any:
    """What a call gave besides its error code, which must be 0."""
    error, *values = result
    if error.value:
        raise CUDAError(f"{type(error).__name__} {error.name}")
    return values[0] if len(values) == 1 else tuple(values)


def _addresses(layer: Layer, pair: Tensor) -> list[int]:
    """A `Block` of mas/step.cu."""
    tensors = (
        *_two(layer.attention_norm),
        layer.to_qkv,
        *_two(layer.qk_norm),
        layer.to_out,
        *_two(layer.feedforward_norm),
        layer.expand,
        layer.contract,
        pair,
    )
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _two(tensors: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    first, second = (*tensors, None, None)[:2]
    return first, second
