"""The refiner: a decoded picture gets the outlines of the scene it follows.

In: pictures as a VQ-GAN decodes them, and their scene maps. Out: the same pictures, corrected. A
token of the picture stands for many pixels, so small things lose their shape; the scene has it, and
while sampling it is known to the pixel. Works on top of any VQ-GAN, whose tokens stay as they are:
a U-Net says what to add to each pixel, at first nothing.
Axes: B batch, C channels, H W pixels, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from mas.scene import CLASSES, VOID, SceneMap
from mas.storage import load_network, save_network
from mas.unet import UNet, UNetConfig
from mas.vq import check_finite, shape_text, start_weights


@dataclass(frozen=True, kw_only=True)
class RefinerConfig(UNetConfig):
    """Sizes of a Refiner; the defaults are 128 px and 0.1M parameters."""

    multipliers: tuple[int, ...] = (1, 2)  # of width, finest level first; halving between
    features: int = 16  # numbers a pixel that its correction is computed from
    label_width: int = 8  # numbers a class is described by

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_width < 1:
            raise ValueError(f"label_width must be at least 1, got {self.label_width}")


class Refiner(UNet):
    """Picture and scene to a better picture."""

    def __init__(self, config: RefinerConfig) -> None:
        super().__init__(3 + config.label_width + 1, config)
        self.config = config
        self.labels = nn.Embedding(CLASSES + 1, config.label_width)  # void is the last
        self.correction = nn.Conv2d(config.features, 3, 1)
        start_weights(self)
        nn.init.zeros_(self.correction.weight)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Refiner:
        """Reads a folder of config.json + model.safetensors; frozen, evaluation mode."""
        network = load_network(cls, RefinerConfig, folder)
        check_finite(network, folder)
        return network

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json + model.safetensors."""
        save_network(self, folder)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last convolution, where the adaptive GAN weight compares gradients."""
        return self.correction.weight

    def forward(self, image_BCHW: Tensor, labels_BHW: Tensor, edges_BHW: Tensor) -> Tensor:
        """Corrected pictures, B C H W, scaled as the input but not clamped to [0, 1].

        Args:
            image_BCHW: RGB in [0, 1], `config.size` pixels a side.
            labels_BHW: uint8, of the same pixels; VOID where nothing is known.
            edges_BHW: bool, likewise.

        Raises:
            ValueError: pictures of another size, or scenes of another size than the pictures.
        """
        size = self.config.size
        if image_BCHW.shape[1:] != (3, size, size):
            raise ValueError(
                f"the refiner takes pictures of B x 3 x {size} x {size}, "
                f"got {shape_text(image_BCHW)}"
            )
        wanted = (len(image_BCHW), size, size)
        for name, given in (("labels", labels_BHW), ("edges", edges_BHW)):
            if given.shape != wanted:
                raise ValueError(
                    f"the refiner needs {name} of {' x '.join(map(str, wanted))}, "
                    f"got {shape_text(given)}"
                )
        ids_BHW = labels_BHW.long().masked_fill(labels_BHW == VOID, CLASSES)
        described_BDHW = rearrange(self.labels(ids_BHW), "b h w d -> b d h w")
        edges_B1HW = edges_BHW[:, None].to(image_BCHW.dtype)
        seen_BCHW = torch.cat([image_BCHW * 2 - 1, described_BDHW, edges_B1HW], dim=1)
        return image_BCHW + self.correction(self.features_of(seen_BCHW).pixels_BDHW)

    def refine(self, image_1CHW: Tensor, scene: SceneMap) -> Tensor:
        """A picture corrected by its scene, clamped to [0, 1].

        Args:
            image_1CHW: RGB in [0, 1], `config.size` pixels a side.
            scene: square, of any size.

        Raises:
            ValueError: a picture of another size.
            SceneError: a scene that is not square.
        """
        scene = scene.resized(self.config.size)
        planes = (
            torch.from_numpy(plane_HW.copy())[None].to(image_1CHW.device)
            for plane_HW in (scene.labels, scene.edges)
        )
        return self(image_1CHW, *planes).clamp(0, 1)
