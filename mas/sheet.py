"""Pictures for people: contact sheets and overlays, one look for every command.

In: rows of pictures and texts. Out: one Pillow image. Used by `mas inspect`, `mas sample` and the
picture logs of training.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mas.scene import SceneMap

GAP = 8  # pixels between cells
BACKGROUND = (250, 249, 246)
INK = (45, 45, 48)
FONT_SIZE = 13


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | str]], *, cell: int = 192, header: Sequence[str] = ()
) -> Image.Image:
    """Lays out cells in rows; every cell is a picture or a text.

    Pictures are fitted into `cell` x `cell` pixels with their aspect kept: enlarged by nearest
    neighbour so that every pixel stays visible, reduced with antialiasing. Texts are wrapped and
    cut with an ellipsis where they do not fit. `header` names the columns.
    """
    columns = max([len(row) for row in rows] + [len(header)], default=0)
    if columns == 0:
        raise ValueError("a contact sheet needs at least one cell")
    font = ImageFont.load_default(size=FONT_SIZE)
    top = FONT_SIZE + 2 * GAP if header else GAP
    size = (GAP + columns * (cell + GAP), top + len(rows) * (cell + GAP))
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(header):
        draw.text((GAP + column * (cell + GAP), GAP), name, fill=INK, font=font)
    for r, row in enumerate(rows):
        for c, content in enumerate(row):
            x, y = GAP + c * (cell + GAP), top + r * (cell + GAP)
            if isinstance(content, str):
                draw.multiline_text((x, y), _wrap(content, cell, font), fill=INK, font=font)
            else:
                picture = _fit(content.convert("RGB"), cell)
                offset = (cell - picture.width) // 2, (cell - picture.height) // 2
                sheet.paste(picture, (x + offset[0], y + offset[1]))
    return sheet


def overlay(photo: Image.Image, scene: SceneMap, opacity: float = 0.5) -> Image.Image:
    """The scene's colours over the photo with its edges in white, at the scene's size."""
    photo = photo.convert("RGB").resize(scene.size, Image.Resampling.LANCZOS)
    mixed = np.array(Image.blend(photo, scene.to_rgb(), opacity))
    mixed[scene.edges] = 255
    return Image.fromarray(mixed)


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return picture.resize(size, resample)


def _wrap(text: str, cell: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    widest = max((font.getlength(letter) for letter in "nw"), default=8.0)
    width = max(4, int(cell / (0.85 * widest)))
    lines = [
        line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, width) or [""]
    ]
    fitting = max(1, cell // (FONT_SIZE + 4))
    if len(lines) > fitting:
        lines = [*lines[: fitting - 1], lines[fitting - 1][: width - 1] + "…"]
    return "\n".join(lines)
