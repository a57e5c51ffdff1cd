"""The people of the park world: clothed, posed, made of LIP parts, with a face of 68 landmarks.

A person is one unit tall, feet at y = 0, and always drawn unmirrored, so that left and right of
the parts and of the landmarks stay the person's own. Facing the viewer, the person's left is on
the right of the picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

import numpy as np

from preprocess.park_colours import Colour, darker, lighter
from preprocess.park_curves import Outline, blob, ellipse, limb
from preprocess.park_faces import face_points, paint_face
from preprocess.park_pen import Figure

HAT, HAIR, GLOVE, UPPER, DRESS, COAT = 1, 2, 3, 5, 6, 7
PANTS, SCARF, SKIRT, FACE = 9, 11, 12, 13
LEFT_ARM, RIGHT_ARM, LEFT_LEG, RIGHT_LEG, LEFT_SHOE, RIGHT_SHOE = range(14, 20)

SKINS: tuple[Colour, ...] = (
    (250, 212, 182), (242, 192, 154), (226, 170, 126), (194, 136, 94), (150, 100, 68),
    (112, 72, 50),
)  # fmt: skip
HAIRS: tuple[Colour, ...] = (
    (46, 36, 36), (84, 54, 36), (128, 84, 48), (196, 134, 62), (232, 196, 112), (170, 74, 40),
    (176, 174, 176),
)  # fmt: skip
SHOES: tuple[Colour, ...] = (
    (60, 46, 44), (112, 70, 46), (196, 70, 60), (70, 84, 120), (236, 232, 226),
)  # fmt: skip
DENIM: tuple[Colour, ...] = (
    (62, 84, 132), (92, 80, 72), (58, 58, 70), (132, 112, 84), (84, 104, 84),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outfit:
    """What a person wears; colours are paint, names live with the truth."""

    kind: str  # man, woman, boy, girl
    top: str  # shirt, coat, dress
    top_colour: Colour
    bottom: str  # pants, shorts, skirt; a dress has none
    bottom_colour: Colour
    hat: str  # cap, sun hat, woolly hat, or ""
    hat_colour: Colour
    scarf: bool
    gloves: bool


@dataclass(frozen=True, slots=True)
class _Body:
    """Measures in units of the person's height."""

    head: float  # half height of the head
    neck: float  # y of the chin's base
    shoulder: float  # half width at the shoulders
    hip: float
    crotch: float  # y
    limb: float  # width of an arm


_BODIES: Mapping[str, _Body] = {
    "man": _Body(head=0.122, neck=0.755, shoulder=0.122, hip=0.088, crotch=0.43, limb=0.062),
    "woman": _Body(head=0.124, neck=0.75, shoulder=0.104, hip=0.094, crotch=0.43, limb=0.054),
    "boy": _Body(head=0.15, neck=0.7, shoulder=0.118, hip=0.098, crotch=0.37, limb=0.068),
    "girl": _Body(head=0.152, neck=0.695, shoulder=0.112, hip=0.1, crotch=0.37, limb=0.064),
}

# Arms as (elbow, hand) offsets from the shoulder, x outward, in units of the arm's length.
_ARMS: Mapping[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "down": ((0.16, -0.46), (0.2, -0.95)),
    "out": ((0.42, -0.3), (0.86, -0.42)),
    "hip": ((0.42, -0.4), (0.02, -0.62)),
    "up": ((0.4, 0.24), (0.5, 0.72)),
    "fore": ((0.2, -0.44), (0.34, -0.04)),
    "swing": ((0.06, -0.5), (0.3, -0.88)),
    "back": ((0.3, -0.44), (0.5, -0.82)),
}


@dataclass(frozen=True, slots=True)
class _Look:
    """What is drawn by chance and shared by head and limbs."""

    skin: Colour
    hair: Colour
    style: str  # of the hair
    turn: float  # of the head, -1..1


