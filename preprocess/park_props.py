"""Scenery figures of the park world: trees, bushes, rocks, houses, lamps, fences, flowers."""

from __future__ import annotations

from random import Random

import numpy as np

from preprocess.park_colours import Colour, darker, lighter, mix
from preprocess.park_curves import blob, ellipse, limb, polygon, rectangle
from preprocess.park_objects import LIT, WOOD
from preprocess.park_pen import Figure

BARK: Colour = (122, 86, 58)
SNOW: Colour = (246, 249, 255)
LEAVES: tuple[Colour, ...] = ((92, 156, 76), (76, 140, 78), (116, 168, 72), (66, 128, 88))
PANE: Colour = (186, 214, 226)
PETALS: tuple[Colour, ...] = (
    (236, 84, 90), (250, 200, 70), (246, 246, 240), (222, 120, 200), (130, 110, 220),
    (250, 150, 70),
)  # fmt: skip


def round_tree(rng: Random, leaf: Colour) -> Figure:
    f = Figure()
    f.add(limb([(0.0, 0.0), (0.01, 0.24), (0.0, 0.5)], [0.13, 0.09, 0.08]), BARK)
    f.add(limb([(0.0, 0.34), (0.12, 0.48)], [0.05, 0.04]), BARK)
    wide = rng.uniform(0.85, 1.15)
    for x, y, r in (
        (-0.2, 0.55, 0.19),
        (0.2, 0.54, 0.19),
        (0.0, 0.5, 0.2),
        (-0.13, 0.74, 0.2),
        (0.14, 0.73, 0.2),
        (0.0, 0.83, 0.18),
        (0.02, 0.64, 0.2),
    ):
        shade = mix(leaf, (40, 80, 50), 0.22 * (0.85 - y) / 0.35)
        f.add(
            ellipse(x * wide + rng.uniform(-0.03, 0.03), y + rng.uniform(-0.02, 0.02), r * wide,
            r * 0.9), shade, relief=0.8,
        )  # fmt: skip
    if rng.random() < 0.2:
        for _ in range(6):
            angle, reach = rng.uniform(0, 6.28), rng.uniform(0.05, 0.26)
            f.add(
                ellipse(reach * float(np.cos(angle)), 0.66 + 0.8 * reach * float(np.sin(angle)),
                0.03, 0.03, count=8), (214, 60, 50), relief=0.3,
            )  # fmt: skip
    return f


def pine(rng: Random, leaf: Colour, *, snowy: bool = False) -> Figure:
    f = Figure()
    f.add(limb([(0, 0), (0, 0.25)], [0.09, 0.07]), BARK)
    green = mix(leaf, (40, 96, 84), 0.55)
    for k, (low, half, high) in enumerate(
        ((0.14, 0.32, 0.52), (0.34, 0.26, 0.72), (0.55, 0.19, 0.88), (0.72, 0.12, 1.0))
    ):
        tier = polygon(
            (-half, low), (-half * 0.5, low + 0.035), (0, low - 0.01), (half * 0.5, low + 0.035),
            (half, low), (half * 0.42, (low + high) / 2), (0, high),
            (-half * 0.42, (low + high) / 2),
        )  # fmt: skip
        f.add(tier, lighter(green, 0.05 * k), relief=0.9)
        if snowy:
            cap = polygon(
                (-half * 0.7, low + 0.09), (-half * 0.35, low + 0.16), (0, low + 0.1),
                (half * 0.3, low + 0.17), (half * 0.7, low + 0.09),
                (half * 0.42, (low + high) / 2), (0, high + 0.01), (-half * 0.42, (low + high) / 2),
            )  # fmt: skip
            f.add(cap, SNOW, relief=0.5)
    return f


def palm(rng: Random, leaf: Colour) -> Figure:
    f = Figure()
    lean = rng.choice((-1, 1)) * rng.uniform(0.1, 0.24)
    top = (lean, 0.74)
    f.add(limb([(0, 0), (lean * 0.35, 0.36), top], [0.1, 0.07, 0.055]), (158, 116, 76))
    for angle in (2.75, 0.4, 2.2, 0.95, 1.6, 3.5, -0.35):
        turn = angle + rng.uniform(-0.12, 0.12)
        cos, sin = float(np.cos(turn)), float(np.sin(turn))
        tip = (top[0] + 0.4 * cos, top[1] + 0.26 * sin - 0.12)
        mid = (top[0] + 0.22 * cos, top[1] + 0.2 * sin + 0.03)
        f.add(
            limb([top, mid, tip], [0.06, 0.11, 0.02]), mix(leaf, (60, 120, 60),
            rng.random() * 0.5), relief=0.8,
        )  # fmt: skip
    for dx in (-0.035, 0.03):
        f.add(
            ellipse(top[0] + dx, top[1] - 0.03, 0.036, 0.036, count=10), (118, 78, 46), relief=0.6,
        )  # fmt: skip
    return f


