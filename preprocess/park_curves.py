"""Outlines of the park world: smooth curves, blobs, tubes and plain shapes, as arrays of points.

An outline is a float array N 2, x right and y up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import numpy as np

Outline: TypeAlias = np.ndarray  # float N 2


class Outlines(NamedTuple):
    """Outlines end to end in one array, so that all are placed and shaded at once."""

    points: np.ndarray  # float N 2
    ends: list[int]  # where each ends in `points`

    @classmethod
    def join(cls, outlines: Sequence[Outline]) -> Outlines:
        return cls(np.concatenate(outlines), list(accumulate(map(len, outlines))))

    def bounds(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 of all together."""
        (x0, y0), (x1, y1) = self.points.min(0).tolist(), self.points.max(0).tolist()
        return x0, y0, x1, y1

    def flat(self) -> list[list[float]]:
        """x, y, x, y ... of each outline."""
        flat = self.points.ravel().tolist()
        return [flat[2 * a : 2 * b] for a, b in zip([0, *self.ends], self.ends, strict=False)]

    def inset(self, toward: tuple[float, float]) -> Outlines:
        """Each drawn in a little and moved toward the light: where a round body is bright."""
        count = len(self.points)
        starts, lasts = [0, *self.ends[:-1]], [end - 1 for end in self.ends]
        after, before = np.arange(1, count + 1), np.arange(-1, count - 1)
        after[lasts], before[starts] = starts, lasts
        x, y = self.points.T.copy()
        next_x, next_y = x.take(after), y.take(after)
        along_x, along_y = next_x - x.take(before), next_y - y.take(before)
        areas = np.add.reduceat(x * next_y - next_x * y, starts) / 2
        depths = 0.1 * np.sqrt(np.abs(areas))
        lengths = [b - a for a, b in zip(starts, self.ends, strict=True)]
        depth, inward = np.array((depths, np.copysign(depths, areas))).repeat(lengths, 1)
        norm = np.hypot(along_x, along_y) + 1e-9
        lift = depth * 0.8
        inset = np.empty_like(self.points)
        inset[:, 0] = x - along_y * inward / norm + toward[0] * lift
        inset[:, 1] = y + along_x * inward / norm + toward[1] * lift
        return Outlines(inset, self.ends)


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
    if turn:
        points = rotate(points, turn)
    points += (x, y)
    return points


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


@cache
def _steps(count: int) -> np.ndarray:
    """Matrix that turns points on a line into the steps from the one before to the one after."""
    matrix = np.eye(count, k=1) - np.eye(count, k=-1)
    matrix[0, 0], matrix[-1, -1] = -1, 1
    return matrix


_LEFT = np.array((-1.0, 1.0))  # of a direction, once its x and y are exchanged
_ENDS = np.array(((1.0,), (-1.0,)))  # which way a tube leaves at its last and its first point


def limb(
    points: Sequence[tuple[float, float]], widths: Sequence[float], detail: int = 4
) -> Outline:
    """Smooth tube through `points`, as wide as `widths` says at each, with round ends."""
    matrix = _spline(len(points), detail, False)
    path = matrix @ np.array(points)
    half = (matrix @ np.array(widths) / 2)[:, None]
    step = _steps(len(path)) @ path
    squares = step * step
    step /= np.sqrt(squares[:, :1] + squares[:, 1:]) + 1e-9
    side = step[:, ::-1] * _LEFT * half
    count = len(path)
    sides = np.empty((2, count + 3, 2))  # one along the path, one back, each with the cap behind it
    sides[0, :count] = path + side
    sides[1, :count] = (path - side)[::-1]
    ends = slice(None, None, 1 - count)  # the last and the first
    tip, across = path[ends], side[ends] * _ENDS
    forward = step[ends] * half[ends] * _ENDS
    sides[:, count] = tip + 0.71 * (across + forward)
    sides[:, count + 1] = tip + forward
    sides[:, count + 2] = tip + 0.71 * (forward - across)
    return sides.reshape(-1, 2)