def _dome(x: float, y: float, rx: float, h: float, low: float) -> Outline:
    """Hair around the head, down to `low` head heights from its middle."""
    reach = rx * (1.1 if low > -0.3 else 1.16)
    return blob(
        (x - rx * 1.1, y + h * 0.3), (x - rx * 0.75, y + h * 0.98), (x, y + h * 1.18),
        (x + rx * 0.75, y + h * 0.98), (x + rx * 1.1, y + h * 0.3), (x + reach, y + h * low),
        (x, y + h * low), (x - reach, y + h * low),
    )  # fmt: skip


def _back_hair(f: Figure, body: _Body, look: _Look) -> None:
    """Hair that hangs or stands behind head and shoulders."""
    h, x, y = body.head, look.turn * 0.01, body.neck + body.head * 0.93
    rx = h * 0.84
    if look.style == "long":
        f.add(_dome(x, y, rx, h, -1.5), look.hair, part=HAIR)
    elif look.style == "bob":
        f.add(_dome(x, y, rx, h, -0.85), look.hair, part=HAIR)
    elif look.style == "tails":
        for side in (-1, 1):
            tail = [
                (x + side * rx, y + h * 0.35), (x + side * rx * 1.6, y + h * 0.1),
                (x + side * rx * 1.55, y - h * 0.75),
            ]  # fmt: skip
            f.add(limb(tail, [h * 0.35, h * 0.52, h * 0.18]), look.hair, part=HAIR)
    elif look.style == "bun":
        f.add(ellipse(x, y + h * 1.22, h * 0.42, h * 0.36), look.hair, part=HAIR)
    elif look.style == "curly":
        for k in range(9):
            angle = -0.4 + k * 0.49
            cx, cy = x + rx * float(np.cos(angle)), y + h * (0.14 + 0.92 * float(np.sin(angle)))
            f.add(ellipse(cx, cy, h * 0.36, h * 0.34, count=14), look.hair, part=HAIR, relief=0.6)
    if look.style != "curly":
        f.add(_dome(x, y, rx, h, 0.0), look.hair, part=HAIR)


def _head(f: Figure, body: _Body, outfit: Outfit, look: _Look, rng: Random, *, back: bool) -> None:
    """Head in front of the shoulders: face, fringe and hat; from behind hair alone."""
    h, x, y = body.head, look.turn * 0.01, body.neck + body.head * 0.93
    rx = h * 0.84
    if back:
        f.add(ellipse(x, y + h * 0.05, rx * 1.12, h * 1.08), look.hair, part=HAIR)
        if look.style in ("long", "tails"):
            f.add(_dome(x, y, rx, h, -1.3), look.hair, part=HAIR)
    else:
        for side in (-1, 1):
            ear = ellipse(
                x + side * rx * 0.98 - look.turn * rx * 0.12, y - h * 0.02, h * 0.17, h * 0.21,
                count=12,
            )  # fmt: skip
            f.add(ear, look.skin, part=FACE, relief=0.6)
        f.add(
            blob((x - rx, y + h * 0.2), (x - rx * 0.62, y + h * 0.84), (x, y + h),
            (x + rx * 0.62, y + h * 0.84), (x + rx, y + h * 0.2), (x + rx * 0.86, y - h * 0.5),
            (x + rx * 0.34, y - h * 0.95), (x - rx * 0.34, y - h * 0.95),
            (x - rx * 0.86, y - h * 0.5)), look.skin, part=FACE, relief=0.5,
        )  # fmt: skip
        wide = rng.choice((0.0, 0.0, 0.06, 0.14))
        points = face_points(look.turn, rng.uniform(0.06, 0.16), wide) * (rx, h) + (x, y)
        paint_face(f, points, look.skin, look.hair, rng, part=FACE)
        f.landmarks = points
        part = rng.uniform(-0.4, 0.4) * rx
        fringe = blob(
            (x - rx * 1.06, y + h * 0.16), (x - rx * 0.98, y + h * 0.72),
            (x - rx * 0.5, y + h * 1.08), (x + rx * 0.5, y + h * 1.08),
            (x + rx * 0.98, y + h * 0.72), (x + rx * 1.06, y + h * 0.16),
            (x + rx * 0.84, y + h * 0.6), (x + part + rx * 0.12, y + h * 0.7),
            (x + part, y + h * 0.78), (x - rx * 0.84, y + h * 0.6), detail=4,
        )  # fmt: skip
        f.add(fringe, look.hair, part=HAIR, relief=0.6)
    if outfit.hat:
        _hat(f, outfit, x, y, rx, h, look.turn, back=back)


