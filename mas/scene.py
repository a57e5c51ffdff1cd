"""What a scene is: label space, scene map, merging of three segmentations, storage as PNG.

In: panoptic, human-part and face-part maps, or a file a person drew. Out: one id a pixel plus a
binary edge map. Everything else in the project asks this file what an id means.
Paper: Make-A-Scene (arXiv 2203.13131) section 3.1; merging rules of the mini version.
Axes: H, W pixels; C channels (157 classes + edge).
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from mas.instances import find_instances, spread
from mas.scene_files import MAX_PIXELS as MAX_PIXELS
from mas.scene_files import (
    SceneError,
    find_segments,
    marks_edges,
    name_of,
    naming,
    open_png,
    read_segments,
    upright,
)

logger = logging.getLogger(__name__)


def _split(text: str) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).split(", "))


# COCO panoptic, ascending category id: 80 things, then 53 stuff.
PANOPTIC_CLASSES = _split(
    """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire
    hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
    zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports
    ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine
    glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot
    dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
    clock, vase, scissors, teddy bear, hair drier, toothbrush, banner, blanket, bridge, cardboard,
    counter, curtain, door-stuff, floor-wood, flower, fruit, gravel, house, light, mirror-stuff,
    net, pillow, platform, playingfield, railroad, river, road, roof, sand, sea, shelf, snow,
    stairs, tent, towel, wall-brick, wall-stone, wall-tile, wall-wood, water-other, window-blind,
    window-other, tree-merged, fence-merged, ceiling-merged, sky-other-merged, cabinet-merged,
    table-merged, floor-other-merged, pavement-merged, mountain-merged, grass-merged, dirt-merged,
    paper-merged, food-other-merged, building-other-merged, rock-merged, wall-other-merged,
    rug-merged
    """
)
# LIP-20 in the order of Self-Correction Human Parsing, without its background (id 0).
HUMAN_CLASSES = _split(
    """
    hat, hair, glove, sunglasses, upper-clothes, dress, coat, socks, pants, jumpsuits, scarf,
    skirt, face, left-arm, right-arm, left-leg, right-leg, left-shoe, right-shoe
    """
)
FACE_CLASSES = ("eyebrows", "eyes", "nose", "outer-mouth", "inner-mouth")
CLASS_NAMES = PANOPTIC_CLASSES + HUMAN_CLASSES + FACE_CLASSES
CLASSES = len(CLASS_NAMES)  # 157
EDGE_CHANNEL = CLASSES  # the binary edge map follows the classes
CHANNELS = CLASSES + 1  # 158
VOID = 255  # no label; never a channel

PERSON = 0
THINGS = 80  # panoptic ids below are things, the rest stuff
HUMAN_OFFSET = len(PANOPTIC_CLASSES) - 1  # LIP id k (1-19) -> 132 + k
FACE_OFFSET = HUMAN_OFFSET + len(HUMAN_CLASSES)  # face part k (1-5) -> 151 + k
HUMAN_IDS = range(HUMAN_OFFSET + 1, FACE_OFFSET + 1)  # 133-151
FACE_IDS = range(FACE_OFFSET + 1, CLASSES)  # 152-156

# Category ids of COCO's annotation files at positions 0-132.
_THING_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
_STUFF_IDS = """
    92 93 95 100 107 109 112 118 119 122 125 128 130 133 138 141 144 145 147 148 149 151 154 155
    156 159 161 166 168 171 175 176 177 178 180 181 184 185 186 187 188 189 190 191 192 193 194
    195 196 197 198 199 200
