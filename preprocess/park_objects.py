"""Vehicles, boats, toys and benches of the park world; same contract as the animals."""

from __future__ import annotations

from random import Random

import numpy as np

from preprocess.park_animals import INK
from preprocess.park_colours import Colour, darker, lighter, mix
from preprocess.park_curves import Outline, blob, curve, ellipse, limb, polygon, rectangle
from preprocess.park_pen import Figure

GLASS: Colour = (168, 206, 226)
LIT: Colour = (255, 214, 120)
RUBBER: Colour = (44, 42, 50)
STEEL: Colour = (196, 200, 206)
WOOD: Colour = (150, 104, 66)
LAMP: Colour = (255, 240, 190)


def _wheel(figure: Figure, x: float, r: float, y: float | None = None) -> None:
    y = r if y is None else y
    figure.add(ellipse(x, y, r, r, count=20), RUBBER, relief=0.6)
    figure.add(ellipse(x, y, r * 0.55, r * 0.55, count=16), STEEL, relief=0.8)
    figure.add(ellipse(x, y, r * 0.18, r * 0.18, count=8), darker(STEEL, 0.5), relief=0)


def _window(figure: Figure, points: Outline) -> None:
    figure.add(points, GLASS, relief=0.5, glow=LIT)
    x0, y0 = points.min(0)
    x1, y1 = points.max(0)
    w, h = x1 - x0, y1 - y0
    glint = polygon(
        (x0 + 0.45 * w, y0 + 0.1 * h), (x0 + 0.6 * w, y0 + 0.1 * h),
        (x0 + 0.8 * w, y1 - 0.1 * h), (x0 + 0.65 * w, y1 - 0.1 * h),
    )  # fmt: skip
    figure.add(glint, lighter(GLASS, 0.6), relief=0, clip=points)


def car(rng: Random, colour: Colour, pose: str) -> Figure:
    f = Figure()
    roof = rng.uniform(0.94, 1.02)
    hatch = rng.random() < 0.5
    tail = -0.98 if hatch else -0.78
    f.add(rectangle(-1.0, 0.14, 1.0, 0.34, 0.06), darker(colour, 0.6))
    body = blob(
        (-1.12, 0.3), (-1.14, 0.52), (-1.0, 0.62), (tail, 0.66), (tail + 0.2, roof - 0.06),
        (-0.3, roof), (0.16, roof - 0.02), (0.42, 0.84), (0.62, 0.63), (0.98, 0.58), (1.14, 0.48),
        (1.15, 0.28), (0.9, 0.2), (-0.9, 0.2),
    )  # fmt: skip
    f.add(body, colour)
    _window(f, polygon((-0.08, 0.62), (-0.08, roof - 0.1), (0.14, roof - 0.1), (0.46, 0.62)))
    _window(
        f, polygon((tail + 0.2, 0.62), (tail + 0.3, roof - 0.1), (-0.18, roof - 0.1),
        (-0.18, 0.62)),
    )  # fmt: skip
    f.add(limb([(-0.13, 0.58), (-0.12, 0.24)], [0.018, 0.018]), darker(colour, 0.4), relief=0)
    f.add(limb([(0.0, 0.52), (0.1, 0.52)], [0.04, 0.04]), darker(colour, 0.5), relief=0)
    f.add(limb([(-1.06, 0.35), (1.08, 0.33)], [0.03, 0.03]), lighter(colour, 0.35), relief=0)
    f.add(ellipse(1.06, 0.47, 0.075, 0.07, count=14), LAMP, relief=0.4, glow=(255, 246, 200))
    f.add(ellipse(-1.08, 0.5, 0.05, 0.06, count=12), (214, 60, 50), relief=0.4, glow=(255, 60, 40))
    for x in (-0.62, 0.64):
        f.add(ellipse(x, 0.21, 0.26, 0.25), darker(colour, 0.75), relief=0)
        _wheel(f, x, 0.21)
    return f


