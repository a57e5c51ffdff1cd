"""What may be asked of a model, checked before anything is computed, and what it answers.

In: captions, numbers, scenes, pictures and masks as they were handed in. Out: a `Request`, or a
`ModelError` of one line that names the mend; tokens of which some are free. A `Generation` is what
comes of a request.
Axes: T tokens, H W pixels, h w grid.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from mas.fill import fill_free, fill_void, stretch
from mas.filter import StreamSampling
from mas.judge import SceneJudge
from mas.model_folder import ModelError
from mas.progress import Progress
from mas.scene import CLASS_NAMES, VOID, SceneMap, find_edges
from mas.sequence import FREE, Streams

LARGEST_SEED = 2**63 - 1
LARGEST_CALL = 100_000  # pictures; all of them stay in the memory until the last is painted
MOST_CANDIDATES = 256  # scenes drawn for a picture; a model folder names its own number
MUCH_VOID = 0.05  # of a scene; the park has none
MUCH_LOST = 0.3  # of what is drawn, on the way through the tokens
REACH = 2  # cells into which what is drawn goes on where the rest is the model's
BEYOND = (VOID, *map(CLASS_NAMES.index, ("sky-other-merged", "grass-merged", "wall-other-merged")))
CPU_ALLOCATOR = "DefaultCPUAllocator"  # how torch's error begins when the CPU's memory is used up
NO_COLOURS = ("I", "F")  # how Pillow's modes begin whose numbers are cut off at 255 as RGB

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GivenScene:
    """A scene of the model's size, and which of its cells the model chooses anew."""

    scene: SceneMap
    free_hw: np.ndarray  # bool; nowhere: the scene is followed as it is

    def fillings(self) -> list[SceneMap]:
        """What its tokens may be made of: ways to fill the void that the model chooses anew.

        A token knows of far more than its cell. What was never seen, such as a sea up to the top of
        a picture, spoils tokens of what is drawn, too; which way it is, only a try can tell.
        """
        if not (self.scene.labels[~self.kept_HW] == VOID).any():
            return [self.scene]
        reach = REACH * len(self.scene.labels) // len(self.free_hw)
        near = [fill_void(self.scene, self.free_hw, reach=reach, beyond=i) for i in BEYOND]
        return [fill_void(self.scene, self.free_hw), *near]

    @property
    def kept_HW(self) -> np.ndarray:
        """Which pixels the model leaves as they are, bool."""
        return ~stretch(self.free_hw, *self.scene.labels.shape)

    @property
    def drawn_HW(self) -> np.ndarray:
        """Which of them have a label, bool."""
        return self.kept_HW & (self.scene.labels != VOID)

    def share_kept(self, shown: SceneMap) -> float:
        """How much of what is drawn and stays is there in `shown`, 0 to 1; a mean over classes."""
        drawn_N = self.scene.labels[self.drawn_HW]
        right_N = drawn_N == shown.labels[self.drawn_HW]
        shares = [right_N[drawn_N == i].mean() for i in np.unique(drawn_N)]
        return float(np.mean(shares)) if shares else 1.0

    def put_back(self, shown: SceneMap) -> SceneMap:
        """A scene that the model has completed, with what was drawn as it was drawn."""
        labels = np.where(self.drawn_HW, self.scene.labels, shown.labels)
        inner = np.where(self.drawn_HW, self.scene.inner_edges, shown.inner_edges)
        return SceneMap(labels, find_edges(labels) | inner)


