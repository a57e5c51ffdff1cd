"""Matrices in the number formats that a CPU multiplies fastest, one token a step.

In: a weight matrix in float32. Out: a function from rows to rows, float32 on both sides. A step
reads every weight once, so the bytes of the weights and the kernel that reads them set the pace:
all three formats are packed once into the layout of their kernel, for torch's own linear layers
read at half of the speed or less.
No row of the result depends on the other rows, whatever the format.
Axes: R rows, K inputs, V outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from mas.rounding import LARGEST_INT8, to_int8

Linear = Callable[[Tensor], Tensor]  # float32 R K -> float32 R V

SMALLEST = 1e-30  # instead of the largest entry of a row of zeros
ZERO_POINT = 128  # the byte that stands for an input of 0
TYPICAL_ROWS = 2  # of one picture with guidance; a hint to the packing


class FloatLinear:
    """A matrix of floats, `dtype` says which; inputs are rounded to it, sums are float32.

    Any device; float32 and bfloat16 on a CPU are packed for oneDNN.
    """

    def __init__(self, weight_VK: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.weight_VK = weight_VK.detach().to(dtype)
        self.packed = weight_VK.device.type == "cpu" and can_pack(dtype)
        if self.packed:
            self.weight_VK = torch.ops.mkldnn._reorder_linear_weight(self.weight_VK, TYPICAL_ROWS)

    def __call__(self, x_RK: Tensor) -> Tensor:
        inputs_RK = x_RK.to(self.dtype)
        if self.packed:
            y_RV = torch.ops.mkldnn._linear_pointwise(
                inputs_RK, self.weight_VK, None, "none", [], ""
            )
        else:
            y_RV = F.linear(inputs_RK, self.weight_VK)
        return y_RV.to(x_RK.dtype)


class Int8Linear:
    """Weights of 8 bits, inputs rounded to 8 bits row by row, sums exact integers.

    The largest entry of a row of inputs becomes ±127, that of a row of weights likewise. Needs
    `sums_are_exact`.
    """

    def __init__(self, weight_VK: Tensor) -> None:
        integers_VK, scale_V = to_int8(weight_VK)
        shape = [TYPICAL_ROWS, weight_VK.shape[1]]
        self.packed = torch.ops.onednn.qlinear_prepack(integers_VK, shape)
        # The step of the inputs, 1/127 of the largest, is multiplied in here, not in each call.
        self.scale_V = scale_V.float() / LARGEST_INT8
        self.zeros_V = torch.zeros_like(self.scale_V, dtype=torch.int32)
        self.zero = torch.tensor(ZERO_POINT + 0.5, dtype=torch.float32)
        self.multiply = torch.ops.onednn.qlinear_pointwise.default

    def __call__(self, x_RK: Tensor) -> Tensor:
        largest_R1 = x_RK.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST)
        # From 1 to 255 about a zero of 128: for signed inputs oneDNN takes a loop a hundred times
        # slower. The cast cuts off, hence the half.
        shifted_RK = torch.addcmul(self.zero, x_RK, LARGEST_INT8 / largest_R1)
        inputs = (shifted_RK.to(torch.uint8), 1.0, ZERO_POINT)
        weights = (self.packed, self.scale_V, self.zeros_V)
        y_RV = self.multiply(*inputs, *weights, None, 1.0, 0, torch.float32, "none", [], "")
        return y_RV.mul_(largest_R1)


class Int8WeightLinear:
    """Weights of 8 bits, inputs in bfloat16; for CPUs whose integer sums overflow."""

    def __init__(self, weight_VK: Tensor) -> None:
        self.integers_VK, self.scale_V = to_int8(weight_VK)

    def __call__(self, x_RK: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x_RK.bfloat16(), self.integers_VK, self.scale_V).float()


def make_int8(weight_VK: Tensor) -> Linear:
    """The faster of the two int8 layers, or the one that this CPU computes rightly."""
    return Int8Linear(weight_VK) if sums_are_exact() else Int8WeightLinear(weight_VK)


@cache
def sums_are_exact() -> bool:
    """Whether `Int8Linear` works here; without VNNI instructions sums may overflow."""
    size = 64
    try:
        ones = torch.ones(size, size, dtype=torch.float32)
        y_RV = Int8Linear(ones)(ones[:1])
    except (AttributeError, RuntimeError):  # torch was built without this kernel
        return False
    return bool((y_RV - size).abs().max() < 0.5)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this format here."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