def bus(rng: Random, colour: Colour, pose: str) -> Figure:
    f = Figure()
    double = rng.random() < 0.4
    half, top = (0.82, 1.0) if double else (1.08, 0.98)
    f.add(rectangle(-half + 0.04, 0.08, half - 0.04, 0.3), darker(colour, 0.6))
    f.add(rectangle(-half, 0.12, half, top, 0.09), colour)
    f.add(
        rectangle(-half + 0.01, 0.36 if double else 0.4, half - 0.01, 0.42 if double else 0.46),
        (246, 240, 226), relief=0.3,
    )  # fmt: skip
    rows = ((0.46, 0.64), (0.74, 0.92)) if double else ((0.54, 0.82),)
    count = 5
    step = (2 * half - 0.3) / count
    for low, high in rows:
        for k in range(count):
            x0 = -half + 0.07 + k * step
            _window(f, rectangle(x0, low, x0 + step * 0.82, high, 0.02))
    _window(f, rectangle(half - 0.2, rows[0][0] - 0.02, half - 0.01, rows[0][1] + 0.02, 0.03))
    f.add(
        rectangle(half - 0.42, 0.16, half - 0.25, 0.5), mix(colour, GLASS, 0.6), relief=0.6,
        glow=LIT,
    )  # fmt: skip
    f.add(ellipse(half - 0.03, 0.24, 0.05, 0.05, count=12), LAMP, relief=0.3, glow=(255, 246, 200))
    f.add(
        ellipse(-half + 0.03, 0.25, 0.035, 0.05, count=10), (214, 60, 50), relief=0.3,
        glow=(255, 60, 40),
    )  # fmt: skip
    for x in (-half * 0.62, half * 0.5):
        f.add(ellipse(x, 0.15, 0.17, 0.165), darker(colour, 0.75), relief=0)
        _wheel(f, x, 0.135)
    return f


def truck(rng: Random, colour: Colour, pose: str) -> Figure:
    f = Figure()
    f.add(rectangle(-1.0, 0.16, 0.95, 0.28), darker(STEEL, 0.5))
    load = rng.random()
    if load < 0.6:
        f.add(rectangle(-1.05, 0.27, 0.3, 1.0, 0.03), colour)
        f.add(rectangle(-1.04, 0.52, 0.29, 0.6), lighter(colour, 0.6), relief=0.2)
        for k in range(1, 5):
            x = -1.05 + 0.27 * k
            f.add(limb([(x, 0.3), (x, 0.97)], [0.018, 0.018]), darker(colour, 0.25), relief=0)
    else:
        for k in range(5):
            r = 0.2 + 0.04 * rng.random()
            f.add(
                ellipse(-0.86 + 0.26 * k, 0.6, r, r * 0.9), mix(WOOD, (120, 110, 70), rng.random()),
            )  # fmt: skip
        f.add(rectangle(-1.05, 0.27, 0.3, 0.62, 0.03), colour)
        for k in range(1, 4):
            x = -1.05 + 0.34 * k
            f.add(limb([(x, 0.29), (x, 0.6)], [0.03, 0.03]), darker(colour, 0.3), relief=0.2)
    f.add(
        blob((0.36, 0.22), (0.36, 0.55), (0.38, 0.86), (0.66, 0.88), (0.82, 0.6), (1.06, 0.5),
        (1.08, 0.22), detail=4), colour,
    )  # fmt: skip
    _window(f, polygon((0.5, 0.56), (0.5, 0.8), (0.66, 0.8), (0.8, 0.56)))
    f.add(limb([(0.47, 0.52), (0.47, 0.26)], [0.016, 0.016]), darker(colour, 0.4), relief=0)
    f.add(rectangle(0.98, 0.16, 1.12, 0.26, 0.02), STEEL)
    f.add(ellipse(1.04, 0.38, 0.05, 0.05, count=12), LAMP, relief=0.3, glow=(255, 246, 200))
    for x in (-0.74, -0.36, 0.72):
        _wheel(f, x, 0.17)
    return f


