"""Composition of a park picture: place, time and groups are drawn by lot, then laid out.

In: (seed, index). Out: a `Scene`, a function of the two alone.
"""

from __future__ import annotations

from itertools import count
from random import Random

from preprocess.park_colours import BRIGHT
from preprocess.park_layout import lay_out
from preprocess.park_scene import Group, Scene
from preprocess.park_world import CLOTHES, HELD_OUT, PLACES, SPECIES, TIMES, Combination


def compose(seed: int, index: int, *, held_out: str = "exclude") -> Scene:
    """The scene of picture `index`, a function of its arguments alone.

    Args:
        seed: of the whole world.
        index: of the picture.
        held_out: "exclude" avoids the held-out combinations, "only" has one in every scene,
            "include" does not look.
    """
    for attempt in count():
        rng = Random(f"park/{seed}/{index}/{held_out == 'only'}/{attempt}")
        wanted = rng.choice(HELD_OUT) if held_out == "only" else None
        scene = _plan(rng, wanted)
        if held_out == "exclude" and find_held_out(scene):
            continue
        if wanted and wanted not in find_held_out(scene):
            continue
        if lay_out(scene, rng):
            return scene
    raise AssertionError("count() has no end")


def find_held_out(scene: Scene) -> list[Combination]:
    """The held-out combinations that a scene contains."""
    met = {(g.name, g.colour) for g in scene.groups}
    met |= {(g.holds, g.holds_colour) for g in scene.groups if g.holds}
    names = {name for name, _ in met}
    return [
        c
        for c in HELD_OUT
        if c.name in names
        and (c.colour is None or (c.name, c.colour) in met)
        and c.time in (None, scene.time)
        and c.place in (None, scene.place)
    ]


def _plan(rng: Random, wanted: Combination | None) -> Scene:
    """Place, time and groups; nothing has a position yet."""
    places = [p for p in PLACES if not wanted or p in SPECIES[wanted.name].places]
    place = (wanted and wanted.place) or rng.choice(places)
    time = (wanted and wanted.time) or rng.choice(TIMES)
    groups: list[Group] = []
    left = 4
    for position in range(rng.choices((1, 2, 3), (28, 52, 20))[0]):
        if not left:
            break
        name = None
        if position == 0 and wanted:
            name = wanted.name
        count = min(left, rng.choices((1, 2, 3, 4), (68, 18, 9, 5))[0])
        colour = wanted.colour if wanted and position == 0 else None
        group = _group(rng, place, name, count, colour)
        if all(_distinct(group, other) for other in groups):
            groups.append(group)
            left -= group.count
    scene = _stage(rng, place, time, any(g.name == "boat" for g in groups))
    scene.groups = groups
    return scene


def _distinct(group: Group, other: Group) -> bool:
    """Whether words can tell two groups apart: by class, kind or named colour."""
    if group.name != other.name:
        return other.holds != group.name and group.holds != other.name
    if group.name == "person":
        return group.kind != other.kind
    return bool(group.colour and other.colour and group.colour != other.colour)


def _group(rng: Random, place: str, name: str | None, count: int, colour: str | None) -> Group:
    if name is None:
        names = [n for n, s in SPECIES.items() if place in s.places]
        name = rng.choices(names, [SPECIES[n].places[place] for n in names])[0]
    species = SPECIES[name]
    if name in ("bus", "truck", "bench", "airplane"):
        count = min(count, 2)
    size = rng.choices(("normal", "small", "big"), (74, 13, 13))[0]
    if name == "person":
        return _people(rng, place, count)
    if colour is None:
        bright = rng.random() < species.bright
        colour = (
            rng.choice(BRIGHT) if bright or not species.natural else rng.choice(species.natural)
        )
    return Group(name, count, colour or None, None, size, rng.choice(species.poses), {})


def _people(rng: Random, place: str, count: int) -> Group:
    kind = rng.choice(("man", "woman", "boy", "girl"))
    cold = place == "snow" or (place == "mountains" and rng.random() < 0.4)
    wears: dict[str, str] = {}
    female = kind in ("woman", "girl")
    top = "coat" if cold else "dress" if female and rng.random() < 0.45 else "shirt"
    wears[top] = rng.choice(CLOTHES)
    if top == "shirt" and rng.random() < 0.5:
        bottom = "skirt" if female and rng.random() < 0.5 else rng.choice(("pants", "shorts"))
        wears[bottom] = rng.choice([c for c in CLOTHES if c != wears[top]])
    if rng.random() < (0.8 if cold else 0.3):
        style = "woolly hat" if cold else rng.choice(("cap", "sun hat"))
        wears[style] = rng.choice([c for c in BRIGHT if c not in wears.values()])
    group = Group("person", count, None, kind, "normal", rng.choice(SPECIES["person"].poses), wears)
    if count == 1 and rng.random() < 0.3:
        group.holds = "kite" if rng.random() < 0.4 else "umbrella"
        species = SPECIES[group.holds]
        bright = rng.random() < species.bright
        group.holds_colour = rng.choice(
            BRIGHT if bright or not species.natural else species.natural
        )
        if group.pose == "running":
            group.pose = "walking"
    return group


def _stage(rng: Random, place: str, time: str, boat: bool) -> Scene:
    """Horizon and the bands of water, road and ground of a place."""
    horizon = rng.uniform(0.34, 0.48)
    water = road = None
    ground = horizon + 0.1
    if place == "beach":
        water = (horizon, horizon + rng.uniform(0.13, 0.2))
        ground = water[1] + 0.05
    elif place == "street":
        top = horizon + rng.uniform(0.13, 0.18)
        road = (top, top + rng.uniform(0.24, 0.28))
        ground = horizon + 0.1
    elif place in ("park", "mountains") and (boat or rng.random() < 0.3):
        top = horizon + rng.uniform(0.05, 0.08)
        water = (top, top + rng.uniform(0.11, 0.15))
        ground = water[1] + 0.05
    side = rng.choice((-1, 1)) * rng.uniform(0.45, 1.0)
    return Scene(place, time, side, horizon, water, road, ground, backdrop_seed=rng.getrandbits(32))
