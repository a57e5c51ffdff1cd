"""The class histogram of a run as a picture, for the eye that looks over a data set.

In: photos and pixels per class, as in summary.json. Out: one Pillow image; a bar a class in the
class's own colour, longest first.
"""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

from mas.scene import CLASS_NAMES, PALETTE

ROWS = 53  # a column; three columns hold all 157 classes
ROW = 18  # pixels
NAME, BAR, NUMBERS = 170, 200, 150  # pixels of a column's three parts
SHARE, COUNT = 60, 130  # pixels from the end of the longest bar to where the numbers end
SWATCH = 4  # pixels; the shortest bar that shows its colour
GAP = 16  # pixels around columns
BACKGROUND, INK = (250, 249, 246), (45, 45, 48)
FONT_SIZE = 12


def draw_histogram(classes: Mapping[str, Mapping[str, int]], *, photos: int) -> Image.Image:
    """Draws how much of the scenes each class covers, and in how many photos it is.

    Args:
        classes: name -> {"photos", "pixels"}.
        photos: that were written in all.
    """
    names = sorted(classes, key=lambda name: (-classes[name]["pixels"], name))
    total = max(1, sum(counts["pixels"] for counts in classes.values()))
    longest = max([1, *(counts["pixels"] for counts in classes.values())])
    columns = max(1, -(-len(names) // ROWS))
    width = GAP + columns * (NAME + BAR + NUMBERS + GAP)
    height = 3 * GAP + ROW * (1 + min(ROWS, len(names)))
    image = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=FONT_SIZE)
    title = f"{photos:,} photos, {len(names)} of {len(CLASS_NAMES)} classes"
    draw.text((GAP, GAP), f"{title}; share of all labelled pixels, photos", fill=INK, font=font)
    for number, name in enumerate(names):
        column, row = divmod(number, ROWS)
        x = GAP + column * (NAME + BAR + NUMBERS + GAP)
        y = 2 * GAP + ROW * (1 + row)
        colour = tuple(int(c) for c in PALETTE[CLASS_NAMES.index(name)])
        length = max(SWATCH, round(BAR * classes[name]["pixels"] / longest))
        share = classes[name]["pixels"] / total
        draw.text((x, y), name, fill=INK, font=font)
        draw.rectangle((x + NAME, y + 2, x + NAME + length, y + ROW - 5), fill=colour, outline=INK)
        numbers = (f"{share:.2%}", f"{classes[name]['photos']:,}")
        for text, right in zip(numbers, (SHARE, COUNT), strict=True):
            draw.text((x + NAME + BAR + right, y), text, fill=INK, font=font, anchor="ra")
    return image
