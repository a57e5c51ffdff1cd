"""Outlines of the park world: smooth curves, blobs, tubes and plain shapes, as arrays of points.

An outline is a float array N 2, x right and y up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TypeAlias

import numpy as np

Outline: TypeAlias = np.ndarray  # float N 2


@cache
def _spline(count: int, detail: int, closed: bool) -> np.ndarray:
    """Matrix that turns `count` control points into points on their Catmull-Rom curve."""
    t = np.arange(detail) / detail
    basis = np.stack(
        [
            -0.5 * t**3 + t**2 - 0.5 * t,
            1.5 * t**3 - 2.5 * t**2 + 1,
            -1.5 * t**3 + 2 * t**2 + 0.5 * t,
            0.5 * t**3 - 0.5 * t**2,
        ],
        axis=1,
    )
    spans = count if closed else count - 1
    matrix = np.zeros((spans * detail + (not closed), count))
    for span in range(spans):
        for k in range(4):
            index = span + k - 1
            index = index % count if closed else min(max(index, 0), count - 1)
            matrix[span * detail : (span + 1) * detail, index] += basis[:, k]
    if not closed:
        matrix[-1, -1] = 1
    return matrix


def blob(*points: tuple[float, float], detail: int = 5) -> Outline:
    """Smooth closed outline through `points`."""
    return _spline(len(points), detail, True) @ np.array(points)


def curve(*points: tuple[float, float], detail: int = 6) -> Outline:
    """Smooth open line through `points`."""
    return _spline(len(points), detail, False) @ np.array(points)


def polygon(*points: tuple[float, float]) -> Outline:
    return np.array(points, float)


@cache
def _circle(count: int) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0, count: int = 22) -> Outline:
    """Ellipse around (x, y), turned by `turn` radians."""
    points = _circle(count) * (rx, ry)
    return (rotate(points, turn) if turn else points) + (x, y)


def rectangle(x0: float, y0: float, x1: float, y1: float, corner: float = 0) -> Outline:
    """Axis-aligned rectangle, its corners rounded by `corner`."""
    if not corner:
        return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    quarter = _circle(16)
    centres = [
        (x1 - corner, y1 - corner),
        (x0 + corner, y1 - corner),
        (x0 + corner, y0 + corner),
        (x1 - corner, y0 + corner),
    ]
    arcs = [quarter[k * 4 : k * 4 + 5] if k < 3 else quarter[[12, 13, 14, 15, 0]] for k in range(4)]
    return np.concatenate([a * corner + c for a, c in zip(arcs, centres, strict=True)])


def move(points: Outline, x: float, y: float) -> Outline:
    return points + np.array((x, y))


def rotate(points: Outline, turn: float, centre: tuple[float, float] = (0, 0)) -> Outline:
    cos, sin = np.cos(turn), np.sin(turn)
    return (points - centre) @ np.array([[cos, sin], [-sin, cos]]) + centre


def limb(
    points: Sequence[tuple[float, float]], widths: Sequence[float], detail: int = 4
) -> Outline:
    """Smooth tube through `points`, as wide as `widths` says at each, with round ends."""
    matrix = _spline(len(points), detail, False)
    path = matrix @ np.array(points)
    half = (matrix @ np.array(widths) / 2)[:, None]
    step = np.empty_like(path)
    step[1:-1] = path[2:] - path[:-2]
    step[0], step[-1] = path[1] - path[0], path[-1] - path[-2]
    step /= np.sqrt((step * step).sum(1, keepdims=True)) + 1e-9
    side = np.stack([-step[:, 1], step[:, 0]], axis=1) * half
    caps = []
    for end, sign in ((-1, 1.0), (0, -1.0)):
        forward, across = step[end] * half[end] * sign, side[end] * sign
        caps.append(
            np.stack(
                [
                    path[end] + 0.71 * (across + forward),
                    path[end] + forward,
                    path[end] + 0.71 * (forward - across),
                ]
            )
        )
    return np.concatenate([path + side, caps[0], (path - side)[::-1], caps[1]])
