"""The GPT in 8 bits with steps of our own: mas/step_kernels.h, one call a token.

In: the config and tensors of a `mas.gpt.GPT`. Out: what the loop in mas/generate.py needs. The
compiled library reads matrices at about the speed of the memory, where PyTorch takes as long again
for its kernels and between them. It needs a C compiler at installation and a CPU with AVX-512 VNNI,
AVX2, or the dot products of Arm; `find_steps` says what was there. What each kind computes is the
same to the bit: what `mas.decoder.CPUDecoder` computes with `mas.quantize.Int8Linear`, but that
queries and weights of the attention stay float32.
Axes: R rows, T tokens, D width, N heads, H width of a head, K inputs, V outputs or vocabulary.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Mapping
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_void_p
from functools import cache, partial
from itertools import count, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mas.cache import Cache
from mas.decoder import CPUDecoder, Layer, Norm
from mas.filter import Sampling, count_kept
from mas.gpt import GPTConfig, make_cache
from mas.heap import Slabs
from mas.quantize import Linear
from mas.rounding import LARGEST_INT8, to_int8

VERSION = 3  # of the calls of mas/step.c
MOST_HEAD_WIDTH = 256  # that its attention has room for
MOST_INPUTS = 2**16  # of a matrix: sums of more products could leave 32 bits


class Step(NamedTuple):
    """The calls of the compiled library for one kind of instructions, or why there are none."""

    calls: dict[str, Any]  # without the step_ before and the kind behind their names; {} = none
    state: str


class CMatrix(ctypes.Structure):
    """`Matrix` of mas/step_matrices.h."""

    _fields_ = (
        ("packed", c_void_p),
        ("scale_V", c_void_p),
        ("outputs", c_int64),
        ("inputs", c_int64),
    )


class CNorm(ctypes.Structure):
    """`Norm` of mas/step_vectors.h."""

    _fields_ = (("weight_D", c_void_p), ("bias_D", c_void_p))


class CLayer(ctypes.Structure):
    """`Layer` of mas/step_kernels.h."""

    _fields_ = (
        *((name, CNorm) for name in ("attention_norm", "q_norm", "k_norm", "feedforward_norm")),
        *((name, CMatrix) for name in ("to_qkv", "to_out", "expand", "contract")),
    )


class CModel(ctypes.Structure):
    """`Model` of mas/step_kernels.h."""

    _fields_ = (
        *((name, c_int64) for name in ("layers", "width", "heads", "gated")),
        ("layer", POINTER(CLayer)),
        ("norm", CNorm),
        ("cosine_TH", c_void_p),
        ("sine_TH", c_void_p),
    )


class CDraw(ctypes.Structure):
    """`Draw` of mas/step_draw.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("logits_BV", "others_BV", "uniform_B")),
        *((name, c_double) for name in ("guidance", "temperature", "top_p")),
        *((name, c_int64) for name in ("top_k", "rows", "vocabulary")),
    )


CALLS: dict[str, list[Any]] = {  # of mas/step_kernels.h and mas/step_draw.h: result, arguments
    "packed_bytes": [c_int64, c_int64, c_int64],
    "pack": [None, c_void_p, c_int64, c_int64, c_void_p],
    "multiply_bytes": [c_int64, c_int64, c_int64],
    "multiply": [None, POINTER(CMatrix), *[c_void_p, c_int64] * 2, c_int64],
    "read_bytes": [c_int64, POINTER(CModel), c_int64],
    "read": [
        c_int,
        POINTER(CModel),
        *[c_void_p, c_int64] * 2,  # tokens of the rows, embeddings of the vocabulary
        *[c_void_p] * 2,  # vector of the position, cache
        *[c_int64] * 2,  # position, length of the cache
        *[c_void_p] * 2,  # state, memory
        c_int64,  # threads
    ],
    "draw_bytes": [c_int64, c_int64, c_int64],
    "draw": [None, POINTER(CDraw), *[c_void_p] * 2, c_int64],
}


@cache
def find_steps() -> dict[str, Step]:
    """Looks for the library beside this file, and at the CPU.

    Returns:
        by kind, the steps that work here, the fastest first; "" is why there is none.
    """
    spec = importlib.util.find_spec("mas._step")
    if spec is None or spec.origin is None:
        return _none("not built: install again where there is a C compiler")
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as error:
        return _none(f"cannot be loaded, install again ({error})")
    if library.step_version() != VERSION:
        return _none("built from other source: install again")
    library.step_kind.restype, library.step_kind.argtypes = c_char_p, [c_int]
    names = takewhile(bool, map(library.step_kind, count()))
    steps = {name.decode(): _bind(library, name.decode()) for name in names}
    return steps or _none("this CPU has neither AVX2 nor the dot products of Arm")


