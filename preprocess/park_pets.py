"""The small and the round animals of the park world; same contract as the big ones."""

from __future__ import annotations

from random import Random

import numpy as np

from preprocess.park_animals import INK, SNOUT, Legs, draw_eye, draw_legs, stride_of
from preprocess.park_colours import Colour, darker, lighter, mix
from preprocess.park_curves import blob, ellipse, limb, polygon
from preprocess.park_pen import Figure


def _dog_head(f: Figure, x: float, y: float, colour: Colour, rng: Random) -> None:
    """Muzzle, eye, tongue and a hanging or a pricked ear around (x, y)."""
    pale, ear_colour = lighter(colour, 0.5), darker(colour, 0.4)
    f.add(ellipse(x + 0.02, y + 0.02, 0.2, 0.18), colour)
    f.add(
        blob((x + 0.05, y + 0.04), (x + 0.3, y + 0.01), (x + 0.34, y - 0.06), (x + 0.26, y - 0.13),
        (x + 0.05, y - 0.13)), pale,
    )  # fmt: skip
    f.add(ellipse(x + 0.31, y + 0.0, 0.05, 0.04, count=14), INK, relief=0.6)
    if rng.random() < 0.5:
        f.add(
            blob((x + 0.2, y - 0.11), (x + 0.26, y - 0.12), (x + 0.25, y - 0.21),
            (x + 0.2, y - 0.2)), (232, 108, 118), relief=0.3,
        )  # fmt: skip
    draw_eye(f, x + 0.1, y + 0.075, 0.032)
    if rng.random() < 0.65:
        f.add(
            blob((x - 0.04, y + 0.17), (x - 0.17, y + 0.12), (x - 0.2, y - 0.12),
            (x - 0.1, y - 0.16), (x - 0.02, y + 0.02)), ear_colour,
        )  # fmt: skip
    else:
        f.add(
            blob((x - 0.15, y + 0.1), (x - 0.16, y + 0.32), (x + 0.01, y + 0.18), detail=4),
            ear_colour,
        )  # fmt: skip


def dog(rng: Random, colour: Colour, pose: str) -> Figure:
    f = Figure()
    pale = lighter(colour, 0.5)
    wag = rng.uniform(-0.08, 0.08)
    if pose == "sitting":
        f.add(limb([(-0.3, 0.12), (-0.5, 0.14), (-0.56 + wag, 0.32)], [0.1, 0.08, 0.05]), colour)
        f.add(limb([(0.16, 0.4), (0.2, 0.05)], [0.14, 0.1]), darker(colour, 0.2))
        f.add(
            blob((-0.36, 0.06), (-0.32, 0.3), (-0.12, 0.5), (0.1, 0.64), (0.24, 0.5), (0.2, 0.2),
            (0.02, 0.04)), colour,
        )  # fmt: skip
        f.add(blob((0.04, 0.6), (0.2, 0.56), (0.25, 0.36), (0.14, 0.28)), pale, relief=0.4)
        f.add(ellipse(-0.16, 0.17, 0.19, 0.16), colour)
        f.add(ellipse(-0.04, 0.04, 0.14, 0.05), colour)
        f.add(limb([(0.1, 0.42), (0.13, 0.05)], [0.14, 0.11]), colour)
        f.add(ellipse(0.17, 0.04, 0.09, 0.045), pale)
        x, y = 0.16, 0.76
    else:
        stride = stride_of(rng, pose, 0.15)
        legs = Legs(
            back=(-0.34, 0.38),
            front=(0.16, 0.38),
            width=0.13,
            colour=colour,
            foot=pale,
            stride=stride,
            taper=0.75,
        )
        f.add(limb([(-0.42, 0.52), (-0.58, 0.64), (-0.6 + wag, 0.82)], [0.11, 0.09, 0.045]), colour)
        draw_legs(f, legs, near=False)
        draw_legs(f, legs, near=True)
        f.add(
            blob(
                (-0.48, 0.5), (-0.36, 0.61), (-0.05, 0.6), (0.18, 0.66), (0.3, 0.5), (0.2, 0.32),
                (-0.08, 0.31), (-0.36, 0.33),
            ),
            colour,
        )  # fmt: skip
        x, y = 0.34, 0.78
        f.add(limb([(0.14, 0.52), (x - 0.05, y - 0.04)], [0.3, 0.22]), colour)
        collar = rng.choice(((208, 48, 44), (58, 110, 200), (245, 205, 60)))
        f.add(limb([(0.16, 0.66), (0.34, 0.56)], [0.055, 0.055]), collar, relief=0.5)
    _dog_head(f, x, y, colour, rng)
    return f


