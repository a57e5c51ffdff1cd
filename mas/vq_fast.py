"""The decoder of `vq` for looking at pictures on a CPU: the same function, rounded where it may be.

In: a `ConvDecoder` and features on the token grid. Out: what the decoder would give, in about
half the time on a CPU with bfloat16 instructions. Three things make it so:

- Convolutions inside the residual blocks of fine grids run in bfloat16. They are most of the work,
  and what they add to the picture is small. The path that carries the picture (residual sums,
  shortcuts, upsampling, first and last layer) and all coarse grids stay float32: rounding there is
  what shows (docs/tokenizers.md has the figures).
- Doubling the grid before a 3×3 convolution makes it read most cells several times. Four 2×2
  kernels of summed weights, one for each place in a doubled cell, give the same numbers.
- Fine grids are worked on by strips, in place: fresh tensors of 32 MB and more cost page faults.

Axes: B batch, C channels, H W grid, O I output and input channels of a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mas.vq import ConvDecoder, Level, Norm, ResidualBlock, Upsample

HALF_FROM = 128  # cells a side from which residual blocks compute in bfloat16
STRIP_CELLS = 2**14  # cells worked on at once on fine grids: 8 MB of 128 channels
# Rows of a 3×3 kernel that fall on the same cell before doubling: [place][cell][row of kernel].
PLACES = ((((1, 0, 0), (0, 1, 1))), (((1, 1, 0), (0, 0, 1))))


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without, it only costs exactness."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@torch.no_grad()
def decode_fast(decoder: ConvDecoder, z_BCHW: Tensor) -> Tensor:
    """What `decoder(z_BCHW)` gives, to about a hundredth of its range; without gradients."""
    return torch.cat([_decode_one(decoder, z_1CHW) for z_1CHW in z_BCHW.split(1)])


def _decode_one(decoder: ConvDecoder, z_1CHW: Tensor) -> Tensor:
    hidden = decoder.middle(decoder.stem(z_1CHW.contiguous(memory_format=torch.channels_last)))
    for level in decoder.levels:
        assert isinstance(level, Level)
        hidden = hidden.contiguous(memory_format=torch.channels_last)
        for index, block in enumerate(level.blocks):
            assert isinstance(block, ResidualBlock)
            hidden = add_block(block, hidden) if hidden.shape[2] >= HALF_FROM else block(hidden)
            if level.attentions:
                hidden = level.attentions[index](hidden)
        if isinstance(level.resample, Upsample):
            hidden = upsample(level.resample, hidden)
    channels = _by_channel(decoder.norm, hidden)
    out = hidden.new_empty(1, decoder.head.out_channels, *hidden.shape[2:])
    for strip in _strips(hidden):
        normed = F.silu(channels.apply(hidden[:, :, strip.read]), inplace=True)
        out[:, :, strip.write] = decoder.head(normed)[:, :, strip.keep]
    return out


def add_block(block: ResidualBlock, x_1CHW: Tensor) -> Tensor:
    """`block(x_1CHW)`, its 3×3 convolutions in bfloat16; `x_1CHW` may be overwritten."""
    channels = _by_channel(block.norm_1, x_1CHW)
    conv_1, conv_2 = _half(block.conv_1), _half(block.conv_2)
    hidden = _empty(block.conv_1.out_channels, *x_1CHW.shape[2:], dtype=torch.bfloat16)
    for strip in _strips(x_1CHW):
        normed = F.silu(channels.apply(x_1CHW[:, :, strip.read]), inplace=True)
        hidden[:, :, strip.write] = conv_1(normed.bfloat16())[:, :, strip.keep]
    hidden = F.silu(block.norm_2(hidden), inplace=True)
    out_1CHW = x_1CHW if block.shortcut is None else block.shortcut(x_1CHW)
    for strip in _strips(x_1CHW):
        out_1CHW[:, :, strip.write] += conv_2(hidden[:, :, strip.read])[:, :, strip.keep].float()
    return out_1CHW


def upsample(layer: Upsample, x_1CHW: Tensor) -> Tensor:
    """`layer(x_1CHW)` by four 2×2 kernels on the grid before it is doubled."""
    places = torch.tensor(PLACES).to(x_1CHW)
    kernels = torch.einsum("pak,qbl,oikl->pqoiab", places, places, layer.conv.weight)
    kernels = rearrange(kernels, "p q o i a b -> (p q o) i a b")
    kernels = kernels.contiguous(memory_format=torch.channels_last)
    assert layer.conv.bias is not None
    bias = layer.conv.bias.repeat(4)
    channels, (height, width) = layer.conv.out_channels, x_1CHW.shape[2:]
    out = _empty(channels, 2 * height, 2 * width, dtype=x_1CHW.dtype)
    for strip in _strips(x_1CHW, STRIP_CELLS // 4):
        # Position r of these reads cells r - 1 and r: place 0 of cell r, and place 1 of cell r - 1.
        found = F.conv2d(x_1CHW[:, :, strip.read], kernels, bias, padding=1)
        found = rearrange(found, "1 (p q o) h w -> p q o h w", p=2, q=2)
        for p in range(2):
            rows = slice(strip.keep.start + p, strip.keep.stop + p)
            for q in range(2):
                out[0, :, 2 * strip.write.start + p : 2 * strip.write.stop : 2, q::2] = found[
                    p, q, :, rows, q : q + width
                ]
    return out


class _Strip(NamedTuple):
    """Rows of a grid, with those beside them that a 3×3 kernel needs."""

    read: slice  # rows to convolve, with up to one more on either side
    keep: slice  # rows of the outcome that had all their neighbours
    write: slice  # where those belong


def _strips(x_BCHW: Tensor, cells: int | None = None) -> Iterator[_Strip]:
    height, width = x_BCHW.shape[2:]
    rows = max(1, (cells or STRIP_CELLS) // width)
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        first = max(start - 1, 0)
        yield _Strip(
            read=slice(first, min(stop + 1, height)),
            keep=slice(start - first, stop - first),
            write=slice(start, stop),
        )


def _empty(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((1, *size), dtype=dtype, memory_format=torch.channels_last)


class _ByChannel(NamedTuple):
    """A group normalisation whose moments are known: the same affine map at every cell."""

    norm: Norm
    mean_C: Tensor
    variance_C: Tensor

    def apply(self, x_1CHW: Tensor) -> Tensor:
        norm = self.norm
        return F.batch_norm(
            x_1CHW, self.mean_C, self.variance_C, norm.weight, norm.bias, eps=norm.eps
        )


def _by_channel(norm: Norm, x_1CHW: Tensor) -> _ByChannel:
    mean_C, variance_C = torch.batch_norm_update_stats(x_1CHW, None, None, 0.0)
    mean_GC, variance_GC = (
        rearrange(x, "(g c) -> g c", g=norm.num_groups) for x in (mean_C, variance_C)
    )
    mean_G1 = mean_GC.mean(1, keepdim=True)
    variance_G1 = (variance_GC + (mean_GC - mean_G1).square()).mean(1, keepdim=True)
    each = norm.num_channels // norm.num_groups
    return _ByChannel(norm, *(x.repeat_interleave(each) for x in (mean_G1, variance_G1)))


def _half(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer in bfloat16; `layer` itself stays as it is."""
    half = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, device="meta")
    for name, tensor in layer.named_parameters():
        setattr(half, name, nn.Parameter(tensor.detach().bfloat16(), requires_grad=False))
    return half
