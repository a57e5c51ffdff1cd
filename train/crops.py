"""The crop terms of the VQ-GAN: faces and things must look right to a network, too.

In: pictures, and boxes of their faces and things (`boxes`). Out: two losses. Make-A-Scene (arXiv
2203.13131) sections 3.3 and 3.4: features of each crop of the reconstruction are matched with
those of the same crop of the photo, for faces in a face-recognition network, for things in VGG.
Axes: B batch, C channels, H W pixels, N boxes of a picture, M crops of all pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas.weights_file import WeightsError, load_graph
from train.perceptual import (
    SMALLEST,
    Perceptual,
    PerceptualConfig,
    ReaderPerceptual,
    load_perceptual,
)


@dataclass(frozen=True, kw_only=True)
class CropsConfig:
    """The face-aware and the object-aware term."""

    face_weight: float = 0.0  # of the face term; 0 = none
    object_weight: float = 0.0  # of the object term; 0 = none
    count: int = 4  # at most so many faces and so many things a picture, drawn by the seed
    size: int = 64  # pixels a side a crop is scaled to
    face_network: str | None = None  # TorchScript or .pt2; null: VGG compares faces like things

    def __post_init__(self) -> None:
        if self.face_weight < 0 or self.object_weight < 0:
            raise ValueError("model.crops.face_weight and object_weight must not be negative")
        if self.count < 1 or self.size < SMALLEST:
            raise ValueError(
                f"model.crops.count is {self.count}, size {self.size}: use at least 1 and "
                f"{SMALLEST} pixels"
            )

    @property
    def boxes(self) -> int:
        """Boxes of each kind that the data must bring along."""
        return self.count if self.face_weight or self.object_weight else 0


class FaceFeatures(nn.Module):
    """Feature matching in a network that the user brings with its graph; frozen.

    The network is called with RGB crops B 3 H W in [0, 1] and returns one tensor, or several of
    different depths; whatever scaling it wants is part of it. A layer's distance is the mean
    absolute difference over the mean absolute feature of the photo, so every layer counts alike.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.network = load_graph(path, source="a saved face-recognition network")
        self.path = Path(path)

    def forward(self, image_BCHW: Tensor, true_image_BCHW: Tensor) -> Tensor:
        """Distance B of pictures in [0, 1] from their originals."""
        with torch.no_grad():
            truths = self._look(true_image_BCHW)
        layers = [
            (guess - truth).abs().flatten(1).mean(1) / truth.abs().mean().clamp(min=1e-6)
            for guess, truth in zip(self._look(image_BCHW), truths, strict=True)
        ]
        return torch.stack(layers).sum(0)

    def _look(self, image_BCHW: Tensor) -> list[Tensor]:
        output = self.network(image_BCHW)
        layers = [output] if isinstance(output, Tensor) else output
        if not isinstance(layers, (list, tuple)) or not all(isinstance(x, Tensor) for x in layers):
            raise WeightsError(
                f"{self.path}: returns a {type(output).__name__}, but must return a tensor or "
                "several"
            )
        return [x.float() for x in layers]


class Judges:
    """The frozen networks of a training that ends in pictures.

    No nn.Module, so that they are in no checkpoint and no moving average.
    """

    def __init__(self, perceptual: PerceptualConfig, crops: CropsConfig) -> None:
        self.crops = crops
        if perceptual.reader and (
            crops.object_weight or (crops.face_weight and crops.face_network is None)
        ):
            raise ValueError(
                "a reader compares whole pictures, not crops: set model.perceptual.vgg instead of "
                "reader, or model.crops.face_weight and object_weight to 0"
            )
        wanted = perceptual.weight or crops.object_weight
        wanted = wanted or (crops.face_weight and crops.face_network is None)
        self.network: Perceptual | ReaderPerceptual | None = (
            load_perceptual(perceptual) if wanted else None
        )
        self.face: nn.Module | None = None
        if crops.face_weight:
            self.face = FaceFeatures(crops.face_network) if crops.face_network else self.network

    def __deepcopy__(self, memo: dict[int, object]) -> Judges:
        return self  # frozen: a moving average of the training needs no second copy

    def perceptual(self, fake_BCHW: Tensor, real_BCHW: Tensor) -> Tensor:
        """Mean distance of the pictures; a scalar."""
        assert self.network is not None
        return self.network.to(fake_BCHW.device)(fake_BCHW, real_BCHW).mean()

    def faces(self, fake_BCHW: Tensor, real_BCHW: Tensor, boxes_BN4: Tensor) -> Tensor:
        """The face term: distances of a picture's faces added up, averaged over pictures."""
        assert self.face is not None
        return self._crops(self.face, fake_BCHW, real_BCHW, boxes_BN4)

    def things(self, fake_BCHW: Tensor, real_BCHW: Tensor, boxes_BN4: Tensor) -> Tensor:
        """The object term, likewise over things."""
        assert self.network is not None
        return self._crops(self.network, fake_BCHW, real_BCHW, boxes_BN4)

    def _crops(
        self, network: nn.Module, fake_BCHW: Tensor, real_BCHW: Tensor, boxes_BN4: Tensor
    ) -> Tensor:
        both_BCHW = torch.cat([fake_BCHW, real_BCHW.to(fake_BCHW)], dim=1)
        crops_MCHW = crop(both_BCHW, boxes_BN4, size=self.crops.size)
        if not len(crops_MCHW):
            return fake_BCHW.sum() * 0
        fakes_MCHW, reals_MCHW = crops_MCHW.chunk(2, dim=1)
        distances_M = network.to(fake_BCHW.device)(fakes_MCHW, reals_MCHW)
        return distances_M.sum() / len(fake_BCHW)


def crop(image_BCHW: Tensor, boxes_BN4: Tensor, *, size: int) -> Tensor:
    """Square crops M C `size` `size` around the boxes, bilinear; boxes of zeros have none.

    A crop is as wide as the longer side of its box, so nothing is distorted; beyond the picture
    its border is repeated.
    """
    height, width = image_BCHW.shape[2:]
    filled_BN = boxes_BN4[..., 2] > boxes_BN4[..., 0]
    picture_M = filled_BN.nonzero()[:, 0]
    left, top, right, bottom = boxes_BN4[filled_BN].float().unbind(1)
    if not len(picture_M):
        return image_BCHW.new_zeros(0, image_BCHW.shape[1], size, size)
    side_M = torch.maximum(right - left, bottom - top)
    # Coordinates in [-1, 1] from border to border, as grid_sample counts them.
    theta_M23 = side_M.new_zeros(len(side_M), 2, 3)
    theta_M23[:, 0, 0] = side_M / width
    theta_M23[:, 1, 1] = side_M / height
    theta_M23[:, 0, 2] = (left + right) / width - 1
    theta_M23[:, 1, 2] = (top + bottom) / height - 1
    shape = [len(side_M), image_BCHW.shape[1], size, size]
    grid_MHW2 = F.affine_grid(theta_M23, shape, align_corners=False)
    return F.grid_sample(
        image_BCHW[picture_M].float(), grid_MHW2, padding_mode="border", align_corners=False
    )