def bush(rng: Random, leaf: Colour, *, snowy: bool = False) -> Figure:
    f = Figure()
    for x, y, r in (
        (-0.4, 0.28, 0.34),
        (0.4, 0.28, 0.34),
        (0.0, 0.42, 0.42),
        (-0.16, 0.22, 0.3),
        (0.18, 0.24, 0.3),
    ):
        f.add(ellipse(x, y, r, r * 0.82), mix(leaf, (40, 80, 50), rng.random() * 0.2), relief=0.8)
    if snowy:
        f.add(
            blob((-0.5, 0.5), (-0.2, 0.76), (0.2, 0.8), (0.5, 0.52), (0.2, 0.6), (-0.1, 0.54)),
            SNOW, relief=0.5,
        )  # fmt: skip
    return f


def rock(rng: Random, *, snowy: bool = False) -> Figure:
    f = Figure()
    stone = mix((134, 130, 134), (150, 132, 112), rng.random())
    f.add(
        blob((-0.6, 0.0), (-0.52, 0.36), (-0.2, rng.uniform(0.55, 0.8)), (0.24, rng.uniform(0.5,
        0.72)), (0.55, 0.3), (0.62, 0.0), detail=3), stone,
    )  # fmt: skip
    f.add(
        blob((-0.3, 0.5), (-0.1, 0.66), (0.15, 0.58), (0.0, 0.42), detail=3), lighter(stone, 0.25),
        relief=0.3,
    )  # fmt: skip
    if snowy:
        f.add(
            blob((-0.5, 0.36), (-0.2, 0.74), (0.24, 0.7), (0.5, 0.34), (0.15, 0.48), (-0.15, 0.4)),
            SNOW, relief=0.4,
        )  # fmt: skip
    return f


def flowers(rng: Random) -> Figure:
    """A tuft of flowers; about one unit wide."""
    f = Figure()
    petal = rng.choice(PETALS)
    f.add(
        blob((-0.5, 0.0), (-0.4, 0.28), (0.0, 0.36), (0.4, 0.28), (0.5, 0.0)), (84, 142, 66),
        relief=0.5,
    )  # fmt: skip
    for _ in range(rng.randint(5, 7)):
        x, y = rng.uniform(-0.42, 0.42), rng.uniform(0.22, 0.6)
        for k in range(5):
            angle = k * 1.257
            f.add(
                ellipse(x + 0.08 * float(np.cos(angle)), y + 0.08 * float(np.sin(angle)), 0.07,
                0.07, count=8), petal, relief=0,
            )  # fmt: skip
        f.add(
            ellipse(x, y, 0.055, 0.055, count=8),
            (248, 206, 84) if petal[1] < 190 else (200, 120, 50), relief=0,
        )  # fmt: skip
    return f


def lamp(rng: Random) -> Figure:
    f = Figure()
    iron: Colour = (66, 70, 80)
    f.add(limb([(0, 0), (0, 0.84)], [0.045, 0.035]), iron)
    f.add(rectangle(-0.05, 0, 0.05, 0.07, 0.015), iron)
    f.add(
        polygon((-0.055, 0.84), (0.055, 0.84), (0.08, 0.97), (-0.08, 0.97)), (255, 246, 214),
        relief=0.3, glow=(255, 236, 170),
    )  # fmt: skip
    f.add(polygon((-0.1, 0.965), (0.1, 0.965), (0.03, 1.02), (-0.03, 1.02)), iron, relief=0.4)
    return f


def cottage(rng: Random, *, snowy: bool = False) -> Figure:
    """A small house; one unit high."""
    f = Figure()
    wall = rng.choice(((236, 220, 190), (226, 190, 160), (206, 214, 220), (216, 160, 130)))
    roof = SNOW if snowy else rng.choice(((176, 84, 62), (130, 88, 70), (104, 112, 130)))
    f.add(rectangle(0.32, 0.7, 0.46, 1.08), (158, 104, 86))
    f.add(rectangle(-0.62, 0, 0.62, 0.58), wall, relief=0.6)
    f.add(polygon((-0.78, 0.54), (0.78, 0.54), (0.46, 1.0), (-0.46, 1.0)), roof)
    f.add(rectangle(-0.12, 0, 0.12, 0.38, 0.02), darker(WOOD, 0.1), relief=0.6)
    for x in (-0.4, 0.4):
        f.add(rectangle(x - 0.13, 0.16, x + 0.13, 0.42), (250, 246, 236), relief=0.3)
        f.add(rectangle(x - 0.1, 0.19, x + 0.1, 0.39), PANE, relief=0.3, glow=LIT)
        f.add(limb([(x, 0.19), (x, 0.39)], [0.03, 0.03]), (250, 246, 236), relief=0)
    return f