def bicycle(rng: Random, colour: Colour, pose: str) -> Figure:
    f = Figure()
    r = 0.36
    back, front, pedal = (-0.58, r), (0.58, r), (-0.1, 0.34)
    seat = (-0.26, 0.82)
    for x, y in (back, front):
        f.add(ellipse(x, y, r, r, count=28), RUBBER, relief=0.4)
        f.add(ellipse(x, y, r * 0.86, r * 0.86, count=24), colour, relief=0.2)
        f.add(
            ellipse(x, y, r * 0.7, r * 0.7, count=24),
            mix(colour, (236, 236, 240), 0.62),
            relief=0.2,
        )
        turn = rng.uniform(0, 0.6)
        for k in range(4):
            angle = turn + k * np.pi / 4
            dx, dy = r * 0.82 * float(np.cos(angle)), r * 0.82 * float(np.sin(angle))
            f.add(
                limb([(x - dx, y - dy), (x + dx, y + dy)], [0.018, 0.018]), darker(STEEL, 0.3),
                relief=0,
            )  # fmt: skip
    tubes = (
        (back, pedal), (back, (-0.22, 0.7)), (pedal, (-0.25, 0.78)), (pedal, (0.38, 0.72)),
        ((-0.22, 0.7), (0.38, 0.74)), (front, (0.37, 0.9)),
    )  # fmt: skip
    for start, end in tubes:
        f.add(limb([start, end], [0.115, 0.115]), colour, relief=0.6)
    f.add(limb([(-0.25, 0.78), seat], [0.05, 0.05]), STEEL)
    f.add(blob((-0.42, 0.86), (-0.28, 0.9), (-0.1, 0.86), (-0.26, 0.8)), (92, 62, 46))
    f.add(
        limb([(0.37, 0.88), (0.36, 0.98), (0.5, 0.98), (0.52, 0.9)], [0.05, 0.05, 0.05, 0.06]),
        darker(STEEL, 0.4),
    )  # fmt: skip
    f.add(ellipse(*pedal, 0.09, 0.09, count=14), darker(colour, 0.4), relief=0.6)
    f.add(limb([pedal, (0.0, 0.18)], [0.045, 0.045]), STEEL)
    f.add(rectangle(-0.06, 0.14, 0.1, 0.19), RUBBER, relief=0.3)
    if rng.random() < 0.5:
        basket = polygon((0.5, 0.86), (0.86, 0.86), (0.8, 0.62), (0.54, 0.62))
        f.add(basket, (196, 150, 96))
        for k in range(3):
            f.add(
                limb([(0.5, 0.68 + 0.07 * k), (0.86, 0.68 + 0.07 * k)], [0.018, 0.018]),
                (150, 108, 66), clip=basket,
            )  # fmt: skip
    return f


def boat(rng: Random, colour: Colour, pose: str) -> Figure:
    f = Figure()
    hull = blob(
        (-0.62, 0.24), (-0.5, 0.06), (-0.38, 0.0), (0.4, 0.0), (0.56, 0.1), (0.74, 0.28),
        (0.2, 0.23), (-0.3, 0.22), detail=4,
    )  # fmt: skip
    if rng.random() < 0.72:
        f.add(limb([(0.02, 0.2), (0.02, 1.0)], [0.035, 0.028]), WOOD)
        belly = rng.uniform(0.02, 0.09)
        sail = np.concatenate(
            [curve((0.06, 0.96), (0.4 + belly, 0.58), (0.6, 0.31)), polygon((0.06, 0.31))],
        )  # fmt: skip
        f.add(sail, lighter(colour, 0.1))
        for k in range(2):
            y = 0.44 + 0.2 * k
            f.add(limb([(0.0, y), (0.7, y - 0.02)], [0.05, 0.05]), lighter(colour, 0.7), clip=sail)
        jib = np.concatenate(
            [curve((-0.02, 0.86), (-0.26 - belly, 0.56), (-0.5, 0.32)), polygon((-0.02, 0.32))],
        )  # fmt: skip
        f.add(jib, lighter(colour, 0.16))
        flag = blob((0.02, 1.0), (0.1, 1.02), (0.18, 0.98), (0.1, 0.955), (0.02, 0.94), detail=3)
        f.add(flag, (232, 84, 70) if colour[0] < 180 else (70, 110, 190), relief=0.4)
        f.add(hull, darker(colour, 0.1))
    else:
        hull = (hull - (0, 0)) * (1.25, 1.5)
        f.add(polygon((-0.36, 0.3), (-0.36, 0.62), (0.2, 0.62), (0.26, 0.3)), (246, 240, 228))
        f.add(rectangle(-0.42, 0.6, 0.28, 0.67, 0.03), darker(colour, 0.1))
        for x in (-0.28, -0.08, 0.1):
            f.add(rectangle(x, 0.42, x + 0.11, 0.55, 0.02), GLASS, relief=0.4, glow=LIT)
        f.add(rectangle(-0.3, 0.66, -0.16, 0.92), colour)
        f.add(rectangle(-0.31, 0.85, -0.15, 0.92), INK, relief=0.4)
        f.add(hull, colour)
    x0, x1 = hull[:, 0].min(), hull[:, 0].max()
    top = hull[:, 1].max()
    f.add(
        polygon((x0, top * 0.66), (x1, top * 0.8), (x1, top * 0.64), (x0, top * 0.5)),
        lighter(colour, 0.75), clip=hull,
    )  # fmt: skip
    return f


