"""What happens behind the studio's page: strokes become a scene, a wish becomes pictures.

In: the layers of a drawing in palette colours; a caption, a scene and settings. Out: a scene map;
scenes and pictures one after the other, while they are sampled. Nothing here knows of the page.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import reduce, repeat
from PIL import Image

from mas.model import Generation, MakeAScene, Progress
from mas.scene import VOID, SceneMap, find_edges, snap_colours

CANVAS = 512  # pixels a side that are drawn on
ROWS_A_PREVIEW = 4  # rows of image tokens between two looks at unfinished pictures
PAPER = 255  # of each colour: the empty canvas is white, which no class is
OPAQUE = 128  # alpha from which a stroke counts
MOST_PICTURES = 16
TELL_EVERY = 0.5  # seconds between two reports of the share alone


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What one press of the button asks for."""

    caption: str
    scene: SceneMap | None  # as drawn, void where nothing is; None: nothing is drawn at all
    keep_void: bool  # what is not drawn stays void; else the model invents it
    count: int
    seed: int
    scene_sampling: Mapping[str, float]
    image_sampling: Mapping[str, float]
    candidates: int
    refine: bool


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What there is to see by now."""

    share: float  # of the tokens that are sampled, 0-1
    scenes: list[SceneMap] | None = None  # as soon as they are complete
    images: list[Image.Image] | None = None
    result: Generation | None = None  # at the end


class Stopped(Exception):
    """Somebody pressed the button that stops."""


class Painter:
    """A model that many visitors share: one is served at a time, and each may stop their own."""

    def __init__(self, model: MakeAScene) -> None:
        self.model = model
        self._turn = threading.Lock()
        self._stops: dict[str, threading.Event] = {}  # by visitor

    def paint(self, wish: Wish, visitor: str = "") -> Iterator[Shown]:
        """Yields what there is to see, the finished pictures last; nothing more when stopped.

        Raises:
            ValueError: as `MakeAScene.generate`.
        """
        stop = self._stops[visitor] = threading.Event()
        news: queue.SimpleQueue[Shown | BaseException | None] = queue.SimpleQueue()
        worker = threading.Thread(target=self._work, args=(wish, stop, news), daemon=True)
        worker.start()
        try:
            while (item := news.get()) is not None:
                if isinstance(item, Stopped):
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()  # also when the visitor has left
            worker.join()
            if self._stops.get(visitor) is stop:
                del self._stops[visitor]

    def stop(self, visitor: str = "") -> None:
        """Ends what this visitor is waiting for, after the step at hand."""
        if visitor in self._stops:
            self._stops[visitor].set()

    def _work(
        self,
        wish: Wish,
        stop: threading.Event,
        news: queue.SimpleQueue[Shown | BaseException | None],
    ) -> None:
        told = 0.0

        def tell(progress: Progress) -> None:
            nonlocal told
            if stop.is_set():
                raise Stopped
            share = progress.done / progress.total
            if progress.new_scene:
                news.put(Shown(share=share, scenes=progress.scenes()))
            elif progress.new_rows and progress.rows % ROWS_A_PREVIEW == 0:
                news.put(Shown(share=share, images=progress.images()))
            elif time.monotonic() - told < TELL_EVERY:
                return
            else:
                news.put(Shown(share=share))
            told = time.monotonic()

        try:
            with self._turn:
                result = self._generate(wish, tell)
            news.put(Shown(share=1.0, scenes=result.scenes, images=result.images, result=result))
        except BaseException as error:  # whatever it is, the page must not wait for ever
            news.put(error)
        news.put(None)

    def _generate(self, wish: Wish, tell: Callable[[Progress], None]) -> Generation:
        scene, free_HW = wish.scene, None
        if scene is not None and not wish.keep_void:
            scene, free_HW = find_free(scene, self.model.vqseg.config.grid)
        return self.model.generate(
            wish.caption,
            scene=scene,
            scene_free=free_HW,
            count=wish.count,
            seed=wish.seed,
            scene_sampling=wish.scene_sampling,
            image_sampling=wish.image_sampling,
            scene_candidates=wish.candidates,
            refine=wish.refine,
            batch=MOST_PICTURES,
            on_progress=tell,
        )


def read_drawing(
    drawing: Mapping[str, Any] | None, loaded: SceneMap | None, size: int
) -> SceneMap | None:
    """The scene on the canvas; None where nothing is drawn.

    Two things of one class are parted by an edge where they were drawn on two layers.

    Args:
        drawing: of the editor: `background`, uint8 H W RGBA or None, and `layers`, a list of them.
        loaded: the scene that was put on the canvas last. Where the background still shows it, its
            edges between things of one class are kept.
        size: pixels a side of the result.
    """
    drawing = drawing or {}
    things = np.zeros((size, size), np.int32)
    labels = np.full((size, size), VOID, np.uint8)
    kept = np.zeros((size, size), np.bool_)
    if drawing.get("background") is not None:
        background = _shrink(drawing["background"], size)
        background[(background[..., :3] == PAPER).all(-1), 3] = 0
        labels = snap_colours(background)
        below = loaded and loaded.resized(size)
        if below and np.array_equal(below.labels, labels):
            kept = below.edges & ~find_edges(labels)
    for number, layer in enumerate(drawing.get("layers") or (), start=1):
        strokes = _shrink(layer, size)
        drawn = strokes[..., 3] >= OPAQUE
        labels[drawn] = snap_colours(strokes)[drawn]
        things[drawn] = number
        kept &= ~drawn
    if (labels == VOID).all():
        return None
    scene = SceneMap.from_labels(labels, things)
    return SceneMap(labels, scene.edges | kept)


def find_free(scene: SceneMap, grid: int) -> tuple[SceneMap, np.ndarray | None]:
    """Where a drawing leaves the choice to the model, and the drawing without gaps elsewhere.

    A grid cell is free where most of it is void. In all others void becomes what is nearest: the
    rim of a stroke shall not give its cells away, nor a speck that nobody drew.

    Args:
        scene: square, a whole number of cells a side.
        grid: cells a side.

    Returns:
        The scene, and bool H W, True in the whole of each free cell; None where there is none.
    """
    cell = len(scene.labels) // grid
    void_HW = scene.labels == VOID
    shares_hw = reduce(void_HW.astype(np.float64), "(h p) (w q) -> h w", "mean", p=cell, q=cell)
    free_HW = repeat(shares_hw > 0.5, "h w -> (h p) (w q)", p=cell, q=cell)
    labels = scene.labels
    while (gaps_HW := (labels == VOID) & ~free_HW).any():
        around = _shifted(labels)
        labels = labels.copy()
        for neighbours in around:
            here = gaps_HW & (labels == VOID) & (neighbours != VOID)
            labels[here] = neighbours[here]
    filled = scene if labels is scene.labels else _with_labels(scene, labels)
    return filled, free_HW if free_HW.any() else None


def _shifted(labels: np.ndarray) -> list[np.ndarray]:
    """The neighbours above, below, left and right of every pixel; void beyond the border."""
    padded = np.pad(labels, 1, constant_values=VOID)
    return [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]


def _with_labels(scene: SceneMap, labels: np.ndarray) -> SceneMap:
    """Other labels, with the edges between things of one class that the scene has."""
    inner = scene.edges & ~find_edges(scene.labels)
    return SceneMap(labels, find_edges(labels) | inner)


def _shrink(rgba: np.ndarray, size: int) -> np.ndarray:
    return np.array(Image.fromarray(rgba).resize((size, size), Image.Resampling.NEAREST))


def draw_scene(scene: SceneMap) -> dict[str, Any]:
    """What the editor shows of a scene: its colours in the background, nothing drawn on it."""
    colours = scene.to_rgb().resize((CANVAS, CANVAS), Image.Resampling.NEAREST)
    alpha = Image.fromarray(np.where(scene.labels == VOID, 0, 255).astype(np.uint8))
    colours.putalpha(alpha.resize((CANVAS, CANVAS), Image.Resampling.NEAREST))
    return {"background": np.asarray(colours), "layers": [], "composite": None}
