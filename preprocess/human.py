"""Human parts by SCHP, one person at a time: crop, parse, paste back inside that person's mask.

In: photos and their panoptic segments. Out: LIP ids 0-19 at the segments' resolution. SCHP is a
single-person network, so each person instance of the panoptic map gets a crop of its own; the crops
of all photos of a call share batches. Network: preprocess/schp.py.
Axes: B batch; C channels; H W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mas.scene import PERSON, Segments, nearest
from preprocess.batching import lacking_device, pick_device, resize
from preprocess.schp import INPUT_SIZE, load_schp
from preprocess.weights import WEIGHTS, file_hash, find_weights, lacking_weights

if TYPE_CHECKING:
    from preprocess.segment import Photo

logger = logging.getLogger(__name__)

MEAN_BGR = (0.406, 0.456, 0.485)
STD_BGR = (0.225, 0.224, 0.229)
MAX_CROP = 2 * INPUT_SIZE  # pixels; longer crops are shrunk first, for bilinear sampling aliases


@dataclass(frozen=True, kw_only=True)
class HumanConfig:
    """Which people are parsed, and how."""

    weights: str = "schp-lip"  # known weights, or a checkpoint of one's own
    margin: float = 0.1  # of the box's longer side, added on each side of a person
    min_side: float = (
        0.04  # of the photo's shorter side; people with a shorter longer side are left
    )
    max_people: int = 20  # a photo, the largest; the others keep the plain person label
    batch: int = 8  # crops a forward pass
    device: str = "auto"  # auto, cpu, cuda, cuda:N

    def lacks(self) -> list[str]:
        """What this machine lacks for it, each with its mend."""
        return [*lacking_weights(self.weights), *lacking_device(self.device)]


class Person(NamedTuple):
    """One person of one photo, in pixels of its segments."""

    box: tuple[int, int, int, int]  # top, left, bottom, right, with margin, within the photo
    mask: np.ndarray  # bool H W of the box
    area: int  # pixels of the mask


class HumanParser:
    """Parses crops that show one person each."""

    def __init__(
        self, weights: str | Path = "schp-lip", *, device: str = "auto", batch: int = 8
    ) -> None:
        """Loads the network; the checksum is checked where `weights` is a known name."""
        known = next((w for w in WEIGHTS if w.name == str(weights)), None)
        path = find_weights(str(weights))
        if known is None:
            logger.info("%s: own checkpoint, sha256 %s", path, file_hash(path))
        self.device = pick_device(device)
        self.batch = batch
        self.network = load_schp(path, sha256=known.sha256 if known else None).to(self.device)

    def parse(self, crops: Sequence[np.ndarray]) -> list[np.ndarray]:
        """LIP ids 0-19, uint8 H W, of RGB crops, uint8 H W 3, of any sizes."""
        labels: list[np.ndarray] = []
        for start in range(0, len(crops), self.batch):
            chunk = [_shrink(crop) for crop in crops[start : start + self.batch]]
            logits_BCHW = self.logits(torch.stack([warp(crop) for crop in chunk]))
            for crop, small, logits_CHW in zip(
                crops[start : start + self.batch], chunk, logits_BCHW, strict=True
            ):
                found = unwarp(logits_CHW, *small.shape[:2])
                labels.append(resize_nearest(found, *crop.shape[:2]))
        return labels

    @torch.inference_mode()
    def logits(self, warped_BCHW: Tensor) -> Tensor:
        """Logits B 20 473 473 of warped crops, BGR 0-255."""
        fusion = self.network(normalise(warped_BCHW.to(self.device)))
        size = warped_BCHW.shape[-2:]
        return F.interpolate(fusion, size, mode="bilinear", align_corners=True)


class HumanSegmenter:
    """Parses every person of a batch of photos."""

    def __init__(self, config: HumanConfig | None = None, **options: Any) -> None:
        """Takes a config, or its fields as keywords."""
        self.config = config or HumanConfig(**options)
        self.parser = HumanParser(
            self.config.weights, device=self.config.device, batch=self.config.batch
        )

    def __call__(self, photos: Sequence[Photo], segments: Sequence[Segments]) -> list[np.ndarray]:
        """LIP ids 0-19, uint8 H W, one map a photo at the resolution of its segments."""
        people = [find_people(found, self.config) for found in segments]
        crops = [
            _crop(photo.image, person.box, found.labels.shape)
            for photo, found, group in zip(photos, segments, people, strict=True)
            for person in group
        ]
        parsed = iter(self.parser.parse(crops))
        return [
            paste(found.labels.shape, [(person, next(parsed)) for person in group])
            for found, group in zip(segments, people, strict=True)
        ]


def find_people(segments: Segments, config: HumanConfig) -> list[Person]:
    """The person instances worth parsing, smaller ones first."""
    labels, instances = segments
    height, width = labels.shape
    people = []
    for instance in np.unique(instances[labels == PERSON]):
        mask = (instances == instance) & (labels == PERSON)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        side = max(bottom - top, right - left)
        if side < config.min_side * min(height, width):
            continue
        margin = round(config.margin * side)
        top, left = max(0, top - margin), max(0, left - margin)
        bottom, right = min(height, bottom + margin), min(width, right + margin)
        box = (int(top), int(left), int(bottom), int(right))
        people.append(Person(box, mask[top:bottom, left:right], int(mask.sum())))
    people.sort(key=lambda person: person.area)
    return people[-config.max_people :] if config.max_people else []


def paste(shape: tuple[int, ...], people: Sequence[tuple[Person, np.ndarray]]) -> np.ndarray:
    """One map from the parsed crops: each inside its person's mask, larger people last."""
    parts = np.zeros(shape, np.uint8)
    for person, labels in sorted(people, key=lambda pair: pair[0].area):
        top, left, bottom, right = person.box
        labels = resize_nearest(labels, bottom - top, right - left)
        parts[top:bottom, left:right][person.mask] = labels[person.mask]
    return parts