@dataclass(frozen=True, kw_only=True)
class GivenImage:
    """A picture of which a part is given."""

    image: Image.Image
    free_HW: np.ndarray  # bool, square: what the model paints; counts for nothing
    free_hw: np.ndarray  # bool: the cells it does so in

    @property
    def filled(self) -> Image.Image:
        """What its tokens are made of."""
        return fill_free(self.image, self.free_HW)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of `MakeAScene.generate`: `count` pictures of each caption."""

    captions: list[str]
    count: int  # 1 or more
    seed: int  # of the first picture of each caption
    batch: int  # pictures at a time, 1 or more
    candidates: int  # scenes drawn for a picture whose scene is not given, 1 or more
    settings: StreamSampling
    scene: GivenScene | None
    image: GivenImage | None
    negative: str  # prompt that guidance moves away from; empty: none
    refine: bool
    on_progress: Callable[[Progress], None] | None

    def __post_init__(self) -> None:
        if not self.captions:
            raise ModelError("there is no caption")
        given = self.scene is not None or self.image is not None
        if not given and not all(text.strip() for text in self.captions):
            raise ModelError("the caption is empty: say what to paint, or give a scene")
        check_seed(self.seed, pictures=self.count)
        pictures = len(self.captions) * self.count
        if pictures > LARGEST_CALL:
            raise ModelError(
                f"{pictures} pictures are too many for one call: use {LARGEST_CALL} or fewer, and "
                "the seeds that follow for others"
            )
        self._check_negative()
        if self.on_progress is not None and not callable(self.on_progress):
            raise ModelError(f"on_progress is {self.on_progress!r}, use a function")
        if not isinstance(self.refine, bool):  # "false" would count as true
            raise ModelError(f"refine is {self.refine!r}, use True or False")

    def _check_negative(self) -> None:
        if not isinstance(self.negative, str):
            raise ModelError(f"negative_prompt is {self.negative!r}, use a text")
        guided = {"scene": self.settings.scene, "image": self.settings.image}
        if self.followed is not None:
            del guided["scene"]
        if self.negative and all(sampling.guidance == 1 for sampling in guided.values()):
            raise ModelError(
                "negative_prompt is what guidance moves away from, and guidance is 1: use more, "
                "or leave one of them out"
            )

    @cached_property
    def seeds(self) -> list[int]:
        """One a picture, caption by caption."""
        return [self.seed + i for _ in self.captions for i in range(self.count)]

    @property
    def followed(self) -> SceneMap | None:
        """The scene that every picture follows as it is."""
        if self.scene is None or self.scene.free_hw.any():
            return None
        return self.scene.scene

    @property
    def draws(self) -> int:
        """Scenes drawn for a picture: one where there is nothing to choose."""
        return self.candidates if self.followed is None else 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """Pictures, the scenes they follow, and what made them; one entry a picture in each list."""

    images: list[Image.Image]  # RGB
    scenes: list[SceneMap]
    captions: list[str]
    seeds: list[int]
    tokens: Streams  # long B T on the CPU
    settings: dict[str, dict[str, Any]]  # sampling of scene and image
    negative_prompt: str  # empty where there was none
    seconds: float  # sampling and decoding, without loading the model
    tokens_per_second: float  # sampled tokens of all pictures
    scores: list[float] | None = None  # of mas/rerank.py, where pictures were compared


def list_captions(caption: str | Sequence[str]) -> list[str]:
    """The captions, one or several; ModelError for anything but text."""
    try:
        captions = [caption] if isinstance(caption, str) else list(caption)
    except TypeError:
        captions = [caption]  # type: ignore[list-item]
    for text in captions:
        if not isinstance(text, str):
            raise ModelError(f"caption holds {text!r}, use a text or a list of texts")
    return captions


def whole_number(name: str, value: int, *, least: int | None = None) -> int:
    """A plain integer of whatever kind of integer it was.

    Raises:
        ModelError: no whole number, or one below `least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ModelError(f"{name} is {value!r}, use a whole number") from None
    if least is not None and number < least:
        raise ModelError(f"{name} is {number}, use {least} or more")
    return number


def check_seed(seed: int, *, pictures: int) -> None:
    """Refuses a seed that is no seed, or has none for the last of so many pictures.

    Raises:
        ModelError: names the seeds that can be.
    """
    if not 0 <= seed <= LARGEST_SEED - pictures + 1:
        many = f" for {pictures} pictures" if 0 <= seed <= LARGEST_SEED else ""
        raise ModelError(f"seed is {seed}{many}, use a number from 0 to 2^63 - {pictures}")


def give_scene(
    scene: SceneMap | None, free_HW: np.ndarray | None, *, grid: int, size: int
) -> GivenScene | None:
    """A scene to follow, with the cells that are free in it.

    Args:
        scene: square, of any size; None: the model invents one.
        free_HW: bool, square, of any size from the grid's; None: nothing is free.
        grid: scene tokens a side.
        size: pixels of the model's scenes.

    Raises:
        ModelError: something else than a scene, or a mask that does not fit.
        SceneError: a scene that is not square.
    """
    if scene is None:
        if free_HW is not None:
            raise ModelError("scene_free says where a given scene is free: give the scene too")
        return None
    if not isinstance(scene, SceneMap):
        raise ModelError(
            f"scene is of type {type(scene).__name__}, use a SceneMap: mas.scene.read_scene reads "
            "a file, SceneMap.from_labels takes an array of ids"
        )
    nothing_hw = np.zeros((grid, grid), np.bool_)
    free_hw = nothing_hw if free_HW is None else to_cells(free_HW, grid=grid, name="scene_free")
    return GivenScene(scene=scene.resized(size), free_hw=free_hw)


def give_image(
    image: Image.Image | None, free_HW: np.ndarray | None, *, grid: int
) -> GivenImage | None:
    """A picture of which a part is given, with the cells that are free in it.

    Args:
        image: square, of any size.
        free_HW: bool, square, of any size from the grid's.
        grid: image tokens a side.

    Raises:
        ModelError: one without the other, something else than a picture in colours, or a mask that
            does not fit.
    """
    if image is None and free_HW is None:
        return None
    if image is None or free_HW is None:
        raise ModelError("image and image_free belong together: give both or neither")
    if not isinstance(image, Image.Image):
        raise ModelError(
            f"image is of type {type(image).__name__}, use a Pillow image: Image.open reads a "
            "file, Image.fromarray takes an array of colours (uint8)"
        )
    if image.mode.startswith(NO_COLOURS):
        raise ModelError(f"image has mode {image.mode}, use one in colours from 0 to 255, as RGB")
    if image.width != image.height or image.width == 0:
        raise ModelError(f"a picture must be square, this one is {image.width}x{image.height}")
    free_hw = to_cells(free_HW, grid=grid, name="image_free")
    return GivenImage(image=image, free_HW=free_HW, free_hw=free_hw)


def check_candidates(candidates: int, judge: SceneJudge | None) -> int:
    """The number of scenes drawn for a picture; several are refused where nobody chooses.

    Raises:
        ModelError: names the number.
    """
    candidates = whole_number("scene_candidates", candidates, least=1)
    if candidates > 1 and judge is None:
        raise ModelError(
            f"scene_candidates is {candidates}, but this model has no judge to choose: use 1, "
            "or train one with mas train judge and assemble the model with --judge"
        )
    if candidates > MOST_CANDIDATES:
        raise ModelError(f"scene_candidates is {candidates}, use {MOST_CANDIDATES} or fewer")
    return candidates


def check_memory(pictures: int, *, fitting: int) -> None:
    """Refuses more pictures at a time than fit into the free memory.

    Raises:
        ModelError: names the number that fits.
    """
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
        said = (
            f"{100 * share:.0f} % of the scene is void, of which a model may have seen none: "
            "anything may be painted there; "
        )
        logger.warning(
            "%slet the model choose with --fill-void (scene_free)",
            said,
            extra={"on_page": f"{said}choose above: what is not drawn is for the model to invent"},
        )


def warn_of_loss(given: GivenScene, shown: SceneMap) -> None:
    """Says so where the scene tokens hold another scene than the one that shall be followed.

    Args:
        given: what was drawn.
        shown: what its tokens are decoded to.
    """
    drawn_N, read_N = (scene.labels[given.drawn_HW] for scene in (given.scene, shown))
    wrong_N = drawn_N != read_N
    if not len(drawn_N) or wrong_N.mean() <= MUCH_LOST:
        return
    pairs, counts = np.unique([drawn_N[wrong_N], read_N[wrong_N]], axis=1, return_counts=True)
    drawn, read = (CLASS_NAMES[i] if i != VOID else "void" for i in pairs[:, counts.argmax()])
    logger.warning(
        "%.0f %% of the scene are lost on the way through its tokens, and so for the picture: most "
        "of all %s is read as %s; VQ-SEG was not trained on scenes like it, or not for long",
        *(100 * wrong_N.mean(), drawn, read),
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
    if not isinstance(free_HW, np.ndarray):
        raise ModelError(f"{name} must be a NumPy array of bool, not a {type(free_HW).__name__}")
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
