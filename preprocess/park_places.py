"""The six places of the park world: far and near ground and scenery.

In: a `Scene`. Out: paint on a `Canvas`, behind the things, and the id of each stuff's segment.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np

from preprocess import park_props as props
from preprocess.park_colours import Colour, darker, lighter, mix
from preprocess.park_curves import curve, ellipse, polygon, rectangle
from preprocess.park_pen import Canvas, Sun
from preprocess.park_scene import Scene
from preprocess.park_stage import (
    SKIES,
    Ledger,
    Stage,
    close_edge,
    flower_beds,
    meadow,
    paint_sky,
    row_of,
    sea,
    tufts,
    water_band,
    winding_path,
)


def paint_place(canvas: Canvas, scene: Scene, sun: Sun) -> Ledger:
    """Paints sky and place; returns the segment ids it used."""
    stage = Stage(canvas, scene, sun, Ledger(), Random(scene.backdrop_seed))
    paint_sky(stage)
    _PLACES[scene.place](stage)
    return stage.ledger


def _park(s: Stage) -> None:
    rng, h = s.rng, s.scene.horizon
    leaf = rng.choice(props.LEAVES)
    s.hill("grass-merged", h + 0.02, 0.07, (142, 186, 118))
    row_of(s, lambda: props.bush(rng, leaf), "tree-merged", h + 0.03, (0.05, 0.09), 9)
    green: Colour = (112, 172, 84)
    _grass_after = h + 0.02
    meadow(s, _grass_after, green)
    if rng.random() < 0.55:
        name, colour = rng.choice(
            (("dirt-merged", (206, 176, 130)), ("pavement-merged", (206, 200, 192)),
            ("gravel", (196, 188, 172))),
        )  # fmt: skip
        winding_path(s, name, colour, h + 0.02)
    if s.scene.water:
        water_band(s, "river")
        tufts(s, s.scene.water[1] + 0.01, green, 20)
    if rng.random() < 0.3:
        size = 0.035
        s.stand(
            props.fence(rng, 30, white=True), "fence-merged", -0.01, h + 0.055, size, cast=False,
        )  # fmt: skip
    base = s.scene.water[1] + 0.03 if s.scene.water else h + 0.07
    for _ in range(rng.randint(1, 3)):
        x = rng.choice((rng.uniform(0.0, 0.3), rng.uniform(0.7, 1.0)))
        s.stand(
            props.round_tree(rng, leaf), "tree-merged", x, base + rng.uniform(0, 0.03),
            rng.uniform(0.34, 0.52),
        )  # fmt: skip
    if rng.random() < 0.5:
        s.stand(props.lamp(rng), "light", rng.uniform(0.1, 0.9), base + 0.01, 0.3)
    if rng.random() < 0.75:
        flower_beds(s, base + 0.04, 0.95, rng.randint(2, 5))


def _beach(s: Stage) -> None:
    rng, h = s.rng, s.scene.horizon
    assert s.scene.water is not None
    if rng.random() < 0.4:
        s.hill(
            "mountain-merged", h + 0.005, 0.06, mix((120, 140, 170), SKIES[s.scene.time][-1],
            0.35), peaks=2,
        )  # fmt: skip
    sea(s)
    shore = s.scene.water[1]
    wave = [(-0.02 + 0.13 * k, shore + rng.uniform(-0.014, 0.014)) for k in range(9)]
    edge = curve(*wave)
    sand: Colour = (236, 210, 158)
    s.canvas.fill(close_edge(edge, 1.02), sand, s.ledger.of("sand"))
    s.canvas.shade([close_edge(edge, shore + 0.05)], (160, 124, 86), 0.3, 0.012)
    s.canvas.stroke(edge - (0, 0.004), (250, 252, 250), 0.012)
    s.rough(shore + 0.03, fine=0.7, soft=0.3)
    for _ in range(16):
        x, y = rng.random(), rng.uniform(shore + 0.06, 0.99)
        s.canvas.stroke(
            curve((x - 0.03, y), (x, y - 0.006), (x + 0.03, y), detail=3), darker(sand, 0.12),
            0.003,
        )  # fmt: skip
    if rng.random() < 0.55:
        x = rng.choice((rng.uniform(0.02, 0.16), rng.uniform(0.84, 0.98)))
        s.stand(
            props.palm(rng, (96, 160, 80)), "tree-merged", x, shore + rng.uniform(0.04, 0.08),
            rng.uniform(0.42, 0.56),
        )  # fmt: skip
    if rng.random() < 0.35:
        s.stand(
            props.rock(rng), "rock-merged", rng.random(), shore + 0.035, rng.uniform(0.07, 0.12),
        )  # fmt: skip
    for _ in range(rng.randint(2, 5)):
        x, y = rng.random(), rng.uniform(shore + 0.08, 0.98)
        tone = rng.choice(((250, 236, 226), (236, 170, 150), (214, 190, 170)))
        s.canvas.draw.ellipse([v * s.canvas.side for v in (x, y, x + 0.014, y + 0.009)], fill=tone)


def _street(s: Stage) -> None:
    rng, h = s.rng, s.scene.horizon
    assert s.scene.road is not None
    top, bottom = s.scene.road
    base = h + 0.055
    x = -rng.uniform(0, 0.12)
    while x < 1:
        width, height = rng.uniform(0.2, 0.34), rng.uniform(0.25, min(0.44, h + 0.02))
        if rng.random() < 0.13:
            s.stand(
                props.round_tree(rng, rng.choice(props.LEAVES)), "tree-merged", x + 0.12,
                base + 0.01, 0.3, cast=False,
            )  # fmt: skip
            width *= 0.8
        else:
            figure = props.building(rng, width / height)
            s.stand(figure, "building-other-merged", x, base + 0.01, height, fur=0.15, cast=False)
        x += width
    stone: Colour = (200, 192, 186)
    s.band("pavement-merged", base, top, (stone, lighter(stone, 0.15)))
    s.band("road", top, bottom, ((106, 106, 116), (92, 92, 102)))
    s.band("pavement-merged", bottom, 1, (lighter(stone, 0.1), darker(stone, 0.05)))
    s.rough(base, fine=0.5, soft=0.22)
    for y in (top - 0.004, bottom):
        s.canvas.fill(
            rectangle(0, y, 1, y + 0.012), (226, 222, 216), s.ledger.of("pavement-merged"),
        )  # fmt: skip
    middle, shift = (top + bottom) / 2, rng.random() * 0.2
    if rng.random() < 0.35:
        left = rng.uniform(0.1, 0.6)
        for k in range(6):
            y0 = top + 0.02 + (bottom - top - 0.03) * k / 6
            stripe = polygon(
                (left, y0), (left + 0.2, y0), (left + 0.21, y0 + 0.022), (left - 0.01, y0 + 0.022),
            )  # fmt: skip
            s.canvas.fill(stripe, (232, 230, 226), s.ledger.of("road"))
    else:
        for k in range(6):
            x = k * 0.2 - shift
            s.canvas.fill(
                rectangle(x, middle - 0.006, x + 0.11, middle + 0.006), (236, 228, 200),
                s.ledger.of("road"),
            )  # fmt: skip
    for k in range(9):
        x = (k + shift) / 8
        s.canvas.stroke(
            polygon((x, bottom + 0.015), (0.5 + (x - 0.5) * 1.5, 1.0)), darker(stone, 0.16), 0.004,
        )  # fmt: skip
    for k in range(rng.randint(1, 2)):
        s.stand(props.lamp(rng), "light", rng.uniform(0.05, 0.45) + 0.5 * k, top - 0.008, 0.36)
    if rng.random() < 0.4:
        s.stand(
            props.round_tree(rng, rng.choice(props.LEAVES)), "tree-merged", rng.random(),
            top - 0.012, 0.36,
        )  # fmt: skip


def _snow(s: Stage) -> None:
    rng, h = s.rng, s.scene.horizon
    if rng.random() < 0.5:
        _range(s, h + 0.02, 0.16, (150, 166, 196), snow=0.5)
    s.hill("snow", h + 0.03, 0.08, (216, 226, 242))
    leaf: Colour = (70, 120, 92)
    row_of(s, lambda: props.pine(rng, leaf, snowy=True), "tree-merged", h + 0.05, (0.09, 0.17), 7)
    s.band("snow", h + 0.05, 1, ((226, 235, 248), (244, 247, 253), (234, 240, 250)))
    for _ in range(4):
        y = rng.uniform(h + 0.1, 0.98)
        drift = ellipse(rng.random(), y, rng.uniform(0.16, 0.34), 0.022 + 0.03 * (y - h))
        s.canvas.shade([drift], (196, 212, 238), 0.55, 0.02)
    s.rough(h + 0.05, fine=0.2, soft=0.2)
    if rng.random() < 0.4:
        s.stand(
            props.cottage(rng, snowy=True), "house", rng.uniform(0.15, 0.85), h + 0.1,
            rng.uniform(0.2, 0.27),
        )  # fmt: skip
    for _ in range(rng.randint(1, 3)):
        x = rng.choice((rng.uniform(0.0, 0.25), rng.uniform(0.75, 1.0)))
        s.stand(
            props.pine(rng, leaf, snowy=True), "tree-merged", x, h + rng.uniform(0.08, 0.12),
            rng.uniform(0.32, 0.5),
        )  # fmt: skip
    if rng.random() < 0.3:
        s.stand(
            props.fence(rng, 30, white=False), "fence-merged", -0.01, h + 0.13, 0.038, cast=False,
        )  # fmt: skip


def _range(s: Stage, level: float, rise: float, colour: Colour, *, snow: float) -> None:
    """A jagged mountain range with lit and shaded sides and snow on the peaks."""
    rng, canvas = s.rng, s.canvas
    segment = s.ledger.of("mountain-merged")
    count = rng.randint(3, 4)
    order = sorted(range(count), key=lambda _: rng.random())
    for k in order:
        x, height = (k + rng.uniform(0.3, 0.7)) / count, rise * rng.uniform(0.65, 1.0)
        half = height * rng.uniform(1.0, 1.3)
        peak = (x, level - height)
        bend = x + half * rng.uniform(-0.12, 0.12)
        whole = polygon(
            (x - half, level + 0.05), (x - half * 0.45, level - height * 0.5), peak,
            (x + half * 0.5, level - height * 0.45), (x + half, level + 0.05),
        )  # fmt: skip
        canvas.fill(whole, colour, segment)
        dark = whole[2:] if s.sun.side < 0 else whole[2::-1]
        canvas.fill(
            np.concatenate([dark, polygon((bend, level + 0.05))]), darker(colour, 0.22), segment,
        )  # fmt: skip
        if snow:
            cap = height * snow * rng.uniform(0.6, 0.9)
            left, right = half * 0.55 * cap / (height * 0.5), half * 0.5 * cap / (height * 0.55)
            left, right = min(left, half * 0.5), min(right, half * 0.5)
            y = level - height + cap
            jag = polygon(
                peak, (x + right, y), (x + right * 0.45, y - cap * 0.22),
                (x + right * 0.1, y + cap * 0.1), (x - left * 0.4, y - cap * 0.25), (x - left, y),
            )  # fmt: skip
            canvas.fill(jag, (244, 247, 252), segment)


def _mountains(s: Stage) -> None:
    rng, h = s.rng, s.scene.horizon
    haze = SKIES[s.scene.time][-1]
    _range(s, h + 0.02, rng.uniform(0.22, 0.3), mix((128, 136, 166), haze, 0.25), snow=0.55)
    _range(s, h + 0.03, rng.uniform(0.12, 0.17), (116, 122, 136), snow=0.0)
    leaf: Colour = (74, 124, 84)
    s.hill("grass-merged", h + 0.035, 0.04, (124, 158, 108))
    row_of(s, lambda: props.pine(rng, leaf), "tree-merged", h + 0.055, (0.07, 0.12), 8)
    green: Colour = rng.choice(((120, 158, 88), (138, 156, 92)))
    meadow(s, h + 0.05, green)
    if s.scene.water:
        water_band(s, "water-other")
        tufts(s, s.scene.water[1] + 0.01, green, 20)
    elif rng.random() < 0.6:
        winding_path(s, "dirt-merged", (178, 146, 110), h + 0.06)
    base = s.scene.water[1] + 0.03 if s.scene.water else h + 0.1
    for _ in range(rng.randint(1, 3)):
        s.stand(
            props.rock(rng), "rock-merged", rng.random(), base + rng.uniform(0, 0.12),
            rng.uniform(0.07, 0.13),
        )  # fmt: skip
    for _ in range(rng.randint(0, 2)):
        x = rng.choice((rng.uniform(0.0, 0.2), rng.uniform(0.8, 1.0)))
        s.stand(props.pine(rng, leaf), "tree-merged", x, base + 0.01, rng.uniform(0.32, 0.46))


def _farm(s: Stage) -> None:
    rng, h = s.rng, s.scene.horizon
    s.hill("grass-merged", h + 0.03, 0.1, (158, 188, 104), peaks=2)
    field_: Colour = rng.choice(((214, 190, 96), (190, 176, 92), (176, 190, 100)))
    s.hill("dirt-merged" if rng.random() < 0.4 else "grass-merged", h + 0.05, 0.05, field_, peaks=2)
    green: Colour = (128, 178, 76)
    meadow(s, h + 0.08, green)
    side = rng.choice((0.2, 0.8))
    s.stand(
        props.barn(rng), "house", side + rng.uniform(-0.06, 0.06), h + 0.1, rng.uniform(0.24,
        0.32), fur=0.1,
    )  # fmt: skip
    leaf = rng.choice(props.LEAVES)
    for _ in range(rng.randint(1, 2)):
        s.stand(
            props.round_tree(rng, leaf), "tree-merged", 1 - side + rng.uniform(-0.15, 0.15),
            h + 0.1, rng.uniform(0.24, 0.36),
        )  # fmt: skip
    if rng.random() < 0.5:
        winding_path(s, "dirt-merged", (190, 152, 108), h + 0.11)
    s.stand(
        props.fence(rng, 26, white=rng.random() < 0.5), "fence-merged", -0.01, h + 0.125, 0.042,
        cast=False,
    )  # fmt: skip
    flower_beds(s, h + 0.17, 0.95, rng.randint(3, 6))


_PLACES: dict[str, Callable[[Stage], None]] = {
    "park": _park, "beach": _beach, "street": _street, "snow": _snow, "mountains": _mountains,
    "farm": _farm,
}  # fmt: skip
