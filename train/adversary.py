"""The other player of VQ-GAN and refiner: a discriminator that judges patches of a picture.

In: pictures in [-1, 1], real or reconstructed. Out: one score a patch, and the losses of both
players. Isola et al. (arXiv 1611.07004) for the network; hinge losses and the adaptive weight as
in Esser et al. (arXiv 2012.09841), section 3.1.
Axes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADAPTIVE_LIMIT = 1e4  # of the ratio of gradients
ADAPTIVE_EPS = 1e-4


@dataclass(frozen=True, kw_only=True)
class AdversaryConfig:
    """The discriminator and when it joins in."""

    weight: float = 0.8  # of the adversarial term, times the adaptive weight; 0 = no discriminator
    start: int = 10_000  # optimiser step from which it trains and judges
    warmup_steps: int = 1000  # after `start`, in which its weight grows from 0 to full
    width: int = 64  # channels of its first layer, doubled each level up to eight times
    levels: int = 3  # halvings; a patch is 16, 34, 70, 142 pixels for 1, 2, 3, 4 levels
    learning_rate: float = 1.0  # times that of the VQ-GAN

    def __post_init__(self) -> None:
        if self.weight < 0 or self.start < 0 or self.warmup_steps < 0:
            raise ValueError("weight, start and warmup_steps of the adversary must not be negative")
        if self.width % 8 or self.levels < 1:
            raise ValueError("the adversary's width must be a multiple of 8, its levels 1 or more")

    def say(self, step: int) -> float:
        """Weight of the adversarial term at an optimiser step, before the adaptive weight."""
        if step < self.start:
            return 0.0
        return self.weight * min(1.0, (step - self.start + 1) / max(1, self.warmup_steps))


class PatchDiscriminator(nn.Module):
    """Scores overlapping patches: high = looks real.

    Group instead of batch normalisation: scores do not depend on the other pictures in the batch,
    and there are no running statistics.
    """

    def __init__(self, config: AdversaryConfig) -> None:
        super().__init__()
        width = config.width
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), _leaky()]
        for level in range(1, config.levels + 1):
            wider = config.width * min(2**level, 8)
            stride = 2 if level < config.levels else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(8, wider),
                _leaky(),
            ]
            width = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.layers(image_BCHW)


def _leaky() -> nn.Module:
    return nn.LeakyReLU(0.2)


def generator_loss(scores_of_fakes: Tensor) -> Tensor:
    """Hinge loss of the VQ-GAN: its pictures should score high."""
    return -scores_of_fakes.mean()


def discriminator_loss(scores_of_reals: Tensor, scores_of_fakes: Tensor) -> Tensor:
    """Hinge loss of the discriminator: real above 1, reconstructed below -1."""
    return 0.5 * (F.relu(1 - scores_of_reals).mean() + F.relu(1 + scores_of_fakes).mean())


def adaptive_weight(
    fake_BCHW: Tensor, last_layer: Tensor, *, pull_BCHW: Tensor, push_BCHW: Tensor
) -> Tensor:
    """How strong the adversarial term must be to pull on the last layer as the other does.

    The ratio of the two losses' gradient norms at `last_layer`; a scalar without gradient.

    Args:
        fake_BCHW: reconstructed pictures, with the way back to `last_layer`.
        last_layer: weight of the layer that drew them.
        pull_BCHW: gradient of the reconstruction term at the pictures.
        push_BCHW: gradient of the adversarial term, likewise.
    """
    (pull,) = torch.autograd.grad(fake_BCHW, last_layer, pull_BCHW, retain_graph=True)
    (push,) = torch.autograd.grad(fake_BCHW, last_layer, push_BCHW, retain_graph=True)
    return (pull.norm() / (push.norm() + ADAPTIVE_EPS)).clamp(0, ADAPTIVE_LIMIT).detach()
