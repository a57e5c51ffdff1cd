"""The network of Self-Correction Human Parsing (SCHP): AugmentCE2P on ResNet-101, for inference.

In: normalised BGR person crops, 473 x 473. Out: logits of 20 human parts (LIP order).
Source: arXiv 1910.09777 (SCHP), 1809.05996 (CE2P). Attribute names are the published checkpoint's
keys ("fushion" included), so that it loads by name with nothing missing and nothing left over.
Axes: B batch; C channels; H W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preprocess.checkpoint import read_checkpoint
from preprocess.weights import WeightsError, check_hash

PARTS = 20  # LIP ids 0-19, 0 = background
INPUT_SIZE = 473  # pixels a side
GAIN_EPS = 1e-5  # the published normalisation scales by |weight| + eps
SLOPE = 0.01  # of the heads' LeakyReLU
PREFIX = "module."  # DataParallel's, in front of every published key


class SCHPOutput(NamedTuple):
    """All three predictions at a quarter of the input size."""

    fusion: Tensor  # B 20 H W, what people use
    parsing: Tensor  # B 20 H W
    edge: Tensor  # B 2 H W


class NormLeakyReLU(nn.BatchNorm2d):
    """BatchNorm followed by LeakyReLU; one module, so that the keys stay as published."""

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x), SLOPE, inplace=True)


def _conv_norm(inputs: int, outputs: int, *, kernel: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return [conv, NormLeakyReLU(outputs)]


def _resize(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


class Bottleneck(nn.Module):
    """ResNet bottleneck; stride and dilation sit on the 3x3 convolution."""

    def __init__(
        self, inputs: int, width: int, *, stride: int = 1, dilation: int = 1, project: bool = False
    ) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(
            width, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
        )
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if project:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        h = F.relu(self.bn2(self.conv2(h)), inplace=True)
        return F.relu(self.bn3(self.conv3(h)) + self.downsample(x), inplace=True)


def _stage(
    inputs: int, width: int, *, blocks: int, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    first = Bottleneck(inputs, width, stride=stride, dilation=dilation, project=True)
    rest = [Bottleneck(4 * width, width, dilation=dilation) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


class PyramidPooling(nn.Module):
    """Context from pooled grids of 1, 2, 3 and 6 cells, ahead of the features themselves."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        grids = (1, 2, 3, 6)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(grid), *_conv_norm(inputs, outputs))
            for grid in grids
        )
        self.bottleneck = nn.Sequential(
            *_conv_norm(inputs + len(grids) * outputs, outputs, kernel=3)
        )

    def forward(self, x: Tensor) -> Tensor:
        pooled = [_resize(stage(x), x.shape[-2:]) for stage in self.stages]
        return self.bottleneck(torch.cat([*pooled, x], dim=1))


class EdgeHead(nn.Module):
    """Part boundaries from the first three stages; its features also feed the fusion."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*_conv_norm(256, 256))
        self.conv2 = nn.Sequential(*_conv_norm(512, 256))
        self.conv3 = nn.Sequential(*_conv_norm(1024, 256))
        self.conv4 = nn.Conv2d(256, 2, 3, padding=1)  # shared by the three, before resizing
        self.conv5 = nn.Conv2d(6, 2, 1)

    def features(self, x1: Tensor, x2: Tensor, x3: Tensor) -> list[Tensor]:
        return [self.conv1(x1), self.conv2(x2), self.conv3(x3)]

    def forward(self, features: list[Tensor]) -> Tensor:
        size = features[0].shape[-2:]
        return self.conv5(torch.cat([_resize(self.conv4(f), size) for f in features], dim=1))


class Decoder(nn.Module):
    """Part features from the context and the first stage."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*_conv_norm(512, 256))
        self.conv2 = nn.Sequential(*_conv_norm(256, 48))
        self.conv3 = nn.Sequential(*_conv_norm(304, 256), *_conv_norm(256, 256))
        self.conv4 = nn.Conv2d(256, PARTS, 1)

    def features(self, context: Tensor, x1: Tensor) -> Tensor:
        coarse = _resize(self.conv1(context), x1.shape[-2:])
        return self.conv3(torch.cat([coarse, self.conv2(x1)], dim=1))

    def forward(self, features: Tensor) -> Tensor:
        return self.conv4(features)


