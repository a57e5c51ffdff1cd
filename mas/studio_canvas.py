"""The studio's canvas: tools, classes and keys around a drawing, in one gr.HTML.

In: the sizes of a model, the classes that can be drawn. Out: a component whose value is what
mas/drawing.py reads. What hands do is in studio_drawing.js and studio_canvas.js, which run in the
browser; what it looks like in studio_canvas.html and studio.css.
"""

from __future__ import annotations

import base64
import io
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mas.drawing import UNTOUCHED, DrawingError, draw_scene, read_drawing
from mas.painter import Warnings
from mas.sample import read_square_scene
from mas.scene import CLASS_NAMES, HUMAN_IDS, MIRRORED, PALETTE, THINGS, VOID, SceneMap

FOLDER = Path(__file__).parent
CSS = (FOLDER / "studio.css").read_text("utf-8")
SCRIPTS = ("studio_drawing.js", "studio_canvas.js")  # in this order
NOTHING = "nothing: the model decides"  # the brush that empties
LARGEST_FILE = 20_000_000  # bytes, that are opened
MOST_PIXELS = 16_000_000  # of a scene that is opened; they take 0.8 GB
MOST_OPENING = 4  # visitors who open a file at once; one is served at a time
PAPER = "#ffffff"  # which no class is
BRUSH, WIDEST = 0.055, 0.3  # radius of the brush in shares of the canvas


def build_canvas(size: int, grid: int, names: Sequence[str]) -> gr.HTML:
    """The component: its value is text for `read_drawing`, or None.

    Args:
        size: pixels a side of a scene.
        grid: cells a side of it.
        names: of the classes that can be drawn.
    """
    opening = threading.Lock()  # small files may hold large scenes: one at a time
    places = threading.BoundedSemaphore(MOST_OPENING)  # the rest of the page needs threads, too

    def save_scene(value: Any) -> dict[str, str]:
        """What is on the canvas as the PNG that `mas sample` reads, in base64; or what is wrong."""
        try:
            scene = read_drawing(value, size).scene
        except ValueError as error:
            return {"error": str(error)}
        if scene is None:
            return {"error": "Nothing is drawn yet."}
        file = io.BytesIO()
        scene.to_png(file)
        return {"png": base64.b64encode(file.getvalue()).decode()}

    def open_scene(content: Any) -> dict[str, Any]:
        """A file, in base64, as what puts it on the canvas; or what is wrong."""
        if not places.acquire(blocking=False):
            return {"error": "Others open files just now: try again in a moment."}
        try:
            with opening:
                scene, warnings = _read_file(content)
                scene = scene.resized(size)
        except ValueError as error:
            return {"error": str(error)}
        finally:
            places.release()
        return {"drawing": draw_scene(scene), "warnings": warnings}

    return gr.HTML(
        html_template=(FOLDER / "studio_canvas.html").read_text("utf-8"),
        js_on_load="\n".join((FOLDER / name).read_text("utf-8") for name in SCRIPTS),
        server_functions=[save_scene, open_scene],
        apply_default_css=False,
        size=size,
        grid=grid,
        radius=max(1, round(size * BRUSH)),
        widest=max(2, round(size * WIDEST)),
        classes=[
            {"id": VOID, "name": NOTHING, "colour": PAPER},
            *({"id": CLASS_NAMES.index(x), "name": x, "colour": colour_of(x)} for x in names),
        ],
        names=list(CLASS_NAMES),
        palette=[colour_of(name) for name in CLASS_NAMES],
        parts=HUMAN_IDS.start,
        stuff=THINGS,
        mirrored={
            str(i): int(j) for i, j in enumerate(MIRRORED[: len(CLASS_NAMES)].tolist()) if i != j
        },
        untouched=UNTOUCHED,
        nothing=VOID,
        largest=LARGEST_FILE,
        emptying=NOTHING,
    )


def colour_of(name: str) -> str:
    """#rrggbb of a class."""
    return "#" + bytes(PALETTE[CLASS_NAMES.index(name)]).hex()


def _read_file(content: object) -> tuple[SceneMap, list[str]]:
    """A scene file in any form that `mas sample --scene` reads alone, and what is odd about it."""
    if not isinstance(content, str) or len(content) > LARGEST_FILE * 4 / 3 + 4:
        raise DrawingError("this file is no scene")
    with tempfile.TemporaryDirectory() as folder, Warnings() as said:
        path = Path(folder, "this file")
        try:
            path.write_bytes(base64.b64decode(content, validate=True))
            _check_pixels(path)
            scene = read_square_scene(path)
        except ValueError as error:
            raise DrawingError(str(error).replace(str(path), path.name)) from error
        return scene, [warning.replace(str(path), path.name) for warning in said]


def _check_pixels(path: Path) -> None:
    """Refuses a picture that is far larger than a scene, before its pixels are unpacked."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return  # the reader of scenes tells what is wrong with it
    if width * height > MOST_PIXELS:
        raise DrawingError(
            f"{path}: {width}x{height} is too large for the studio, which opens up to "
            f"{MOST_PIXELS // 10**6} million pixels: make it smaller"
        )
