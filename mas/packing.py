"""Int8 tensors in fewer bytes, exactly: each number gets as many bits as it is rare.

In: the tensors of a network in int8 (mas/rounding.py). Out: the same with Huffman codes in their
place, and back. Most weights of a row are small beside its largest, so that a byte says less than
it could: 7.3 bits in the park's GPT. Numbers do not repeat in any order, so zlib is told not to
look for repetitions. A fifth of a second unpacks 29 million numbers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

SHAPE = ":shape"  # behind the name of a packed tensor: the name of its shape


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every int8 tensor that becomes smaller as bytes (uint8, one axis) and its shape (int64)."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int8:
            continue
        coder = zlib.compressobj(9, strategy=zlib.Z_HUFFMAN_ONLY)
        packed = coder.compress(tensor.contiguous().numpy().tobytes()) + coder.flush()
        shape = torch.tensor(tensor.shape)
        if len(packed) + shape.nbytes < tensor.nbytes:
            result[name] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
            result[name + SHAPE] = shape
    return result


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What went into `pack`, to the last bit; tensors that are not packed stay as they are.

    Raises:
        ValueError: a packed tensor that is damaged, by name.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(SHAPE) and name.removesuffix(SHAPE) in tensors:
            continue
        if name + SHAPE in tensors:
            tensor = _unpack(name, tensor, tensors[name + SHAPE].tolist())
        result[name] = tensor
    return result


def _unpack(name: str, packed: Tensor, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    try:
        numbers = zlib.decompress(packed.numpy().tobytes(), bufsize=max(count, 1))
    except zlib.error as error:
        raise ValueError(f"{name} cannot be unpacked ({error})") from error
    if len(numbers) != count:
        raise ValueError(f"{name} and its shape do not fit together")
    return torch.frombuffer(bytearray(numbers), dtype=torch.int8).view(shape)
