"""Where a picture counts more: pixel weights from its scene map.

In: the labels of a picture. Out: a weight a pixel. Make-A-Scene (arXiv 2203.13131) sections 3.3 and
3.4 makes faces and things count more by crops and other networks; this is the plain way, which
needs neither: most of a picture is sky and ground, and a codebook is spent on what the loss counts.
Axes: B batch, H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mas.scene import FACE_IDS, HUMAN_IDS, THINGS


@dataclass(frozen=True, kw_only=True)
class FocusConfig:
    """What a pixel counts in the terms that compare pixels; those of stuff and void count 1."""

    things: float = 1.0  # pixels of the 80 thing classes
    people: float = 1.0  # pixels of human parts
    faces: float = 1.0  # pixels of face parts

    def __post_init__(self) -> None:
        if not all(0 < weight < math.inf for weight in (self.things, self.people, self.faces)):
            raise ValueError(f"weights of model.focus must be numbers above 0: {self}")

    @property
    def even(self) -> bool:
        """Whether all pixels count alike, so that nobody needs the scene."""
        return self.things == self.people == self.faces == 1

    def weigh(self, labels_BHW: Tensor) -> Tensor:
        """Weights B H W of mean 1 over the batch; labels are uint8."""
        weights_K = torch.ones(256, device=labels_BHW.device)
        weights_K[:THINGS] = self.things
        weights_K[HUMAN_IDS.start : HUMAN_IDS.stop] = self.people
        weights_K[FACE_IDS.start : FACE_IDS.stop] = self.faces
        weights_BHW = weights_K[labels_BHW.int()]
        return weights_BHW / weights_BHW.mean()


EVEN = FocusConfig()
