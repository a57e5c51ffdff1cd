"""The convolutional encoder and decoder that both tokenizers are built from.

In: pictures, or anything on a square grid. Out: features on the token grid, and back. The
architecture is the one the public VQGANs share (Esser et al., arXiv 2012.09841, section 3.1 and
appendix): residual blocks, one level per halving, self-attention at the deepest level.
What becomes of the features between the two is in `vq_codebook`.
Axes: B batch, C channels, H W grid.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mas.storage import StorageError

# Of a VQSEG or VQGAN: these parts decide the tokens.
TOKEN_PARTS = ("stem", "encoder", "pre_quant", "quantizer")
LARGEST_SIDE = 4096  # pixels of a picture or scene; a folder's config names any in a few letters
NORM_EPS = 1e-6  # of every published VQGAN; PyTorch's default of 1e-5 shows on flat pictures


def check_side(size: int) -> None:
    """Raises ValueError for more pixels a side than a network is run with."""
    if size > LARGEST_SIDE:
        raise ValueError(f"size is {size}, use {LARGEST_SIDE} pixels a side or fewer")


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Shape of an encoder and of the decoder that mirrors it."""

    width: int  # channels of the finest level
    multipliers: tuple[int, ...]  # of width, finest level first; the grid halves between two levels
    blocks: int  # residual blocks a level in the encoder; the decoder has one more
    attention: tuple[int, ...]  # levels whose blocks are followed by attention, 0 = finest
    groups: int  # of the group normalisation; divides every width
    middle: bool = True  # block, attention, block on the coarsest grid, on both sides

    def __post_init__(self) -> None:
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers must be positive, one a level, got {self.multipliers}")
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")
        if self.groups < 1 or self.width < 1 or self.width % self.groups:
            raise ValueError(f"width {self.width} must be a multiple of groups {self.groups}")
        wrong = [level for level in self.attention if not 0 <= level < len(self.multipliers)]
        if wrong:
            raise ValueError(
                f"attention names levels {wrong}, but there are {len(self.multipliers)} "
                "(0 = finest)"
            )

    @property
    def widths(self) -> list[int]:
        """Channels of each level, finest first."""
        return [self.width * multiplier for multiplier in self.multipliers]

    @property
    def factor(self) -> int:
        """Cells of the finest level to one of the coarsest, along each side."""
        return 2 ** (len(self.multipliers) - 1)


class Norm(nn.GroupNorm):
    """Group normalisation as the published networks use it."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(groups, channels, eps=NORM_EPS)


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3×3 convolution, twice, added to the input."""

    def __init__(self, width_in: int, width_out: int, *, groups: int) -> None:
        super().__init__()
        self.norm_1 = Norm(width_in, groups)
        self.conv_1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm_2 = Norm(width_out, groups)
        self.conv_2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden = self.conv_1(F.silu(self.norm_1(x_BCHW)))
        hidden = self.conv_2(F.silu(self.norm_2(hidden)))
        return hidden + (x_BCHW if self.shortcut is None else self.shortcut(x_BCHW))


class Attention(nn.Module):
    """Single-head self-attention over all grid positions, added to the input."""

    def __init__(self, width: int, *, groups: int) -> None:
        super().__init__()
        self.norm = Norm(width, groups)
        self.query = nn.Conv2d(width, width, 1)
        self.key = nn.Conv2d(width, width, 1)
        self.value = nn.Conv2d(width, width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        normed = self.norm(x_BCHW)
        query, key, value = (
            rearrange(project(normed), "b c h w -> b 1 (h w) c").contiguous()
            for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x_BCHW + self.out(
            rearrange(mixed, "b 1 (h w) c -> b c h w", h=x_BCHW.shape[2]).contiguous()
        )


class Downsample(nn.Module):
    """Halves the grid; zeros are padded on the right and at the bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the grid by repeating, then smooths by a 3×3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks at one resolution, each followed by attention or not, then the change of grid."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        *,
        blocks: int,
        attention: bool,
        groups: int,
        resample: nn.Module | None,
    ) -> None:
        super().__init__()
        widths = [width_in] + [width_out] * blocks
        self.blocks = nn.ModuleList(ResidualBlock(a, b, groups=groups) for a, b in pairwise(widths))
        self.attentions = nn.ModuleList(
            Attention(width_out, groups=groups) for _ in range(blocks if attention else 0)
        )
        self.resample = resample

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x_BCHW = block(x_BCHW)
            if self.attentions:
                x_BCHW = self.attentions[index](x_BCHW)
        return x_BCHW if self.resample is None else self.resample(x_BCHW)


def _middle(shape: Backbone) -> nn.Sequential:
    width, groups = shape.widths[-1], shape.groups
    if not shape.middle:
        return nn.Sequential()
    return nn.Sequential(
        ResidualBlock(width, width, groups=groups),
        Attention(width, groups=groups),
        ResidualBlock(width, width, groups=groups),
    )


def start_weights(network: nn.Module) -> None:
    """Starts every residual block as the identity and every other layer variance-preserving.

    Label maps learn several times faster from here than from PyTorch's defaults, which shrink the
    signal at every layer (docs/tokenizers.md has the curves).
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.conv_2.weight)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.out.weight)


