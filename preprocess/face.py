"""Face landmarks by face-alignment: all faces of a photo, 68 points each.

In: photos. Out: landmarks in pixels of the photo. The only file that imports face_alignment.
Detector S3FD (arXiv 1708.05237) or another of the library's, landmarks FAN (arXiv 1703.07332).
Axes: B batch; C channels; H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from mas.errors import first_line
from mas.scene import PERSON, VOID, Segments
from preprocess.batching import fitted_size, lacking_device, pick_device, plan_batches, resize
from preprocess.checkpoint import UNREADABLE, is_of_machine
from preprocess.landmarks import LANDMARKS
from preprocess.needs import EXTRA, lacking_modules
from preprocess.weights import (
    WEIGHTS,
    WeightsError,
    find_weights,
    lacking_weights,
    weights_folder,
)

if TYPE_CHECKING:
    from preprocess.segment import Photo

DETECTOR_WEIGHTS = {
    "sfd": ("s3fd",),
    "yunet": ("yunet",),
    "retinaface": ("retinaface",),
    "blazeface": ("blazeface", "blazeface-anchors"),
}
# face-alignment 1.5 subtracts the blue-green-red means without swapping the channels first.
FED_BGR = ("retinaface",)


@dataclass(frozen=True, kw_only=True)
class FaceLandmarksConfig:
    """How faces are found."""

    detector: Literal["sfd", "yunet", "retinaface", "blazeface"] = "sfd"
    short_side: int = 512  # pixels; larger photos are shrunk to it before detection
    max_side: int = 1024  # pixels; caps the longer side
    min_side: float = 0.05  # of the photo's shorter side; smaller faces are skipped
    batch: int = 8  # photos a pass of the detector, faces a pass of the landmark network
    device: str = "auto"  # auto, cpu, cuda, cuda:N

    def __post_init__(self) -> None:
        if self.detector not in DETECTOR_WEIGHTS:
            known = ", ".join(DETECTOR_WEIGHTS)
            raise ValueError(f"detector {self.detector!r}: use one of {known}")

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the two networks' weights."""
        return ("2dfan4", *DETECTOR_WEIGHTS[self.detector])

    def lacks(self) -> list[str]:
        """What this machine lacks for it, each with its mend."""
        user = f"face detector {self.detector}"
        by_hand = ("torchvision",) if self.detector == "retinaface" else ()
        return [
            *lacking_modules("face_alignment", user=user),
            *lacking_modules(*by_hand, user=user, mend="pip install torchvision"),
            *([] if _in_cache_of_torch(self.weights) else lacking_weights(*self.weights)),
            *lacking_device(self.device),
        ]


