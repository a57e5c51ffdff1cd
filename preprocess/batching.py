"""What the segmenters share: shrinking photos and grouping them into true batches.

In: photos as uint8 H x W x 3 arrays of any size. Out: resized photos and groups of indices whose
padding to a common size wastes little.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

MAX_WASTE = 0.25  # of a padded batch may be padding


def pick_device(name: str) -> torch.device:
    """`auto` = the GPU where there is one, else the CPU; anything else as torch spells it.

    Raises:
        ValueError: torch does not know the device, or this machine lacks it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r}: use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""  # as Ray does with workers
        lacking = "this process was given no GPU" if hidden else "this machine has no CUDA GPU"
        mend = "--gpus-per-worker gives a worker one" if hidden else "use auto or cpu"
        raise ValueError(f"device {name!r}: {lacking}; {mend}")
    return device


def lacking_device(name: str) -> list[str]:
    """What `pick_device` says of a device that is not there."""
    try:
        pick_device(name)
    except ValueError as error:
        return [str(error)]
    return []


def fitted_size(height: int, width: int, *, short_side: int, max_side: int) -> tuple[int, int]:
    """Height and width with the given shorter side, the longer one at most `max_side`."""
    scale = short_side / min(height, width)
    scale = min(scale, max_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize(image: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Bilinear (area-weighted when shrinking), uint8 H W 3, as detectron2 and its kin resize."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def plan_batches(sizes: Sequence[tuple[int, int]], *, batch: int) -> list[list[int]]:
    """Groups indices of (height, width) so that similar shapes share a batch.

    A batch is padded to its largest height and width; at most `MAX_WASTE` of it is padding.
    """
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i][0] / sizes[i][1], i))
    batches: list[list[int]] = []
    for index in order:
        members = [*batches[-1], index] if batches else [index]
        padded = max(sizes[i][0] for i in members) * max(sizes[i][1] for i in members)
        filled = sum(sizes[i][0] * sizes[i][1] for i in members)
        wasted = 1 - filled / (padded * len(members))
        if batches and len(members) <= batch and wasted <= MAX_WASTE:
            batches[-1] = members
        else:
            batches.append([index])
    return batches
