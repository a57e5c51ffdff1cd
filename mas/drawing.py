"""Drawings and scenes: strokes on a canvas become a scene map, a scene map becomes a canvas.

In: layers of RGBA pixels in palette colours, as an image editor hands them out, on a scene that may
lie below. Out: a scene at the model's size, void where the model shall choose.
Axes: H W pixels, h w grid cells, p q pixels of a cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import reduce, repeat
from PIL import Image, ImageFilter

from mas.request import spread_labels
from mas.scene import THINGS, VOID, SceneMap, find_edges, snap_colours

CANVAS = 512  # pixels a side that are drawn on, about
PAPER = 255  # of each colour: the empty canvas is white, which no class is
OPAQUE = 128  # alpha from which a stroke counts


@dataclass(frozen=True)
class Drawing:
    """What is on the canvas."""

    scene: SceneMap | None  # None: nothing
    drawn: np.ndarray  # bool H W: where there are strokes
    on_loaded: bool  # whether the scene that was put on the canvas is still below them


def canvas_side(size: int) -> int:
    """Pixels a side of a canvas for scenes of `size` pixels: a whole number of times as many."""
    return size * max(1, CANVAS // size)


def draw_scene(scene: SceneMap) -> dict[str, Any]:
    """What the editor shows of a scene: its colours in the background, nothing drawn on it."""
    alpha = np.where(scene.labels == VOID, 0, 255).astype(np.uint8)
    colours = np.dstack([np.asarray(scene.to_rgb()), alpha])
    times = canvas_side(len(alpha)) // len(alpha)
    background = repeat(colours, "h w c -> (h p) (w q) c", p=times, q=times)
    return {"background": background, "layers": [], "composite": None}


def read_drawing(drawing: Mapping[str, Any] | None, loaded: SceneMap | None, size: int) -> Drawing:
    """The scene on the canvas.

    Two things of one class are parted by an edge where they were drawn on two layers, or one of
    them on the other.

    Args:
        drawing: of the editor: `background`, uint8 H W RGBA or None, and `layers`, a list of them.
        loaded: the scene of `size` pixels that was put on the canvas last. Where the background
            still shows it, its edges between things of one class are kept.
        size: pixels a side of the result.
    """
    drawing = drawing or {}
    labels = np.full((size, size), VOID, np.uint8)
    things = np.zeros((size, size), np.int32)
    drawn = np.zeros((size, size), np.bool_)
    kept = np.zeros((size, size), np.bool_)
    on_loaded = False
    if drawing.get("background") is not None:
        background = _shrink(drawing["background"], size)
        background[(background[..., :3] == PAPER).all(-1), 3] = 0
        labels = snap_colours(background)
        if loaded is not None and np.array_equal(loaded.labels, labels):
            kept = loaded.edges & ~find_edges(labels)
            on_loaded = True
    for number, layer in enumerate(drawing.get("layers") or (), start=1):
        rgba = _shrink(layer, size)
        strokes = rgba[..., 3] >= OPAQUE
        labels[strokes] = snap_colours(rgba)[strokes]
        things[strokes] = number
        drawn |= strokes
        kept &= ~strokes
    scene = None
    if (labels != VOID).any():
        things[labels >= THINGS] = 0  # stuff and parts of people have no instances
        scene = SceneMap(labels, find_edges(labels, things) | kept)
    return Drawing(scene, drawn, on_loaded)


def free_cells(scene: SceneMap, grid: int) -> SceneMap:
    """The scene, void in the whole of those cells that are for the model to choose, nowhere else.

    A cell is free where most of it is void. In all others void becomes what is nearest: the rim of
    a stroke shall not give its cells away, nor a speck that nobody drew.

    Args:
        scene: square, a whole number of cells a side.
        grid: cells a side.
    """
    cell = len(scene.labels) // grid
    void_HW = (scene.labels == VOID).astype(np.float64)
    shares_hw = reduce(void_HW, "(h p) (w q) -> h w", "mean", p=cell, q=cell)
    free_HW = repeat(shares_hw > 0.5, "h w -> (h p) (w q)", p=cell, q=cell)
    labels = spread_labels(scene.labels, ~free_HW)
    labels[free_HW] = VOID
    between_things = scene.edges & ~find_edges(scene.labels) & ~free_HW
    return SceneMap(labels, find_edges(labels) | between_things)


def widen(drawn_HW: np.ndarray, grid: int, side: int) -> np.ndarray:
    """The cells that strokes touch or come near, within half a cell; bool, `side` pixels a side.

    Args:
        drawn_HW: bool, square.
        grid: cells a side.
        side: a whole number of cells.
    """
    margin = len(drawn_HW) // grid // 2
    wider = Image.fromarray(drawn_HW.astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * margin + 1))
    touched_hw = np.zeros((grid, grid), np.bool_)
    rows, columns = np.nonzero(np.asarray(wider))
    touched_hw[rows * grid // len(drawn_HW), columns * grid // len(drawn_HW)] = True
    return repeat(touched_hw, "h w -> (h p) (w q)", p=side // grid, q=side // grid)


def _shrink(rgba: np.ndarray, size: int) -> np.ndarray:
    return np.array(Image.fromarray(rgba).resize((size, size), Image.Resampling.NEAREST))
