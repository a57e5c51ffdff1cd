"""The animals of the park world, each a function (random source, colour, pose) -> Figure.

All look to the right, feet at y = 0, and are about one unit tall; the world knows their size.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from preprocess.park_colours import Colour, darker, lighter, mix
from preprocess.park_curves import Outline, blob, ellipse, limb, move, polygon, rotate
from preprocess.park_pen import Figure

INK: Colour = (38, 32, 44)
SNOUT: Colour = (226, 170, 160)
IVORY: Colour = (248, 240, 220)


def draw_eye(figure: Figure, x: float, y: float, r: float) -> None:
    figure.add(ellipse(x, y, r * 1.25, r * 1.35, count=12), (252, 250, 246), relief=0)
    figure.add(ellipse(x + r * 0.25, y, r * 0.85, r, count=10), INK, relief=0)
    spark = ellipse(x + r * 0.45, y + r * 0.4, r * 0.32, r * 0.32, count=6)
    figure.add(spark, (255, 255, 255), relief=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Legs:
    """The four legs of an animal that is seen from the side."""

    back: tuple[float, float]  # the hip of the back legs
    front: tuple[float, float]
    width: float
    colour: Colour
    foot: Colour  # of hoof or paw
    stride: float  # how far a step moves the feet apart, 0 = standing
    taper: float = 0.7  # width at the ankle, as a share
    foot_height: float = 0.07


def draw_legs(figure: Figure, legs: Legs, *, near: bool) -> list[Outline]:
    """The back and the front leg of the near or of the far side; returns their outlines."""
    width, sign = legs.width, 1 if near else -1
    colour = legs.colour if near else darker(legs.colour, 0.22)
    foot = legs.foot if near else darker(legs.foot, 0.2)
    outlines = []
    for (x, y), way in ((legs.back, -sign), (legs.front, sign)):
        swing = legs.stride * way
        lift = 0.03 if swing > 0 else 0.0
        x += width * 0.55 if near else 0.0
        ankle = (x + swing, lift + legs.foot_height * 0.7)
        knee = (x + swing * 0.35 + width * 0.12, y * 0.5 + lift * 0.5)
        leg = limb([(x, y), knee, ankle], [width * 1.25, width, width * legs.taper])
        figure.add(leg, colour)
        half = width * (0.46 if foot != colour else 0.52)
        left, right = ankle[0] - half * 0.9, ankle[0] + half * 1.25
        top = lift + legs.foot_height
        figure.add(blob((left, lift), (right, lift), (right * 0.97, top * 0.8), (left, top)), foot)
        outlines.append(leg)
    return outlines


def stride_of(rng: Random, pose: str, reach: float) -> float:
    if pose == "running":
        return reach * 1.7
    return reach * rng.choice((-1, 1)) * rng.uniform(0.75, 1.1) if pose == "walking" else 0.0


def elephant(rng: Random, colour: Colour, pose: str) -> Figure:
    f = Figure()
    stride = stride_of(rng, pose, 0.1)
    nail = lighter(colour, 0.55)
    f.add(limb([(-0.56, 0.66), (-0.66, 0.5), (-0.65, 0.34)], [0.05, 0.035, 0.02]), darker(colour))
    f.add(ellipse(-0.65, 0.32, 0.03, 0.05, count=10), INK)
    legs = Legs(
        back=(-0.38, 0.42),
        front=(0.16, 0.42),
        width=0.19,
        colour=colour,
        foot=colour,
        stride=stride,
        taper=0.95,
    )
    draw_legs(f, legs, near=False)
    f.add(
        blob(
            (-0.6, 0.6), (-0.5, 0.84), (-0.15, 0.94), (0.2, 0.9), (0.4, 0.75), (0.35, 0.42),
            (0.1, 0.33), (-0.2, 0.3), (-0.5, 0.36),
        ),
        colour,
    )  # fmt: skip
    draw_legs(f, legs, near=True)
    for x, sign in ((-0.38, -1), (0.16, 1)):
        for k in (-1, 0, 1):
            toe = ellipse(x + stride * sign + 0.02 + k * 0.055, 0.022, 0.026, 0.024, count=8)
            f.add(toe, nail, relief=0.3)
    raised = rng.random() < 0.35
    trunk = (
        [(0.62, 0.72), (0.78, 0.58), (0.92, 0.62), (0.95, 0.82), (0.9, 0.94)]
        if raised
        else [
            (0.62, 0.7),
            (0.76, 0.5),
            (0.76, 0.3),
            (0.8, 0.14),
            (0.9, 0.12 + rng.uniform(0, 0.08)),
        ]
    )
    f.add(limb(trunk, [0.2, 0.15, 0.11, 0.085, 0.07]), colour)
    f.add(
        blob((0.24, 0.74), (0.36, 0.98), (0.56, 1.0), (0.72, 0.82), (0.66, 0.6), (0.4, 0.54)),
        colour,
    )  # fmt: skip
    f.add(limb([(0.6, 0.6), (0.72, 0.52), (0.84, 0.54)], [0.055, 0.05, 0.015]), IVORY)
    ear = blob(
        (0.42, 0.92), (0.2, 1.02), (0.0, 0.9), (0.0, 0.66), (0.14, 0.48), (0.32, 0.54), (0.42, 0.7)
    )
    f.add(ear, darker(colour, 0.06))
    inner = (ear - (0.22, 0.74)) * 0.68 + (0.22, 0.74)
    f.add(inner, mix(colour, SNOUT, 0.45), relief=0.5)
    draw_eye(f, 0.56, 0.8, 0.034)
    return f


def giraffe(rng: Random, colour: Colour, pose: str) -> Figure:
    f = Figure()
    stride = stride_of(rng, pose, 0.08)
    patch = darker(colour, 0.32)
    hoof = darker(colour, 0.55)
    legs = Legs(
        back=(-0.2, 0.42),
        front=(0.1, 0.42),
        width=0.075,
        colour=colour,
        foot=hoof,
        stride=stride,
        foot_height=0.05,
    )
    f.add(limb([(-0.27, 0.46), (-0.33, 0.36), (-0.32, 0.25)], [0.03, 0.02, 0.02]), patch)
    f.add(ellipse(-0.32, 0.23, 0.022, 0.04, count=10), INK)
    draw_legs(f, legs, near=False)
    lean = rng.uniform(-0.03, 0.06)
    neck = limb([(0.06, 0.46), (0.19, 0.68), (0.27 + lean, 0.9)], [0.24, 0.13, 0.095])
    body = blob(
        (-0.29, 0.44), (-0.2, 0.54), (0.02, 0.6), (0.16, 0.54), (0.16, 0.4), (0.0, 0.34),
        (-0.22, 0.34),
    )  # fmt: skip
    draw_legs(f, legs, near=True)
    mane = limb([(-0.02, 0.6), (0.11, 0.72), (0.2 + lean, 0.94)], [0.05, 0.05, 0.04])
    f.add(mane, hoof)
    f.add(neck, colour)
    f.add(body, colour)
    for x, y, r in (
        (-0.2, 0.46, 0.05), (-0.09, 0.52, 0.045), (-0.11, 0.41, 0.045), (0.01, 0.46, 0.05),
        (0.1, 0.52, 0.045), (0.08, 0.4, 0.04), (-0.23, 0.38, 0.035), (-0.01, 0.37, 0.03),
    ):  # fmt: skip
        spot = ellipse(
            x + rng.uniform(-0.012, 0.012), y, r, r * 0.8, rng.uniform(-0.5, 0.5), count=7,
        )  # fmt: skip
        f.add(spot, patch, clip=body)
    for k in range(5):
        x, y = 0.13 + k * 0.034 + lean * k / 5, 0.6 + k * 0.07
        f.add(ellipse(x + 0.02 * (-1) ** k, y, 0.036, 0.028, 0.6, count=7), patch, clip=neck)
    hx, hy = 0.3 + lean, 0.92
    for dx in (-0.035, 0.02):
        f.add(
            limb([(hx + dx, hy + 0.03), (hx + dx - 0.01, hy + 0.11)], [0.022, 0.022]),
            darker(colour, 0.15),
        )  # fmt: skip
        f.add(ellipse(hx + dx - 0.01, hy + 0.115, 0.02, 0.02, count=10), hoof)
    f.add(
        blob((hx - 0.06, hy + 0.05), (hx - 0.17, hy + 0.07), (hx - 0.07, hy - 0.0)), darker(colour,
        0.12),
    )  # fmt: skip
    f.add(
        blob((hx - 0.08, hy), (hx - 0.04, hy + 0.065), (hx + 0.05, hy + 0.05),
        (hx + 0.17, hy - 0.02), (hx + 0.16, hy - 0.07), (hx + 0.04, hy - 0.07)), colour,
    )  # fmt: skip
    f.add(ellipse(hx + 0.15, hy - 0.045, 0.045, 0.038, count=14), lighter(colour, 0.45))
    f.add(ellipse(hx + 0.165, hy - 0.03, 0.008, 0.008, count=6), INK, relief=0)
    draw_eye(f, hx + 0.02, hy + 0.02, 0.022)
    return f


@dataclass(frozen=True, slots=True)
class _Hide:
    """How one hoofed animal differs from another."""

    colour: Colour
    mane: Colour
    hoof: Colour
    muzzle: Colour
    bushy_tail: bool = False
    crest: bool = True  # a mane along the neck


def _hoofed(rng: Random, hide: _Hide, pose: str) -> tuple[Figure, dict[str, Outline]]:
    """A horse or a zebra, and the outlines a pattern may be laid over."""
    f = Figure()
    colour = hide.colour
    stride = stride_of(rng, pose, 0.14)
    legs = Legs(
        back=(-0.38, 0.5),
        front=(0.2, 0.48),
        width=0.115,
        colour=colour,
        foot=hide.hoof,
        stride=stride,
        taper=0.62,
    )
    tail = [(-0.5, 0.68), (-0.62, 0.58), (-0.62 - abs(stride) * 0.5, 0.3)]
    f.add(limb(tail, [0.08, 0.12, 0.04] if hide.bushy_tail else [0.035, 0.03, 0.06]), hide.mane)
    outlines = dict(zip(("far0", "far1"), draw_legs(f, legs, near=False), strict=True))
    if pose == "grazing":
        path, head, turn = [(0.16, 0.62), (0.4, 0.5), (0.5, 0.28)], (0.52, 0.22), -1.25
    else:
        path, head, turn = [(0.12, 0.6), (0.34, 0.78), (0.42, 0.93)], (0.45, 0.93), rng.uniform(
            -0.75, -0.55,
        )  # fmt: skip
    if hide.crest:
        f.add(limb([(a - 0.07, b + 0.06) for a, b in path], [0.16, 0.13, 0.12]), hide.mane)
    outlines["neck"] = limb(path, [0.36, 0.2, 0.15])
    outlines["body"] = blob(
        (-0.53, 0.6), (-0.46, 0.72), (-0.25, 0.72), (0.0, 0.69), (0.2, 0.73), (0.34, 0.64),
        (0.32, 0.46), (0.1, 0.38), (-0.2, 0.39), (-0.45, 0.42),
    )  # fmt: skip
    outlines |= zip(("near0", "near1"), draw_legs(f, legs, near=True), strict=True)
    f.add(outlines["neck"], colour)
    f.add(outlines["body"], colour)

    def turned(points: Outline) -> Outline:
        return rotate(points, turn) + head

    ear = blob((-0.02, 0.06), (-0.02, 0.17), (0.05, 0.07), detail=3)
    outlines["head"] = turned(
        blob(
            (-0.1, 0.0), (-0.05, 0.08), (0.06, 0.08), (0.26, 0.055), (0.3, -0.02), (0.24, -0.07),
            (0.06, -0.1), (-0.07, -0.09),
        )
    )  # fmt: skip
    f.add(move(turned(ear), -0.05, 0.0), darker(colour, 0.2))
    f.add(outlines["head"], colour)
    f.add(turned(ellipse(0.255, -0.008, 0.062, 0.07, count=16)), hide.muzzle)
    f.add(turned(ellipse(0.28, 0.01, 0.012, 0.012, count=6)), INK, relief=0)
    f.add(turned(ear), colour)
    forelock = blob((-0.08, 0.03), (-0.02, 0.15), (0.09, 0.06), (0.0, 0.05), detail=4)
    f.add(turned(forelock), hide.mane)
    eye = turned(polygon((0.05, 0.03)))[0]
    draw_eye(f, float(eye[0]), float(eye[1]), 0.026)
    return f, outlines


def horse(rng: Random, colour: Colour, pose: str) -> Figure:
    mane = darker(colour, 0.5) if rng.random() < 0.6 else lighter(colour, 0.65)
    hide = _Hide(colour, mane, darker(colour, 0.6), lighter(colour, 0.3), bushy_tail=True)
    return _hoofed(rng, hide, pose)[0]


def zebra(rng: Random, colour: Colour, pose: str) -> Figure:
    del colour  # a zebra is black and white
    white: Colour = (246, 243, 238)
    f, outlines = _hoofed(rng, _Hide(white, INK, INK, (70, 62, 70)), pose)
    for k in range(8):
        x, bend = -0.5 + k * 0.105, -0.05 if k < 4 else 0.04
        stripe = limb([(x, 0.76), (x + bend, 0.58), (x + bend * 0.3, 0.36)], [0.05, 0.042, 0.012])
        f.add(stripe, INK, clip=outlines["body"])
    grazing = pose == "grazing"
    path = [(0.24, 0.6), (0.34, 0.53), (0.42, 0.44), (0.48, 0.34)]
    if not grazing:
        path = [(0.18, 0.7), (0.26, 0.76), (0.33, 0.82), (0.39, 0.89)]
    dx, dy = (0.07, 0.1) if grazing else (0.13, -0.09)
    for x, y in path:
        stripe = limb([(x - dx, y - dy), (x + dx, y + dy)], [0.036, 0.036])
        f.add(stripe, INK, clip=outlines["neck"])
    x, y = outlines["head"].mean(0).tolist()
    for shift in (-1.1, 0.0, 1.0):
        sx, sy = x + 0.06 * shift, y - 0.05 * shift
        if grazing:
            sx, sy = x + 0.02 * shift, y - 0.07 * shift
        across = (0.09, 0.02) if grazing else (0.05, 0.08)
        ends = [(sx - across[0], sy - across[1]), (sx + across[0], sy + across[1])]
        f.add(limb(ends, [0.024, 0.018]), INK, clip=outlines["head"])
    for name in ("near0", "near1"):
        leg = outlines[name]
        x0, x1 = leg[:, 0].min() - 0.02, leg[:, 0].max() + 0.02
        for y in (0.12, 0.2, 0.28, 0.36):
            f.add(polygon((x0, y), (x1, y + 0.02), (x1, y + 0.05), (x0, y + 0.03)), INK, clip=leg)
    return f


def cow(rng: Random, colour: Colour, pose: str) -> Figure:
    f = Figure()
    stride = stride_of(rng, pose, 0.1)
    hoof = darker(colour, 0.65)
    legs = Legs(
        back=(-0.4, 0.42),
        front=(0.26, 0.42),
        width=0.13,
        colour=colour,
        foot=hoof,
        stride=stride,
        taper=0.75,
        foot_height=0.08,
    )
    f.add(
        limb([(-0.54, 0.74), (-0.62, 0.6), (-0.6, 0.36)], [0.05, 0.035, 0.03]), darker(colour, 0.1),
    )  # fmt: skip
    f.add(ellipse(-0.6, 0.33, 0.035, 0.06, count=12), hoof)
    draw_legs(f, legs, near=False)
    f.add(ellipse(-0.2, 0.33, 0.1, 0.075), SNOUT)
    body = blob(
        (-0.56, 0.62), (-0.52, 0.78), (-0.3, 0.82), (0.05, 0.8), (0.32, 0.82), (0.46, 0.66),
        (0.4, 0.42), (0.1, 0.34), (-0.25, 0.33), (-0.5, 0.42),
    )  # fmt: skip
    draw_legs(f, legs, near=True)
    f.add(body, colour)
    patch = darker(colour, 0.75) if min(colour) > 190 else lighter(colour, 0.75)
    for _ in range(rng.randint(3, 5)):
        x, y, r = rng.uniform(-0.5, 0.35), rng.uniform(0.45, 0.8), rng.uniform(0.07, 0.12)
        ring = [
            (x + r * a * rng.uniform(0.9, 1.5), y + r * b)
            for a, b in ((1, 0), (0.3, 1), (-1, 0.4), (-0.4, -1))
        ]
        f.add(blob(*ring), patch, clip=body)
    x, y = (0.56, 0.36) if pose == "grazing" else (0.56, 0.8)
    f.add(limb([(0.3, 0.66), (x - 0.04, y)], [0.34, 0.22]), colour)
    for side in (-1, 1):
        f.add(
            limb([(x + side * 0.09, y + 0.14), (x + side * 0.15, y + 0.2),
            (x + side * 0.13, y + 0.27)], [0.05, 0.04, 0.015]), IVORY,
        )  # fmt: skip
        f.add(
            blob((x + side * 0.1, y + 0.1), (x + side * 0.24, y + 0.12),
            (x + side * 0.22, y + 0.04), (x + side * 0.12, y + 0.03)), darker(colour, 0.15),
        )  # fmt: skip
    f.add(
        blob((x - 0.14, y + 0.12), (x, y + 0.18), (x + 0.14, y + 0.12), (x + 0.13, y - 0.08),
        (x, y - 0.14), (x - 0.13, y - 0.08)), colour,
    )  # fmt: skip
    f.add(ellipse(x + 0.01, y - 0.11, 0.135, 0.095), SNOUT)
    for side in (-1, 1):
        f.add(
            ellipse(x + 0.01 + side * 0.05, y - 0.1, 0.02, 0.025, count=8), darker(SNOUT, 0.5),
            relief=0,
        )  # fmt: skip
        draw_eye(f, x + side * 0.07, y + 0.05, 0.027)
    return f
