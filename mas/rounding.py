"""Weights in fewer bits: how they are rounded for the disk; and how long floats may be.

In: the tensors of a network. Out: the same in float16 or int8, a half or a quarter of the bytes;
and back to float32. Only tensors of two or more axes are rounded: vectors (norms, biases, running
means) weigh nothing and matter most.
Axes: V rows (outputs, or entries of a table), K columns; a convolution's kernel counts as V K.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Weights = Literal["float32", "float16", "int8"]
LARGEST_INT8 = 127
ROWS_AT_ONCE = 1024  # that are rounded together; bounds the memory it takes
NO_FLOAT64 = ("mps",)  # kinds of devices: Apple's GPUs
SCALE = ":scale"  # behind the name of an int8 tensor: the name of its scales


class Int8(NamedTuple):
    """A matrix, or the kernels of a convolution, as `integers * scale`."""

    integers_VK: Tensor  # int8, -127 … 127, of the shape of the weight
    scale_V: Tensor  # bfloat16, one a row


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64."""
    return device.type not in NO_FLOAT64


def to_int8(weight_VK: Tensor) -> Int8:
    """Rounds to the nearest; symmetric, the largest of each row becomes ±127."""
    parts = [_to_int8(rows_VK.float()) for rows_VK in weight_VK.detach().split(ROWS_AT_ONCE)]
    return Int8(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]))


def _to_int8(weight_VK: Tensor) -> Int8:
    largest_V = weight_VK.abs().flatten(1).amax(1).clamp(min=1e-12)
    # Rounded to bfloat16 first, so that the integers make up for the rounding of the scale.
    scale_V = (largest_V / LARGEST_INT8).bfloat16()
    integers_VK = (weight_VK / _column(scale_V, weight_VK)).round_()
    return Int8(integers_VK.clamp_(-LARGEST_INT8, LARGEST_INT8).char(), scale_V)


def from_int8(rounded: Int8) -> Tensor:
    """The float32 weight that `to_int8` rounded to; rounding it again changes nothing."""
    return rounded.integers_VK.float() * _column(rounded.scale_V, rounded.integers_VK)


def _column(scale_V: Tensor, like_VK: Tensor) -> Tensor:
    """Scales in float32, shaped to multiply whole rows."""
    return scale_V.float().view(-1, *[1] * (like_VK.ndim - 1))


def narrow(tensors: Mapping[str, Tensor], weights: Weights) -> dict[str, Tensor]:
    """Rounds the tensors of a network for the disk.

    Raises:
        ValueError: an unknown format, or a tensor that is too large for float16, by name.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights are {weights!r}, use one of {', '.join(get_args(Weights))}")
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if weights == "float32" or tensor.ndim < 2 or not tensor.is_floating_point():
            result[name] = tensor
        elif weights == "int8":
            result[name], result[name + SCALE] = to_int8(tensor)
        else:
            result[name] = tensor.half()
            if not result[name].isfinite().all():
                raise ValueError(f"{name} holds numbers too large for float16: use float32")
    return result


def is_rounded(tensors: Mapping[str, Tensor], weights: Weights) -> bool:
    """Whether `narrow` to this format would change no number."""
    after = widen(narrow(tensors, weights))
    return all(torch.equal(tensor, after[name]) for name, tensor in tensors.items())


def widen(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every number of `narrow` in float32, under the names that went into it.

    Raises:
        ValueError: an int8 tensor and its scales that do not fit together, by name.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in tensors:
            continue
        scale_V = tensors.get(name + SCALE)
        if scale_V is not None:
            if (tensor.dtype, tensor.shape[:1]) != (torch.int8, scale_V.shape):
                raise ValueError(f"{name} and its scales do not fit together")
            tensor = from_int8(Int8(tensor, scale_V))
        result[name] = tensor.float() if tensor.is_floating_point() else tensor
    return result
