"""Panoptic segmentation by detectron2, the base of every scene map.

In: photos. Out: `Segments` (133 COCO classes, instance ids). The only file that imports detectron2.
Panoptic FPN: arXiv 1901.02446.
Axes: C channels; H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mas.errors import first_line
from mas.scene import PANOPTIC_CLASSES, THINGS, VOID, Segments
from preprocess.batching import fitted_size, lacking_device, pick_device, plan_batches, resize
from preprocess.checkpoint import Numbers, read_checkpoint
from preprocess.needs import lacking_modules
from preprocess.weights import WeightsError, find_weights, lacking_weights

if TYPE_CHECKING:
    from preprocess.segment import Photo

STUFF = len(PANOPTIC_CLASSES) - THINGS  # 53
COCO_SHORT_SIDE = 480  # pixels of the usual COCO photo, for which area limits are stated

USER = "panoptic detectron2"
INSTALL = (
    "pip install 'setuptools<81' wheel ninja torchvision && pip install --no-build-isolation "
    "'git+https://github.com/facebookresearch/detectron2.git' (docs/segmenters.md)"
)


@dataclass(frozen=True, kw_only=True)
class Detectron2Config:
    """How photos are segmented by a detectron2 network."""

    config_file: str = (
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml"  # model zoo name or file
    )
    weights: str = "panoptic_fpn_R_50_3x"  # known weights, or a .pkl or .pth file of one's own
    short_side: int = 512  # pixels; photos are resized to it, up or down
    max_side: int = 1024  # pixels; caps the longer side
    score: float = 0.5  # 0-1; things below it are dropped
    overlap: float = 0.5  # 0-1; a thing covered by better ones to more than this is dropped
    stuff_area: int = 4096  # pixels of a 480-pixel-high photo; smaller stuff is left void
    batch: int = 8  # photos a forward pass
    device: str = "auto"  # auto, cpu, cuda, cuda:N

    def lacks(self) -> list[str]:
        """What this machine lacks for it, each with its mend."""
        return [
            *lacking_modules("detectron2", "torchvision", user=USER, mend=INSTALL),
            *lacking_weights(self.weights),
            *lacking_device(self.device),
        ]


class Detectron2Panoptic:
    """Segments photos in batches, at the resolution the network saw (`short_side`)."""

    def __init__(self, config: Detectron2Config | None = None, **options: Any) -> None:
        """Takes a config, or its fields as keywords."""
        self.config = config or Detectron2Config(**options)
        self.device = pick_device(self.config.device)
        self.network, self.channels = load_detectron2(self.config)
        self.network.to(self.device)

    def __call__(self, photos: Sequence[Photo]) -> list[Segments]:
        """One `Segments` a photo, at the network's resolution and the photo's aspect."""
        config = self.config
        sizes = [
            fitted_size(
                *photo.image.shape[:2], short_side=config.short_side, max_side=config.max_side
            )
            for photo in photos
        ]
        segments: dict[int, Segments] = {}
        for indices in plan_batches(sizes, batch=config.batch):
            inputs = [self._prepare(photos[i].image, sizes[i]) for i in indices]
            with torch.inference_mode():
                outputs = self.network(inputs)
            for i, output in zip(indices, outputs, strict=True):
                ids_HW, info = output["panoptic_seg"]
                segments[i] = from_detectron2(ids_HW.cpu().numpy(), info)
        return [segments[i] for i in range(len(photos))]

    def _prepare(self, image: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
        """detectron2's input: 0-255, C H W, in the channel order the network was trained with."""
        height, width = size
        resized = resize(image, height=height, width=width)
        if self.channels == "BGR":
            resized = resized[..., ::-1]
        image_CHW = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return {"image": image_CHW, "height": height, "width": width}


