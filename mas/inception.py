"""Inception v3 as the Fréchet distance of pictures (FID) wants it: the network of 2015.

In: pictures 299 × 299, RGB in [-1, 1]. Out: 2048 features each. Szegedy et al. (arXiv 1512.00567)
in the version of 2015-12-05 that published figures are computed with. It differs from later ones:
averages over a place's neighbours leave the padding out, and the last block takes their maximum.
Tensors are called as in pt_inception-2015-12-05-6726825d.pth, that is as in torchvision.
Axes: B batch, C channels, H W grid, D features.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 299  # pixels a side
FEATURES = 2048
CLASSES = 1008  # of its classifier, which no feature needs
Pool = Literal["average", "maximum"]


class Conv(nn.Module):
    """Convolution, batch normalisation, ReLU; `padded` keeps the size at stride 1."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padded: bool = True,
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if padded else 0
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_BCHW)))


def pool(x_BCHW: Tensor, kind: Pool) -> Tensor:
    """Average or maximum of each place and its eight neighbours, as far as they exist."""
    if kind == "maximum":
        return F.max_pool2d(x_BCHW, 3, stride=1, padding=1)
    return F.avg_pool2d(x_BCHW, 3, stride=1, padding=1, count_include_pad=False)


def halve(x_BCHW: Tensor) -> Tensor:
    """Maximum of 3 × 3 places, every second one."""
    return F.max_pool2d(x_BCHW, 3, stride=2)


class BlockA(nn.Module):
    """35 × 35: kernels of 1, 5 and twice 3."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1 = Conv(inputs, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(inputs, pooled, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x_BCHW)))
        five = self.branch5x5_2(self.branch5x5_1(x_BCHW))
        pooled = self.branch_pool(pool(x_BCHW, "average"))
        return torch.cat([self.branch1x1(x_BCHW), five, double, pooled], dim=1)


class BlockB(nn.Module):
    """From 35 × 35 to 17 × 17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(inputs, 384, 3, stride=2, padded=False)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2, padded=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x_BCHW)))
        return torch.cat([self.branch3x3(x_BCHW), double, halve(x_BCHW)], dim=1)


class BlockC(nn.Module):
    """17 × 17: kernels of 7 in one direction after the other."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        across, down = (1, 7), (7, 1)
        self.branch1x1 = Conv(inputs, 192, 1)
        self.branch7x7_1 = Conv(inputs, width, 1)
        self.branch7x7_2 = Conv(width, width, across)
        self.branch7x7_3 = Conv(width, 192, down)
        self.branch7x7dbl_1 = Conv(inputs, width, 1)
        self.branch7x7dbl_2 = Conv(width, width, down)
        self.branch7x7dbl_3 = Conv(width, width, across)
        self.branch7x7dbl_4 = Conv(width, width, down)
        self.branch7x7dbl_5 = Conv(width, 192, across)
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x_BCHW)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x_BCHW)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        pooled = self.branch_pool(pool(x_BCHW, "average"))
        return torch.cat([self.branch1x1(x_BCHW), once, twice, pooled], dim=1)


class BlockD(nn.Module):
    """From 17 × 17 to 8 × 8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(inputs, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2, padded=False)
        self.branch7x7x3_1 = Conv(inputs, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2, padded=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x_BCHW))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x_BCHW)))
        return torch.cat([three, self.branch7x7x3_4(seven), halve(x_BCHW)], dim=1)


class BlockE(nn.Module):
    """8 × 8: kernels of 3 in both directions at once."""

    def __init__(self, inputs: int, pooling: Pool) -> None:
        super().__init__()
        across, down = (1, 3), (3, 1)
        self.pooling: Pool = pooling
        self.branch1x1 = Conv(inputs, 320, 1)
        self.branch3x3_1 = Conv(inputs, 384, 1)
        self.branch3x3_2a = Conv(384, 384, across)
        self.branch3x3_2b = Conv(384, 384, down)
        self.branch3x3dbl_1 = Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3)
        self.branch3x3dbl_3a = Conv(384, 384, across)
        self.branch3x3dbl_3b = Conv(384, 384, down)
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        three = self.branch3x3_1(x_BCHW)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x_BCHW))
        parts = [
            self.branch1x1(x_BCHW),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pool(x_BCHW, self.pooling)),
        ]
        return torch.cat(parts, dim=1)


class Inception(nn.Module):
    """Pictures to the 2048 features before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, padded=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padded=False)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128)
        self.Mixed_6c = BlockC(768, 160)
        self.Mixed_6d = BlockC(768, 160)
        self.Mixed_6e = BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, "average")
        self.Mixed_7c = BlockE(FEATURES, "maximum")
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Features B D of pictures in [-1, 1], 299 pixels a side."""
        x_BCHW = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(image_BCHW)))
        x_BCHW = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x_BCHW))))
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x_BCHW = block(x_BCHW)
        return x_BCHW.mean(dim=(2, 3))
