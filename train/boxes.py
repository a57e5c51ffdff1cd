"""Where the crop terms of the VQ-GAN look: boxes around faces and things of a scene map.

In: a scene map. Out: boxes (left, top, right, bottom in pixels, right and bottom exclusive), and a
fixed number of them drawn at random. Make-A-Scene (arXiv 2203.13131) sections 3.3 and 3.4.
Axes: N boxes, 4 sides of a box.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import ndimage

from mas.scene import CLASS_NAMES, FACE_IDS, HUMAN_IDS, PERSON, THINGS, SceneMap, find_edges

SKIN = CLASS_NAMES.index("face")  # the human part around the face parts
SMALLEST_THING = 1 / 16  # of the picture's side, for the longer side of a box
SMALLEST_FACE = 1 / 32
FACE_MARGIN = 0.25  # of the longer side, added on each side: hair and chin


def face_boxes(scene: SceneMap) -> np.ndarray:
    """Boxes N 4 of faces: connected patches of face skin and face parts that hold a part.

    Skin without a part is no face to look at (a head from behind). Where there is no skin, a part
    is a patch of its own.
    """
    parts = np.isin(scene.labels, FACE_IDS)
    boxes = [
        _grow(box, FACE_MARGIN)
        for box, patch in _patches(parts | (scene.labels == SKIN))
        if (patch & parts[_slices(box)]).any()
    ]
    return _large_enough(boxes, scene, SMALLEST_FACE)


def thing_boxes(scene: SceneMap) -> np.ndarray:
    """Boxes N 4 of things: connected pixels of one thing class that no edge parts.

    People are their human and face parts too. Of two people who touch, an edge between different
    parts cannot be told from one between parts of the same person, so they may share a box.
    """
    ids = scene.labels.copy()
    ids[np.isin(ids, [*HUMAN_IDS, *FACE_IDS])] = PERSON
    within_a_person = find_edges(scene.labels) & ~find_edges(ids)
    inside = ~scene.edges | within_a_person
    things = [thing for thing in np.unique(ids) if thing < THINGS]
    boxes = [
        # An edge lies on the left or upper one of two pixels: it belongs to the thing, too.
        (left, top, right + 1, bottom + 1)
        for thing in things
        for (left, top, right, bottom), _ in _patches((ids == thing) & inside)
    ]
    return _large_enough(boxes, scene, SMALLEST_THING)


def draw_boxes(boxes_N4: np.ndarray, count: int, rng: np.random.Generator | None) -> np.ndarray:
    """`count` different boxes as int64 count × 4, zeros where there are fewer.

    The same `rng` state draws the same boxes; without `rng` the largest are taken.
    """
    if rng is None:
        areas = (boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1])
        order = np.argsort(-areas, kind="stable")
    else:
        order = rng.permutation(len(boxes_N4))
    drawn = np.zeros((count, 4), np.int64)
    chosen = boxes_N4[order[:count]]
    drawn[: len(chosen)] = chosen
    return drawn


Box = tuple[int, int, int, int]


def _patches(mask: np.ndarray) -> Iterator[tuple[Box, np.ndarray]]:
    """Boxes of the connected (side by side) pixels of a mask, each with its part of the mask."""
    numbers, _ = ndimage.label(mask)
    for number, (rows, columns) in enumerate(ndimage.find_objects(numbers), start=1):
        box = (columns.start, rows.start, columns.stop, rows.stop)
        yield box, numbers[rows, columns] == number


def _slices(box: Box) -> tuple[slice, slice]:
    left, top, right, bottom = box
    return slice(top, bottom), slice(left, right)


def _grow(box: Box, share: float) -> Box:
    left, top, right, bottom = box
    margin = round(share * max(right - left, bottom - top))
    return left - margin, top - margin, right + margin, bottom + margin


def _large_enough(boxes: list[Box], scene: SceneMap, smallest: float) -> np.ndarray:
    """Boxes cut off at the picture's borders, without those too small to show anything."""
    width, height = scene.size
    boxes_N4 = np.array(boxes, np.int64).reshape(-1, 4)
    boxes_N4 = np.clip(boxes_N4, 0, [width, height, width, height])
    sides = (boxes_N4[:, 2:] - boxes_N4[:, :2]).max(axis=1)
    return boxes_N4[sides >= smallest * max(width, height)]