def _none(reason: str) -> dict[str, Step]:
    return {"": Step({}, reason)}


def _bind(library: ctypes.CDLL, kind: str) -> Step:
    calls = {}
    for name, (result, *arguments) in CALLS.items():
        calls[name] = function = getattr(library, f"step_{name}_{kind}")
        function.restype, function.argtypes = result, arguments
    return Step(calls, f"there ({kind})")


def find_step() -> Step:
    """The fastest step that works here; another one, or none, where MAS_STEP names it.

    Raises:
        ValueError: MAS_STEP names one that does not work here.
    """
    steps = find_steps()
    wanted = os.environ.get("MAS_STEP") or next(iter(steps))
    if wanted == "none":
        return Step({}, "switched off by MAS_STEP=none")
    if wanted not in steps:
        there = ", ".join([*filter(None, steps), "none"])
        raise ValueError(f"MAS_STEP={wanted}: there is no such step here; use {there}, or unset it")
    return steps[wanted]


def can_step(config: GPTConfig) -> bool:
    """Whether `FastDecoder` runs a GPT of these sizes here."""
    narrow = config.width // config.heads <= MOST_HEAD_WIDTH and 4 * config.width <= MOST_INPUTS
    return narrow and bool(find_step().calls)


class StepLinear:
    """`mas.quantize.Int8Linear` in the layout of mas/step_matrices.h; the same numbers."""

    def __init__(self, weight_VK: Tensor, slabs: Slabs) -> None:
        """Packs a matrix into memory of `slabs`."""
        integers_VK, scale_V = to_int8(weight_VK)
        self.outputs, self.inputs = integers_VK.shape
        self.calls = _calls()
        size = self.calls["packed_bytes"](self.outputs, self.inputs)
        self.packed = slabs.take(size)
        self.calls["pack"](
            integers_VK.data_ptr(), self.outputs, self.inputs, self.packed.data_ptr()
        )
        self.scale_V = scale_V.float() / LARGEST_INT8
        self.matrix = CMatrix(
            self.packed.data_ptr(), self.scale_V.data_ptr(), self.outputs, self.inputs
        )

    def __call__(self, x_RK: Tensor) -> Tensor:
        """The product, R V; ValueError for inputs that are not float32 R K."""
        if x_RK.shape[1:] != (self.inputs,) or x_RK.dtype != torch.float32 or x_RK.is_cuda:
            raise ValueError(
                f"inputs are {x_RK.dtype} {tuple(x_RK.shape)}, not float32 R {self.inputs}"
            )
        x_RK = x_RK.contiguous()
        rows = len(x_RK)
        y_RV = _floats(rows, self.outputs)
        memory = _memory(self.calls["multiply_bytes"](rows, self.inputs))
        self.calls["multiply"](
            self.matrix,
            x_RK.data_ptr(),
            rows,
            y_RV.data_ptr(),
            memory.data_ptr(),
            torch.get_num_threads(),
        )
        return y_RV


