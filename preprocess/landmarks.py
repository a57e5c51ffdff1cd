"""Face parts from 68 landmarks, drawn at the size of the scene.

In: the landmarks of all faces of one photo, in pixels of the square. Out: a map of part ids.
Parts and point numbers: the 300-W markup; which parts: Make-A-Scene, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

LANDMARKS = 68
BROWS = (range(17, 22), range(22, 27))
EYES = (range(36, 42), range(42, 48))
BRIDGE, NOSTRILS = range(27, 31), range(31, 36)
OUTER_MOUTH = range(48, 60)
INNER_MOUTH = range(60, 68)
BROW_WIDTH = 1 / 24  # of the distance from chin to brows; at least one pixel


def draw_faces(faces: Sequence[np.ndarray], size: int, *, min_height: float = 0.0) -> np.ndarray:
    """Draws the five parts of every face, without antialiasing, larger faces over smaller ones.

    Args:
        faces: one 68 x 2 array a face: x and y in pixels of the square, 0 at its left upper corner.
        size: pixels per side.
        min_height: faces whose points span fewer pixels from top to bottom are left out.

    Returns:
        uint8 H W: 0 = no part, 1-5 = eyebrows, eyes, nose, outer mouth, inner mouth.
    """
    canvas = Image.new("L", (size, size))
    draw = ImageDraw.Draw(canvas)
    for face in sorted(faces, key=_height):
        height = _height(face)
        if height < min_height or not _overlaps(face, size):
            continue
        # Pillow takes the pixel a point lies in, as the continuous plane of landmarks has it.
        points = [(float(x), float(y)) for x, y in face]

        def pick(*numbers: range, points: list[tuple[float, float]] = points) -> list:
            return [points[n] for part in numbers for n in part]

        for brow in BROWS:
            draw.line(pick(brow), fill=1, width=max(1, round(height * BROW_WIDTH)), joint="curve")
        for eye in EYES:
            draw.polygon(pick(eye), fill=2)
        # Down the bridge and back along either nostril: one side each, the tip in both.
        draw.polygon(pick(BRIDGE, NOSTRILS), fill=3)
        draw.polygon(pick(BRIDGE, NOSTRILS[::-1]), fill=3)
        draw.polygon(pick(OUTER_MOUTH), fill=4)
        draw.polygon(pick(INNER_MOUTH), fill=5)
    return np.asarray(canvas)


def _height(face: np.ndarray) -> float:
    return float(np.ptp(face[:, 1]))


def _overlaps(face: np.ndarray, size: int) -> bool:
    return bool((face.max(0) > 0).all() and (face.min(0) < size).all())