def _cat_head(f: Figure, x: float, y: float, colour: Colour, *, tabby: bool) -> None:
    """Round head with ears, eyes and whiskers around (x, y)."""
    pale, stripe = lighter(colour, 0.55), darker(colour, 0.3)
    for side in (-1, 1):
        ear = polygon(
            (x + side * 0.21, y + 0.08), (x + side * 0.19, y + 0.3), (x + side * 0.04, y + 0.17),
        )  # fmt: skip
        f.add(ear, colour)
        f.add((ear - ear.mean(0)) * 0.55 + ear.mean(0), SNOUT, relief=0.3)
    f.add(
        blob((x - 0.23, y + 0.02), (x - 0.16, y + 0.16), (x, y + 0.19), (x + 0.16, y + 0.16),
        (x + 0.23, y + 0.02), (x + 0.12, y - 0.14), (x - 0.12, y - 0.14)), colour,
    )  # fmt: skip
    f.add(ellipse(x, y - 0.06, 0.11, 0.075), pale, relief=0.5)
    if tabby:
        for k in (-1, 0, 1):
            f.add(
                limb([(x + 0.06 * k, y + 0.17), (x + 0.045 * k, y + 0.1)], [0.028, 0.02]), stripe,
                relief=0.3,
            )  # fmt: skip
    for side in (-1, 1):
        f.add(
            ellipse(x + side * 0.095, y + 0.035, 0.05, 0.052, count=14), (206, 220, 120),
            relief=0.3,
        )  # fmt: skip
        f.add(ellipse(x + side * 0.095, y + 0.03, 0.024, 0.045, count=10), INK, relief=0)
        for k in (-1, 1):
            whisker = limb(
                [(x + side * 0.1, y - 0.05), (x + side * 0.29, y - 0.05 + 0.03 * k)], [0.014,
                0.008],
            )  # fmt: skip
            f.add(whisker, lighter(colour, 0.8), relief=0)
    f.add(
        polygon((x - 0.03, y - 0.02), (x + 0.03, y - 0.02), (x, y - 0.055)), (214, 110, 120),
        relief=0,
    )  # fmt: skip
    f.add(
        limb([(x - 0.05, y - 0.085), (x, y - 0.1), (x + 0.05, y - 0.085)], [0.014, 0.014, 0.014]),
        INK, relief=0,
    )  # fmt: skip