class FaceLandmarks:
    """Finds all faces of a batch of photos and their landmarks."""

    def __init__(self, config: FaceLandmarksConfig | None = None, **options: Any) -> None:
        """Takes a config, or its fields as keywords."""
        self.config = config or FaceLandmarksConfig(**options)
        self.alignment = load_face_alignment(self.config)

    def __call__(
        self, photos: Sequence[Photo], segments: Sequence[Segments]
    ) -> list[list[np.ndarray]]:
        """Per photo a list of faces, 68 x 2 float (x, y) in pixels of the photo."""
        config = self.config
        sizes = [_detection_size(photo.image, config) for photo in photos]
        faces: dict[int, list[np.ndarray]] = {}
        for indices in plan_batches(sizes, batch=config.batch):
            images = [
                resize(photos[i].image, height=sizes[i][0], width=sizes[i][1]) for i in indices
            ]
            boxes = self._detect(images)
            for i, image, found in zip(indices, images, boxes, strict=True):
                height, width = photos[i].image.shape[:2]
                scale = np.array([width / image.shape[1], height / image.shape[0]])
                mine = [box for box in found if self._counts(box, image, segments[i])]
                faces[i] = [points * scale for points in self._align(image, mine)]
        return [faces[i] for i in range(len(photos))]

    def _detect(self, images: list[np.ndarray]) -> list[list[np.ndarray]]:
        """Boxes (left, top, right, bottom, score) per image."""
        height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
        batch_BCHW = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
        for padded_CHW, image in zip(batch_BCHW, images, strict=True):
            padded_CHW[:, : image.shape[0], : image.shape[1]] = torch.from_numpy(
                np.ascontiguousarray(image.transpose(2, 0, 1))
            )
        if self.config.detector in FED_BGR:
            batch_BCHW = batch_BCHW.flip(1)
        with _cudnn_benchmark_restored():
            found = self.alignment.face_detector.detect_from_batch(batch_BCHW)
        return [[np.asarray(box, np.float64) for box in boxes] for boxes in found]

    def _counts(self, box: np.ndarray, image: np.ndarray, segments: Segments) -> bool:
        """Whether a face is large enough and somewhere on a person, or on what nothing is known of.

        Faces of pictures on walls, teddy bears and the like would be dropped by the merge anyway.
        """
        height, width = image.shape[:2]
        left, top, right, bottom = box[:4]
        large = bottom - top >= self.config.min_side * min(height, width)
        inside = 0 <= left + right <= 2 * width and 0 <= top + bottom <= 2 * height
        if not (large and inside):
            return False
        rows, columns = segments.labels.shape
        region = segments.labels[
            max(0, int(top / height * rows)) : ceil(bottom / height * rows),
            max(0, int(left / width * columns)) : ceil(right / width * columns),
        ]
        return bool(((region == PERSON) | (region == VOID)).any())

    def _align(self, image: np.ndarray, boxes: list[np.ndarray]) -> list[np.ndarray]:
        """68 x 2 points a box, in pixels of the image; 0, 0 is its left upper corner."""
        if not boxes:
            return []
        found = self.alignment.get_landmarks_from_image(image, detected_faces=boxes)
        return [points.reshape(LANDMARKS, 2).astype(np.float64) for points in found]


def load_face_alignment(config: FaceLandmarksConfig) -> Any:
    """The library's two networks, from files on this machine.

    Raises:
        WeightsError: the package or a file is missing, or a file is damaged.
    """
    device = str(pick_device(config.device))
    try:
        import face_alignment

        with _hub_folder(config.weights) as folder, _cudnn_benchmark_restored():
            try:
                return face_alignment.FaceAlignment(
                    face_alignment.LandmarksType.TWO_D,
                    device=device,
                    flip_input=False,
                    compile=False,
                    face_detector=config.detector,
                    max_batch_size=config.batch,
                )
            except UNREADABLE as error:
                if is_of_machine(error):
                    raise
                raise WeightsError(
                    f"{folder}: {' or '.join(config.weights)} cannot be loaded "
                    f"({first_line(error)}); if the file is damaged, remove it and fetch it again"
                ) from error
    except ImportError as error:
        raise WeightsError(
            f"faces by {config.detector} need face-alignment >= 1.5 (retinaface torchvision too): "
            f"{EXTRA} (the import said: {error})"
        ) from error


@contextmanager
def _hub_folder(names: Sequence[str]) -> Iterator[Path]:
    """Lets the library find its files: below the weights folder, else in torch's own cache.

    It would download what it misses; that every file is there is checked first.
    """
    if _in_cache_of_torch(names):
        yield Path(torch.hub.get_dir())
        return
    before = torch.hub.get_dir()
    for name in names:
        find_weights(name)
    torch.hub.set_dir(str(weights_folder() / "face"))
    try:
        yield Path(torch.hub.get_dir())
    finally:
        torch.hub.set_dir(before)


def _in_cache_of_torch(names: Sequence[str]) -> bool:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return all((folder / Path(w.path).name).is_file() for w in WEIGHTS if w.name in names)


@contextmanager
def _cudnn_benchmark_restored() -> Iterator[None]:
    """The library switches cuDNN's autotuner on for the whole process; results then may vary."""
    before = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _detection_size(image: np.ndarray, config: FaceLandmarksConfig) -> tuple[int, int]:
    height, width = image.shape[:2]
    short_side = min(config.short_side, height, width)
    return fitted_size(height, width, short_side=short_side, max_side=config.max_side)
