"""Faces of the park world: 68 landmarks in the usual order, and a face drawn through them."""

from __future__ import annotations

from random import Random

import numpy as np

from preprocess.park_colours import Colour, darker, mix
from preprocess.park_curves import Outline, ellipse, limb, move
from preprocess.park_pen import Figure


def face_points(turn: float, smile: float, wide: float) -> np.ndarray:
    """68 landmarks of a face, x and y in -1..1 of the face's half width and height.

    `turn` (-1..1) looks to a side, `smile` bends the mouth, `wide` opens it.
    """
    angles = np.linspace(np.pi * 1.0, np.pi * 2.0, 17)
    jaw = np.stack([0.9 * np.cos(angles), 0.06 + 0.96 * np.sin(angles)], axis=1)
    shift = turn * 0.22
    brow = np.array([(-0.27, 0.0), (-0.14, 0.06), (0.0, 0.085), (0.14, 0.07), (0.26, 0.01)])
    brows = np.concatenate([move(brow, -0.42, 0.4), move(brow * (-1, 1), 0.42, 0.4)])
    brows[5:] = brows[5:][::-1]
    nose = np.array(
        [(0, 0.22), (0, 0.12), (0, 0.02), (0, -0.08), (-0.15, -0.15), (-0.08, -0.19), (0, -0.21),
        (0.08, -0.19), (0.15, -0.15)],
    )  # fmt: skip
    nose[:4, 0] += turn * np.array([0.0, 0.03, 0.07, 0.1])
    eye = np.array(
        [(-0.19, 0.0), (-0.08, 0.12), (0.08, 0.12), (0.19, 0.0), (0.08, -0.11), (-0.08, -0.11)],
    )  # fmt: skip
    eyes = np.concatenate([move(eye, -0.4, 0.12), move(eye, 0.4, 0.12)])
    x = np.array([-0.34, -0.22, -0.09, 0.0, 0.09, 0.22, 0.34])
    bow = smile * (x / 0.34) ** 2
    top = np.stack([x, -0.5 + bow + np.array([0, 0.055, 0.08, 0.065, 0.08, 0.055, 0])], axis=1)
    low_x = x[5:0:-1]
    low = np.stack(
        [low_x, -0.5 + smile * (low_x / 0.34) ** 2 - np.array([0.07, 0.11, 0.125, 0.11,
        0.07]) - wide], axis=1,
    )  # fmt: skip
    ix = np.array([-0.27, -0.13, 0.0, 0.13, 0.27])
    inner_top = np.stack(
        [ix, -0.495 + smile * (ix / 0.34) ** 2 + np.array([0, 0.015, 0.015, 0.015, 0])], axis=1,
    )  # fmt: skip
    jx = ix[3:0:-1]
    inner_low = np.stack([jx, -0.51 + smile * (jx / 0.34) ** 2 - wide * 0.9 - 0.02], axis=1)
    points = np.concatenate([jaw, brows, nose, eyes, top, low, inner_top, inner_low])
    features = points[17:]
    features[:, 0] = features[:, 0] * (1 - 0.12 * abs(turn)) + shift
    return points


def paint_face(
    f: Figure, points: np.ndarray, skin: Colour, hair: Colour, rng: Random, *, part: int
) -> None:
    """Brows, eyes, nose and mouth, drawn through the landmarks."""
    width = float(np.ptp(points[:17, 0])) / 2
    cheek = mix(skin, (232, 106, 100), 0.34)
    for k in (36, 42):
        x, y = points[k : k + 6].mean(0)
        f.add(
            ellipse(float(x), float(y) - width * 0.3, width * 0.2, width * 0.13, count=12), cheek,
            part=part, relief=0,
        )  # fmt: skip
    iris = rng.choice(((60, 44, 38), (60, 92, 130), (70, 104, 70), (52, 40, 40)))
    for k in (36, 42):
        eye = points[k : k + 6]
        x, y = eye.mean(0)
        f.add(_spread(eye, 1.1), (255, 253, 250), part=part, relief=0)
        f.add(
            ellipse(float(x), float(y), width * 0.115, width * 0.135, count=10), iris, part=part,
            relief=0,
        )  # fmt: skip
        f.add(
            ellipse(float(x) + width * 0.035, float(y) + width * 0.05, width * 0.035,
            width * 0.035, count=6), (255, 255, 255), part=part, relief=0,
        )  # fmt: skip
        lid = [tuple(p) for p in eye[:4].tolist()]
        f.add(
            limb(lid, [width * 0.05, width * 0.08, width * 0.08, width * 0.05], detail=2),
            darker(hair, 0.5), part=part, relief=0,
        )  # fmt: skip
    brow = darker(hair, 0.15) if sum(hair) < 420 else darker(hair, 0.35)
    for k in (17, 22):
        line = [tuple(p) for p in points[k : k + 5 : 2].tolist()]
        f.add(
            limb(line, [width * 0.08, width * 0.11, width * 0.07], detail=3), brow, part=part,
            relief=0,
        )  # fmt: skip
    nose = darker(mix(skin, (210, 110, 90), 0.25), 0.16)
    line = [tuple(points[k].tolist()) for k in (31, 33, 35)]
    f.add(
        limb(line, [width * 0.07, width * 0.13, width * 0.07], detail=3), nose, part=part, relief=0,
    )  # fmt: skip
    f.add(points[48:60], (206, 84, 86), part=part, relief=0)
    f.add(
        points[60:68], (255, 250, 246) if np.ptp(points[60:68,
        1]) > width * 0.16 else (140, 44, 52), part=part, relief=0,
    )  # fmt: skip


def _spread(points: Outline, factor: float) -> Outline:
    middle = points.mean(0)
    return (points - middle) * factor + middle