def barn(rng: Random) -> Figure:
    f = Figure()
    wall = rng.choice(((176, 62, 54), (166, 76, 58), (150, 110, 82)))
    f.add(
        polygon((-0.6, 0), (0.6, 0), (0.6, 0.52), (0.4, 0.82), (0, 1.0), (-0.4, 0.82),
        (-0.6, 0.52)), wall, relief=0.7,
    )  # fmt: skip
    trim: Colour = (244, 236, 222)
    f.add(
        limb([(-0.64, 0.5), (-0.42, 0.84), (0, 1.02), (0.42, 0.84), (0.64, 0.5)], [0.07] * 5,
        detail=2), darker(trim, 0.25),
    )  # fmt: skip
    f.add(rectangle(-0.26, 0, 0.26, 0.46), darker(wall, 0.3), relief=0.4)
    for ends in (
        ((-0.26, 0), (0.26, 0.46)),
        ((-0.26, 0.46), (0.26, 0)),
        ((-0.26, 0.46), (0.26, 0.46)),
        ((0, 0), (0, 0.46)),
    ):
        f.add(limb(list(ends), [0.045, 0.045]), trim, relief=0.2)
    f.add(rectangle(-0.1, 0.58, 0.1, 0.76), PANE, relief=0.3, glow=LIT)
    return f


def fence(rng: Random, count: int, *, white: bool) -> Figure:
    """A board fence of `count` pickets, one unit apart, one unit high."""
    f = Figure()
    colour: Colour = (240, 236, 226) if white else (164, 120, 80)
    f.add(rectangle(-0.45, 0.08, count - 0.55, 0.84), darker(colour, 0.34), relief=0.2)
    for k in range(count):
        top = 0.98 + rng.uniform(-0.05, 0.05)
        picket = polygon((k - 0.36, 0), (k + 0.36, 0), (k + 0.36, 0.84), (k, top), (k - 0.36, 0.84))
        f.add(picket, mix(colour, BARK, rng.uniform(0, 0.15)), relief=0.3)
    return f


def building(rng: Random, width: float) -> Figure:
    """A town house, `width` wide, one unit high, with rows of windows and a shop."""
    f = Figure()
    wall = rng.choice(
        ((214, 150, 120), (232, 206, 160), (186, 178, 190), (200, 122, 104), (170, 190, 196),
        (222, 180, 150)),
    )  # fmt: skip
    f.add(rectangle(0, 0, width, 1.0), wall, relief=0.35)
    cornice = darker(wall, 0.25)
    if rng.random() < 0.5:
        f.add(
            polygon((-0.01, 0.97), (width + 0.01, 0.97), (width * 0.85, 1.1), (width * 0.15, 1.1)),
            (140, 82, 70), relief=0.7,
        )  # fmt: skip
    else:
        f.add(rectangle(-0.01, 0.96, width + 0.01, 1.02), cornice, relief=0.5)
    columns = max(2, round(width / 0.2))
    step = width / columns
    lit = rng.random
    for row in range(3):
        y = 0.36 + row * 0.2
        for column in range(columns):
            x = (column + 0.5) * step
            glow = LIT if lit() < 0.6 else (60, 60, 70)
            f.add(
                rectangle(x - step * 0.27, y, x + step * 0.27, y + 0.13), PANE, relief=0.25,
                glow=glow,
            )  # fmt: skip
    f.add(
        rectangle(step * 0.2, 0.0, width - step * 0.9, 0.2), darker(PANE, 0.15), relief=0.3,
        glow=LIT,
    )  # fmt: skip
    f.add(
        rectangle(width - step * 0.75, 0, width - step * 0.2, 0.22), darker(WOOD, 0.25), relief=0.4,
    )  # fmt: skip
    awning = rng.choice(((196, 66, 60), (66, 120, 90), (70, 96, 160), (226, 170, 70)))
    f.add(
        polygon((step * 0.1, 0.21), (width - step * 0.8, 0.21), (width - step * 0.85, 0.3),
        (step * 0.15, 0.3)), awning, relief=0.6,
    )  # fmt: skip
    return f