def _hat(
    f: Figure, outfit: Outfit, x: float, y: float, rx: float, h: float, turn: float, *, back: bool
) -> None:
    colour, style = outfit.hat_colour, outfit.hat
    low = y + h * 0.58
    if style == "sun hat":
        f.add(
            blob((x - rx * 0.95, low), (x - rx * 0.72, y + h * 1.25), (x, y + h * 1.42),
            (x + rx * 0.72, y + h * 1.25), (x + rx * 0.95, low), detail=4), colour, part=HAT,
        )  # fmt: skip
        f.add(
            limb([(x - rx * 0.95, low + h * 0.14), (x, low + h * 0.08),
            (x + rx * 0.95, low + h * 0.14)], [h * 0.2] * 3), darker(colour, 0.35), part=HAT,
            relief=0.3,
        )  # fmt: skip
        f.add(ellipse(x, low + h * 0.03, rx * 1.85, h * 0.17), colour, part=HAT)
    elif style == "woolly hat":
        f.add(ellipse(x, y + h * 1.5, h * 0.24, h * 0.24, count=14), lighter(colour, 0.5), part=HAT)
        f.add(
            blob((x - rx * 1.1, low), (x - rx * 0.92, y + h * 1.1), (x, y + h * 1.42),
            (x + rx * 0.92, y + h * 1.1), (x + rx * 1.1, low), detail=4), colour, part=HAT,
        )  # fmt: skip
        f.add(
            limb([(x - rx * 1.02, low + h * 0.06), (x, low + h * 0.12),
            (x + rx * 1.02, low + h * 0.06)], [h * 0.3] * 3), lighter(colour, 0.35), part=HAT,
            relief=0.7,
        )  # fmt: skip
    else:
        f.add(
            blob((x - rx * 1.1, low), (x - rx * 0.9, y + h * 1.1), (x, y + h * 1.32),
            (x + rx * 0.9, y + h * 1.1), (x + rx * 1.1, low), detail=4), colour, part=HAT,
        )  # fmt: skip
        if not back:
            way = 1 if turn >= 0 else -1
            f.add(
                limb([(x - way * rx * 0.35, low + h * 0.06), (x + way * rx * 0.6, low + h * 0.05),
                (x + way * rx * 1.6, low + h * 0.0)], [h * 0.12, h * 0.2, h * 0.1]), darker(colour,
                0.25), part=HAT,
            )  # fmt: skip


def _leg(
    f: Figure,
    body: _Body,
    outfit: Outfit,
    skin: Colour,
    shoe: Colour,
    side: int,
    foot: tuple[float, float],
    *,
    left: bool,
) -> None:
    """One leg, its trouser leg and its shoe; `foot` is where the ankle ends."""
    part, shoe_part = (LEFT_LEG, LEFT_SHOE) if left else (RIGHT_LEG, RIGHT_SHOE)
    hip = (side * body.hip * 0.52, body.crotch + 0.03)
    knee = ((hip[0] + foot[0]) / 2 + side * 0.006, (hip[1] + foot[1]) / 2 + 0.01)
    w = body.limb * 1.28
    f.add(limb([hip, knee, foot], [w * 1.15, w * 0.9, w * 0.68]), skin, part=part)
    x, y = foot
    out = side * 0.018
    f.add(
        blob((x - w * 0.5, y - 0.045), (x + out + side * w * 0.42 - side * 0.0, y - 0.045),
        (x + w * 0.5 + out * 0.4, y - 0.01), (x, y + 0.028), (x - w * 0.5 + out * 0.4, y - 0.01)),
        shoe, part=shoe_part,
    )  # fmt: skip
    if outfit.bottom == "pants" or outfit.top == "coat":
        low = (x, y + 0.02)
        f.add(
            limb([hip, knee, low], [w * 1.45, w * 1.22, w * 1.12]), outfit.bottom_colour,
            part=PANTS,
        )  # fmt: skip
    elif outfit.bottom == "shorts":
        f.add(
            limb([hip, (knee[0], knee[1] + 0.015)], [w * 1.5, w * 1.4]), outfit.bottom_colour,
            part=PANTS,
        )  # fmt: skip


