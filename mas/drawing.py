"""Drawings and scenes: what the studio's canvas tells becomes a scene map, and back.

In: planes of class ids as the page hands them out: a scene that may lie below, strokes above it.
Out: a scene at the model's size, void where the model shall choose.
Axes: H W pixels, h w grid cells, p q pixels of a cell.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import reduce, repeat
from PIL import Image, ImageFilter

from mas.fill import fill_gaps, relabel
from mas.scene import THINGS, VOID, SceneError, SceneMap, find_edges

UNTOUCHED = 254  # on the plane of strokes: none, what lies below is seen
LARGEST_PICTURE = 2048  # pixels a side


class DrawingError(ValueError):
    """What a page sent is no drawing; the message says what to do."""


@dataclass(frozen=True)
class Drawing:
    """What is on the canvas."""

    scene: SceneMap | None  # None: nothing
    drawn: np.ndarray  # bool H W: where there are strokes
    picture: Image.Image | None  # of the scene below the strokes, if that has been painted


def draw_scene(scene: SceneMap, picture: Image.Image | None = None) -> str:
    """What puts a scene on the canvas, and with it the picture that was painted of it."""
    told: dict[str, Any] = {
        "size": len(scene.labels),
        "labels": _to_text(scene.labels.tobytes()),
        "edges": _to_text(scene.edges.astype(np.uint8).tobytes()),
    }
    if picture is not None:
        file = io.BytesIO()
        picture.save(file, "PNG")
        told["picture"] = _to_text(file.getvalue())
    return json.dumps(told)


def read_drawing(told: object, size: int) -> Drawing:
    """The scene on the canvas.

    Two things of one class are parted by an edge where their strokes have two numbers, or one of
    them lies on the other. Edges of the scene below are kept where nothing is drawn over them.

    Args:
        told: by the page, or by `draw_scene`; None: nothing. A stranger may have sent it.
        size: pixels a side of a scene.

    Raises:
        DrawingError: anything else.
    """
    planes = {
        name: np.full((size, size), value, np.uint8)
        for name, value in (("labels", VOID), ("edges", 0), ("strokes", UNTOUCHED), ("things", 0))
    }
    picture = None
    if told is not None:
        content = _parse(told, size)
        planes |= {name: _to_plane(content[name], size) for name in planes if name in content}
        if content.get("picture") is not None:
            picture = _to_picture(content["picture"])
    drawn = planes["strokes"] != UNTOUCHED
    labels = np.where(drawn, planes["strokes"], planes["labels"])
    if (labels == VOID).all():
        return Drawing(None, drawn, picture)
    things = np.where(drawn, planes["things"], 0)
    things[labels >= THINGS] = 0  # stuff and parts of people have no instances
    between_things = planes["edges"].astype(np.bool_) & ~find_edges(planes["labels"]) & ~drawn
    try:
        scene = SceneMap(labels, find_edges(labels, things) | between_things)
    except SceneError as error:
        raise DrawingError(f"this is no drawing: {error}") from error
    return Drawing(scene, drawn, picture)


def _parse(told: object, size: int) -> dict[str, Any]:
    try:
        content = json.loads(told) if isinstance(told, str) else None
    except (ValueError, RecursionError) as error:
        raise DrawingError(f"this is no drawing: {error}") from error
    if not isinstance(content, dict):
        raise DrawingError("this is no drawing: use the canvas of the page")
    if content.get("size") != size:
        raise DrawingError(
            f"the drawing has {content.get('size')!r} pixels a side, scenes of this model {size}: "
            "reload the page"
        )
    return content


def _to_plane(text: object, size: int) -> np.ndarray:
    pixels = _to_bytes(text)
    if len(pixels) != size * size:
        raise DrawingError(f"this is no drawing: {len(pixels)} pixels instead of {size * size}")
    return np.frombuffer(pixels, np.uint8).reshape(size, size)


def _to_picture(text: object) -> Image.Image:
    """A PNG of a picture that this or another page was given before."""
    try:
        image = Image.open(io.BytesIO(_to_bytes(text)), formats=["PNG"])
        if image.width != image.height or image.width > LARGEST_PICTURE:
            raise DrawingError(f"this is no picture of a scene: {image.width}x{image.height}")
        return image.convert("RGB")
    except DrawingError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DrawingError(f"the picture of the scene cannot be read: {error}") from error


def _to_bytes(text: object) -> bytes:
    try:
        return base64.b64decode(text, validate=True)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise DrawingError(f"this is no drawing: {error}") from error


def _to_text(pixels: bytes) -> str:
    return base64.b64encode(pixels).decode()


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
    filled = fill_gaps(scene, ~free_HW)
    return relabel(filled, np.where(free_HW, np.uint8(VOID), filled.labels))


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
