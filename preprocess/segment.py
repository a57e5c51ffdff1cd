"""Segmenters: what they are called with, and those that read annotations instead of running.

In: a batch of photos. Out: panoptic segments, human parts, or face landmarks of each. The networks
behind the same interfaces are in preprocess/panoptic.py, mask2former.py, human.py and face.py.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any, Literal, Protocol

import fsspec
import numpy as np
from PIL import Image

from mas.scene import HUMAN_CLASSES, MAX_PIXELS, SceneError, Segments, from_coco
from mas.shards import Sample, local_path
from preprocess.landmarks import LANDMARKS
from preprocess.needs import EXTRA
from preprocess.rejects import Reject, RejectError


@dataclass(frozen=True)
class Photo:
    """What a segmenter sees of a sample."""

    key: str
    image: np.ndarray  # uint8 H W 3, RGB, upright, before the square crop
    sample: Sample
    original: tuple[int, int] | None = None  # width, height before `image` was reduced, if it was


class PanopticSegmenter(Protocol):
    """Finds what each pixel is; any resolution with the photo's aspect."""

    def __call__(self, photos: list[Photo]) -> list[Segments]: ...


class HumanParser(Protocol):
    """Finds human parts: uint8 H W, LIP ids 0-19; any resolution with the photo's aspect."""

    def __call__(self, photos: list[Photo], segments: list[Segments]) -> list[np.ndarray]: ...


class FaceFinder(Protocol):
    """Finds the faces of each photo: 68 x 2 landmarks (x, y) in pixels of `Photo.image`."""

    def __call__(self, photos: list[Photo], segments: list[Segments]) -> list[list[np.ndarray]]: ...


@dataclass(frozen=True, kw_only=True)
class PanopticConfig:
    """Where panoptic segments come from."""

    source: Literal["shard-annotations", "coco-annotations", "detectron2", "mask2former"] = (
        "shard-annotations"
    )
    json: str = ""  # coco-annotations: COCO's panoptic JSON, path or URL
    folder: str = ""  # coco-annotations: the folder of the PNGs it names
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the network's class


@dataclass(frozen=True, kw_only=True)
class HumanConfig:
    """Where human parts come from."""

    source: Literal["none", "shard-annotations", "schp"] = "shard-annotations"
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the network's class


@dataclass(frozen=True, kw_only=True)
class FaceConfig:
    """Where face landmarks come from, and which faces are drawn."""

    source: Literal["none", "shard-annotations", "face-alignment"] = "shard-annotations"
    min_height: float = 8.0  # pixels of the written square; smaller faces are left out
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the network's class


MAX_COORDINATE = 1e5  # pixels; landmarks beyond it are no landmarks
NETWORKS = {  # module, the segmenter's class, the class of its options
    "detectron2": ("preprocess.panoptic", "Detectron2Panoptic", "Detectron2Config"),
    "mask2former": ("preprocess.mask2former", "Mask2FormerPanoptic", "Mask2FormerConfig"),
    "schp": ("preprocess.human", "HumanSegmenter", "HumanConfig"),
    "face-alignment": ("preprocess.face", "FaceLandmarks", "FaceLandmarksConfig"),
}


def build_panoptic(config: PanopticConfig) -> PanopticSegmenter:
    """The panoptic segmenter of a config that `check_sources` has passed."""
    if config.source == "shard-annotations":
        return ShardPanoptic()
    if config.source == "coco-annotations":
        return CocoPanoptic(config.json, folder=config.folder)
    return _build_network(config.source, config.options)


def build_human(config: HumanConfig) -> HumanParser | None:
    """The human parser of a config, None for `none`."""
    if config.source == "none":
        return None
    if config.source == "shard-annotations":
        return ShardHuman()
    return _build_network(config.source, config.options)


def build_face(config: FaceConfig) -> FaceFinder | None:
    """The face finder of a config, None for `none`."""
    if config.source == "none":
        return None
    if config.source == "shard-annotations":
        return ShardFace()
    return _build_network(config.source, config.options)