def cat(rng: Random, colour: Colour, pose: str) -> Figure:
    f = Figure()
    pale, stripe = lighter(colour, 0.55), darker(colour, 0.3)
    curl = rng.uniform(-0.05, 0.08)
    tabby = rng.random() < 0.5
    if pose == "sitting":
        f.add(
            limb([(-0.2, 0.08), (-0.46, 0.06), (-0.52, 0.26), (-0.42 + curl, 0.4)], [0.1, 0.1,
            0.09, 0.06]), colour,
        )  # fmt: skip
        body = blob(
            (-0.28, 0.04), (-0.26, 0.28), (-0.12, 0.52), (0.08, 0.58), (0.22, 0.46), (0.24, 0.2),
            (0.2, 0.02),
        )  # fmt: skip
        f.add(body, colour)
        f.add(blob((0.02, 0.52), (0.16, 0.5), (0.19, 0.3), (0.08, 0.24)), pale, relief=0.4)
        f.add(limb([(0.06, 0.34), (0.07, 0.04)], [0.11, 0.1]), colour)
        f.add(limb([(0.19, 0.34), (0.2, 0.04)], [0.11, 0.1]), colour)
        f.add(ellipse(-0.12, 0.12, 0.16, 0.12), colour)
        x, y = 0.1, 0.72
    else:
        stride = stride_of(rng, pose, 0.12)
        legs = Legs(
            back=(-0.32, 0.32),
            front=(0.16, 0.32),
            width=0.1,
            colour=colour,
            foot=pale,
            stride=stride,
            taper=0.8,
        )
        f.add(
            limb([(-0.4, 0.46), (-0.58, 0.52), (-0.62, 0.76), (-0.52 + curl, 0.9)], [0.09, 0.08,
            0.08, 0.05]), colour,
        )  # fmt: skip
        draw_legs(f, legs, near=False)
        draw_legs(f, legs, near=True)
        body = blob(
            (-0.46, 0.42), (-0.36, 0.54), (-0.05, 0.53), (0.2, 0.54), (0.28, 0.42), (0.18, 0.28),
            (-0.1, 0.26), (-0.38, 0.28),
        )  # fmt: skip
        f.add(body, colour)
        x, y = 0.3, 0.66
    if tabby:
        for k in range(4):
            sx = (-0.36 if pose != "sitting" else -0.24) + 0.13 * k
            f.add(
                limb([(sx, 0.6), (sx + 0.03, 0.42), (sx + 0.02, 0.34)], [0.045, 0.04, 0.01]),
                stripe, clip=body,
            )  # fmt: skip
    _cat_head(f, x, y, colour, tabby=tabby)
    return f


def sheep(rng: Random, colour: Colour, pose: str) -> Figure:
    f = Figure()
    skin: Colour = (74, 62, 66) if rng.random() < 0.6 or max(colour) < 120 else (230, 202, 182)
    if max(colour) < 120:
        skin = (206, 180, 165)
    stride = stride_of(rng, pose, 0.09)
    legs = Legs(
        back=(-0.26, 0.34),
        front=(0.2, 0.34),
        width=0.1,
        colour=skin,
        foot=darker(skin, 0.4),
        stride=stride,
    )
    draw_legs(f, legs, near=False)
    draw_legs(f, legs, near=True)
    f.add(ellipse(-0.48, 0.58, 0.1, 0.09), colour)
    f.add(ellipse(-0.03, 0.56, 0.46, 0.3), colour)
    for k in range(11):
        angle = 0.571 * k + rng.uniform(-0.12, 0.12)
        x, y = -0.03 + 0.4 * np.cos(angle), 0.56 + 0.25 * np.sin(angle)
        f.add(
            ellipse(float(x), float(y), rng.uniform(0.12, 0.15), rng.uniform(0.1, 0.13), count=16),
            colour, relief=0.75,
        )  # fmt: skip
    for k in range(4):
        f.add(
            ellipse(-0.28 + 0.17 * k, rng.uniform(0.5, 0.64), 0.13, 0.11, count=16), colour,
            relief=0.6,
        )  # fmt: skip
    x, y = (0.44, 0.32) if pose == "grazing" else (0.44, 0.7)
    f.add(blob((x - 0.12, y + 0.14), (x - 0.25, y + 0.1), (x - 0.16, y + 0.02)), darker(skin, 0.2))
    f.add(
        blob((x - 0.15, y + 0.08), (x - 0.02, y + 0.17), (x + 0.11, y + 0.08),
        (x + 0.15, y - 0.11), (x + 0.05, y - 0.19), (x - 0.09, y - 0.09)), skin,
    )  # fmt: skip
    f.add(
        blob((x + 0.0, y + 0.14), (x - 0.02, y + 0.02), (x - 0.12, y - 0.02), (x - 0.1, y + 0.08)),
        darker(skin, 0.12),
    )  # fmt: skip
    for dx, dy, r in ((-0.09, 0.15, 0.08), (0.0, 0.18, 0.08), (0.06, 0.13, 0.06)):
        f.add(ellipse(x + dx, y + dy, r, r * 0.85, count=14), colour, relief=0.7)
    draw_eye(f, x + 0.05, y + 0.03, 0.028)
    f.add(ellipse(x + 0.09, y - 0.12, 0.014, 0.012, count=6), lighter(skin, 0.5), relief=0)
    return f


