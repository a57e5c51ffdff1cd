"""What an evaluation asks of a model: captions with real scenes, pictures and, in the park, facts.

In: scene shards. Out: cases, spread evenly over the shards, decoded only when they are used.
Axes: H W pixels, C colours.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mas.obedience import FORMAT
from mas.scene import SceneMap
from mas.shards import Sample, ShardError, ShardIndex, expand_shards, read_captions

PARK = ("facts", "held_out", "time", "light", "place")  # of a park entry, what is read here


@dataclass(frozen=True, kw_only=True)
class Case:
    """One caption with the picture it was written for.

    Raises:
        ShardError: a file that cannot be read, when it is asked for; by name.
    """

    key: str
    caption: str
    jpg: bytes
    scene_png: bytes
    facts: Mapping[str, Any] | None = None  # what the caption claims; None outside the park
    place: str | None = None  # of the picture
    time: str | None = None

    @property
    def side(self) -> int:
        """Pixels of the scene's shorter side."""
        with (
            _naming(f"{self.key}.scene.png"),
            Image.open(io.BytesIO(self.scene_png), formats=["PNG"]) as png,
        ):
            return min(png.size)

    def scene(self, size: int) -> SceneMap:
        """The true scene, `size` pixels a side."""
        with _naming(f"{self.key}.scene.png"):
            return SceneMap.from_png(io.BytesIO(self.scene_png)).resized(size)

    def pixels(self, size: int) -> np.ndarray:
        """The real picture, uint8 H W C, `size` pixels a side."""
        with (
            _naming(f"{self.key}.jpg"),
            Image.open(io.BytesIO(self.jpg), formats=["JPEG", "PNG", "WEBP"]) as photo,
        ):
            return resize(np.asarray(photo.convert("RGB")), size)


@dataclass(frozen=True, kw_only=True)
class Cases:
    """All that is asked, and what the hours of the day do to colours."""

    cases: Sequence[Case]
    lights: Mapping[str, Sequence[float]]  # hour -> factor on the colours of things

    @property
    def has_facts(self) -> bool:
        """Whether every caption comes with what it claims."""
        return all(case.facts is not None for case in self.cases)


def read_cases(shards: str, count: int) -> Cases:
    """Up to `count` pictures, evenly spread.

    The i-th is asked for by its caption number i mod n, but one that holds a combination kept out
    of the training by the first caption that says so.

    Raises:
        ShardError: no shards, no pictures, a picture without scene or caption, or with a JSON that
            is broken.
    """
    index = ShardIndex(expand_shards(shards), extensions=("jpg", "scene.png", "txt", "json"))
    if not len(index):
        raise ShardError(f"{shards}: the shards hold no pictures")
    cases = []
    lights: dict[str, Sequence[float]] = {}
    for number, place in enumerate(np.linspace(0, len(index) - 1, min(count, len(index)))):
        sample = index.read(round(place))
        captions = read_captions(sample)  # first: tells of a JSON that cannot be read
        park = _read_park(sample)
        if park:
            lights[park["time"]] = park["light"]
        cases.append(_read_case(sample, captions, park, number))
    return Cases(cases=cases, lights=lights)


def resize(pixels_HWC: np.ndarray, size: int) -> np.ndarray:
    """A picture (uint8) of `size` pixels a side."""
    if pixels_HWC.shape[:2] == (size, size):
        return pixels_HWC
    resized = Image.fromarray(pixels_HWC).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(resized)


def _read_case(
    sample: Sample, captions: Sequence[str], park: Mapping[str, Any] | None, number: int
) -> Case:
    if not captions:
        raise ShardError(f"{sample.key}: has no caption")
    chosen, facts = number % len(captions), None
    if park and len(park["facts"]) == len(captions):
        chosen = choose_caption(park["facts"], park["held_out"], chosen)
        facts = park["facts"][chosen]
    return Case(
        key=sample.key,
        caption=captions[chosen],
        jpg=sample.files["jpg"],
        scene_png=sample.files["scene.png"],
        facts=facts,
        place=park["place"] if park else None,
        time=park["time"] if park else None,
    )


def choose_caption(
    facts: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, str]], otherwise: int
) -> int:
    """Position of the first caption that states one of the combinations, else `otherwise`."""
    for position, claims in enumerate(facts):
        if any(_states(claims, combination) for combination in held_out):
            return position
    return otherwise


def _states(claims: Mapping[str, Any], combination: Mapping[str, str]) -> bool:
    """Whether a caption names the class together with its colour, time or place."""
    things = [claim for claim in claims["things"] if claim["class"] == combination["class"]]
    if "colour" in combination:
        return any(claim.get("colour") == combination["colour"] for claim in things)
    return bool(things) and all(
        claims[name] == combination[name] for name in ("time", "place") if name in combination
    )


def _read_park(sample: Sample) -> dict[str, Any] | None:
    """The park's truth about a picture, None where there is none of the format known here."""
    park = json.loads(sample.files["json"]).get("park")
    if not isinstance(park, dict) or park.get("format") != FORMAT:
        return None
    missing = [name for name in PARK if name not in park]
    if missing:
        raise ShardError(
            f"{sample.key}.json: its park entry has no {missing[0]}; draw and preprocess it again"
        )
    return park


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts the file's name before why it cannot be read."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ShardError(f"{name}: cannot be read ({error}); preprocess its photo again") from error
