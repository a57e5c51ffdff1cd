"""A small U-Net: features of every pixel of a picture.

In: pictures, with whatever else is known of each pixel in more channels. Out: features at full
resolution and those of every level. `mas/reader.py` tells classes by them, `mas/refiner.py`
corrects colours.
A U-Net (Ronneberger et al. 2015, arXiv 1505.04597) that works on patches of pixels, with one
convolution at full resolution beside it for the outlines.
Axes: B batch, C channels, H W pixels (or grid), D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mas.vq import Downsample, Norm, ResidualBlock


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes of a UNet."""

    size: int = 128  # pixels a side
    patch: int = 2  # pixels a side that are folded into one cell of the finest level
    width: int = 32  # channels of the finest level
    multipliers: tuple[int, ...] = (1, 2, 3, 4)  # of width, finest level first; halving between
    groups: int = 8  # of the group normalisation; divides every width
    features: int = 32  # numbers a pixel that come out

    def __post_init__(self) -> None:
        for name in ("size", "patch", "width", "groups", "features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers must be positive, one a level, got {self.multipliers}")
        if self.width % self.groups:
            raise ValueError(f"width {self.width} must be a multiple of groups {self.groups}")
        factor = self.patch * 2 ** (len(self.multipliers) - 1)
        if self.size % factor:
            raise ValueError(
                f"size {self.size} must be a multiple of {factor}: patches of {self.patch} pixels, "
                f"then one halving between each two of the {len(self.multipliers)} multipliers"
            )


class Features(NamedTuple):
    """Activations of one pass."""

    pixels_BDHW: Tensor  # full resolution
    levels: list[Tensor]  # of the way down, finest first


class UNet(nn.Module):
    """Pixels of `channels` numbers to features."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.patch = config.patch
        widths = [config.width * multiplier for multiplier in config.multipliers]

        def block(width_in: int, width_out: int) -> ResidualBlock:
            return ResidualBlock(width_in, width_out, groups=config.groups)

        self.stem = nn.Conv2d(channels, config.width, config.patch, stride=config.patch)
        self.down = nn.ModuleList(block(a, b) for a, b in pairwise([config.width, *widths]))
        self.shrink = nn.ModuleList(Downsample(width) for width in widths[:-1])
        self.grow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(block(width, width) for width in widths[:-1])
        self.norm = Norm(widths[0], config.groups)
        self.head = nn.Conv2d(widths[0], config.patch**2 * config.features, 1)
        self.outlines = nn.Conv2d(channels, config.features, 3, padding=1)

    def features_of(self, pixels_BCHW: Tensor) -> Features:
        """Features of pictures of any size that the patches and halvings divide."""
        hidden = self.stem(pixels_BCHW)
        levels = []
        for index, block in enumerate(self.down):
            hidden = block(hidden)
            levels.append(hidden)
            if index < len(self.shrink):
                hidden = self.shrink[index](hidden)
        for index in reversed(range(len(self.up))):
            # Narrowed before it grows and added, not joined: a third of the usual cost.
            grown = F.interpolate(self.grow[index](hidden), scale_factor=2.0, mode="nearest")
            hidden = self.up[index](levels[index] + grown)
        coarse = self.head(F.silu(self.norm(hidden)))
        fine = F.pixel_shuffle(coarse, self.patch)
        return Features(F.silu(fine + self.outlines(pixels_BCHW)), levels)