"""
COCO_CATEGORY_IDS = tuple(i for i in range(1, 91) if i not in _THING_GAPS) + tuple(
    int(i) for i in _STUFF_IDS.split()
)

# One colour a class. Related classes share a hue range; within it the colours were spread to
# maximise the smallest OKLab distance (0.05 over all pairs), with everyday colours kept for the
# everyday stuff (sky, sea, grass, sand, road).
_PALETTE_HEX = """
    dc282d 826eff 37009b 0000be 054bff 0f00f0 731ed2 9100ff 3c1469 005a6e 05aab4 007391 00968c
    00cdff 8c4600 f07d19 ff9600 a58c00 ffcd6e f5d200 a5876e fab405 cdb44b ffb482 9100b4 a54bff
    c800f0 ff55fa 6400a0 694bff 5a05fa cd9bfa 7873cd aa3ccd 5a327d 4b00c8 d7beff b47dfa 7850c8
    00e187 0aa564 50ffa5 0aebd7 00be96 73d2a0 9bfad2 827800 afa50f b4c80a aae600 699100 9bb973
    78aa00 fff02d cdff05 c3e678 c8877d eb876e c88737 785046 915f55 e19b5a 7d91fa 0a327d 5a699b
    4150cd 96aaf0 19a0ff 1e3caa 14284b 4173f0 0a5a9b 0a0087 64055f d255fa 823c96 e16ed7 b964c3
    7d0a82 a54ba0
    8c4b73 af697d 3c375a 5a0a05 5f3200 d278aa a04137 694b00 00eb05 4b5f05 6e693c 78afa5 b45a37
    41280f 00372d d79bbe 414b14 bec891 87915a 3c8cd2 6e6c70 9191b9 e6d7a5 1e6ebe d2a091 ebf0f5
    af7314 46645a 6e3c5a e1beb4 bee1e6 739696 aac8c8 5faad7 1e7d6e 5fc8cd 287832 558296 1e464b
    96cdfa 965f00 823228 b9a06e aaa5a5 9673a5 6ec350 96785a cd695a e1faaa 505073 55463e 698269
    ff9b91
    962855 eb5a0f be1905 ff377d f06473 ff3237 ffcde1 7d0000 ff5faa af4b64 e60a5f a00019 ff87af
    c8508c d20582 faafcd 7d0a46 5f2837 be0555
    ff87f0 fa00a5 cd05b4 aa008c eb23d7
