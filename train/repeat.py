"""Rare classes more often: how many times a picture comes in each epoch of a training.

In: the classes of every picture, as `mas preprocess` noted them in KEY.json. Out: items in which
some pictures stand several times; the stream shuffles them as it does all others, so the copies lie
apart. Paper: LVIS (arXiv 1908.03195) appendix B.2, repeat factor sampling.
Axes: N pictures, K classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mas.scene import CLASS_NAMES
from mas.shards import Sample
from train.stream import Items

IDS = {name: number for number, name in enumerate(CLASS_NAMES)}


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """How often pictures come: the largest factor of the classes that they hold, at least 1."""

    below: float = 0.0  # a class in a share f of the pictures, f < below, has √(below / f)
    named: Mapping[str, float] = field(default_factory=dict)  # class name → factor of its own

    def __post_init__(self) -> None:
        if not 0 <= self.below <= 1:
            raise ValueError(f"data.repeat_below is {self.below}, use a share from 0 to 1")
        for name, factor in self.named.items():
            if name not in IDS:
                raise ValueError(f"data.repeat names {name!r}, which is not one of the classes")
            if not 1 <= factor < math.inf:
                raise ValueError(f"data.repeat of {name!r} is {factor}, use 1 or more")

    def __bool__(self) -> bool:
        return self.below > 0 or bool(self.named)

    def factors(self, present_NK: np.ndarray) -> np.ndarray:
        """Times an epoch that each picture shall come on average, float N."""
        shares_K = present_NK.mean(0)
        factors_K = np.sqrt(self.below / np.where(shares_K > 0, shares_K, np.inf))
        for name, factor in self.named.items():
            factors_K[IDS[name]] = max(factor, factors_K[IDS[name]])
        factors_N = np.ones(len(present_NK))
        for number in np.flatnonzero(factors_K > 1):
            np.maximum(factors_N, factors_K[number], out=factors_N, where=present_NK[:, number] > 0)
        return factors_N


class Repeated:
    """Items of which number i stands `factors[i]` times on average, rounded at random by `seed`."""

    def __init__(self, items: Items, factors_N: np.ndarray, *, seed: int) -> None:
        self.items = items
        draws_N = np.random.default_rng(seed).random(len(factors_N))
        self.places = np.repeat(np.arange(len(factors_N)), np.int64(factors_N + draws_N))

    def __len__(self) -> int:
        return len(self.places)

    def item(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        """As of `items`, with other draws for each copy."""
        return self.items.item(int(self.places[index]), rng)


def read_presence(samples: Iterable[Sample], count: int) -> np.ndarray:
    """Which classes each of `count` pictures holds, bool N K; only KEY.json is read.

    Raises:
        ValueError: a picture whose JSON does not list its classes, or lists an unknown one.
    """
    present_NK = np.zeros((count, len(CLASS_NAMES)), np.bool_)
    for row, sample in zip(present_NK, samples, strict=True):
        try:
            row[[IDS[name] for name in json.loads(sample.files["json"])["scene"]["classes"]]] = True
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{sample.key}.json does not list the classes of its scene ({error!r}), which "
                "data.repeat and data.repeat_below need: use scene shards of mas preprocess"
            ) from error
    return present_NK
