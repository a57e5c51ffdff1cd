"""Pictures for people: contact sheets and overlays, one look for every command.

In: rows of pictures and texts. Out: one Pillow image. Used by `mas inspect`, `mas sample` and the
picture logs of training.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mas.scene import SceneMap

GAP = 8  # pixels between cells
BACKGROUND = (250, 249, 246)
INK = (45, 45, 48)
FONT_SIZE = 13
# Looked for in this order. The first is Pillow's own: ASCII, the same on every machine.
FONTS = (
    "",
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",
    "arial.ttf",
    "msyh.ttc",
    "LiberationSans-Regular.ttf",
)
NO_LETTER = "\uffff"  # of no script, so that every font shows its box

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | str]], *, cell: int = 192, header: Sequence[str] = ()
) -> Image.Image:
    """Lays out cells in rows; every cell is a picture or a text.

    Pictures are fitted into `cell` x `cell` pixels with their aspect kept: enlarged by nearest
    neighbour so that every pixel stays visible, reduced with antialiasing. Texts are wrapped and
    cut with an ellipsis where they do not fit. `header` names the columns. Texts of ASCII look the
    same on every machine, others by the fonts that it has.
    """
    columns = max([len(row) for row in rows] + [len(header)], default=0)
    if columns == 0:
        raise ValueError("a contact sheet needs at least one cell")
    texts = [*header, *(content for row in rows for content in row if isinstance(content, str))]
    font = find_font("".join(texts), FONT_SIZE)
    top = FONT_SIZE + 2 * GAP if header else GAP
    size = (GAP + columns * (cell + GAP), top + len(rows) * (cell + GAP))
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(header):
        draw.text((GAP + column * (cell + GAP), GAP), spell(name, font), fill=INK, font=font)
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


def find_font(text: str, size: int) -> Font:
    """The first font that has every letter of a text, else one that lacks the fewest.

    Args:
        text: what is to be drawn; see `spell` for what the font lacks.
        size: pixels.
    """
    fonts = [font for name in FONTS if (font := _load(name, size)) is not None]
    return min(fonts, key=lambda font: sum(not _has(font, letter) for letter in set(text)))


def spell(text: str, font: Font) -> str:
    """The text in letters that the font has: those it lacks without their accents, or as ?."""
    spelled = []
    for letter in text:
        if not _has(font, letter):
            parts = unicodedata.normalize("NFKD", letter)
            bare = [part for part in parts if not unicodedata.combining(part)]
            letter = "".join(part if _has(font, part) else "?" for part in bare)
        spelled.append(letter)
    return "".join(spelled)


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return picture.resize(size, resample)


def _wrap(text: str, cell: int, font: Font) -> str:
    paragraphs = spell(text, font).splitlines()
    letters = {"n", "w", *(letter for letter in "".join(paragraphs) if not letter.isascii())}
    width = max(4, int(cell / (0.85 * max(map(font.getlength, letters)))))
    lines = [line for words in paragraphs for line in textwrap.wrap(words, width) or [""]]
    fitting = max(1, cell // (max(FONT_SIZE, int(font.getbbox("A")[3])) + 4))
    if len(lines) > fitting:
        lines = [*lines[: fitting - 1], lines[fitting - 1][: width - 1] + "…"]
    return "\n".join(lines)


@cache
def _load(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:  # not on this machine
        return None


@cache
def _has(font: Font, letter: str) -> bool:
    """Whether a font draws a letter as something else than the box for what it does not have."""
    if letter == "\t" or not letter.splitlines()[0]:  # what ends a line is never drawn
        return True
    shown, box = (font.getmask(x) for x in (letter, NO_LETTER))
    return shown.size != box.size or bytes(shown) != bytes(box)