"""
PALETTE = np.zeros((256, 3), np.uint8)  # VOID and the unused ids are black
PALETTE[:CLASSES] = [tuple(bytes.fromhex(colour)) for colour in _PALETTE_HEX.split()]


def _mirrored_ids() -> np.ndarray:
    """Id → id after a flip: a left arm becomes a right arm."""
    swapped = {"left-": "right-", "right-": "left-"}
    table = np.arange(256, dtype=np.uint8)
    for index, name in enumerate(CLASS_NAMES):
        for side, other in swapped.items():
            if name.startswith(side):
                table[index] = CLASS_NAMES.index(name.replace(side, other))
    return table


MIRRORED = _mirrored_ids()
SNAP_DISTANCE = 12.0  # RGB distance above which a colour counts as "not of the palette"
OPAQUE = 128  # alpha below which a drawn pixel is void


class Segments(NamedTuple):
    """A panoptic segmentation: what each pixel is, and which instance it belongs to."""

    labels: np.ndarray  # uint8 H W: 0-132 or VOID
    instances: np.ndarray  # int32 H W: segment id, different for two things of one class; 0 = void


@dataclass(frozen=True, eq=False)
class SceneMap:
    """One id a pixel plus a binary edge map."""

    labels: np.ndarray  # uint8 H W: 0-156 or VOID
    edges: np.ndarray  # bool H W

    def __post_init__(self) -> None:
        labels, edges = self.labels, self.edges
        _check_labels(labels)
        if getattr(edges, "dtype", None) != np.bool_ or edges.shape != labels.shape:
            raise SceneError(f"edges must be bool {labels.shape} like labels, got {_kind(edges)}")
        unknown = (labels >= CLASSES) & (labels != VOID)
        if unknown.any():
            ids = np.unique(labels[unknown]).tolist()
            raise SceneError(f"unknown class ids {ids}: use 0-{CLASSES - 1}, or {VOID} for void")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, in Pillow's order."""
        return self.labels.shape[1], self.labels.shape[0]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, SceneMap)
            and np.array_equal(self.labels, other.labels)
            and np.array_equal(self.edges, other.edges)
        )

    __hash__ = None  # type: ignore[assignment]  # arrays are mutable

    @classmethod
    def from_labels(cls, labels: np.ndarray, instances: np.ndarray | None = None) -> SceneMap:
        """Computes the edges from the boundaries of `labels` (and of `instances`).

        Raises:
            SceneError: labels that are not uint8 H W, instances that are not integers H W, an
                unknown id.
        """
        _check_labels(labels)
        if instances is not None:
            _check_ids("instances", instances, labels.shape)
        return cls(labels, find_edges(labels, instances))

    def to_png(self, path: str | Path | IO[bytes]) -> None:
        """Writes the lossless mode LA form: L = label, A = 255 on edges."""
        bands = np.stack([self.labels, self.edges.astype(np.uint8) * 255], axis=-1)
        Image.fromarray(bands).save(path, format="PNG", compress_level=6, compress_type=zlib.Z_RLE)

    @classmethod
    def from_png(cls, path: str | Path | IO[bytes]) -> SceneMap:
        """Reads what `to_png` wrote.

        Raises:
            SceneError: not a PNG, not mode LA, an alpha other than 0 and 255, an unknown id.
        """
        image = open_png(path)
        if image.mode != "LA":
            raise SceneError(f"{name_of(path)}: a scene PNG has mode LA, this one {image.mode}")
        return _from_bands(np.asarray(image), path)

    def to_rgb(self, *, edges: bool = False) -> Image.Image:
        """Palette colours, void black; with `edges`, boundaries drawn white (for people only)."""
        rgb = PALETTE[self.labels]
        if edges:
            rgb[self.edges] = 255
        return Image.fromarray(rgb)

    def resized(self, size: int) -> SceneMap:
        """A square map of `size` x `size` pixels, labels by nearest neighbour.

        Edges are those that the same segments have at that size, as preprocessing finds them.

        Raises:
            SceneError: a scene that is not square, or no such size.
        """
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise SceneError(f"size is {size!r}, use a whole number of 1 or more pixels a side")
        width, height = self.size
        if (width, height) == (size, size):
            return self
        if width != height:
            raise SceneError(f"a scene must be square to be resized, this one is {width}x{height}")
        few = np.ix_(*2 * [nearest(width, size)])
        return SceneMap.from_labels(self.labels[few], self.find_instances()[few])

    def mirrored(self) -> SceneMap:
        """The scene with left and right exchanged, body parts included.

        Edges are those that the same segments have the other way round.
        """
        labels, instances = self.labels[:, ::-1], self.find_instances()[:, ::-1]
        return SceneMap.from_labels(MIRRORED[labels], instances)

    @property
    def inner_edges(self) -> np.ndarray:
        """Edges between two segments of one label, bool H W."""
        return self.edges & ~find_edges(self.labels)

    def find_instances(self) -> np.ndarray:
        """Numbers that differ between parts of one label that edges part, int32 H W."""
        return find_instances(self.labels, self.edges, self.inner_edges)

    def histogram(self) -> dict[str, int]:
        """Pixels per class name, void left out, in id order."""
        counts = np.bincount(self.labels.ravel(), minlength=CLASSES)[:CLASSES]
        return {CLASS_NAMES[i]: int(counts[i]) for i in np.flatnonzero(counts)}

    def void_fraction(self) -> float:
        """Share of the pixels that carry no label, 0-1."""
        return np.count_nonzero(self.labels == VOID) / self.labels.size


def _check_labels(labels: np.ndarray) -> None:
    if getattr(labels, "dtype", None) != np.uint8 or labels.ndim != 2 or labels.size == 0:
        raise SceneError(f"labels must be a uint8 array of H x W, got {_kind(labels)}")


def _check_ids(name: str, ids: object, shape: tuple[int, ...]) -> None:
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.shape != shape:
        raise SceneError(f"{name} must be integers of {shape} like labels, got {_kind(ids)}")


def _kind(x: object) -> str:
    return f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__


