"""The GPT with smaller weights for sampling on CPUs: int8 or bfloat16.

In: the float32 GPT. Out: a twin whose linear layers hold smaller weights; everything else is shared
with the original. One token a step reads every weight once, so the bytes of the weights set the
pace. Residual stream, norms, attention and cache stay float32.
Axes: R rows, K inputs, V outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mas.gpt import GPT

LARGEST_INT8 = 127


class Int8Linear(nn.Module):
    """Weights of 8 bits with one bfloat16 scale an output; symmetric, rounded to nearest."""

    weight: Tensor  # int8 V K
    scale: Tensor  # bfloat16 V

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_VK = linear.weight.detach().float()
        largest_V = weight_VK.abs().amax(1).clamp(min=1e-12)
        # Rounded to bfloat16 first, so that the integers make up for the rounding of the scale.
        scale_V = (largest_V / LARGEST_INT8).bfloat16()
        integers_VK = (weight_VK / scale_V.float()[:, None]).round()
        self.register_buffer("weight", integers_VK.clamp(-LARGEST_INT8, LARGEST_INT8).char())
        self.register_buffer("scale", scale_V)

    def forward(self, x: Tensor) -> Tensor:
        x_RK = x.bfloat16().view(-1, x.shape[-1])
        y_RV = torch._weight_int8pack_mm(x_RK, self.weight, self.scale)
        return y_RV.float().view(*x.shape[:-1], -1)


class Bfloat16Linear(nn.Module):
    """Weights, inputs and outputs in bfloat16, sums in float32."""

    weight: Tensor  # bfloat16 V K

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight).float()


def with_linears(gpt: GPT, make: Callable[[nn.Linear], nn.Module]) -> GPT:
    """A twin of `gpt` with every linear layer replaced; the other tensors are the same ones."""
    with torch.device("meta"):
        twin = GPT(gpt.config)
    shared = gpt.state_dict()
    for name, module in gpt.named_modules():
        if isinstance(module, nn.Linear):
            twin.set_submodule(name, make(module))
            del shared[f"{name}.weight"]
    twin.load_state_dict(shared, strict=False, assign=True)
    return twin.eval().requires_grad_(False)
