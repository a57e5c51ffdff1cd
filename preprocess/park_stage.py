"""What the places of the park world are painted with: sky, water, meadow, paths, scenery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np

from preprocess import park_props as props
from preprocess.park_colours import Colour, darker, lighter, mix
from preprocess.park_curves import Outline, curve, ellipse, move, polygon, rotate
from preprocess.park_pen import Canvas, Figure, Frame, Sun
from preprocess.park_scene import Scene, scale_at

SKIES: dict[str, tuple[Colour, ...]] = {
    "morning": ((142, 188, 232), (190, 214, 236), (252, 224, 196), (255, 206, 172)),
    "day": ((86, 160, 228), (128, 188, 238), (176, 214, 244), (214, 234, 246)),
    "sunset": ((92, 82, 150), (190, 104, 140), (246, 142, 96), (255, 192, 104)),
    "night": ((14, 18, 50), (22, 30, 74), (36, 48, 100), (58, 72, 126)),
}
CLOUDS: dict[str, Colour] = {
    "morning": (255, 240, 230), "day": (252, 253, 255), "sunset": (255, 176, 138),
    "night": (62, 70, 116),
}  # fmt: skip
SEA: dict[str, tuple[Colour, ...]] = {
    "beach": ((58, 134, 190), (84, 172, 204), (142, 210, 214)),
    "park": ((92, 150, 184), (120, 178, 196)),
    "mountains": ((70, 130, 170), (112, 170, 190)),
}


@dataclass(slots=True)
class Ledger:
    """Which segment id stands for which class of stuff."""

    ids: dict[str, int] = field(default_factory=dict)

    def of(self, name: str) -> int:
        return self.ids.setdefault(name, len(self.ids) + 1)


@dataclass(slots=True)
class Stage:
    """Everything a place is painted with."""

    canvas: Canvas
    scene: Scene
    sun: Sun
    ledger: Ledger
    rng: Random

    def band(self, name: str, top: float, bottom: float, colours: Sequence[Colour]) -> None:
        self.canvas.gradient((0, top, 1, bottom), colours, self.ledger.of(name))

    def hill(self, name: str, level: float, rise: float, colour: Colour, *, peaks: int = 3) -> None:
        """A soft rolling edge filled down to the middle of the picture."""
        rng = self.rng
        points = [(-0.05, level + rng.uniform(-rise, 0))]
        points += [
            ((k + rng.uniform(0.2, 0.8)) / peaks, level + rng.uniform(-rise, rise * 0.3))
            for k in range(peaks)
        ]
        points.append((1.05, level + rng.uniform(-rise, 0)))
        edge = curve(*points, detail=7)
        self.canvas.fill(close_edge(edge, level + 0.3), colour, self.ledger.of(name))

    def stand(
        self,
        figure: Figure,
        name: str,
        x: float,
        y: float,
        size: float,
        *,
        fur: float = 0.25,
        cast: bool = True,
    ) -> None:
        """Puts a piece of scenery on the ground; `size` in picture sides per unit."""
        frame = Frame(x, y, size)
        if cast:
            self.canvas.cast(figure, frame, self.sun)
        self.canvas.paint(figure, frame, self.ledger.of(name), self.sun, fur=fur)

    def rough(self, top: float, *, fine: float, soft: float) -> None:
        """Uneven light and grain on everything below `top`."""
        shift = (self.rng.random(), self.rng.random())
        self.canvas.texture((0, top, 1, 1), (("soft", soft), ("fine", fine)), shift)


def close_edge(edge: Outline, bottom: float) -> Outline:
    return np.concatenate([edge, polygon((edge[-1, 0], bottom), (edge[0, 0], bottom))])


def paint_sky(s: Stage) -> None:
    """Gradient of the hour with clouds, and the sun, or moon and stars."""
    time, rng = s.scene.time, s.rng
    s.band("sky-other-merged", 0, s.scene.horizon + 0.12, (*SKIES[time], SKIES[time][-1]))
    if time == "night":
        _moon_and_stars(s)
    else:
        _sun(s)
    for _ in range(rng.randint(1, 4)):
        y = rng.uniform(0.09, s.scene.horizon * 0.7)
        _cloud(s, rng.random(), y, rng.uniform(0.07, 0.14), CLOUDS[time])


def _sun(s: Stage) -> None:
    h, rng = s.scene.horizon, s.rng
    y, r, colour = {
        "morning": (h - rng.uniform(0.04, 0.09), 0.06, (255, 244, 206)),
        "day": (rng.uniform(0.07, 0.12), 0.052, (255, 244, 170)),
        "sunset": (h - rng.uniform(0.0, 0.05), 0.085, (255, 232, 150)),
    }[s.scene.time]
    x = 0.5 + 0.36 * s.scene.sun_side
    s.canvas.shade([ellipse(x, y, r * 2.1, r * 2.1)], lighter(colour), 0.55, 0.06)
    s.canvas.fill(ellipse(x, y, r, r, count=32), colour, s.ledger.of("sky-other-merged"))


def _moon_and_stars(s: Stage) -> None:
    rng, sky = s.rng, s.ledger.of("sky-other-merged")
    for _ in range(26):
        x, y, r = rng.random(), rng.uniform(0, s.scene.horizon), rng.uniform(0.002, 0.0045)
        star = mix((255, 250, 220), SKIES["night"][1], rng.random() * 0.6)
        s.canvas.fill(ellipse(x, y, r, r, count=6), star, sky)
    x, y, r = 0.5 + 0.36 * s.scene.sun_side, rng.uniform(0.08, 0.16), 0.055
    s.canvas.shade([ellipse(x, y, r * 2, r * 2)], (190, 196, 230), 0.35, 0.05)
    if rng.random() < 0.5:
        outer = curve((0, -1), (-0.7, -0.72), (-1, 0), (-0.7, 0.72), (0, 1))
        inner = curve((0, 1), (-0.32, 0.66), (-0.46, 0), (-0.32, -0.66), (0, -1))
        crescent = rotate(np.concatenate([outer, inner]), rng.uniform(-0.5, 0.5))
        s.canvas.fill(move(crescent * r, x, y), (250, 244, 214), sky)
        return
    s.canvas.fill(ellipse(x, y, r, r, count=32), (250, 244, 214), sky)
    for dx, dy, size in ((-0.015, 0.01, 0.011), (0.018, -0.012, 0.008), (0.01, 0.022, 0.007)):
        s.canvas.fill(ellipse(x + dx, y + dy, size, size), (224, 216, 186), sky)


def _cloud(s: Stage, x: float, y: float, size: float, colour: Colour) -> None:
    """Round puffs on a flat base, darker below."""
    rng = s.rng
    puffs = []
    for k in range(-2, 3):
        r = size * (0.62 - 0.15 * abs(k)) * rng.uniform(0.85, 1.1)
        puffs.append((x + size * (0.52 * k + rng.uniform(-0.1, 0.1)), r))
    for drop, tone, opacity in ((0.09, darker(colour, 0.13), 0.75), (0.0, colour, 0.95)):
        base = y + drop * size
        rings = [ellipse(px, base - r * 0.8, r, r * 0.8, count=16) for px, r in puffs]
        s.canvas.shade(rings, tone, opacity, 0.006)


def tufts(s: Stage, top: float, colour: Colour, count: int) -> None:
    """Blades of grass, larger to the front."""
    rng, canvas = s.rng, s.canvas
    side = canvas.side
    tones = [
        lighter(colour, 0.28), darker(colour, 0.22), lighter(colour, 0.12), darker(colour, 0.12),
    ]  # fmt: skip
    for _ in range(count):
        y = top + (1.02 - top) * rng.random() ** 0.8
        size = 0.012 + 0.024 * (y - top) / (1 - top)
        x = rng.random()
        tone = tones[rng.randrange(4)]
        for lean in (-0.45, 0.05, 0.5):
            line = (
                x * side, y * side, (x + lean * size) * side,
                (y - size * (1.1 - abs(lean) * 0.5)) * side,
            )  # fmt: skip
            canvas.draw.line(line, fill=tone, width=max(1, side // 260))


def _waves(s: Stage, top: float, bottom: float, colour: Colour, count: int) -> None:
    rng = s.rng
    for _ in range(count):
        share = rng.random()
        y = top + 0.01 + (bottom - top - 0.02) * share
        half = 0.015 + 0.05 * share * rng.random()
        x = rng.random()
        line = curve(
            (x - half, y), (x - half * 0.3, y - 0.004), (x + half * 0.3, y + 0.001),
            (x + half, y - 0.002), detail=3,
        )  # fmt: skip
        s.canvas.stroke(line, colour, 0.004)


def _glitter(s: Stage, top: float, bottom: float) -> None:
    """The light of a low sun or of the moon on the water."""
    colour: Colour = {"sunset": (255, 206, 130), "night": (206, 214, 240)}.get(
        s.scene.time, (255, 246, 220),
    )  # fmt: skip
    x = 0.5 + 0.36 * s.scene.sun_side
    for _ in range(18):
        y = s.rng.uniform(top + 0.005, bottom - 0.005)
        half = s.rng.uniform(0.01, 0.035)
        dx = s.rng.uniform(-0.05, 0.05)
        s.canvas.stroke(polygon((x + dx - half, y), (x + dx + half, y)), colour, 0.004)


def sea(s: Stage) -> None:
    """The sea from the horizon to a little below the shore, which is painted over it."""
    assert s.scene.water is not None
    top, bottom = s.scene.water
    colours = SEA["beach"]
    s.band("sea", top, bottom + 0.04, colours)
    _waves(s, top, bottom, lighter(colours[-1], 0.5), 22)
    _glitter(s, top, bottom)


def water_band(s: Stage, name: str) -> None:
    """River or lake between two banks; the near one is uneven."""
    assert s.scene.water is not None
    top, bottom = s.scene.water
    colours = SEA[s.scene.place]
    s.band(name, top, bottom - 0.01, colours)
    bank = [(-0.03 + 0.106 * k, bottom + s.rng.uniform(-0.009, 0.009)) for k in range(11)]
    edge = curve(*bank, detail=4)
    s.canvas.fill(close_edge(edge, bottom - 0.015), colours[-1], s.ledger.of(name))
    s.canvas.stroke(edge, (116, 100, 70), 0.007)
    _waves(s, top, bottom - 0.012, lighter(colours[-1], 0.5), 22)
    _glitter(s, top, bottom - 0.012)


def row_of(
    s: Stage,
    make: Callable[[], Figure],
    name: str,
    y: float,
    sizes: tuple[float, float],
    count: int,
) -> None:
    """A loose row of far scenery."""
    rng = s.rng
    for k in range(count):
        x = (k + rng.uniform(0.1, 0.9)) / count
        s.stand(make(), name, x, y + rng.uniform(-0.006, 0.012), rng.uniform(*sizes), cast=False)


def meadow(s: Stage, top: float, colour: Colour) -> None:
    s.band("grass-merged", top, 1, (lighter(colour, 0.18), colour, darker(colour, 0.1)))
    s.rough(top, fine=0.4, soft=0.5)
    tufts(s, top + 0.01, colour, 110)


def flower_beds(s: Stage, low: float, high: float, count: int) -> None:
    for y in sorted(s.rng.uniform(low, high) for _ in range(count)):
        size = 0.13 * scale_at(s.scene, y) / 0.5
        s.stand(props.flowers(s.rng), "flower", s.rng.random(), y, size, fur=0, cast=False)


def winding_path(s: Stage, name: str, colour: Colour, top: float) -> None:
    """A path that winds from the front to the back."""
    rng = s.rng
    x0, x1, x2 = rng.uniform(0.2, 0.8), rng.uniform(0.3, 0.7), rng.uniform(0.35, 0.65)
    left = curve(
        (x0 - 0.17, 1.02), (x1 - 0.07, 0.5 * (1 + top)), (x2 - 0.02, top + 0.003), detail=8,
    )  # fmt: skip
    right = curve(
        (x2 + 0.02, top + 0.003), (x1 + 0.08, 0.5 * (1 + top)), (x0 + 0.19, 1.02), detail=8,
    )  # fmt: skip
    s.canvas.fill(np.concatenate([left, right]), colour, s.ledger.of(name))
    s.canvas.stroke(left, darker(colour, 0.15), 0.006)
    s.canvas.stroke(right, darker(colour, 0.15), 0.006)