class FastDecoder(CPUDecoder):
    """`CPUDecoder` in 8 bits that reads single tokens in one call; several as that one does.

    No result depends on the other rows or on the number of threads.
    """

    mode = "fast"

    def __init__(self, config: GPTConfig, tensors: Mapping[str, Tensor]) -> None:
        """Converts all tensors, as `CPUDecoder`; RuntimeError where `can_step` is false."""
        if not can_step(config):
            raise RuntimeError(f"no fast step for this GPT here ({find_step().state})")
        make_linear = partial(StepLinear, slabs=Slabs())
        super().__init__(config, tensors, make_linear=make_linear, stored=torch.bfloat16)
        self.calls = _calls()
        layers = (CLayer * config.layers)(*(_c_layer(layer) for layer in self.layers))
        _address(self.positions_TD)
        self.model = CModel(
            config.layers,
            config.width,
            config.heads,
            config.gated,
            layers,
            _c_norm(self.norm),
            *map(_address, self.rotation or (None, None)),
        )

    def new_cache(self, rows: int, *, length: int | None = None) -> Cache:
        """An empty cache for `rows` sequences of `length` tokens (default: whole ones)."""
        return make_cache(
            self.config, rows, length=length, dtype=self.dtype, device=self.device, grows=False
        )

    def extend(self, tokens_RT: Tensor, *, cache: Cache, start: int) -> Tensor:
        """Reads tokens at positions `start` …, fills the cache, returns the last state, R D.

        Raises:
            ValueError: a single token whose type, value or place fits neither GPT nor cache.
        """
        if tokens_RT.shape[1] != 1:
            return super().extend(tokens_RT, cache=cache, start=start)
        rows = len(tokens_RT)
        self._check(tokens_RT, cache, start)
        tokens_R = tokens_RT.contiguous()
        stream = self.layout.stream_at(start)
        state_RD = _floats(rows, self.config.width)
        memory = _memory(self.calls["read_bytes"](self.model, rows))
        failed = self.calls["read"](
            self.model,
            tokens_R.data_ptr(),
            rows,
            self.embeddings[stream.name].data_ptr(),
            stream.vocabulary,
            self.positions_TD[start].data_ptr(),
            (c_void_p * len(cache.pairs))(*(pair.data_ptr() for pair in cache.pairs)),
            start,
            cache.length,
            state_RD.data_ptr(),
            memory.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise ValueError(f"{stream.name} tokens must be 0 to {stream.vocabulary - 1}")
        return state_RD

    def draw(
        self, logits_BV: Tensor, others_BV: Tensor | None, uniform_B: Tensor, sampling: Sampling
    ) -> Tensor:
        """What `mas.filter.draw_guided` draws but for rounding, in one call.

        Raises:
            ValueError: tensors of other types, or that do not fit each other.
        """
        rows, vocabulary = logits_BV.shape
        other = logits_BV if others_BV is None else others_BV
        if (logits_BV.dtype, other.dtype, uniform_B.dtype) != (*[torch.float32] * 2, torch.float64):
            raise ValueError("logits must be float32, the numbers to draw by float64")
        if other.shape != logits_BV.shape or uniform_B.shape != (rows,) or not vocabulary:
            raise ValueError(f"logits {tuple(logits_BV.shape)} do not fit {len(uniform_B)} numbers")
        logits_BV, other, uniform_B = (
            tensor.contiguous() for tensor in (logits_BV, other, uniform_B)
        )
        request = CDraw(
            logits_BV.data_ptr(),
            None if others_BV is None else other.data_ptr(),
            uniform_B.data_ptr(),
            *(sampling.guidance, sampling.temperature),
            1.0 if sampling.top_p is None else sampling.top_p,
            *(count_kept(sampling.top_k, vocabulary), rows, vocabulary),
        )
        tokens_B = torch.empty(rows, dtype=torch.long, device="cpu")
        memory = _memory(self.calls["draw_bytes"](rows, vocabulary))
        threads = torch.get_num_threads()
        self.calls["draw"](request, tokens_B.data_ptr(), memory.data_ptr(), threads)
        return tokens_B

    def _check(self, tokens_R1: Tensor, cache: Cache, start: int) -> None:
        if tokens_R1.dtype != torch.long or tokens_R1.is_cuda:
            raise ValueError(f"tokens are {tokens_R1.dtype} on {tokens_R1.device}, not long")
        if not 0 <= start < min(cache.length, self.layout.length):
            raise ValueError(f"position {start} is outside of cache or sequence")
        heads = self.config.heads
        shape = (2, len(tokens_R1), heads, cache.length, self.config.width // heads)
        pairs = cache.pairs
        if cache.grows or len(pairs) != self.config.layers:
            raise ValueError("use a cache that `new_cache` made")
        for pair in pairs:
            if pair.shape != shape or pair.dtype != self.dtype or not pair.is_contiguous():
                raise ValueError(f"the cache is {pair.dtype} {tuple(pair.shape)}, not {shape}")


def _calls() -> dict[str, Any]:
    calls, state = find_step()
    if not calls:
        raise RuntimeError(f"no fast step here ({state})")
    return calls


# Never of the default type or device, which a program may have changed: the library writes there.
def _floats(rows: int, width: int) -> Tensor:
    return torch.empty(rows, width, dtype=torch.float32, device="cpu")


def _memory(size: int) -> Tensor:
    # It begins at a whole vector, as all memory of PyTorch's does.
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def _address(floats: Tensor | None) -> int | None:
    if floats is None:
        return None
    if floats.dtype != torch.float32 or not floats.is_contiguous():
        raise ValueError(f"the GPT holds {floats.dtype}; int8 is made of float32")
    return floats.data_ptr()


def _c_norm(norm: Norm | None) -> CNorm:
    return CNorm(*(None, None) if norm is None else map(_address, (norm.weight_D, norm.bias_D)))


def _c_matrix(linear: Linear) -> CMatrix:
    assert isinstance(linear, StepLinear)
    return linear.matrix


def _c_layer(layer: Layer) -> CLayer:
    norms = (layer.attention_norm, layer.q_norm, layer.k_norm, layer.feedforward_norm)
    matrices = (layer.to_qkv, layer.to_out, layer.expand, layer.contract)
    return CLayer(*map(_c_norm, norms), *map(_c_matrix, matrices))