class ConvEncoder(nn.Module):
    """Input grid to token grid: `levels` from the finest to the coarsest."""

    def __init__(self, channels_in: int, channels_out: int, shape: Backbone) -> None:
        super().__init__()
        widths = [shape.width, *shape.widths]
        last = len(shape.multipliers) - 1
        self.stem = nn.Conv2d(channels_in, shape.width, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                widths[index],
                widths[index + 1],
                blocks=shape.blocks,
                attention=index in shape.attention,
                groups=shape.groups,
                resample=Downsample(widths[index + 1]) if index < last else None,
            )
            for index in range(last + 1)
        )
        self.middle = _middle(shape)
        self.norm = Norm(widths[-1], shape.groups)
        self.head = nn.Conv2d(widths[-1], channels_out, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden = self.stem(x_BCHW)
        for level in self.levels:
            hidden = level(hidden)
        return self.head(F.silu(self.norm(self.middle(hidden))))


class ConvDecoder(nn.Module):
    """Token grid to output grid: `levels` from the coarsest to the finest, as they run."""

    def __init__(self, channels_in: int, channels_out: int, shape: Backbone) -> None:
        super().__init__()
        widths = [*shape.widths, shape.widths[-1]]
        self.stem = nn.Conv2d(channels_in, widths[-1], 3, padding=1)
        self.middle = _middle(shape)
        self.levels = nn.ModuleList(
            Level(
                widths[index + 1],
                widths[index],
                blocks=shape.blocks + 1,
                attention=index in shape.attention,
                groups=shape.groups,
                resample=Upsample(widths[index]) if index > 0 else None,
            )
            for index in reversed(range(len(shape.multipliers)))
        )
        self.norm = Norm(widths[0], shape.groups)
        self.head = nn.Conv2d(widths[0], channels_out, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        hidden = self.middle(self.stem(z_BCHW))
        for level in self.levels:
            hidden = level(hidden)
        return self.head(F.silu(self.norm(hidden)))


def token_parts(network: nn.Module) -> list[nn.Module]:
    """The parts of a VQSEG or VQGAN that decide the tokens, and the codes they stand for."""
    return [part for name, part in network.named_children() if name in TOKEN_PARTS]


def hash_tokens(network: nn.Module) -> str:
    """Sha256 of the weights that decide the tokens: equal where only the decoders differ.

    Args:
        network: a VQSEG or VQGAN. In which number format it was stored does not matter, as long as
            that rounded nothing.
    """
    config: Any = network.config
    meaning = (config.quantizer, config.size, config.grid)
    digest = hashlib.sha256(repr(meaning).encode())
    for name, parameter in network.named_parameters():
        if name.split(".")[0] in TOKEN_PARTS:
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_tokens(tokens_BT: Tensor, *, grid: int, codes: int) -> None:
    """Refuses tokens that no encoder of this grid and codebook writes.

    Raises:
        ValueError: wrong number or dtype of tokens, or a token outside 0 to codes - 1.
    """
    if tokens_BT.ndim != 2 or tokens_BT.shape[1] != grid * grid:
        raise ValueError(
            f"tokens must be B x {grid * grid} (a grid of {grid} x {grid}), got "
            f"{shape_text(tokens_BT)}"
        )
    if tokens_BT.dtype not in (torch.long, torch.int):
        raise ValueError(f"tokens must be whole numbers (long), got {tokens_BT.dtype}")
    low, high = tokens_BT.aminmax()
    if low < 0 or high >= codes:
        raise ValueError(f"tokens must be 0 to {codes - 1}, got {int(low)} to {int(high)}")


def check_finite(network: nn.Module, folder: str | Path) -> None:
    """Refuses weights that a run which diverged has left behind: they would decode to nothing.

    Raises:
        StorageError: names the tensors with NaN or infinity.
    """
    broken = [name for name, x in network.state_dict().items() if not x.sum().isfinite()]
    if broken:
        raise StorageError(
            f"{folder}: NaN or infinity in {len(broken)} tensors, first in {broken[0]}; "
            "train or copy it again"
        )


def shape_text(x: Tensor) -> str:
    """Sizes for an error message, as 2 x 3 x 64 x 64."""
    return " x ".join(map(str, x.shape)) or "a single number"
