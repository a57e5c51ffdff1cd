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
BITS = 8  # of a byte: so many numbers it packs at most, as a Huffman code takes one bit or more


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
            shape = read_shape(name, tensors[name + SHAPE], size=tensor.nbytes)
            tensor = _unpack(name, tensor, shape)
        result[name] = tensor
    return result


def read_shape(name: str, shape: Tensor, *, size: int) -> list[int]:
    """The shape of a tensor that is packed in `size` bytes, before memory is taken for it.

    Raises:
        ValueError: it is none, or one of more numbers than the bytes can hold; by name.
    """
    if shape.dtype != torch.int64 or shape.ndim != 1 or (shape < 0).any():
        raise ValueError(f"{name} and its shape do not fit together")
    sides: list[int] = shape.tolist()
    if math.prod(sides) > BITS * size:
        raise ValueError(f"{name} cannot be unpacked (it is too short for its shape)")
    return sides


def _unpack(name: str, packed: Tensor, shape: list[int]) -> Tensor:
    if packed.dtype != torch.uint8:
        raise ValueError(f"{name} and its shape do not fit together")
    count = math.prod(shape)
    coder = zlib.decompressobj()
    try:
        numbers = coder.decompress(packed.numpy().tobytes(), count + 1)
    except zlib.error as error:
        raise ValueError(f"{name} cannot be unpacked ({error})") from error
    if not coder.eof and len(numbers) <= count:
        raise ValueError(f"{name} cannot be unpacked (it is cut)")
    if len(numbers) != count:
        raise ValueError(f"{name} and its shape do not fit together")
    return torch.frombuffer(bytearray(numbers), dtype=torch.int8).view(shape)
