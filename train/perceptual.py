"""How alike two pictures look to a network: LPIPS by VGG-16, or the same by a trained reader.

In: pictures in [0, 1]. Out: one distance a picture. Zhang et al. (arXiv 1801.03924), version 0.1:
unit-length features of five layers of VGG-16, squared differences weighted by one linear layer
each, averaged over the picture. VGG's weights are a file that the user supplies; where there are
none, a reader (mas/reader.py) that was trained on the same scene shards can take its place.
Axes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas.reader import Reader
from mas.storage import CONFIG_FILE, StorageError
from mas.weights_file import pick_tensors, read_tensors

BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # (channels, convolutions) of VGG-16
SMALLEST = 16  # pixels a side: the last layer has one cell for 16 pixels
VGG_SOURCE = "https://download.pytorch.org/models/vgg16-397923af.pth (torchvision's VGG-16)"
LINEAR_SOURCE = (
    "https://github.com/richzhang/PerceptualSimilarity, lpips/weights/v0.1/vgg.pth (torchmetrics "
    "brings the same file: functional/image/lpips_models/vgg.pth)"
)
# The network wants ImageNet's mean and standard deviation; LPIPS gives them for [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """The perceptual term and the files of its network."""

    weight: float = 0.0  # of the term, beside L1 with weight 1; 0 = none, taming has 1
    reader: str | None = None  # folder of a trained reader that compares instead of VGG-16
    vgg: str | None = None  # file with torchvision's weights of VGG-16
    linear: str | None = None  # file with LPIPS' linear layers; null: all channels alike

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"model.perceptual.weight is {self.weight}, use 0 or more")
        if self.reader and (self.vgg or self.linear):
            raise ValueError(
                "model.perceptual has a reader and files of VGG-16: leave either of them out"
            )


class VGG16(nn.Module):
    """The convolutions of VGG-16; tensors are called as in torchvision (`features.0.weight` …)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for channels, convolutions in BLOCKS:
            for _ in range(convolutions):
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
                before = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])

    def forward(self, image_BCHW: Tensor) -> list[Tensor]:
        """Features after the last convolution of each block, finest first."""
        outputs, hidden = [], image_BCHW
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                outputs.append(hidden)
            hidden = layer(hidden)
        return [*outputs, hidden]


class Perceptual(nn.Module):
    """LPIPS between pictures; frozen. Without linear layers every channel has weight 1."""

    def __init__(self) -> None:
        super().__init__()
        self.vgg = VGG16()
        self.linear = nn.ParameterList(torch.ones(1, channels, 1, 1) for channels, _ in BLOCKS)
        self.eval().requires_grad_(False)

    def forward(self, image_BCHW: Tensor, true_image_BCHW: Tensor) -> Tensor:
        """Distance B of pictures in [0, 1], at least 16 pixels a side, from their originals.

        The gradient reaches `image_BCHW` only.
        """
        with torch.no_grad():
            truths = self._look(true_image_BCHW)
        distance_B = image_BCHW.new_zeros(len(image_BCHW), dtype=torch.float32)
        for weight, guess, truth in zip(self.linear, self._look(image_BCHW), truths, strict=True):
            difference_BC = (guess - truth).square().mean(dim=(2, 3))
            distance_B = distance_B + (difference_BC * weight.flatten()).sum(1)
        return distance_B

    def _look(self, image_BCHW: Tensor) -> list[Tensor]:
        """Features of unit length at every place, float32."""
        shift, scale = (
            torch.tensor(values, device=image_BCHW.device)[:, None, None]
            for values in (SHIFT, SCALE)
        )
        features = self.vgg((image_BCHW * 2 - 1 - shift) / scale)
        return [F.normalize(x_BCHW.float(), dim=1, eps=1e-10) for x_BCHW in features]


class ReaderPerceptual(nn.Module):
    """Squared distance of a reader's features, of unit length at every place; frozen.

    The reader tells classes apart, so what makes a thing recognisable weighs most. It is no judge
    of what was trained with it: evaluate with another one.
    """

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader
        self.eval().requires_grad_(False)

    def forward(self, image_BCHW: Tensor, true_image_BCHW: Tensor) -> Tensor:
        """Distance B of pictures in [0, 1] of the reader's size from their originals.

        The gradient reaches `image_BCHW` only.
        """
        return self.compare(image_BCHW, true_image_BCHW)[0]

    def compare(self, image_BCHW: Tensor, true_image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The same distance, and the features B D H W that the reader tells classes by."""
        with torch.no_grad():
            truths = self.reader.look(true_image_BCHW)
        guesses = self.reader.look(image_BCHW)
        layers = [
            (F.normalize(guess.float(), dim=1) - F.normalize(truth.float(), dim=1))
            .square()
            .sum(1)
            .mean(dim=(1, 2))
            for guess, truth in zip(guesses, truths, strict=True)
        ]
        return torch.stack(layers).sum(0), guesses[0]


def load_perceptual(config: PerceptualConfig) -> Perceptual | ReaderPerceptual:
    """The network with the weights of the files.

    Raises:
        WeightsError: no file named, or one that cannot be used; names it and its source.
        StorageError: the folder holds no reader.
    """
    if config.reader is not None:
        source = Path(config.reader) / CONFIG_FILE
        if not source.is_file():
            raise StorageError(
                f"model.perceptual.reader: {source}: no such file; train that reader first (mas "
                "train reader), or train without the term: --model.perceptual.weight 0 (refiner: "
                "--model.consistency 0, too)"
            )
        return ReaderPerceptual(Reader.from_pretrained(config.reader))
    if config.vgg is None:
        raise ValueError(
            "the perceptual, face and object terms need the weights of VGG-16: set "
            f"model.perceptual.vgg to a file from {VGG_SOURCE}, or, for the perceptual term alone, "
            "model.perceptual.reader to a folder of mas train reader"
        )
    network = Perceptual()
    expected = network.vgg.state_dict()
    tensors = read_tensors(config.vgg, source=VGG_SOURCE)
    network.vgg.load_state_dict(pick_tensors(tensors, expected, path=config.vgg, source=VGG_SOURCE))
    if config.linear is not None:
        names = {f"lin{k}.model.1.weight": weight for k, weight in enumerate(network.linear)}
        tensors = read_tensors(config.linear, source=LINEAR_SOURCE)
        found = pick_tensors(tensors, names, path=config.linear, source=LINEAR_SOURCE)
        for name, weight in names.items():
            weight.copy_(found[name])
    return network