def bear(rng: Random, colour: Colour, pose: str) -> Figure:
    f = Figure()
    pale = lighter(colour, 0.42)
    if pose == "sitting":
        for side in (-1, 1):
            f.add(ellipse(side * 0.26, 0.1, 0.16, 0.11), colour)
        f.add(
            blob((-0.32, 0.12), (-0.32, 0.4), (-0.16, 0.64), (0.16, 0.64), (0.32, 0.4),
            (0.32, 0.12), (0, 0.03)), colour,
        )  # fmt: skip
        f.add(ellipse(0, 0.3, 0.2, 0.22), pale, relief=0.5)
        for side in (-1, 1):
            f.add(
                limb([(side * 0.26, 0.52), (side * 0.36, 0.34), (side * 0.22, 0.24)], [0.16, 0.15,
                0.13]), colour,
            )  # fmt: skip
            f.add(ellipse(side * 0.3, 0.08, 0.07, 0.065, count=14), pale, relief=0.4)
        x, y = 0.0, 0.76
    else:
        stride = stride_of(rng, pose, 0.1)
        legs = Legs(
            back=(-0.34, 0.4),
            front=(0.2, 0.4),
            width=0.19,
            colour=colour,
            foot=colour,
            stride=stride,
            taper=0.9,
        )
        f.add(ellipse(-0.56, 0.6, 0.07, 0.06), colour)
        draw_legs(f, legs, near=False)
        draw_legs(f, legs, near=True)
        f.add(
            blob(
                (-0.58, 0.52), (-0.48, 0.76), (-0.2, 0.82), (0.08, 0.8), (0.3, 0.82), (0.44, 0.6),
                (0.34, 0.34), (0.0, 0.28), (-0.4, 0.28),
            ),
            colour,
        )  # fmt: skip
        x, y = 0.46, 0.72
    for side in (-1, 1):
        f.add(ellipse(x + side * 0.16, y + 0.17, 0.085, 0.085, count=16), darker(colour, 0.12))
        f.add(
            ellipse(x + side * 0.16, y + 0.165, 0.045, 0.045, count=12), mix(colour, SNOUT, 0.5),
            relief=0.3,
        )  # fmt: skip
    f.add(ellipse(x, y, 0.225, 0.205), colour)
    mx = x + (0.05 if pose != "sitting" else 0)
    f.add(ellipse(mx, y - 0.075, 0.12, 0.095), pale)
    f.add(ellipse(mx, y - 0.035, 0.05, 0.036, count=14), INK, relief=0.5)
    f.add(
        limb([(mx - 0.05, y - 0.11), (mx, y - 0.125), (mx + 0.05, y - 0.11)], [0.016, 0.016,
        0.016]), INK, relief=0,
    )  # fmt: skip
    for side in (-1, 1):
        draw_eye(f, mx + side * 0.095, y + 0.055, 0.026)
    return f


