"""Gaps in scenes and pictures, filled by what lies nearest before they become tokens.

In: a scene or picture, and where a model is to choose. Out: one without such gaps: a token knows of
pixels far beyond its cell, so what stands there counts for the tokens beside it.
Axes: H W pixels, h w grid.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt

from mas.instances import spread
from mas.scene import VOID, SceneMap, find_edges


def fill_free(image: Image.Image, free_HW: np.ndarray) -> Image.Image:
    """The picture with its free pixels replaced by the nearest kept ones.

    A token knows of pixels far beyond its cell, and nobody has said what is where the model paints.

    Args:
        image: of any size.
        free_HW: bool, square, of any size; where all of it is free nothing is replaced.
    """
    free_HW = stretch(free_HW, image.height, image.width)
    return Image.fromarray(spread(np.asarray(image.convert("RGB")), ~free_HW))


def fill_void(
    scene: SceneMap, free_hw: np.ndarray, *, reach: int | None = None, beyond: int = VOID
) -> SceneMap:
    """The scene with void in free cells replaced by what is nearest, as if that went on there.

    A token knows what lies beside its cell. Void there reads like the rim of a thing.

    Args:
        scene: with void.
        free_hw: bool.
        reach: in pixels, how far that goes on; None: all over.
        beyond: label of what lies farther away.
    """
    free_HW = stretch(free_hw, *scene.labels.shape)
    filled = fill_gaps(scene, free_HW)
    known_HW = scene.labels != VOID
    if reach is None or not known_HW.any():
        return filled
    far_HW = distance_transform_edt(~known_HW) > reach
    return relabel(filled, np.where(far_HW & free_HW, np.uint8(beyond), filled.labels))


def fill_gaps(scene: SceneMap, gaps_HW: np.ndarray) -> SceneMap:
    """The scene with void of the gaps replaced by what is nearest; where all is void it stays.

    Things of one class that an edge parts stay apart in what becomes of them there, too.

    Args:
        scene: with void.
        gaps_HW: bool.
    """
    known_HW = scene.labels != VOID
    labels, instances = (
        np.where(gaps_HW & ~known_HW, spread(ids_HW, known_HW), ids_HW)
        for ids_HW in (scene.labels, scene.find_instances())
    )
    return SceneMap(labels, find_edges(labels, instances) | scene.inner_edges)


def relabel(scene: SceneMap, labels: np.ndarray) -> SceneMap:
    """The scene with other labels in places, which no edge between instances runs through."""
    return SceneMap(labels, find_edges(labels) | (scene.inner_edges & (labels == scene.labels)))


def stretch(mask_hw: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask of cells, or of another size, as one of so many pixels."""
    rows, columns = (np.arange(size) * len(mask_hw) // size for size in (height, width))
    return mask_hw[np.ix_(rows, columns)]