class ShardPanoptic:
    """Reads KEY.panoptic.png and KEY.segments.json of the sample itself."""

    def __call__(self, photos: list[Photo]) -> list[Segments]:
        return [self._read(photo.sample) for photo in photos]

    def _read(self, sample: Sample) -> Segments:
        png, info = _member(sample, "panoptic.png"), _member(sample, "segments.json")
        try:
            segments = json.loads(info)["segments_info"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RejectError(
                Reject.BAD_ANNOTATION, f"segments.json: no segments_info ({error})"
            ) from error
        return decode_panoptic(png, segments)


class CocoPanoptic:
    """Reads COCO's panoptic annotations, one JSON and a folder of PNGs.

    A photo is known by the stem of its annotation's file name (its key) or by `image_id` in its
    JSON.
    """

    def __init__(self, json_path: str, *, folder: str) -> None:
        _check_coco(json_path, folder)
        self.folder = folder.rstrip("/")
        with fsspec.open(json_path, "rb") as file:
            content = file.read()
        try:
            annotations = json.loads(content)["annotations"]
            self._by_stem = {
                PurePosixPath(a["file_name"]).stem: (a["file_name"], _slim(a["segments_info"]))
                for a in annotations
            }
            self._stem_of_id = {
                a["image_id"]: PurePosixPath(a["file_name"]).stem for a in annotations
            }
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{json_path}: not COCO's panoptic JSON ({error!r})") from error

    def __call__(self, photos: list[Photo]) -> list[Segments]:
        return [self._read(photo.sample) for photo in photos]

    def _read(self, sample: Sample) -> Segments:
        stem = PurePosixPath(sample.key).name
        if stem not in self._by_stem:
            stem = self._stem_of_id.get(_image_id(sample), "")
        if stem not in self._by_stem:
            raise RejectError(
                Reject.NO_ANNOTATION, "neither the key nor image_id is in the panoptic JSON"
            )
        file_name, segments = self._by_stem[stem]
        path = f"{self.folder}/{file_name}"
        try:
            with fsspec.open(path, "rb") if local_path(path) is None else open(path, "rb") as file:
                png = file.read()
        except FileNotFoundError as error:
            raise RejectError(Reject.NO_ANNOTATION, f"{file_name} is not there") from error
        return decode_panoptic(png, [{"id": i, "category_id": c} for i, c in segments])


class ShardHuman:
    """Reads KEY.human.png of the sample: mode L, LIP ids."""

    def __call__(self, photos: list[Photo], segments: list[Segments]) -> list[np.ndarray]:
        return [self._read(photo.sample) for photo in photos]

    def _read(self, sample: Sample) -> np.ndarray:
        image = _open_png(_member(sample, "human.png"), "human.png")
        parts = np.asarray(image)
        if image.mode not in ("L", "P") or parts.max(initial=0) > len(HUMAN_CLASSES):
            raise RejectError(
                Reject.BAD_ANNOTATION, f"human.png: mode {image.mode}, ids to {parts.max()}"
            )
        return parts


class ShardFace:
    """Reads KEY.landmarks.json of the sample: a list of faces, 68 pairs x, y each."""

    def __call__(self, photos: list[Photo], segments: list[Segments]) -> list[list[np.ndarray]]:
        return [self._read(photo) for photo in photos]

    def _read(self, photo: Photo) -> list[np.ndarray]:
        try:
            faces = np.array(json.loads(_member(photo.sample, "landmarks.json")), np.float64)
            faces = faces.reshape(-1, LANDMARKS, 2)
            if not (np.abs(faces) < MAX_COORDINATE).all():  # also true of NaN
                raise ValueError("a coordinate is no number or far outside")
        except (ValueError, TypeError, RecursionError) as error:
            raise RejectError(
                Reject.BAD_ANNOTATION, f"landmarks.json: not {LANDMARKS} pairs a face ({error})"
            ) from error
        height, width = photo.image.shape[:2]
        original = photo.original or (width, height)
        return list(faces * np.array([width / original[0], height / original[1]]))


def decode_panoptic(png: bytes, segments_info: Sequence[dict[str, Any]]) -> Segments:
    """Segments of a COCO panoptic PNG.

    Neighbouring pixels mostly carry the same id, so only one pixel a run is looked up.

    Raises:
        RejectError: not a PNG, or ids and categories that do not fit.
    """
    image = _open_png(png, "panoptic PNG")
    image = image if image.mode == "RGB" else image.convert("RGB")
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32)  # one number a pixel
    starts = np.flatnonzero(np.concatenate(([True], pixels[1:] != pixels[:-1])))
    lengths = np.diff(starts, append=pixels.size)
    colours = pixels[starts].view(np.uint8).reshape(-1, 4)[:, :3]
    try:
        runs = from_coco(colours[None], segments_info)
    except (SceneError, KeyError, TypeError) as error:
        raise RejectError(Reject.BAD_ANNOTATION, str(error)) from error
    shape = (image.height, image.width)
    return Segments(
        np.repeat(runs.labels[0], lengths).reshape(shape),
        np.repeat(runs.instances[0], lengths).reshape(shape),
    )


