"""Whether a scene and a picture are what a caption claims.

In: the facts of a caption (`park` in KEY.json, docs/park.md), and what was generated for it. Out:
shares of claims that were kept. Class, number and relation are read from the scene, colours from
the pixels under it; place and time are read by `mas/reader.py`. The same judge is put before true
scenes and real pictures: what it says of them is the most that a model can reach.
Axes: H W pixels, N pixels of one thing, K colours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from mas.scene import CLASS_NAMES, SceneMap
from mas.things import Found, find_things

FORMAT = 1  # of the "park" entry this module understands
CLAIMS = ("class", "number", "colour", "relation", "place", "time")
CONFIDENCE = 0.95  # of the intervals around shares
# The named colours of the park world, sRGB before shading.
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (208, 44, 40), "orange": (240, 134, 36), "yellow": (246, 208, 58),
    "green": (66, 158, 66), "blue": (52, 108, 206), "purple": (134, 78, 182),
    "pink": (244, 142, 184), "brown": (140, 88, 54), "black": (48, 46, 54),
    "white": (244, 242, 236), "grey": (146, 148, 154),
}  # fmt: skip
DULL = ("brown", "black", "white", "grey")  # met in shadows, windows and wheels of anything
BRIGHT_SHARE = 0.24  # of a thing's pixels from which a bright colour is the thing's
KITE_STRING = 0.22  # of the picture's side, between a kite and who holds it
LIGHTNESS = 0.7  # weight of OKLab's lightness, which shading changes most


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was generated (or is real): a scene, its picture, and what the reader makes of them."""

    scene: SceneMap
    pixels_HWC: np.ndarray  # uint8 RGB, of the scene's size
    place: str | None = None  # None: no reader, or one that knows no places
    time: str | None = None


class Obedience:
    """Shares of claims that hold, over many captions."""

    def __init__(self, lights: Mapping[str, Sequence[float]]) -> None:
        """Takes the factor of each hour on the colours of things, three numbers an hour."""
        self.lights = {time: np.array(light) for time, light in lights.items()}
        self.kept: Counter[str] = Counter()
        self.made: Counter[str] = Counter()
        self.captions: list[bool] = []  # whether all of a caption's claims hold

    def update(self, facts: Mapping[str, Any], seen: Seen) -> dict[str, list[bool]]:
        """Adds one caption's facts; returns which of its claims hold, in order."""
        verdict = judge(facts, seen, light=self.lights.get(seen.time or ""))
        for claim, holds in verdict.items():
            self.kept[claim] += sum(holds)
            self.made[claim] += len(holds)
        self.captions.append(all(all(holds) for holds in verdict.values()))
        return verdict

    def compute(self) -> dict[str, float]:
        """Share of the claims kept by kind, and `all`: of captions kept whole; NaN where none."""
        shares = {
            claim: self.kept[claim] / self.made[claim] if self.made[claim] else float("nan")
            for claim in CLAIMS
        }
        whole = sum(self.captions) / len(self.captions) if self.captions else float("nan")
        return {**shares, "all": whole}

    def count(self) -> dict[str, dict[str, Any]]:
        """What each share of `compute` was counted from: `kept` of `count`, and its `interval`.

        The interval is Wilson's (1927) of a proportion, `CONFIDENCE` wide; None where `count` is 0.
        """
        counted = {claim: (self.kept[claim], self.made[claim]) for claim in CLAIMS}
        counted["all"] = (sum(self.captions), len(self.captions))
        return {
            claim: {"kept": kept, "count": count, "interval": wilson_interval(kept, count)}
            for claim, (kept, count) in counted.items()
        }