def _arm(
    f: Figure,
    body: _Body,
    outfit: Outfit,
    skin: Colour,
    side: int,
    pose: str,
    *,
    left: bool,
    bent: float,
) -> tuple[float, float]:
    """One arm with sleeve and hand; returns where the hand is."""
    part = LEFT_ARM if left else RIGHT_ARM
    length = 0.36 if body.head < 0.13 else 0.31
    x, y = side * body.shoulder * 0.86, body.neck - 0.055
    (ex, ey), (hx, hy) = _ARMS[pose]
    elbow = (x + side * ex * length * bent, y + ey * length)
    hand = (x + side * hx * length * bent, y + hy * length)
    w = body.limb
    f.add(limb([(x, y), elbow, hand], [w, w * 0.85, w * 0.72]), skin, part=part)
    cloth = {"shirt": UPPER, "coat": COAT, "dress": DRESS}[outfit.top]
    if outfit.top == "coat":
        wrist = (elbow[0] + (hand[0] - elbow[0]) * 0.85, elbow[1] + (hand[1] - elbow[1]) * 0.85)
        f.add(
            limb([(x, y), elbow, wrist], [w * 1.45, w * 1.3, w * 1.2]), outfit.top_colour,
            part=cloth,
        )  # fmt: skip
    else:
        mid = (x + (elbow[0] - x) * 0.72, y + (elbow[1] - y) * 0.72)
        f.add(limb([(x, y), mid], [w * 1.42, w * 1.4]), outfit.top_colour, part=cloth)
    mitten = outfit.gloves
    f.add(
        ellipse(*hand, w * 0.56, w * 0.56, count=14), (196, 70, 76) if mitten else skin,
        part=GLOVE if mitten else part,
    )  # fmt: skip
    return hand


def _torso(f: Figure, body: _Body, outfit: Outfit) -> None:
    s, top, crotch, hip = body.shoulder, body.neck - 0.01, body.crotch, body.hip
    colour = outfit.top_colour
    waist = crotch + (top - crotch) * 0.3
    woman = outfit.kind == "woman"
    w = hip * (0.82 if woman else 0.98)
    if outfit.bottom == "skirt" and outfit.top == "shirt":
        flare, low = hip * 1.7, crotch - 0.15
        f.add(
            blob((-w, waist + 0.04), (w, waist + 0.04), (hip * 1.2, crotch), (flare, low),
            (0, low - 0.02), (-flare, low), (-hip * 1.2, crotch), detail=4), outfit.bottom_colour,
            part=SKIRT,
        )  # fmt: skip
    if outfit.top == "dress":
        flare, low = hip * 2.0, crotch - 0.17
        f.add(
            blob((-w, waist + 0.05), (w, waist + 0.05), (hip * 1.35, crotch), (flare, low),
            (0, low - 0.025), (-flare, low), (-hip * 1.35, crotch), detail=4), colour, part=DRESS,
        )  # fmt: skip
    hem = {"shirt": crotch + 0.045, "coat": crotch - 0.1, "dress": waist}[outfit.top]
    if outfit.top == "shirt" and outfit.bottom != "skirt":
        f.add(
            blob((-hip * 1.04, hem + 0.04), (hip * 1.04, hem + 0.04), (hip * 1.06, crotch - 0.02),
            (0, crotch - 0.035), (-hip * 1.06, crotch - 0.02), detail=3), outfit.bottom_colour,
            part=PANTS,
        )  # fmt: skip
    part = {"shirt": UPPER, "coat": COAT, "dress": DRESS}[outfit.top]
    wide = hip * (1.22 if outfit.top == "coat" else 1.05)
    f.add(
        blob((-s * 0.45, top), (s * 0.45, top), (s * 1.04, top - 0.05), (s * 0.94, top - 0.14),
        (w * 1.04, waist + 0.03), (wide, hem), (0, hem - 0.01), (-wide, hem),
        (-w * 1.04, waist + 0.03), (-s * 0.94, top - 0.14), (-s * 1.04, top - 0.05), detail=4),
        colour, part=part,
    )  # fmt: skip


