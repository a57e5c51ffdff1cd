"""Scenes spoilt the way a GPT errs, for the judge to tell from the true one.

In: the entries of a scene, as `mas.judge.describe_scenes` writes them. Out: those of one that is
not true, if only just.
Axes: N entries of a scene, F numbers an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from mas.judge import NOTHING
from mas.scene import THINGS

APART = 0.1  # of the picture's width: how far a thing is moved at least, if it has that room
TRIES = 10  # to spoil a scene; a way may leave it as it is, as a class put for itself does


def spoil(
    true_NF: np.ndarray, other_NF: np.ndarray, rng: np.random.Generator, *, way: str | None = None
) -> np.ndarray:
    """A scene that is not the true one, if only just; float32 N F as `describe_scenes` writes.

    A thing the caption does not speak of may be spoilt, too: nobody knows which one that is.

    Args:
        true_NF: entries of the true scene.
        other_NF: entries of any other scene.
        rng: of what is done.
        way: the one of WAYS that is tried, where there are things enough for it; None: any.
    """
    things = _count_things(true_NF)
    ways = [spoil_it for least, spoil_it in WAYS.values() if things >= least]
    if way is not None and things >= WAYS[way][0]:
        ways = [WAYS[way][1]]
    for _ in range(TRIES):
        spoilt_NF = ways[rng.integers(len(ways))](true_NF.copy(), other_NF, rng)
        if not np.array_equal(spoilt_NF, true_NF):
            return spoilt_NF
    return _invent(true_NF, rng)


def mirror_entries(entries_NF: np.ndarray) -> np.ndarray:
    """The entries of the mirrored scene."""
    mirrored_NF = entries_NF.copy()
    present = entries_NF[:, 0] != NOTHING
    mirrored_NF[present, 1] = 1 - entries_NF[present, 3]
    mirrored_NF[present, 3] = 1 - entries_NF[present, 1]
    return mirrored_NF


def _count_things(entries_NF: np.ndarray) -> int:
    return int((entries_NF[:, 0] < THINGS).sum())


def _draw_thing(entries_NF: np.ndarray, rng: np.random.Generator) -> int:
    return int(rng.integers(_count_things(entries_NF)))  # things come first


def _shift(entry: np.ndarray, across: float, down: float) -> None:
    """Moves an entry's box, as far as the picture goes."""
    entry[[1, 3]] += np.clip(across, -entry[1], 1 - entry[3])
    entry[[2, 4]] += np.clip(down, -entry[2], 1 - entry[4])


def _add(entries_NF: np.ndarray, _: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One more of something, elsewhere and up to a third smaller."""
    more = entries_NF[_draw_thing(entries_NF, rng)].copy()
    _shift(more, _far(more, rng), rng.normal(0, 0.03))
    scale = rng.uniform(0.7, 1.0)  # about its feet
    middle, half = (more[1] + more[3]) / 2, (more[3] - more[1]) / 2 * scale
    more[[1, 3]] = middle - half, middle + half
    more[2] = more[4] - (more[4] - more[2]) * scale
    more[5] *= scale**2
    return np.concatenate([more[None], entries_NF[:-1]])


def _invent(entries_NF: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A thing where there may be none at all."""
    (x, y), (width, height) = rng.uniform(0, 0.5, 2), rng.uniform(0.1, 0.5, 2)
    thing = (rng.integers(THINGS), x, y, x + width, y + height, width * height)
    return np.concatenate([np.array([thing], entries_NF.dtype), entries_NF[:-1]])


def _remove(entries_NF: np.ndarray, _: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    kept_NF = np.delete(entries_NF, _draw_thing(entries_NF, rng), axis=0)
    nothing = np.zeros_like(entries_NF[:1])
    nothing[0, 0] = NOTHING
    return np.concatenate([kept_NF, nothing])


def _move(entries_NF: np.ndarray, _: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    entry = entries_NF[_draw_thing(entries_NF, rng)]
    _shift(entry, _far(entry, rng), rng.normal(0, 0.08))
    return entries_NF


def _swap(entries_NF: np.ndarray, other_NF: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two things of two classes in each other's places: middles across, feet down."""
    a = _draw_thing(entries_NF, rng)
    others = np.flatnonzero((entries_NF[:, 0] < THINGS) & (entries_NF[:, 0] != entries_NF[a, 0]))
    if not len(others):
        return _move(entries_NF, other_NF, rng)
    b = rng.choice(others)
    across = (entries_NF[b, [1, 3]].sum() - entries_NF[a, [1, 3]].sum()) / 2
    down = entries_NF[b, 4] - entries_NF[a, 4]
    _shift(entries_NF[a], across, down)
    _shift(entries_NF[b], -across, -down)
    return entries_NF


def _replace(entries_NF: np.ndarray, other_NF: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All things of one class become another class, one of the other scene if it has things."""
    old = entries_NF[_draw_thing(entries_NF, rng), 0]
    things = _count_things(other_NF)
    new = other_NF[rng.integers(things), 0] if things else rng.integers(THINGS)
    entries_NF[entries_NF[:, 0] == old, 0] = new
    return entries_NF


def _exchange(_: np.ndarray, other_NF: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return other_NF


def _far(entry: np.ndarray, rng: np.random.Generator) -> float:
    """How far across, to the other side where the drawn one leaves no room."""
    side, distance = rng.choice([-1, 1]), rng.uniform(APART, 0.6)
    room = entry[1] if side < 0 else 1 - entry[3]
    return float((side if room >= APART else -side) * distance)


Way = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
# How a scene is spoilt: the things it takes, and what is done. What GPTs do most comes twice.
WAYS: Mapping[str, tuple[int, Way]] = {
    "add": (1, _add),
    "add again": (1, _add),
    "remove": (1, _remove),
    "move": (1, _move),
    "move again": (1, _move),
    "swap": (2, _swap),
    "replace": (1, _replace),
    "exchange": (0, _exchange),
}