def from_detectron2(ids_HW: np.ndarray, info: Sequence[Mapping[str, Any]]) -> Segments:
    """Maps detectron2's panoptic output to the 133 ids.

    Things keep their `category_id` (0-79). Stuff has 1-53 for ids 80-132; its 0 means "a thing" and
    becomes void, as does segment id 0, "unlabelled".

    Args:
        ids_HW: segment ids.
        info: a dict a segment with `id`, `isthing` and `category_id`.

    Raises:
        ValueError: a segment without an entry, or a category outside COCO's.
    """
    present, inverse = np.unique(ids_HW, return_inverse=True)
    classes = {segment["id"]: _class_of(segment) for segment in info} | {0: VOID}
    unknown = [int(i) for i in present if int(i) not in classes]
    if unknown:
        raise ValueError(f"panoptic output has segment ids {unknown[:5]} without an entry")
    labels = np.array([classes[int(i)] for i in present], np.uint8)[inverse].reshape(ids_HW.shape)
    return Segments(labels, np.where(labels == VOID, 0, ids_HW).astype(np.int32))


def _class_of(segment: Mapping[str, Any]) -> int:
    category = segment["category_id"]
    kind, last = ("things", THINGS - 1) if segment["isthing"] else ("stuff", STUFF)
    if not 0 <= category <= last:
        raise ValueError(f"panoptic output has {kind} of category {category}, beyond COCO's {last}")
    if segment["isthing"]:
        return category
    return THINGS - 1 + category if category else VOID


def load_detectron2(config: Detectron2Config) -> tuple[Any, str]:
    """The frozen network and its channel order ("BGR" or "RGB").

    Raises:
        WeightsError: detectron2, the config or the weights are missing, or they do not fit.
    """
    try:
        from detectron2 import model_zoo
        from detectron2.config import get_cfg
        from detectron2.modeling import build_model
    except ImportError as error:
        raise WeightsError(
            f"{USER} cannot import detectron2: {INSTALL}; the import said: {error}"
        ) from error

    import yaml

    weights = find_weights(config.weights)
    path = config.config_file
    cfg = get_cfg()
    try:
        given = Path(path).is_file()
        file = path if given else model_zoo.get_config_file(path)
        cfg.merge_from_file(file, allow_unsafe=not given)  # YAML may ask to run code
    except yaml.YAMLError as error:
        reason = first_line(error)
        raise WeightsError(f"{path}: not a config of plain values ({reason})") from error
    except RuntimeError:
        raise WeightsError(
            f"{path}: neither a file nor a config of detectron2's model zoo"
        ) from None
    except KeyError as error:
        raise WeightsError(f"{path}: not a config of detectron2 itself ({error})") from error
    if cfg.MODEL.META_ARCHITECTURE != "PanopticFPN":
        raise WeightsError(
            f"{path}: builds a {cfg.MODEL.META_ARCHITECTURE}; use a PanopticFPN config"
        )
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = str(pick_device(config.device))
    combine = cfg.MODEL.PANOPTIC_FPN.COMBINE
    combine.INSTANCES_CONFIDENCE_THRESH = config.score
    combine.OVERLAP_THRESH = config.overlap
    combine.STUFF_AREA_LIMIT = round(config.stuff_area * (config.short_side / COCO_SHORT_SIDE) ** 2)
    network = build_model(cfg)
    _load_state(network, weights)
    return network.eval().requires_grad_(False), cfg.INPUT.FORMAT


def _load_state(network: torch.nn.Module, path: Path) -> None:
    """Loads a checkpoint strictly; detectron2's own loader only warns about what is missing."""
    state = read_state(path)
    try:
        found = network.load_state_dict(state, strict=False)
    except RuntimeError as error:  # lists the misshaped tensors, one a line
        first = str(error).splitlines()[1].strip()
        raise WeightsError(f"{path}: does not fit the config: {first}") from error
    # Old checkpoints hold buffers that are computed from the config today.
    unknown = [
        key
        for key in found.unexpected_keys
        if key not in ("pixel_mean", "pixel_std") and "anchor_generator" not in key
    ]
    for problem, keys in (("lacks", found.missing_keys), ("has unknown", unknown)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise WeightsError(
                f"{path}: does not fit the config: it {problem} {', '.join(keys[:3])}{more}"
            )


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model zoo .pkl or of a .pth that detectron2 wrote; runs no code from it.

    Raises:
        WeightsError: not such a file.
    """
    wanted = "a detectron2 checkpoint of plain tensors"
    content = read_checkpoint(path, wanted=wanted)
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: not {wanted} (it has no dictionary `model`)")
    try:
        return {
            name: torch.as_tensor(value.values if isinstance(value, Numbers) else value)
            for name, value in state.items()
        }
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise WeightsError(f"{path}: not {wanted} ({error})") from error
