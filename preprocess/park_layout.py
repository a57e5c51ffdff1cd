"""Layout of a park picture: figures are made, sized by perspective and put where they fit.

In: a planned `Scene` with groups. Out: the same scene with its things, far to near.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from preprocess.park_colours import COLOURS, Colour
from preprocess.park_objects import kite, umbrella
from preprocess.park_pen import Figure, Frame
from preprocess.park_people import DENIM, Outfit, person
from preprocess.park_scene import NEAREST, Box, Group, Scene, Thing, scale_at
from preprocess.park_world import KIND_HEIGHTS, NATURAL, SIZES, SPECIES

SMALLEST = 0.13  # longer side of a thing in the picture
TRIES = 16  # positions tried for a thing
LAYOUTS = 8  # tries before a picture counts as too full; fewer would favour small and single things
HIDDEN = 0.42  # largest share of a thing's box that nearer things may cover


@dataclass(frozen=True, slots=True)
class _Wish:
    """Where a thing would like to stand."""

    kind: str  # row: at a similar depth; beside: close by; line: behind or in front
    partner: Thing


def lay_out(scene: Scene, rng: Random) -> bool:
    """Finds a place for every thing; false when the picture is too full."""
    made = [[_make(rng, scene, g, n) for _ in range(g.count)] for n, g in enumerate(scene.groups)]
    for _ in range(LAYOUTS):
        scene.things.clear()
        if all(_place(scene, rng, g, things) for g, things in zip(scene.groups, made, strict=True)):
            _sort(scene)
            return True
    return False


def _place(scene: Scene, rng: Random, group: Group, things: list[Thing]) -> bool:
    """Puts the things of one group where they fit."""
    alone = sum(g.count for g in scene.groups) == 1
    wish = _wish(rng, scene, group)
    for thing in things:
        for _ in range(TRIES):
            frame = _try(rng, scene, group, thing, wish, alone=alone)
            if frame and _fits(scene, thing, frame):
                break
        else:
            return False
        thing.frame = frame
        thing.box = _box(thing.figure, frame)
        thing.depth = _depth(scene, group, thing)
        scene.things.append(thing)
        wish = _Wish("row", thing)
        if group.holds and not _hand_over(scene, group, thing, rng):
            return False
    return True


def _sort(scene: Scene) -> None:
    """Far to near; what is held comes right after its holder."""
    holders = {id(t): scene.things[t.holder] for t in scene.things if t.holder is not None}

    def rank(thing: Thing) -> tuple[bool, float, int]:
        base = holders.get(id(thing), thing)
        return base.grounded, base.foot, int(thing is not base)

    scene.things.sort(key=rank)
    for thing in scene.things:
        if id(thing) in holders:
            holder = holders[id(thing)]
            thing.holder = next(i for i, t in enumerate(scene.things) if t is holder)


def _make(rng: Random, scene: Scene, group: Group, number: int) -> Thing:
    species = SPECIES[group.name]
    if group.kind:
        outfit = _outfit(rng, group, cold=scene.place == "snow")
        arms = [rng.choice(("down", "down", "out", "hip", "up", "fore", "swing")) for _ in range(2)]
        if group.pose != "standing":
            arms = [rng.choice(("swing", "fore", "down", "up")) for _ in range(2)]
        if group.holds:
            arms[rng.randint(0, 1)] = "fore"
        view = "back" if rng.random() < 0.07 and not group.holds else "front"
        figure = person(rng, outfit, pose=group.pose, arms=(arms[0], arms[1]), view=view)
    else:
        assert species.draw is not None
        paint = COLOURS[group.colour] if group.colour else NATURAL[group.name]
        figure = species.draw(rng, _vary(rng, paint), group.pose)
    mirrored = group.kind is None and rng.random() < 0.5
    frame = Frame(0.5, 0.5, 1.0, mirrored)
    return Thing(
        group.name, number, group.colour, group.kind, group.size, group.pose, dict(group.wears),
        figure, frame,
    )  # fmt: skip


def _vary(rng: Random, colour: Colour) -> Colour:
    """A slightly different paint of the same name."""
    light = rng.randint(-9, 9)
    return tuple(min(max(c + light + rng.randint(-4, 4), 0), 255) for c in colour)  # type: ignore[return-value]


def _outfit(rng: Random, group: Group, *, cold: bool) -> Outfit:
    wears, kind = group.wears, group.kind
    assert kind is not None
    top = next(g for g in ("coat", "dress", "shirt") if g in wears)
    hat = next((g for g in ("woolly hat", "sun hat", "cap") if g in wears), "")
    bottom = next((g for g in ("pants", "shorts", "skirt") if g in wears), "")
    bottom_colour = _vary(rng, COLOURS[wears[bottom]]) if bottom else rng.choice(DENIM)
    if not bottom and top != "dress":
        bottom = "pants"
    hat_colour = COLOURS[wears[hat]] if hat else rng.choice(list(COLOURS.values()))
    return Outfit(
        kind=kind, top=top, top_colour=_vary(rng, COLOURS[wears[top]]), bottom=bottom,
        bottom_colour=bottom_colour, hat=hat, hat_colour=hat_colour,
        scarf=top == "coat" and rng.random() < 0.6, gloves=cold,
    )  # fmt: skip


def _wish(rng: Random, scene: Scene, group: Group) -> _Wish | None:
    """Some groups stand beside, behind or in front of what is there already."""
    partners = [t for t in scene.things if t.grounded and t.holder is None]
    if not partners or SPECIES[group.name].layer in ("air", "water") or group.pose == "flying":
        return None
    kind = rng.choices(("beside", "line", ""), (30, 22, 48))[0]
    return _Wish(kind, rng.choice(partners)) if kind else None


def _try(
    rng: Random, scene: Scene, group: Group, thing: Thing, wish: _Wish | None, *, alone: bool
) -> Frame | None:
    """A position at random that suits the kind of thing and its wish."""
    species = SPECIES[group.name]
    layer = "air" if group.pose == "flying" else species.layer
    size = species.height * SIZES[group.size] * (KIND_HEIGHTS[group.kind] if group.kind else 1)
    if layer == "air":
        y = rng.uniform(0.16, scene.horizon + 0.06)
        scale = size * rng.uniform(0.26, 0.44)
    elif layer == "water":
        assert scene.water is not None
        y = rng.uniform(scene.water[0] + 0.035, scene.water[1] - 0.02)
        scale = size * scale_at(scene, y) * 1.25
    else:
        low, high = scene.ground, 0.965
        if layer == "road" and scene.road:
            low, high = scene.road[0] + 0.06, scene.road[1] - 0.005
        elif alone:
            low += (high - low) * 0.4
        y = rng.uniform(low, high)
        if wish and wish.kind != "line":
            reach = 0.1 if wish.kind == "row" else 0.05
            y = min(max(wish.partner.foot + rng.uniform(-reach, reach), low), high)
        scale = size * scale_at(scene, y)
    x0, y0, x1, y1 = thing.figure.bounds()
    width, height = (x1 - x0) * scale, (y1 - y0) * scale
    if width > 0.86 or height > 0.88 or max(width, height) < SMALLEST:
        return None
    left = _left_edge(rng, wish, width)
    return Frame(
        left - (-x1 if thing.frame.mirrored else x0) * scale, y, scale, thing.frame.mirrored
    )


def _left_edge(rng: Random, wish: _Wish | None, width: float) -> float:
    """Where the box of a thing begins, in picture sides."""
    if wish is None or wish.kind == "row":
        return rng.uniform(0.03, 0.97 - width)
    box = wish.partner.box
    if wish.kind == "line":
        return box.middle + rng.uniform(-0.35, 0.35) * (box.x1 - box.x0) - width / 2
    gap = rng.uniform(0.005, 0.07)
    return box.x1 + gap if rng.random() < 0.5 else box.x0 - gap - width


def _box(figure: Figure, frame: Frame) -> Box:
    x0, y0, x1, y1 = figure.bounds()
    a, b = (-x1, -x0) if frame.mirrored else (x0, x1)
    return Box(
        frame.x + a * frame.scale,
        frame.y - y1 * frame.scale,
        frame.x + b * frame.scale,
        frame.y - y0 * frame.scale,
    )


def _fits(scene: Scene, thing: Thing, frame: Frame) -> bool:
    """Inside the picture, and nobody hides anybody too much."""
    box = _box(thing.figure, frame)
    if box.x0 < 0.01 or box.x1 > 0.99 or box.y0 < 0.02 or box.y1 > 0.99:
        return False
    if any(not _apart(thing.name, frame.y, box, other) for other in scene.things):
        return False
    boxes = [(_base(scene, other).foot, other.box) for other in scene.things]
    boxes.append((frame.y, box))
    return all(
        sum(mine.shared(b) for foot, b in boxes if foot > y) <= HIDDEN * mine.area
        for y, mine in boxes
    )


def _base(scene: Scene, thing: Thing) -> Thing:
    """What carries a thing: its holder, or itself."""
    return thing if thing.holder is None else scene.things[thing.holder]


def _apart(name: str, foot: float, box: Box, other: Thing) -> bool:
    """Whether two things can be told apart: alike or equally near, they hardly overlap."""
    if other.name != name and abs(other.foot - foot) >= 0.035:
        return True
    return box.shared(other.box) <= 0.05 * min(box.area, other.box.area)


def _depth(scene: Scene, group: Group, thing: Thing) -> str:
    if SPECIES[group.name].layer in ("air", "water") or group.pose == "flying":
        return "middle"
    share = (thing.foot - scene.horizon) / (NEAREST - scene.horizon)
    return "near" if share > 0.8 else "far" if share < 0.42 else "middle"


def _hand_over(scene: Scene, group: Group, holder: Thing, rng: Random) -> bool:
    """Gives an umbrella or a kite to the person who was just placed; false if there is no room."""
    assert group.holds and group.holds_colour
    colour = _vary(rng, COLOURS[group.holds_colour])
    x, y = holder.hand()
    if group.holds == "umbrella":
        figure, pose = umbrella(rng, colour, "held"), "held"
        head = holder.frame.y - holder.figure.anchors["head top"][1] * holder.frame.scale
        frame = Frame(x, y, (y - head + 0.02 * holder.frame.scale) / 0.5)
    else:
        figure, pose = kite(rng, colour, "still"), "still"
        high = rng.uniform(0.22, 0.3)
        frame = Frame(
            x + rng.choice((-1, 1)) * rng.uniform(0.1, 0.24), high, rng.uniform(0.16, 0.2)
        )
    box = _box(figure, frame)
    if box.x0 < 0.01 or box.x1 > 0.99 or box.y0 < 0.01:
        return False
    others = scene.things if group.holds == "kite" else scene.things[:-1]
    if any(box.shared(o.box) > 0.05 * min(box.area, o.box.area) for o in others):
        return False
    thing = Thing(
        group.holds, holder.group, group.holds_colour, None, "normal", pose, {}, figure, frame
    )
    thing.box, thing.depth = box, holder.depth
    thing.holder = len(scene.things) - 1
    scene.things.append(thing)
    return True