def person(
    rng: Random,
    outfit: Outfit,
    *,
    pose: str,
    arms: tuple[str, str] = ("down", "down"),
    view: str = "front",
) -> Figure:
    """A person of the given outfit.

    Args:
        rng: decides skin, hair, face and small differences.
        outfit: kind and clothes.
        pose: "standing", "walking" or "running".
        arms: of the picture's left and right side: down, out, hip, up, fore, swing, back.
        view: "front" or "back"; from the front the figure has landmarks.
    """
    f = Figure()
    body, back = _BODIES[outfit.kind], view == "back"
    styles = ("short", "short", "curly") if outfit.kind in ("man", "boy") else (
        "long", "bob", "bun", "tails", "curly",
    )  # fmt: skip
    turn = rng.choice((-1, 0, 0, 1)) * rng.uniform(0.4, 1.0)
    hairs = HAIRS if outfit.kind in ("man", "woman") else HAIRS[:-1]
    look = _Look(rng.choice(SKINS), rng.choice(hairs), rng.choice(styles), turn)
    if not back:
        _back_hair(f, body, look)
    shoe = rng.choice(SHOES)
    stride = {"standing": 0.0, "walking": 0.055, "running": 0.1}[pose]
    way = 1 if turn >= 0 else -1
    for side in (-way, way):
        ahead = side == way
        foot_x = side * body.hip * 0.6 + way * (stride if ahead else -stride) * 0.6
        foot_y = 0.05 + (0.0 if not stride or ahead else stride * 0.55)
        _leg(f, body, outfit, look.skin, shoe, side, (foot_x, foot_y), left=(side > 0) != back)
    anchors = {}
    behind = [k for k in (0, 1) if arms[k] in ("swing", "back")]
    order = behind + [2] + [k for k in (0, 1) if k not in behind]
    for k in order:
        if k == 2:
            _torso(f, body, outfit)
            continue
        side = -1 if k == 0 else 1
        hand = _arm(
            f, body, outfit, look.skin, side, arms[k], left=(side > 0) != back,
            bent=rng.uniform(0.9, 1.1),
        )  # fmt: skip
        anchors["left hand" if side < 0 else "right hand"] = hand
    x = look.turn * 0.01
    neck = limb([(0, body.neck - 0.03), (x, body.neck + body.head * 0.3)], [body.head * 0.72] * 2)
    f.add(neck, darker(look.skin, 0.1), part=FACE, relief=0.5)
    if outfit.scarf:
        wool = lighter(outfit.hat_colour, 0.1)
        f.add(
            limb([(-body.head * 0.75, body.neck + 0.0), (0, body.neck - 0.025),
            (body.head * 0.75, body.neck)], [0.06, 0.07, 0.06]), wool, part=SCARF,
        )  # fmt: skip
        f.add(
            limb([(body.head * 0.35, body.neck - 0.02), (body.head * 0.45, body.neck - 0.15)],
            [0.06, 0.055]), darker(wool, 0.08), part=SCARF,
        )  # fmt: skip
    _head(f, body, outfit, look, rng, back=back)
    f.anchors |= anchors
    f.anchors["head top"] = (x, body.neck + body.head * 2.3)
    return f
