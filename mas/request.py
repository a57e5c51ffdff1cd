"""What may be asked of a model: requests are checked before anything is computed.

In: captions, numbers and masks as they were handed in. Out: tokens of which some are free, or a
`ModelError` of one line that names the mend.
Axes: T tokens, H W pixels, h w grid.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from mas.generate import Decoder
from mas.gpt import GPTConfig
from mas.judge import SceneJudge
from mas.model_folder import ModelError
from mas.precision import pictures_that_fit
from mas.scene import VOID, SceneMap, find_edges
from mas.sequence import FREE

LARGEST_SEED = 2**63 - 1
MUCH_VOID = 0.05  # of a scene; the park has none
CPU_ALLOCATOR = "DefaultCPUAllocator"  # how torch's error begins when the CPU's memory is used up

logger = logging.getLogger(__name__)


def check_request(
    captions: Sequence[str], *, conditioned: bool, count: int, seed: int, batch: int
) -> None:
    """Refuses a request without anything to go by, or with impossible numbers.

    Args:
        captions: as they were handed in.
        conditioned: whether a scene or a picture is given besides.
        count: pictures a caption.
        seed: of the first picture.
        batch: pictures at a time.

    Raises:
        ModelError: names the value.
    """
    if not captions:
        raise ModelError("there is no caption")
    if not conditioned and not all(text.strip() for text in captions):
        raise ModelError("the caption is empty: say what to paint, or give a scene")
    for name, value in (("count", count), ("batch", batch)):
        if value < 1:
            raise ModelError(f"{name} is {value}, use 1 or more")
    if not 0 <= seed <= LARGEST_SEED - count:
        raise ModelError(f"seed is {seed}, use a number from 0 to 2^63 - 1")


def check_candidates(candidates: int, judge: SceneJudge | None) -> None:
    """Refuses several scenes where nobody chooses among them.

    Raises:
        ModelError: names the number.
    """
    if candidates < 1:
        raise ModelError(f"scene_candidates is {candidates}, use 1 or more")
    if candidates > 1 and judge is None:
        raise ModelError(
            f"scene_candidates is {candidates}, but this model has no judge to choose: use 1, "
            "or train one with mas train judge and assemble the model with --judge"
        )


def check_memory(decoder: Decoder, config: GPTConfig, pictures: int) -> None:
    """Refuses more pictures at a time than the free memory holds.

    Raises:
        ModelError: names the number that fits.
    """
    fitting = pictures_that_fit(decoder, config)
    if pictures > fitting:
        raise ModelError(
            f"{pictures} pictures at a time do not fit into the memory, {fitting} do: "
            f"use batch {fitting}"
            if fitting
            else "not even one picture fits into the free memory: use a smaller model"
        )


def warn_of_void(scene: SceneMap) -> None:
    """Says so where much of a scene that shall be followed as it is carries no label."""
    share = scene.void_fraction()
    if share > MUCH_VOID:
        logger.warning(
            "%.0f %% of the scene is void, of which a model may have seen none: anything may be "
            "painted there; let the model choose with --fill-void (scene_free)",
            100 * share,
        )


@contextmanager
def room_for(pictures: int) -> Iterator[None]:
    """Says what to do when the memory runs out all the same: others take from it, too."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not out_of_memory and CPU_ALLOCATOR not in str(error):
            raise
        mend = f"try batch {pictures // 2}" if pictures > 1 else "use a smaller model"
        raise ModelError(
            f"the memory ran out with {pictures} pictures at a time: {mend}"
        ) from error


def to_cells(free_HW: np.ndarray, *, grid: int, name: str) -> np.ndarray:
    """Which grid cells have a free pixel, bool h w.

    Args:
        free_HW: bool, of any size from the grid's.
        grid: tokens a side.
        name: of the mask, for messages.

    Raises:
        ModelError: a mask of another kind or too small a one.
    """
    if free_HW.dtype != np.bool_ or free_HW.ndim != 2 or free_HW.shape[0] != free_HW.shape[1]:
        raise ModelError(f"{name} must be a square bool array, got {free_HW.dtype} {free_HW.shape}")
    size = len(free_HW)
    if size < grid:
        raise ModelError(f"{name} must have {grid} pixels a side or more, not {size}")
    free_hw = np.zeros((grid, grid), np.bool_)
    rows, columns = np.nonzero(free_HW)
    free_hw[rows * grid // size, columns * grid // size] = True
    return free_hw


def release(tokens_1T: Tensor, free_hw: np.ndarray) -> Tensor:
    """Sets the tokens of free cells to `FREE`."""
    free_1T = rearrange(torch.from_numpy(free_hw), "h w -> 1 (h w)")
    return tokens_1T.masked_fill(free_1T, FREE)


def fill_free(image: Image.Image, free_HW: np.ndarray) -> Image.Image:
    """The picture with its free pixels replaced by the nearest kept ones.

    A token knows of pixels far beyond its cell, and nobody has said what is where the model paints.

    Args:
        image: of any size.
        free_HW: bool, square, of any size; where all of it is free nothing is replaced.
    """
    free_HW = _stretch(free_HW, image.height, image.width)
    return Image.fromarray(_spread(np.asarray(image.convert("RGB")), ~free_HW))


def fill_void(scene: SceneMap, free_hw: np.ndarray) -> SceneMap:
    """The scene with void in free cells replaced by what is nearest, as if that went on there.

    A token knows what lies beside its cell. Void there reads like the rim of a thing.
    """
    labels = spread_labels(scene.labels, _stretch(free_hw, *scene.labels.shape))
    between_things = scene.edges & ~find_edges(scene.labels)
    return SceneMap(labels, find_edges(labels) | between_things)


def spread_labels(labels_HW: np.ndarray, gaps_HW: np.ndarray) -> np.ndarray:
    """Labels in which void of the gaps is what is nearest; where all is void it stays.

    Args:
        labels_HW: uint8.
        gaps_HW: bool.
    """
    known_HW = labels_HW != VOID
    return np.where(gaps_HW & ~known_HW, _spread(labels_HW, known_HW), labels_HW)


def _spread(values: np.ndarray, known_HW: np.ndarray) -> np.ndarray:
    """Each value that of the nearest known pixel, H W …; as they are where none is known."""
    if not known_HW.any():
        return values
    nearest = distance_transform_edt(~known_HW, return_distances=False, return_indices=True)
    return values[tuple(nearest)]


def _stretch(mask_hw: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = (np.arange(size) * len(mask_hw) // size for size in (height, width))
    return mask_hw[np.ix_(rows, columns)]