def warp(crop_HWC: np.ndarray) -> Tensor:
    """Warps an RGB crop into the network's square: BGR 3 473 473, float, whole values 0-255.

    The crop is centred, its aspect kept, the rest black: x' = (x - (w-1)/2) * 472/s + 236 with
    s = max(w, h) - 1, sampled bilinearly (SCHP's get_affine_transform and warpAffine).
    """
    height, width = crop_HWC.shape[:2]
    image = torch.from_numpy(np.ascontiguousarray(crop_HWC[..., ::-1].transpose(2, 0, 1)))
    target = torch.arange(INPUT_SIZE, dtype=torch.float64) - (INPUT_SIZE - 1) / 2
    scale = max(height - 1, width - 1, 1) / (INPUT_SIZE - 1)
    rows = target * scale + (height - 1) / 2
    columns = target * scale + (width - 1) / 2
    return _sample(image.float(), rows, columns).round()


def unwarp(logits_CHW: Tensor, height: int, width: int) -> np.ndarray:
    """Labels, uint8 H W, of a crop of this size: the warp undone on the logits, then argmax."""
    scale = (INPUT_SIZE - 1) / max(height - 1, width - 1, 1)
    middle = (INPUT_SIZE - 1) / 2
    rows = (torch.arange(height, dtype=torch.float64) - (height - 1) / 2) * scale + middle
    columns = (torch.arange(width, dtype=torch.float64) - (width - 1) / 2) * scale + middle
    return _sample(logits_CHW, rows, columns).argmax(0).to(torch.uint8).cpu().numpy()


def normalise(warped_BCHW: Tensor) -> Tensor:
    """0-255 BGR to what the network was trained on; black padding becomes about -1.8."""
    mean = rearrange(torch.tensor(MEAN_BGR, device=warped_BCHW.device), "c -> c 1 1")
    std = rearrange(torch.tensor(STD_BGR, device=warped_BCHW.device), "c -> c 1 1")
    return (warped_BCHW / 255 - mean) / std


def resize_nearest(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Labels H W at another size, each pixel that of the source under its centre."""
    if labels.shape == (height, width):
        return labels
    return labels[np.ix_(nearest(labels.shape[0], height), nearest(labels.shape[1], width))]


def _sample(image_CHW: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bilinear values at all pairs of `rows` and `columns` (pixel centres whole), zero outside."""
    height, width = image_CHW.shape[1:]
    y = (2 * rows + 1) / height - 1
    x = (2 * columns + 1) / width - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None].to(image_CHW)
    return F.grid_sample(image_CHW[None], grid, align_corners=False)[0]


def _crop(image: np.ndarray, box: tuple[int, int, int, int], shape: tuple[int, ...]) -> np.ndarray:
    """The part of the photo under a box in pixels of its segments (of `shape`)."""
    down, across = image.shape[0] / shape[0], image.shape[1] / shape[1]
    top, left, bottom, right = box
    y, x = int(top * down), int(left * across)
    return image[y : max(round(bottom * down), y + 1), x : max(round(right * across), x + 1)]


def _shrink(crop: np.ndarray) -> np.ndarray:
    scale = MAX_CROP / max(crop.shape[:2])
    if scale >= 1:
        return crop
    height, width = (max(1, round(side * scale)) for side in crop.shape[:2])
    return resize(crop, height=height, width=width)