def bird(rng: Random, colour: Colour, pose: str) -> Figure:
    f = Figure()
    beak: Colour = (240, 160, 50) if abs(colour[0] - 240) > 30 else (120, 84, 60)
    wing, pale = darker(colour, 0.22), lighter(colour, 0.5)
    if pose == "flying":
        up = rng.random() < 0.6
        lift = 0.62 if up else -0.38
        f.add(
            blob((0.08, 0.52), (-0.02, 0.52 + lift * 0.9), (-0.24, 0.5 + lift), (-0.12, 0.52)),
            darker(wing, 0.2),
        )  # fmt: skip
        f.add(polygon((-0.3, 0.5), (-0.62, 0.6), (-0.56, 0.48), (-0.64, 0.4), (-0.3, 0.42)), wing)
        f.add(
            blob((-0.4, 0.46), (-0.1, 0.6), (0.22, 0.62), (0.36, 0.5), (0.12, 0.36), (-0.2, 0.36)),
            colour,
        )  # fmt: skip
        f.add(blob((-0.2, 0.4), (0.1, 0.42), (0.26, 0.44), (0.1, 0.355)), pale, relief=0.3)
        f.add(ellipse(0.34, 0.6, 0.16, 0.15), colour)
        f.add(polygon((0.46, 0.64), (0.66, 0.57), (0.47, 0.53)), beak)
        draw_eye(f, 0.38, 0.64, 0.032)
        f.add(
            blob((0.14, 0.54), (0.0, 0.5 + lift), (-0.34, 0.48 + lift * 1.25),
            (-0.3, 0.5 + lift * 0.5), (-0.16, 0.5)), wing,
        )  # fmt: skip
        return f
    for x in (-0.05, 0.09):
        f.add(limb([(x, 0.3), (x + 0.02, 0.02)], [0.045, 0.04]), beak)
        f.add(limb([(x - 0.05, 0.015), (x + 0.12, 0.015)], [0.035, 0.03]), beak)
    tilt = rng.uniform(-0.05, 0.1)
    f.add(
        blob((-0.28, 0.42), (-0.7, 0.42 + tilt), (-0.66, 0.56 + tilt), (-0.26, 0.58), detail=4),
        wing,
    )  # fmt: skip
    f.add(
        blob((-0.42, 0.48), (-0.24, 0.66), (0.12, 0.72), (0.34, 0.54), (0.26, 0.28), (-0.02, 0.2),
        (-0.28, 0.3)), colour,
    )  # fmt: skip
    f.add(blob((0.02, 0.5), (0.3, 0.52), (0.24, 0.3), (0.02, 0.23)), pale, relief=0.4)
    f.add(ellipse(0.2, 0.78, 0.22, 0.2), colour)
    f.add(polygon((0.37, 0.83), (0.62, 0.75), (0.38, 0.69)), beak)
    f.add(blob((0.08, 0.6), (-0.12, 0.64), (-0.46, 0.42), (-0.2, 0.34), (0.04, 0.42)), wing)
    draw_eye(f, 0.26, 0.83, 0.04)
    return f


def teddy_bear(rng: Random, colour: Colour, pose: str) -> Figure:
    f = Figure()
    pale = lighter(colour, 0.5)
    lean = rng.uniform(-0.06, 0.06)
    for side in (-1, 1):
        f.add(limb([(side * 0.2, 0.5), (side * 0.38, 0.36 + side * lean)], [0.17, 0.17]), colour)
    f.add(ellipse(0, 0.33, 0.28, 0.3), colour)
    f.add(ellipse(0, 0.31, 0.17, 0.19), pale, relief=0.5)
    for side in (-1, 1):
        f.add(limb([(side * 0.18, 0.15), (side * 0.34, 0.11)], [0.2, 0.21]), colour)
        f.add(ellipse(side * 0.38, 0.11, 0.085, 0.09, count=16), pale, relief=0.4)
        f.add(ellipse(side * 0.22 + lean, 0.93, 0.1, 0.1, count=16), colour)
        f.add(ellipse(side * 0.22 + lean, 0.925, 0.055, 0.055, count=12), pale, relief=0.3)
    f.add(ellipse(lean, 0.76, 0.27, 0.23), colour)
    f.add(ellipse(lean, 0.69, 0.12, 0.095, count=18), pale, relief=0.6)
    f.add(ellipse(lean, 0.725, 0.045, 0.035, count=12), INK, relief=0.4)
    f.add(
        limb([(lean - 0.04, 0.66), (lean, 0.645), (lean + 0.04, 0.66)], [0.016] * 3), INK, relief=0,
    )  # fmt: skip
    for side in (-1, 1):
        f.add(ellipse(side * 0.11 + lean, 0.8, 0.034, 0.038, count=12), INK, relief=0)
        f.add(
            ellipse(side * 0.11 + lean + 0.012, 0.812, 0.012, 0.012, count=6), (255, 255, 255),
            relief=0,
        )  # fmt: skip
    bow = rng.choice(((208, 48, 44), (58, 110, 200), (245, 205, 60), (132, 80, 176)))
    if bow != colour:
        for side in (-1, 1):
            f.add(polygon((0.0, 0.55), (side * 0.13, 0.6), (side * 0.13, 0.49)), bow, relief=0.7)
        f.add(ellipse(0, 0.548, 0.035, 0.035, count=10), darker(bow, 0.2), relief=0.4)
    return f