def find_edges(labels: np.ndarray, instances: np.ndarray | None = None) -> np.ndarray:
    """Edge map, bool H W: true where the right or the lower neighbour is of another segment.

    Two pixels are of one segment when label and, if given, instance agree.
    """
    edges = np.zeros(labels.shape, np.bool_)
    for ids in (labels,) if instances is None else (labels, instances):
        edges[:, :-1] |= ids[:, :-1] != ids[:, 1:]
        edges[:-1] |= ids[:-1] != ids[1:]
    return edges


def nearest(source: int, target: int) -> np.ndarray:
    """Of `source` pixels in a row the index of the one under the centre of each of `target`."""
    return (np.arange(target) * 2 + 1) * source // (2 * target)


def merge(
    *, panoptic: Segments, human: np.ndarray | None = None, face: np.ndarray | None = None
) -> SceneMap:
    """Paints human parts, then face parts over the panoptic map, by the three merging rules.

    1. human *background* (LIP id 0) never is painted; 2. every pixel ends with exactly one label;
    3. without a *person* segment the human and the face map are dropped. Human and face labels
    stay within person or void pixels; on void they are parts of the person that is nearest.

    Args:
        panoptic: the base.
        human: uint8 H W, LIP ids 0-19.
        face: uint8 H W, 0 = no face part, 1-5 = FACE_CLASSES.

    Raises:
        SceneError: anything else.
    """
    if not isinstance(panoptic, Segments):
        raise SceneError(f"panoptic must be Segments(labels, instances), got {_kind(panoptic)}")
    _check_labels(panoptic.labels)
    _check_ids("instances", panoptic.instances, panoptic.labels.shape)
    labels = panoptic.labels.copy()
    person = labels == PERSON
    if person.any():
        paintable = person | (labels == VOID)
        for name, parts, offset, count in (
            ("human", human, HUMAN_OFFSET, len(HUMAN_CLASSES)),
            ("face", face, FACE_OFFSET, len(FACE_CLASSES)),
        ):
            if parts is None:
                continue
            _check_ids(f"the {name} part map", parts, labels.shape)
            if parts.min() < 0 or parts.max() > count:
                raise SceneError(
                    f"the {name} part map must have ids 0-{count}, "
                    f"got {parts.min()} to {parts.max()}"
                )
            painted = paintable & (parts > 0)
            labels[painted] = parts[painted] + offset
    instances = panoptic.instances
    beyond = (panoptic.labels == VOID) & (labels != VOID)
    if beyond.any():
        instances = np.where(beyond, spread(instances, person), instances)
    return SceneMap.from_labels(labels, instances)


def from_coco(ids_rgb: np.ndarray, segments_info: Sequence[Mapping[str, Any]]) -> Segments:
    """Decodes COCO's panoptic format.

    Args:
        ids_rgb: uint8 H W 3; segment id = R + 256 G + 65536 B, 0 = void.
        segments_info: dicts with `id` and COCO's `category_id`.

    Raises:
        SceneError: a segment without an entry, a category that is not one of the 133, or no such
            dicts.
    """
    instances = ids_rgb.astype(np.int32) @ np.array([1, 256, 65536], np.int32)
    present, inverse = np.unique(instances, return_inverse=True)
    try:
        categories = {segment["id"]: segment["category_id"] for segment in segments_info}
    except (KeyError, TypeError):
        raise SceneError("segments_info must list objects with an id and a category_id") from None
    for category in categories.values():
        if category not in COCO_CATEGORY_IDS:
            raise SceneError(f"category_id {category} is not one of COCO's 133 panoptic categories")
    known = {0: VOID} | {i: COCO_CATEGORY_IDS.index(c) for i, c in categories.items()}
    missing = [int(i) for i in present if int(i) not in known]
    if missing:
        raise SceneError(f"segment ids {missing[:5]} stand in the PNG but not in segments_info")
    labels = np.array([known[int(i)] for i in present], np.uint8)[inverse]
    return Segments(labels.reshape(instances.shape), instances)


