"""Which instance each pixel of a scene map belongs to, found again from its edges.

In: labels and edges. Out: numbers of instances, from which `mas.scene` finds the edges of the map
mirrored or resized. An edge lies on the left or upper one of two pixels: turned or stretched along
with them, it would lie on the wrong one, and with gaps.
Axes: H W pixels.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def find_instances(labels: np.ndarray, edges: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Numbers that differ between parts of one label that edges part, int32 H W.

    An edge that parts nothing, since it has gaps, leaves no trace.

    Args:
        labels: uint8 H W.
        edges: bool H W, on the left or upper one of two pixels.
        inner: bool H W, those of them that lie between two segments of one label.
    """
    instances = np.zeros(labels.shape, np.int32)
    if not inner.any():
        return instances
    between = with_ends(inner, edges)
    for label in np.unique(labels[inner]):
        (box,) = ndimage.find_objects((labels == label).astype(np.uint8))
        mine = labels[box] == label
        instances[box][mine] = _split(mine, between[box])[mine]
    return instances


def with_ends(inner: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Edges between two segments of one label and their ends, bool H W.

    Where such an edge ends at another label, its last pixel is an edge of both kinds.
    """
    return edges & ndimage.binary_dilation(inner, np.ones((3, 3)))


def _split(mask: np.ndarray, between: np.ndarray) -> np.ndarray:
    """Numbers of the parts of a mask; an edge belongs to what lies left of it, or above."""
    parts, count = ndimage.label(mask & ~between)
    if not count:
        return parts
    found = parts.copy()
    for down, right in ((0, 1), (1, 0), (1, 1)):
        before = np.pad(parts, ((down, 0), (right, 0)))[: len(parts), : parts.shape[1]]
        found = np.where(mask & (found == 0), before, found)
    rest = mask & (found == 0)
    if rest.any():
        found[rest] = spread(parts, parts > 0)[rest]
    return found


def spread(values: np.ndarray, known_HW: np.ndarray) -> np.ndarray:
    """Each value that of the nearest known pixel, H W …; as they are where none is known."""
    if not known_HW.any():
        return values
    nearest = ndimage.distance_transform_edt(~known_HW, return_distances=False, return_indices=True)
    return values[tuple(nearest)]
