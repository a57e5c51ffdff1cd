"""The reader: a small network that says what a picture shows, so that pictures can be judged.

In: pictures. Out: a label a pixel, the hour of the day, and features to compare sets of pictures
by; from a scene map alone, the place. `mas evaluate` asks it whether a generated picture keeps to
its scene; what it says of real pictures stands beside every such figure.
A U-Net (mas/unet.py) with three layers on top.
Axes: B batch, C channels, H W pixels (or grid), D features, P sampled pixels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from mas.scene import CLASSES, VOID
from mas.storage import load_network, save_network
from mas.unet import Features, UNet, UNetConfig
from mas.vq import shape_text, start_weights


@dataclass(frozen=True, kw_only=True)
class ReaderConfig(UNetConfig):
    """Sizes of a Reader; the defaults are 128 px and 0.9M parameters."""

    times: tuple[str, ...] = ()  # hours of the day it tells apart; none without the park's facts
    places: tuple[str, ...] = ()  # likewise places


class Reading(NamedTuple):
    """What the reader sees in a batch of pictures."""

    labels_BHW: Tensor  # uint8, 0-156
    times_B: Tensor  # long, position in `config.times`; 0 where the reader knows none
    features_BD: Tensor  # means of every level, to compare sets of pictures by


class Reader(UNet):
    """Picture to labels and hour of the day; scene map to place."""

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__(3, config)
        self.config = config
        widths = [config.width * multiplier for multiplier in config.multipliers]
        self.classifier = nn.Linear(config.features, CLASSES)
        self.time = nn.Linear(sum(widths), max(1, len(config.times)))
        self.place = nn.Linear(CLASSES, max(1, len(config.places)))
        start_weights(self)
        for layer in (self.time, self.place):
            nn.init.zeros_(layer.weight)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Reader:
        """Reads a folder of config.json + model.safetensors; frozen, evaluation mode."""
        return load_network(cls, ReaderConfig, folder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json + model.safetensors."""
        save_network(self, folder)

    @torch.no_grad()
    def read(self, image_BCHW: Tensor) -> Reading:
        """Labels, hours and features of pictures in [0, 1], `config.size` pixels a side.

        Raises:
            ValueError: pictures of another size.
        """
        seen = self._see(image_BCHW)
        pooled_BD = self._pool(seen)
        labels = [
            self.classifier(rearrange(pixels_DHW, "d h w -> h w d")).argmax(-1).to(torch.uint8)
            for pixels_DHW in seen.pixels_BDHW  # one at a time: 157 numbers a pixel
        ]
        return Reading(torch.stack(labels), self.time(pooled_BD).argmax(1), pooled_BD.float())

    @torch.no_grad()
    def read_places(self, labels_BHW: Tensor) -> Tensor:
        """Positions in `config.places`, long B, of scene maps (uint8, any size)."""
        return self.place_logits(labels_BHW).argmax(1)

    def look(self, image_BCHW: Tensor) -> list[Tensor]:
        """Features of pictures in [0, 1]: of every pixel, then of each level, finest first."""
        seen = self._see(image_BCHW)
        return [seen.pixels_BDHW, *seen.levels]

    def logits(self, image_BCHW: Tensor, pixels_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the classes at some pixels, B P K, and of the hours, B K; for training.

        Args:
            image_BCHW: in [0, 1].
            pixels_BP: long, positions in a flattened picture, row by row.
        """
        seen = self._see(image_BCHW)
        return self.classifier(pick_pixels(seen.pixels_BDHW, pixels_BP)), self.time(
            self._pool(seen)
        )

    def place_logits(self, labels_BHW: Tensor) -> Tensor:
        """Logits of the places, B K, from how much of each class a scene map (uint8) holds."""
        return self.place(class_shares(labels_BHW))

    def _see(self, image_BCHW: Tensor) -> Features:
        size = self.config.size
        if image_BCHW.shape[1:] != (3, size, size):
            raise ValueError(
                f"the reader takes pictures of B x 3 x {size} x {size}, "
                f"got {shape_text(image_BCHW)}"
            )
        return self.features_of(image_BCHW * 2 - 1)

    def _pool(self, seen: Features) -> Tensor:
        means = [reduce(F.silu(x), "b d h w -> b d", "mean") for x in seen.levels]
        return torch.cat(means, 1)


def pick_pixels(features_BDHW: Tensor, pixels_BP: Tensor) -> Tensor:
    """Features B P D of some pixels, positions in the flattened picture, row by row."""
    flat_BDP = rearrange(features_BDHW, "b d h w -> b d (h w)")
    places_BDP = pixels_BP[:, None].expand(-1, flat_BDP.shape[1], -1)
    return rearrange(flat_BDP.gather(2, places_BDP), "b d p -> b p d")


def class_shares(labels_BHW: Tensor) -> Tensor:
    """How much of each class a scene map holds, B K: log(1 + percent), so that little counts."""
    ids_BP = rearrange(labels_BHW.long(), "b h w -> b (h w)")
    counts_BK = torch.zeros(len(ids_BP), VOID + 1, device=ids_BP.device)
    counts_BK.scatter_add_(1, ids_BP, torch.ones_like(ids_BP, dtype=torch.float32))
    return (100 * counts_BK[:, :CLASSES] / ids_BP.shape[1]).log1p()