def read_scene(path: str | Path, *, segments: str | Path | None = None) -> SceneMap:
    """Reads a scene in any form a person may hand in.

    Mode LA as `to_png` writes it; a grey PNG of ids, which may be of mode LA, too, where alpha
    means transparency and marks no edges (see `marks_edges`); a palette PNG or an RGB(A) image in
    palette colours (snapped to the nearest); a COCO panoptic PNG, recognised by `segments` or by a
    JSON with `segments_info` beside it (same stem, or KEY.segments.json for KEY.panoptic.png).
    Transparent is void. Edges are computed where the form does not carry them. EXIF may say which
    side is up.

    Raises:
        SceneError: with the file's name and the mend.
    """
    path = Path(path)
    image = upright(open_png(path))
    segments_file = find_segments(path) if segments is None else Path(segments)
    if segments_file is not None:
        info = read_segments(segments_file, path.name)
        with naming(f"{path} with {segments_file.name}"):
            return merge(panoptic=from_coco(np.asarray(image.convert("RGB")), info))
    if image.mode == "LA":
        bands = np.asarray(image)
        if marks_edges(bands[..., 1], find_edges(bands[..., 0])):
            return _from_bands(bands, path)
        labels = bands[..., 0].copy()  # ids that a paint program saved
        labels[bands[..., 1] < OPAQUE] = VOID
        with naming(str(path)):
            return SceneMap.from_labels(labels)
    if image.mode == "L":
        labels = np.array(image)
        if "transparency" in image.info:  # the one grey that is
            labels[labels == image.info["transparency"]] = VOID
        with naming(str(path)):
            return SceneMap.from_labels(labels)
    if image.mode in ("P", "RGB", "RGBA"):
        return SceneMap.from_labels(snap_colours(np.asarray(image.convert("RGBA")), path))
    raise SceneError(
        f"{path}: mode {image.mode} is no scene; use LA (label, edge), L (ids), or P, RGB or RGBA "
        "in palette colours"
    )


def snap_colours(rgba: np.ndarray, source: str | Path = "drawing") -> np.ndarray:
    """Ids of the nearest palette colours (void's black included), uint8 H W.

    Args:
        rgba: uint8 H W 4; what is less than half opaque is void.
        source: for the warning when colours are far from the palette's.
    """
    opaque = rgba[..., 3] >= OPAQUE
    packed = rgba[..., :3].astype(np.int32) @ np.array([65536, 256, 1], np.int32)
    packed, inverse = np.unique(packed, return_inverse=True)  # much quicker than rows of three
    inverse = inverse.reshape(opaque.shape)
    colours = packed[:, None] >> np.array([16, 8, 0]) & 255
    ids = np.append(np.arange(CLASSES), VOID).astype(np.uint8)
    palette = PALETTE[ids].astype(np.float32)  # exact: all numbers here are whole and below 2^24
    nearest, distances = np.empty(len(colours), np.uint8), np.empty(len(colours), np.float32)
    for start in range(0, len(colours), 4096):
        chunk = colours[start : start + 4096].astype(np.float32)
        squared = (palette**2).sum(1) - 2 * chunk @ palette.T  # less that of the colour itself
        nearest[start : start + 4096] = ids[squared.argmin(1)]
        distances[start : start + 4096] = np.sqrt((chunk**2).sum(1) + squared.min(1))
    far = opaque & (distances > SNAP_DISTANCE)[inverse]
    if far.any():
        panoptic = "; a COCO panoptic PNG needs its JSON beside it" if far.mean() > 0.5 else ""
        logger.warning(
            "%s: %.1f %% of the pixels are in no palette colour and were snapped to the nearest%s",
            *(source, 100 * far.mean(), panoptic),
        )
    return np.where(opaque, nearest[inverse], VOID).astype(np.uint8)


def _from_bands(bands: np.ndarray, path: str | Path | IO[bytes]) -> SceneMap:
    alpha = bands[..., 1]
    with naming(name_of(path)):
        if not ((alpha == 0) | (alpha == 255)).all():
            raise SceneError("alpha marks edges and must be 0 or 255 everywhere")
        return SceneMap(bands[..., 0].copy(), alpha == 255)
