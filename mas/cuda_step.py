"""A whole one-token step on a GPU as one kernel, mas/step.cu: compiled for a network, launched.

In: the tensors of a GPT in bfloat16, its cache, a token a row. Out: the state that predicts the
next token. NVRTC, which comes with PyTorch for CUDA, compiles the file in about a second for the
sizes of a network and a number of rows; cuda-bindings call it, and nothing is kept on the disk.
Only networks of which two thirds of a block fit into the shared memory of all multiprocessors run
this way, and few rows at a time; the others run in the kernels of mas/cuda_kernels.py.
Axes: R rows, D width, T tokens, H width of a head, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mas.cache import Cache
from mas.cuda_blocks import Layer
from mas.gpt import GPTConfig, hidden_width

SOURCE = Path(__file__).with_name("step.cu")
PARTS = ("step_device.cuh", "step_matrices.cuh", "step_attention.cuh")  # which it includes
THREADS = 512  # a program; what the file says, as the next two
EMPTY = -1  # in scratch memory: what nobody has given yet
MOST_ROWS = 8  # that the tensor cores take at a time
MOST_KEYS = 20  # of 16 bytes, that a thread holds of keys and values
PAD = 32  # numbers between rows of the state in shared memory
OLDEST = (8, 0)  # compute capability with tensor cores for bfloat16 and copies past the registers
COPY_ENGINE = (9, 0)  # with an engine that copies rows


class CUDAError(RuntimeError):
    """A call of the driver or the compiler failed."""


class Processors(NamedTuple):
    """What a step knows of a device."""

    number: int  # of multiprocessors
    shared_bytes: int  # of memory a program may have
    copy_engine: bool


def sizes(
    config: GPTConfig, *, rows: int, processors: Processors, epsilons: tuple[float, float]
) -> dict[str, int | str] | None:
    """What mas/step.cu is compiled with, or None where such a network does not fit.

    Args:
        config: of the GPT.
        rows: pictures x guidance streams.
        processors: of the device.
        epsilons: of norms and of those of queries and keys.
    """
    programs = 2 ** (processors.number.bit_length() - 1)
    width, hidden, head_width = config.width, hidden_width(config), config.width // config.heads
    if width % 32 or hidden % 32 or head_width not in (32, 64, 128, 256):
        return None
    if rows > MOST_ROWS or rows * config.heads > programs:
        return None
    columns = head_width // _shares(programs // (rows * config.heads), head_width)
    keys_a_warp = 8 * -(-config.layout.length // (8 * THREADS // 32))
    loads = keys_a_warp // 8 * (head_width // 32) + -(-keys_a_warp * columns // 256)
    if loads > MOST_KEYS or -(-width // programs) * rows > THREADS:
        return None
    attention = config.layout.length + 16 * (columns + 64)  # floats, at most
    norms = width * (2 if config.gated else 4) + 2 * head_width * config.qk_norm  # numbers
    others = (
        2 * norms
        + 2 * rows * (max(width, hidden) + PAD)
        + 4 * rows * THREADS // 2 * (2 if config.gated else 1)
        + 4 * attention
        + 88 * config.layers
        + 256
    )
    if 2 * _slot_bytes(width, hidden, programs, gated=config.gated) + others > (
        processors.shared_bytes
    ):
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
        "SHARED_LIMIT": processors.shared_bytes,
        "COPY_ENGINE": int(processors.copy_engine),
    }


def _shares(programs: int, head_width: int) -> int:
    """Programs that share a head."""
    return 2 ** (max(1, min(programs, head_width // 8)).bit_length() - 1)


def _slot_bytes(width: int, hidden: int, programs: int, *, gated: bool) -> int:
    """Shared memory for a third of a block: the largest of those that mas/step.cu loads."""

    def tile(outputs: int, inputs: int, unit: int = 1) -> int:
        return unit * -(-outputs // (unit * programs)) * inputs * 2

    return max(
        tile(3 * width, width) + tile(width, width),
        tile(hidden, width, unit=2) * (2 if gated else 1),
        tile(width, hidden),
    )


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
        device = positions_TD.device
        self.programs = int(defines["PROGRAMS"])
        self.shape = int(defines["ROWS"]), int(defines["D"])
        addresses = [_addresses(*both) for both in zip(layers, cache.pairs, strict=True)]
        self.kernel = _compile(tuple(defines.items()), device.index or 0)
        self.before = (positions_TD, *rotation, norm[0], norm[-1])
        self.table = torch.tensor(addresses, dtype=torch.int64, device=device)
        # Two of them: a launch uses one and empties the other.
        self.scratch = torch.full(
            (2, self.kernel.scratch_words), EMPTY, dtype=torch.int32, device=device
        )
        self.counts = torch.zeros(2, dtype=torch.int32, device=device)  # programs: begun and ended

    def read(
        self,
        tokens_R: Tensor,
        position_1: Tensor,
        embedding_VD: Tensor,
        *,
        out_RD: Tensor | None = None,
    ) -> Tensor:
        """The state that predicts what follows a token a row, R D.

        Args:
            tokens_R: long.
            position_1: long, where they stand; it goes on by one.
            embedding_VD: of their stream.
            out_RD: contiguous; where the state goes.
        """
        state_RD = embedding_VD.new_empty(self.shape) if out_RD is None else out_RD
        tensors = (
            self.table,
            tokens_R.contiguous(),
            position_1,
            embedding_VD,
            *self.before,
            self.scratch,
            state_RD,
            self.counts,
        )
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
    processors = Processors(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # not in its stub
        (properties.major, properties.minor) >= COPY_ENGINE,
    )
    defines = sizes(config, rows=pair.shape[1], processors=processors, epsilons=epsilons)
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
        self.shared, self.scratch_words = self._read(b"shared_bytes"), self._read(b"scratch_words")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(self.function, attribute, self.shared))

    def _read(self, name: bytes) -> int:
        number = ctypes.c_int()
        address, length = _check(self.driver.cuModuleGetGlobal(self.module, name))
        _check(self.driver.cuMemcpyDtoH(ctypes.addressof(number), address, length))
        return number.value

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
    parts = [SOURCE.with_name(name) for name in PARTS]
    program = _check(
        nvrtc.nvrtcCreateProgram(
            SOURCE.read_bytes(),
            SOURCE.name.encode(),
            len(parts),
            [part.read_bytes() for part in parts],
            [part.name.encode() for part in parts],
        )
    )
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