def _open_png(content: bytes, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=["PNG"])
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} is too large")
        image.load()
    except Exception as error:  # decoders meet hostile bytes and raise whatever they like
        raise RejectError(Reject.BAD_ANNOTATION, f"{name}: {error}") from error
    return image


def _member(sample: Sample, extension: str) -> bytes:
    if extension not in sample.files:
        raise RejectError(Reject.NO_ANNOTATION, f"no {sample.key}.{extension} in the shard")
    return sample.files[extension]


def _slim(segments_info: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """Id and category only: the whole of COCO's training annotations stays in memory."""
    return [(segment["id"], segment["category_id"]) for segment in segments_info]


def _image_id(sample: Sample) -> int | None:
    try:
        return int(json.loads(sample.files.get("json", b"{}"))["image_id"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _check_coco(json_path: str, folder: str) -> None:
    if not json_path or not folder:
        raise ValueError("coco-annotations needs --panoptic.json FILE and --panoptic.folder FOLDER")
    filesystem, inner = fsspec.core.url_to_fs(folder)
    if not filesystem.isdir(inner):
        raise ValueError(f"--panoptic.folder {folder}: no such folder")
    filesystem, inner = fsspec.core.url_to_fs(json_path)
    if not filesystem.isfile(inner):
        raise ValueError(f"--panoptic.json {json_path}: no such file")


def _build_network(source: str, options: dict[str, Any]) -> Any:
    segmenter, config = _network_classes(source)
    return segmenter(config(**options))


def _network_classes(source: str) -> tuple[Any, Any]:
    module_name, segmenter, config = NETWORKS[source]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise OSError(
            f"{source} needs {error.name!r}: {EXTRA}; docs/segmenters.md tells what is not on the "
            "package index"
        ) from error
    return getattr(module, segmenter), getattr(module, config)


def check_sources(panoptic: PanopticConfig, human: HumanConfig, face: FaceConfig) -> None:
    """Finds settings that cannot work, wherever the workers are; loads no weights or annotations.

    Raises:
        ValueError: a missing setting or file, or options that a network does not know.
        OSError: a package that is not installed.
    """
    if panoptic.source == "coco-annotations":
        _check_coco(panoptic.json, panoptic.folder)
    for config in (panoptic, human, face):
        if config.source in NETWORKS:
            _network_options(config)
        elif config.options:
            raise ValueError(f"{config.source} takes no options, got {sorted(config.options)}")


def lacks_of_sources(panoptic: PanopticConfig, human: HumanConfig, face: FaceConfig) -> list[str]:
    """What this machine lacks: packages, weights, a device, annotations; each with its mend.

    The segmenters are where the workers are, so it is their machine that must be asked.
    """
    networks = [config for config in (panoptic, human, face) if config.source in NETWORKS]
    lacks = [lack for config in networks for lack in _network_options(config).lacks()]
    if panoptic.source == "coco-annotations":
        try:
            _check_coco(panoptic.json, panoptic.folder)
        except ValueError as error:
            lacks.append(str(error))
    return list(dict.fromkeys(lacks))


def _network_options(config: PanopticConfig | HumanConfig | FaceConfig) -> Any:
    options = _network_classes(config.source)[1]
    known = [each.name for each in fields(options)]
    if unknown := sorted(config.options.keys() - known):
        raise ValueError(f"{config.source} has no option {unknown[0]!r}: use {', '.join(known)}")
    return options(**config.options)
