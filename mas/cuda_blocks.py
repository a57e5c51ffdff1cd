"""The blocks of a GPT for one-token steps, in PyTorch's kernels: what torch.compile may fuse.

In: the tensors of a GPT, the state of a token a row. Out: that state a block further. What lies
between two attentions is one function, `cross`.
Axes: R rows, T tokens, D width, N heads, H width of a head, K and N numbers in and out of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mas.decoder import EPSILON
from mas.gpt import Rotation, rotate

RMS_EPSILON = torch.finfo(torch.float32).eps  # what RMSNorm takes in float32 and bfloat16
MASKED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # that take a mask


class Layer(NamedTuple):
    """The tensors of one block; a norm is its weight and, for LayerNorm, its bias."""

    attention_norm: tuple[Tensor, ...]
    to_qkv: Tensor
    qk_norm: tuple[Tensor, ...]  # of queries and of keys, or nothing
    to_out: Tensor
    feedforward_norm: tuple[Tensor, ...]
    expand: Tensor
    contract: Tensor


def plain_linear(
    x_RK: Tensor,
    matrix_NK: Tensor,
    *,
    norm: tuple[Tensor, ...] = (),
    epsilon: float = 0.0,
    activation: str = "none",
    residual_RN: Tensor | None = None,
) -> Tensor:
    """What `mas.cuda_kernels.linear` computes, in PyTorch's kernels and for any number of rows."""
    y_RN = F.linear(normalise(x_RK, norm) if norm else x_RK, matrix_NK)
    if activation == "gelu":
        y_RN = F.gelu(y_RN)
    elif activation == "swiglu":
        gate, value = y_RN.chunk(2, dim=-1)
        y_RN = F.silu(gate) * value
    return y_RN if residual_RN is None else residual_RN + y_RN


def enter(x_RD: Tensor, layer: Layer, rotation: Rotation | None, heads: int) -> Tensor:
    """What attention gets of a token: normed and rotated q, k and v, three R N H."""
    qkv_RD = plain_linear(x_RD, layer.to_qkv, norm=layer.attention_norm)
    # Not einops: torch.compile shall see nothing but PyTorch.
    qkv = qkv_RD.view(len(x_RD), 3, heads, -1).transpose(0, 1)
    if not layer.qk_norm and rotation is None:
        return qkv
    q, k, v = qkv
    if layer.qk_norm:
        q, k = (normalise(x, (w,)) for x, w in zip((q, k), layer.qk_norm, strict=True))
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    return torch.stack([q, k, v])


def attend(qkv: Tensor, pair: Tensor, position_1: Tensor, mask_T: Tensor) -> Tensor:
    """Stores keys and values of a token and lets its query see those not masked, R D.

    Args:
        qkv: three R N H.
        pair: keys and values of all positions, 2 R N T H.
        position_1: where those of the token go.
        mask_T: 0 or -inf for the first places of the cache; the others are not read.
    """
    pair.index_copy_(3, position_1, qkv[1:, :, :, None])
    keys, values = pair[:, :, :, : len(mask_T)]
    q = qkv[0, :, :, None]
    mask = mask_T.expand(*q.shape[:3], -1)
    with sdpa_kernel(MASKED):
        attended_RN1H = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return attended_RN1H.flatten(1)


def leave(
    x_RD: Tensor, attended_RD: Tensor, layer: Layer, linear: Callable[..., Tensor] = plain_linear
) -> Tensor:
    """A block after its attention, R D."""
    x_RD = linear(attended_RD, layer.to_out, residual_RN=x_RD)
    norm = layer.feedforward_norm
    hidden = linear(
        x_RD,
        layer.expand,
        norm=norm,
        epsilon=epsilon_of(norm),
        activation="swiglu" if len(norm) == 1 else "gelu",
    )
    return linear(hidden, layer.contract, residual_RN=x_RD)


def cross(
    x_RD: Tensor,
    attended_RD: Tensor,
    layer: Layer,
    following: Layer,
    rotation: Rotation | None,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """From one attention to the next: the state R D, and q, k and v of the next, three R N H."""
    x_RD = leave(x_RD, attended_RD, layer)
    return x_RD, enter(x_RD, following, rotation, heads)


def normalise(x: Tensor, norm: tuple[Tensor, ...]) -> Tensor:
    """LayerNorm with weight and bias, RMSNorm with a weight alone."""
    shape = norm[0].shape
    if len(norm) == 1:
        return F.rms_norm(x, shape, norm[0])
    return F.layer_norm(x, shape, norm[0], norm[1], EPSILON)


def epsilon_of(norm: tuple[Tensor, ...]) -> float:
    """Of an RMSNorm or a LayerNorm."""
    return RMS_EPSILON if len(norm) == 1 else EPSILON


def read_layer(tensors: Mapping[str, Tensor], name: str, *, normed: bool) -> Layer:
    """The tensors of the block whose names begin with `name`; `normed`: with QK-norm."""
    attention, feedforward = name + "attention", name + "feedforward"
    return Layer(
        attention_norm=read_norm(tensors, attention + "_norm"),
        to_qkv=tensors[attention + ".to_qkv.weight"],
        qk_norm=tuple(tensors[f"{attention}.{x}_norm.weight"] for x in "qk") if normed else (),
        to_out=tensors[attention + ".to_out.weight"],
        feedforward_norm=read_norm(tensors, feedforward + "_norm"),
        expand=tensors[feedforward + ".expand.weight"],
        contract=tensors[feedforward + ".contract.weight"],
    )


def read_norm(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    """Weight and, where there is one, bias."""
    return tuple(tensors[key] for key in (name + ".weight", name + ".bias") if key in tensors)