def airplane(rng: Random, colour: Colour, pose: str) -> Figure:
    f = Figure()
    pale = lighter(colour, 0.35)
    f.add(polygon((-0.05, 0.56), (-0.34, 0.92), (-0.18, 0.92), (0.28, 0.56)), darker(pale, 0.25))
    f.add(polygon((-0.9, 0.6), (-1.08, 1.0), (-0.86, 1.0), (-0.62, 0.62)), colour)
    f.add(
        blob((-1.04, 0.58), (-0.7, 0.66), (0.1, 0.72), (0.78, 0.7), (1.1, 0.54), (0.86, 0.38),
        (0.1, 0.34), (-0.62, 0.42)), colour,
    )  # fmt: skip
    f.add(
        blob((-0.62, 0.42), (0.1, 0.34), (0.86, 0.38), (0.98, 0.44), (0.1, 0.44)), lighter(colour,
        0.65), relief=0.4,
    )  # fmt: skip
    f.add(
        polygon((0.76, 0.66), (0.96, 0.63), (0.9, 0.54), (0.76, 0.56)), GLASS, relief=0.4, glow=LIT,
    )  # fmt: skip
    for k in range(7):
        f.add(ellipse(-0.5 + 0.17 * k, 0.58, 0.042, 0.05, count=10), GLASS, relief=0.3, glow=LIT)
    f.add(polygon((-0.1, 0.46), (-0.6, 0.02), (-0.38, 0.0), (0.3, 0.44)), pale)
    f.add(ellipse(-0.12, 0.22, 0.15, 0.065, count=16), STEEL)
    f.add(polygon((-0.9, 0.6), (-1.14, 0.48), (-1.0, 0.46), (-0.68, 0.56)), pale)
    return f


def bench(rng: Random, colour: Colour, pose: str) -> Figure:
    f = Figure()
    iron: Colour = (70, 72, 80)
    dark = darker(colour, 0.25)
    for x in (-0.78, 0.78):
        f.add(limb([(x * 0.96, 0.4), (x * 0.93, 0.05)], [0.06, 0.06]), darker(iron, 0.3))
    for y in (0.62, 0.76, 0.9):
        f.add(rectangle(-0.95, y, 0.95, y + 0.11, 0.03), colour, relief=0.45)
    for x in (-0.8, 0.8):
        f.add(limb([(x, 0.96), (x * 1.02, 0.5), (x * 1.06, 0.03)], [0.07, 0.07, 0.08]), iron)
    for k, y in enumerate((0.5, 0.42, 0.34)):
        reach = 0.96 + 0.03 * k
        f.add(rectangle(-reach, y, reach, y + 0.085, 0.03), colour if k < 2 else dark, relief=0.45)
    for x in (-0.86, 0.86):
        f.add(limb([(x * 0.98, 0.36), (x * 1.04, 0.02)], [0.075, 0.085]), iron)
        f.add(limb([(x * 0.98, 0.68), (x * 1.06, 0.66), (x * 1.06, 0.4)], [0.06, 0.06, 0.05]), iron)
    return f


