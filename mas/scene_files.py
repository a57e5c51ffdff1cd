"""The files that scenes come in: what is opened, and which form it has.

In: a PNG, COCO's JSON. Out: pixels, segments, or an error that names the file. What they mean is
for `mas.scene` to say.
Axes: H, W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps
from scipy.ndimage import binary_opening

from mas.picture_file import why_no_picture

MAX_PIXELS = 64_000_000  # larger scene files are refused
FEWER_PIXELS = f"use {MAX_PIXELS // 10**6} million pixels or fewer"  # what messages then say


class SceneError(ValueError):
    """A scene that cannot be what it claims to be; the message names the mend."""


def open_png(path: str | Path | IO[bytes]) -> Image.Image:
    """A PNG, read whole; SceneError where there is none, or a too large one."""
    try:
        image = Image.open(path, formats=["PNG"])
        if image.width * image.height > MAX_PIXELS:
            size = f"{image.width}x{image.height}"
            raise SceneError(f"{name_of(path)}: {size} is too large, {FEWER_PIXELS}")
        image.load()
    except FileNotFoundError:
        raise SceneError(f"{name_of(path)}: no such file") from None
    except SceneError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SceneError(f"{name_of(path)}: {why_no_picture(path, error, wanted='PNG')}") from error
    return image


def upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says it shall be seen."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF may raise anything, and says nothing
        return image


def marks_edges(alpha_HW: np.ndarray, changes_HW: np.ndarray) -> bool:
    """Whether the alpha of ids marks edges, as `SceneMap.to_png` writes it, or is transparency.

    It marks edges if it is 255 at every change of label and else mostly in lines, as between two
    things of one class; an area (squares of 3 x 3) larger than all outlines is what somebody drew.
    Where nothing is opaque it marks edges, too: a scene of one label has none, while nobody hands
    in a drawing of which nothing is seen. A drawing of one id in thin lines only is taken for edges
    if its transparent pixels have that id, too.

    Args:
        alpha_HW: uint8.
        changes_HW: bool, edges between labels (`mas.scene.find_edges`).
    """
    opaque_HW = alpha_HW == 255
    if opaque_HW.all() or (~opaque_HW & (alpha_HW > 0)).any():
        return False
    if not opaque_HW.any():
        return True
    if (changes_HW & ~opaque_HW).any():
        return False
    inner_HW = opaque_HW & ~changes_HW
    areas = int(binary_opening(inner_HW, np.ones((3, 3))).sum())
    return areas <= max(int(changes_HW.sum()), int(inner_HW.sum()) // 2)


def find_segments(path: Path) -> Path | None:
    """The JSON beside a COCO panoptic PNG, if there is one."""
    shard_form = path.with_name(path.name.removesuffix(".panoptic.png") + ".segments.json")
    for candidate in (path.with_suffix(".json"), shard_form):
        if candidate.is_file() and "segments_info" in candidate.read_text("utf-8", "replace"):
            return candidate
    return None


def read_segments(path: Path, file_name: str) -> list[dict[str, Any]]:
    """`segments_info` of one annotation, or of `file_name` in a whole COCO panoptic JSON."""
    try:
        content = json.loads(path.read_text("utf-8-sig"))  # a BOM may begin it
    except (OSError, ValueError, RecursionError) as error:
        raise SceneError(f"{path}: not a readable JSON ({error})") from error
    try:
        if "segments_info" in content:
            return content["segments_info"]
        named = [a for a in content["annotations"] if a["file_name"] == file_name]
        if named:
            return named[0]["segments_info"]
    except (KeyError, TypeError):
        raise SceneError(f"{path}: not in COCO's panoptic form") from None
    raise SceneError(f"{path}: no annotation with file_name {file_name!r}")


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Puts the file's name before what is wrong with its content."""
    try:
        yield
    except SceneError as error:
        raise SceneError(f"{source}: {error}") from None


def name_of(path: str | Path | IO[bytes]) -> str:
    """What messages call a file."""
    return str(path) if isinstance(path, (str, Path)) else "scene PNG"
