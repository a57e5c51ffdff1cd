"""Panoptic segmentation by Mask2Former, through transformers: a better, slower base than FPN.

In: photos. Out: `Segments`. Paper: arXiv 2112.01527. The COCO panoptic checkpoints number their
labels like `mas.scene` (0-132); a checkpoint that does not is refused. Needs no torchvision.
Axes: B batch; C channels; H W pixels; N queries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError

from mas.errors import first_line
from mas.scene import PANOPTIC_CLASSES, THINGS, VOID, Segments
from preprocess.batching import fitted_size, lacking_device, pick_device, plan_batches, resize
from preprocess.checkpoint import UNREADABLE, is_of_machine
from preprocess.needs import EXTRA, lacking_modules
from preprocess.weights import WeightsError, find_weights, lacking_weights

if TYPE_CHECKING:
    from preprocess.segment import Photo

STRIDE = 32  # the backbone's; sides are multiples of it, so that masks align with pixels
MASK_STRIDE = 4  # pixels a side of one mask cell


@dataclass(frozen=True, kw_only=True)
class Mask2FormerConfig:
    """How photos are segmented by Mask2Former."""

    weights: str = "mask2former-swin-tiny-coco-panoptic"  # known weights, or a folder of one's own
    short_side: int = 512  # pixels; photos are resized to it, up or down
    max_side: int = 1024  # pixels; caps the longer side
    score: float = 0.8  # 0-1; queries below it are dropped
    mask: float = 0.5  # 0-1; probability above which a pixel counts as a query's own
    overlap: float = 0.8  # 0-1; a query that keeps less of its own pixels is dropped
    batch: int = 4  # photos a forward pass
    device: str = "auto"  # auto, cpu, cuda, cuda:N

    def lacks(self) -> list[str]:
        """What this machine lacks for it, each with its mend."""
        return [
            *lacking_modules("transformers", user="panoptic mask2former"),
            *lacking_weights(self.weights),
            *lacking_device(self.device),
        ]


class Mask2FormerPanoptic:
    """Segments photos in batches, at the resolution the network saw (`short_side`)."""

    def __init__(self, config: Mask2FormerConfig | None = None, **options: Any) -> None:
        """Takes a config, or its fields as keywords."""
        self.config = config or Mask2FormerConfig(**options)
        self.device = pick_device(self.config.device)
        self.network, self.processor = load_mask2former(self.config.weights)
        self.network.to(self.device)

    def __call__(self, photos: Sequence[Photo]) -> list[Segments]:
        """One `Segments` a photo, at the network's resolution and the photo's aspect."""
        config = self.config
        targets = [
            fitted_size(
                *photo.image.shape[:2], short_side=config.short_side, max_side=config.max_side
            )
            for photo in photos
        ]
        inputs = [_multiples(size) for size in targets]
        segments: dict[int, Segments] = {}
        for indices in plan_batches(inputs, batch=config.batch):
            images = [
                resize(photos[i].image, height=inputs[i][0], width=inputs[i][1]) for i in indices
            ]
            found = self._segment(images, [targets[i] for i in indices])
            segments.update(zip(indices, found, strict=True))
        return [segments[i] for i in range(len(photos))]

    @torch.inference_mode()
    def _segment(self, images: list[np.ndarray], targets: list[tuple[int, int]]) -> list[Segments]:
        features = self.processor(images, do_resize=False, return_tensors="pt")
        output = self.network(
            pixel_values=features["pixel_values"].to(self.device),
            pixel_mask=features["pixel_mask"].to(self.device),
        )
        segments = []
        for i, (image, target) in enumerate(zip(images, targets, strict=True)):
            # Post-processing stretches the mask grid over the target: the padding is cut off first.
            height, width = (side // MASK_STRIDE for side in image.shape[:2])
            own = SimpleNamespace(
                class_queries_logits=output.class_queries_logits[i : i + 1],
                masks_queries_logits=output.masks_queries_logits[i : i + 1, :, :height, :width],
            )
            (result,) = self.processor.post_process_panoptic_segmentation(
                own,
                threshold=self.config.score,
                mask_threshold=self.config.mask,
                overlap_mask_area_threshold=self.config.overlap,
                # Not the stuff: transformers (5.23) gives a segment that follows a fused one an id
                # that is taken. `from_mask2former` fuses it.
                label_ids_to_fuse=set(),
                target_sizes=[target],
            )
            segments.append(from_mask2former(result))
        return segments


def from_mask2former(result: Mapping[str, Any]) -> Segments:
    """Turns one result of `post_process_panoptic_segmentation` into `Segments`.

    `segmentation` H W holds segment ids, 0 or -1 = nothing; `segments_info` names each id's label.
    Segments of one kind of stuff become one.
    """
    ids_HW = result["segmentation"].cpu().numpy().astype(np.int32).clip(min=0)
    classes = np.full(int(ids_HW.max()) + 1, VOID, np.uint8)
    instances = np.zeros(len(classes), np.int32)
    first_of_stuff: dict[int, int] = {}
    for segment in result["segments_info"]:
        number, label = segment["id"], segment["label_id"]
        if number < len(classes):  # else all its pixels went to others
            classes[number] = label
            instances[number] = (
                first_of_stuff.setdefault(label, number) if label >= THINGS else number
            )
    return Segments(classes[ids_HW], instances[ids_HW])


def load_mask2former(weights: str) -> tuple[Any, Any]:
    """The frozen network and its processor, from a folder on this machine.

    Raises:
        WeightsError: transformers or the weights are missing, the weights are damaged or of another
            network, or the labels are not COCO's.
    """
    try:
        from transformers import Mask2FormerForUniversalSegmentation
        from transformers.models.mask2former.image_processing_pil_mask2former import (
            Mask2FormerImageProcessorPil,
        )
    except ImportError as error:
        raise WeightsError(
            f"panoptic mask2former needs transformers >= 5.4 ({error}): {EXTRA}"
        ) from error
    folder = find_weights(weights)
    described = (folder / "preprocessor_config.json").is_file()
    try:
        loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
        network, report = loaded
        processor = (
            Mask2FormerImageProcessorPil.from_pretrained(folder, local_files_only=True)
            if described
            else Mask2FormerImageProcessorPil()
        )
    except (*UNREADABLE, SafetensorError) as error:
        if is_of_machine(error):
            raise
        raise WeightsError(
            f"{folder}: not a readable Mask2Former of transformers ({first_line(error)}); remove "
            "the folder and fetch it again"
        ) from error
    # transformers fills what a file lacks at random, and only warns.
    absent = sorted(set(report["missing_keys"]) & {name for name, _ in network.named_parameters()})
    if absent:
        raise WeightsError(
            f"{folder}: lacks {len(absent)} of the network's tensors, such as {absent[0]}; remove "
            "the folder and fetch it again"
        )
    if network.config.num_labels != len(PANOPTIC_CLASSES):
        raise WeightsError(
            f"{folder}: has {network.config.num_labels} labels, not COCO panoptic's "
            f"{len(PANOPTIC_CLASSES)}"
        )
    return network.eval().requires_grad_(False), processor


def _multiples(size: tuple[int, int]) -> tuple[int, int]:
    height, width = (math.ceil(side / STRIDE) * STRIDE for side in size)
    return height, width