def ball(rng: Random, colour: Colour, pose: str) -> Figure:
    f = Figure()
    round_ = ellipse(0, 0.5, 0.5, 0.5, count=32)
    f.add(round_, colour)
    pale: Colour = (250, 246, 238) if min(colour) < 200 else (216, 84, 76)
    turn = rng.uniform(0, 3.1)
    cos, sin = float(np.cos(turn)), float(np.sin(turn))
    if rng.random() < 0.5:
        for side in (-0.42, 0.42):
            ends = [
                (0.6 * cos - side * sin, 0.5 + 0.6 * sin + side * cos),
                (-side * sin * 0.4, 0.5 + side * cos * 0.4),
                (-0.6 * cos - side * sin, 0.5 - 0.6 * sin + side * cos),
            ]  # fmt: skip
            f.add(limb(ends, [0.09, 0.09, 0.09]), pale, clip=round_)
    else:
        for k in range(5):
            angle = turn + k * 2 * np.pi / 5
            x, y = 0.4 * float(np.cos(angle)), 0.5 + 0.4 * float(np.sin(angle))
            f.add(ellipse(x, y, 0.12, 0.12, count=5), pale, clip=round_)
        f.add(ellipse(0, 0.5, 0.12, 0.12, count=5), pale, clip=round_)
    f.add(ellipse(-0.16, 0.7, 0.1, 0.07, 0.6, count=12), lighter(colour, 0.7), relief=0)
    return f


def kite(rng: Random, colour: Colour, pose: str) -> Figure:
    f = Figure()
    pale = lighter(colour, 0.45)
    sway = rng.uniform(-0.15, 0.15)
    tail = curve(
        (0.0, 0.3), (0.1 + sway, 0.16), (-0.06 + sway, 0.02), (0.08 + sway * 2, -0.14),
        (-0.04 + sway * 2, -0.3),
    )  # fmt: skip
    f.add(
        limb([(float(x), float(y)) for x, y in tail[::4]], [0.024] * len(tail[::4])),
        darker(colour, 0.4), relief=0,
    )  # fmt: skip
    for k in (0.3, 0.6, 0.9):
        x, y = tail[int(k * (len(tail) - 1))]
        for side in (-1, 1):
            f.add(
                polygon((x, y), (x + side * 0.12, y + 0.06), (x + side * 0.12, y - 0.06)), colour,
                relief=0.4,
            )  # fmt: skip
    top, left, right, low = (0.0, 1.0), (-0.36, 0.68), (0.36, 0.68), (0.0, 0.28)
    f.add(polygon(top, right, low, left), colour, relief=0.7)
    f.add(polygon(top, left, (0, 0.68)), pale, relief=0.5)
    f.add(polygon(low, right, (0, 0.68)), pale, relief=0.5)
    f.add(limb([top, low], [0.022, 0.022]), darker(colour, 0.45), relief=0)
    f.add(limb([left, right], [0.022, 0.022]), darker(colour, 0.45), relief=0)
    f.anchors["string"] = (0.0, 0.3)
    return f


def umbrella(rng: Random, colour: Colour, pose: str) -> Figure:
    """Open, upright; `held` ends in a handle at (0, 0), otherwise the pole stands in the ground."""
    f = Figure()
    tip = 1.0
    f.add(limb([(0, 0.0), (0, tip)], [0.035, 0.03]), WOOD if pose != "held" else (90, 70, 60))
    if pose == "held":
        f.add(limb([(0, 0.02), (0.03, -0.04), (0.09, -0.03)], [0.045, 0.045, 0.04]), (120, 76, 48))
    reach, low = 0.62, 0.56
    edge = [(-reach + reach * 0.5 * k, low) for k in range(5)]
    arc = curve((-reach, low), (-0.47, 0.8), (0.0, 0.95), (0.47, 0.8), (reach, low))
    dips = []
    for k in range(4, 0, -1):
        (x1, _), (x0, _) = edge[k], edge[k - 1]
        dips.append(curve((x1, low), ((x0 + x1) / 2, low + 0.055), (x0, low), detail=4)[:-1])
    canopy = np.concatenate([arc[:-1], *dips])
    f.add(canopy, colour)
    pale = lighter(colour, 0.5) if rng.random() < 0.5 else darker(colour, 0.1)
    for k in (1, 3):
        inner = [
            (edge[k - 1][0] * 0.995, low), (edge[k - 1][0] * 0.6, 0.8), (0.0, 0.95),
            (edge[k][0] * 0.6, 0.83), (edge[k][0], low),
        ]  # fmt: skip
        f.add(
            np.concatenate([curve(*inner), polygon(((edge[k - 1][0] + edge[k][0]) / 2,
            low + 0.05))]), pale, clip=canopy,
        )  # fmt: skip
    f.add(limb([(0, 0.93), (0, tip + 0.02)], [0.03, 0.02]), darker(colour, 0.3))
    f.anchors["grip"] = (0.0, 0.06)
    return f