def wilson_interval(kept: int, count: int) -> tuple[float, float] | None:
    """Bounds of the share `kept` / `count` at `CONFIDENCE`; None where there is nothing to share.

    Unlike the normal approximation it stays in 0–1 and has a width where all or none were kept.
    """
    if not count:
        return None
    bounds = binomtest(kept, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(bounds.low), float(bounds.high)


def judge(
    facts: Mapping[str, Any], seen: Seen, *, light: np.ndarray | None = None
) -> dict[str, list[bool]]:
    """Which claims of a caption hold, by kind.

    A class is claimed once however often it is mentioned, and so is its number, the sum of all
    mentions. A colour holds when as many things of the class have it as are claimed, or all that
    were found. A relation holds when as many things of the one class as are claimed stand so to as
    many of the other; between things of one class it is not judged.
    Place and time are judged only where a reader has read them.

    Args:
        facts: one entry of `park.facts`.
        seen: what to judge.
        light: factor of the hour on colours, three numbers; None: 1.
    """
    found = {CLASS_NAMES[k]: things for k, things in find_things(seen.scene).items()}
    wanted: Counter[str] = Counter()
    for claim in facts["things"]:
        wanted[claim["class"]] += claim["count"]
    verdict: dict[str, list[bool]] = {
        "class": [name in found for name in wanted],
        "number": [len(found.get(name, ())) == count for name, count in wanted.items()],
        "colour": [],
        "relation": [],
    }
    colours = {
        name: [read_colour(seen.pixels_HWC[thing.mask_HW], light) for thing in found.get(name, ())]
        for name in {claim["class"] for claim in facts["things"] if "colour" in claim}
    }
    for claim in facts["things"]:
        if "colour" in claim:
            have = colours[claim["class"]]
            least = max(1, min(claim["count"], len(have)))
            verdict["colour"].append(have.count(claim["colour"]) >= least)
    for relation in facts["relations"]:
        subject, other = (facts["things"][relation[side]] for side in ("subject", "object"))
        if subject["class"] != other["class"]:
            verdict["relation"].append(
                relates(
                    found.get(subject["class"], ()),
                    relation["relation"],
                    found.get(other["class"], ()),
                    counts=(subject["count"], other["count"]),
                )
            )
    for kind, read in (("place", seen.place), ("time", seen.time)):
        if facts.get(kind) is not None and read is not None:
            verdict[kind] = [facts[kind] == read]
    return verdict


def relates(
    subjects: Sequence[Found], relation: str, others: Sequence[Found], *, counts: tuple[int, int]
) -> bool:
    """Whether as many subjects as are claimed stand in the relation to as many others.

    Where fewer were found, all of them must: number is a claim of its own. There may be more of a
    class than the relation speaks of.

    Args:
        subjects: things of the first class.
        relation: one of `RELATIONS`.
        others: things of the second class.
        counts: how many of each the relation speaks of.

    Raises:
        ValueError: a relation that nobody defined.
    """
    if relation not in RELATIONS:
        raise ValueError(f"no relation {relation!r}; known are {', '.join(RELATIONS)}")
    if not subjects or not others:
        return False
    holds = RELATIONS[relation]
    each = [sum(holds(a, b) for b in others) for a in subjects]
    related = sum(n >= min(counts[1], len(others)) for n in each)
    return related >= min(counts[0], len(subjects))


def _middle(thing: Found) -> float:
    return (thing.box[0] + thing.box[2]) / 2


def _shared(a: Found, b: Found) -> float:
    """Columns that two boxes share, in those of the narrower one; negative: there is a gap."""
    narrower = min(a.box[2] - a.box[0], b.box[2] - b.box[0])
    return (min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])) / narrower


def _gaps(a: Found, b: Found) -> tuple[float, float]:
    """Across and down between two boxes; negative where they overlap."""
    return (
        max(a.box[0], b.box[0]) - min(a.box[2], b.box[2]),
        max(a.box[1], b.box[1]) - min(a.box[3], b.box[3]),
    )


def _left(a: Found, b: Found) -> bool:
    return _shared(a, b) <= 0.3 and _middle(b) - _middle(a) > 0.06


def _behind(a: Found, b: Found) -> bool:
    return _shared(a, b) >= 0.2 and b.box[3] - a.box[3] > 0.03


def _next(a: Found, b: Found) -> bool:
    level = abs(a.box[3] - b.box[3]) < 0.09
    return level and _gaps(a, b)[0] < 0.11 and _shared(a, b) <= 0.3


def _holds(a: Found, b: Found) -> bool:
    # A kite flies on a string that is in no scene map.
    reach = KITE_STRING if CLASS_NAMES[b.class_id] == "kite" else 0.04
    return max(_gaps(a, b)) < reach


# As the world defines them (docs/park.md), with a little room on each threshold: the boxes are
# those of what is visible.
RELATIONS: Mapping[str, Callable[[Found, Found], bool]] = {
    "left of": _left,
    "right of": lambda a, b: _left(b, a),
    "behind": _behind,
    "in front of": lambda a, b: _behind(b, a),
    "next to": _next,
    "holds": _holds,
}


def read_colour(pixels_NC: np.ndarray, light: np.ndarray | None = None) -> str:
    """The named colour of a thing.

    Every pixel votes for the nearest named colour in OKLab; a bright colour of enough pixels wins
    over the dull ones, which shadows, windows and wheels have on anything.

    Args:
        pixels_NC: uint8 RGB of the thing's pixels.
        light: factor of the hour that is divided out; None: 1.
    """
    plain_NC = pixels_NC / (np.ones(3) if light is None else light)
    scale = np.array([LIGHTNESS, 1, 1])
    names = list(COLOURS)
    named_KC = _oklab(np.array([COLOURS[name] for name in names], np.float64)) * scale
    distance_NK = (((_oklab(plain_NC) * scale)[:, None] - named_KC) ** 2).sum(-1)
    votes = np.bincount(distance_NK.argmin(1), minlength=len(names))
    ranked = sorted(range(len(names)), key=lambda k: -votes[k])
    bright = next(k for k in ranked if names[k] not in DULL)
    if votes[bright] >= BRIGHT_SHARE * len(pixels_NC):
        return names[bright]
    return next(names[k] for k in ranked if names[k] in DULL)


def _oklab(rgb_NC: np.ndarray) -> np.ndarray:
    """OKLab of sRGB 0-255 (Ottosson 2020, https://bottosson.github.io/posts/oklab)."""
    share_NC = np.clip(rgb_NC, 0, 255) / 255
    power_NC = ((share_NC + 0.055) / 1.055) ** 2.4
    linear_NC = np.where(share_NC <= 0.04045, share_NC / 12.92, power_NC)
    return np.cbrt(linear_NC @ _TO_LMS.T) @ _TO_LAB.T


_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