class SCHP(nn.Module):
    """AugmentCE2P: ResNet-101 with a deep stem and output stride 16, context, edges, fusion."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(128)
        self.layer1 = _stage(128, 64, blocks=3)
        self.layer2 = _stage(256, 128, blocks=4, stride=2)
        self.layer3 = _stage(512, 256, blocks=23, stride=2)
        self.layer4 = _stage(1024, 512, blocks=3, dilation=2)
        self.context_encoding = PyramidPooling(2048, 512)
        self.edge = EdgeHead()
        self.decoder = Decoder()
        dropout = nn.Identity()  # active only in training; keeps the key of the last convolution
        self.fushion = nn.Sequential(*_conv_norm(1024, 256), dropout, nn.Conv2d(256, PARTS, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the fusion head, B 20 H/4 W/4, of normalised BGR crops B 3 H W."""
        return self._fuse(*self._features(x))

    def heads(self, x: Tensor) -> SCHPOutput:
        """All three predictions; `forward` leaves out what the fusion does not need."""
        parts, edges = self._features(x)
        return SCHPOutput(self._fuse(parts, edges), self.decoder(parts), self.edge(edges))

    def _features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        x1 = self.layer1(F.max_pool2d(x, 3, stride=2, padding=1))
        x2 = self.layer2(x1)
        x3 = self.layer3(x2)
        context = self.context_encoding(self.layer4(x3))
        return self.decoder.features(context, x1), self.edge.features(x1, x2, x3)

    def _fuse(self, parts: Tensor, edges: list[Tensor]) -> Tensor:
        size = parts.shape[-2:]
        return self.fushion(torch.cat([parts, *(_resize(f, size) for f in edges)], dim=1))


def load_schp(path: str | Path, *, sha256: str | None = None) -> SCHP:
    """Builds the network from a checkpoint in the published layout; frozen, eval mode, float32.

    The published networks normalise with (x - mean) / sqrt(var + 1e-5) * (|weight| + 1e-5) + bias
    (in-place ABN), so |weight| + 1e-5 is folded into the plain BatchNorm here.

    Args:
        path: a file of {"state_dict": {...}}, or of the state dict itself, with or without
            DataParallel's "module." prefix.
        sha256: expected checksum of the file; None = not checked (a checkpoint of one's own).

    Raises:
        WeightsError: wrong checksum, unreadable file, missing, unknown or misshaped tensors.
    """
    path = Path(path)
    if sha256 is not None:
        check_hash(path, sha256)
    state = _read_state(path)
    with torch.device("meta"):
        network = SCHP()
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            state.setdefault(f"{name}.num_batches_tracked", torch.tensor(0))
    _check_keys(state, network, path)
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            state[f"{name}.weight"] = state[f"{name}.weight"].abs() + GAIN_EPS
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def _read_state(path: Path) -> dict[str, Tensor]:
    content = read_checkpoint(
        path,
        wanted="a readable SCHP checkpoint of plain tensors, as "
        "torch.save({'state_dict': network.state_dict()}, path) writes it",
    )
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise WeightsError(f"{path}: no state dict of tensors in this checkpoint")
    return {
        name.removeprefix(PREFIX): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def _check_keys(state: dict[str, Tensor], network: SCHP, path: Path) -> None:
    wanted = network.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    unknown = sorted(state.keys() - wanted.keys())
    misshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    for problem, names in (("lacks", missing), ("has unknown", unknown), ("misshapes", misshaped)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise WeightsError(
                f"{path}: not the AugmentCE2P ResNet-101 of LIP: it {problem} "
                f"{', '.join(names[:3])}{more}"
            )
