"""Which things a scene map holds: instances, told apart by class and by the edges between them.

In: a scene map, true or predicted. Out: each thing with its class, pixels and box. Counting has a
ceiling: two things of a class that cover each other without an edge between them are one. How
often that happens on true scenes stands in every report of `mas evaluate`.
Axes: H W pixels, N components.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mas.instances import with_ends
from mas.scene import FACE_IDS, HUMAN_IDS, PERSON, THINGS, SceneMap

LEAST_SHARE = 3.5e-4  # of the picture: what is smaller is no thing (6 pixels of 128 x 128)
FRAGMENT = 0.1  # of the largest thing of its class: what is smaller is a piece of one
PIECE = 0.3  # of its neighbour: what is smaller and as near as `REACH` belongs to it
REACH = 0.047  # of the side: how far a piece lies from its thing (6 pixels of 128)


@dataclass(frozen=True, eq=False)
class Found:
    """One thing of a scene map."""

    class_id: int  # 0-79; a person with all parts is a person
    mask_HW: np.ndarray  # bool
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 as shares of width and height


def find_things(scene: SceneMap) -> dict[int, list[Found]]:
    """All things by class, large ones first.

    Components of a class are separated by edges that run inside it. Pieces are joined: what is
    small beside a near component was cut off by something in front of it.
    """
    part = (scene.labels >= HUMAN_IDS.start) & (scene.labels < FACE_IDS.stop)
    labels = np.where(part, PERSON, scene.labels)
    between = with_ends(scene.inner_edges, scene.edges)
    found = {}
    for class_id in np.unique(labels[labels < THINGS]).tolist():
        things = _find_class(labels == class_id, between, class_id)
        if things:
            found[class_id] = things
    return found


def _find_class(mask_HW: np.ndarray, between_HW: np.ndarray, class_id: int) -> list[Found]:
    parts_HW, count = _split(mask_HW, between_HW)
    areas = ndimage.sum_labels(mask_HW, parts_HW, range(1, count + 1))
    boxes = ndimage.find_objects(parts_HW, count)
    height, width = mask_HW.shape
    kept: list[tuple[float, tuple[slice, slice]]] = []
    found = []
    for number in np.argsort(-areas, kind="stable").tolist():
        area, box = float(areas[number]), boxes[number]
        if area < LEAST_SHARE * mask_HW.size or (kept and area < FRAGMENT * kept[0][0]):
            break  # so are all that follow
        if any(area < PIECE * other and _gap(box, place) <= REACH * width for other, place in kept):
            continue
        kept.append((area, box))
        rows, columns = box
        found.append(
            Found(
                class_id,
                parts_HW == number + 1,
                (
                    columns.start / width,
                    rows.start / height,
                    columns.stop / width,
                    rows.stop / height,
                ),
            )
        )
    return found


def _split(mask_HW: np.ndarray, between_HW: np.ndarray) -> tuple[np.ndarray, int]:
    """Components of a mask, int H W from 1, and their number; edges inside it separate.

    An edge is one pixel wide and has gaps for steps to a diagonal neighbour. So diagonal steps
    join only where both other pixels of the four lie outside the mask, as in thin things.
    """
    parts_HW, count = ndimage.label(mask_HW & ~between_HW)
    pairs = []
    for flipped in (False, True):
        parts, mask = (x[:, ::-1] if flipped else x for x in (parts_HW, mask_HW))
        here, there = parts[:-1, :-1], parts[1:, 1:]
        thin = (here > 0) & (there > 0) & ~mask[:-1, 1:] & ~mask[1:, :-1]
        pairs.append(np.stack([here[thin], there[thin]]))
    first, second = np.concatenate(pairs, axis=1) - 1
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(count, count))
    count, joined = connected_components(graph, directed=False)
    return np.append(0, joined + 1)[parts_HW], count


def _gap(box: tuple[slice, slice], other: tuple[slice, slice]) -> int:
    """Pixels between two boxes along the axis where they are farther apart; 0 where they touch."""
    return max(max(a.start, b.start) - min(a.stop, b.stop) for a, b in zip(box, other, strict=True))
