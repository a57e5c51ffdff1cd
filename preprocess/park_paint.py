"""From a composed scene to pixels: place, things, light of the hour; picture and exact maps.

In: a `Scene` and a size. Out: a `Painting`: picture, segment and human-part map, landmarks.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
from einops import rearrange
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from preprocess.park_colours import mix
from preprocess.park_curves import curve, ellipse, polygon
from preprocess.park_pen import Canvas, Sun
from preprocess.park_people import FACE
from preprocess.park_places import paint_place
from preprocess.park_scene import Scene, Thing
from preprocess.park_stage import SKIES, Ledger
from preprocess.park_world import SPECIES

# Light of the hour on the place and on the things: these stay bright enough to keep their colour.
TINTS = {
    "morning": ((1.03, 0.98, 0.91), (1.03, 0.99, 0.94)),
    "day": ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    "sunset": ((1.04, 0.84, 0.7), (1.05, 0.92, 0.82)),
    "night": ((0.42, 0.48, 0.74), (0.74, 0.76, 0.92)),
}
_SHADOWS = {"morning": (0.9, 0.26), "day": (0.4, 0.36), "sunset": (1.15, 0.32), "night": (0.5, 0.3)}
FACE_SHARE = 0.055  # faces narrower than this share of the picture carry no landmarks


@dataclass(frozen=True, slots=True)
class Painting:
    """One picture with everything that is known about its pixels."""

    image: Image.Image  # RGB, size x size
    segments: np.ndarray  # uint8 H W: segment ids, never 0
    human: np.ndarray  # uint8 H W: LIP ids, 0 outside people
    stuff: dict[str, int]  # class name -> segment id
    things: list[int]  # segment id of each thing of the scene
    landmarks: list[np.ndarray | None]  # per thing: float 68 2 in pixels, where a face is legible


def paint(scene: Scene, size: int) -> Painting:
    """Paints `scene` at `size` x `size` pixels."""
    canvas = Canvas(size)
    length, shadow = _SHADOWS[scene.time]
    sun = Sun(
        side=scene.sun_side, length=length, shadow=shadow, dark=scene.time in ("night", "sunset")
    )
    ledger = paint_place(canvas, scene, sun)
    first = len(ledger.ids) + 1
    for number, thing in enumerate(scene.things):
        _paint_thing(canvas, scene, thing, first + number, sun)
    image = _light(canvas, scene, ledger)
    segments, human = canvas.maps()
    ids = [first + k for k in range(len(scene.things))]
    marks = [
        _landmarks(t, i, segments, human, size) for t, i in zip(scene.things, ids, strict=True)
    ]
    return Painting(image, segments, human, ledger.ids, ids, marks)


def _paint_thing(canvas: Canvas, scene: Scene, thing: Thing, segment: int, sun: Sun) -> None:
    species = SPECIES[thing.name]
    flying = species.layer == "air" or thing.pose == "flying"
    if species.layer == "water":
        _reflect(canvas, thing)
    elif not flying and thing.holder is None:
        canvas.cast(thing.figure, thing.frame, sun)
    if thing.name == "kite":
        _string(canvas, scene, thing)
    canvas.paint(thing.figure, thing.frame, segment, sun, fur=species.fur)


def _reflect(canvas: Canvas, thing: Thing) -> None:
    """A dark broken patch on the water below a boat."""
    box = thing.box
    patch = ellipse(box.middle, box.y1, (box.x1 - box.x0) * 0.46, 0.016)
    canvas.shade([patch], (30, 50, 90), 0.5, 0.01)


def _string(canvas: Canvas, scene: Scene, thing: Thing) -> None:
    """The kite's string, to its holder's hand or out of the picture."""
    x, y = thing.frame.place(polygon(thing.figure.anchors["string"]))[0]
    if thing.holder is None:
        end = (-0.02 if x < 0.5 else 1.02, scene.horizon + 0.2)
    else:
        end = scene.things[thing.holder].hand()
    line = curve((x, y), ((x + end[0]) / 2, (y + end[1]) / 2 + 0.03), end, detail=8)
    canvas.stroke(line, (240, 238, 230), 0.003)


def _light(canvas: Canvas, scene: Scene, ledger: Ledger) -> Image.Image:
    """Averages the picture down and gives it the light of the hour; the sky has its own."""
    image = canvas.image.reduce(canvas.factor)
    if scene.time == "day":
        return _flakes(image, scene)
    sky = _share(canvas, ledger.of("sky-other-merged"), ledger.of("sky-other-merged"))
    things = _share(canvas, len(ledger.ids) + 1, 255)
    # Colours as planes: arrays with a last axis of three are several times slower.
    pixels_CHW = rearrange(np.asarray(image), "h w c -> c h w").astype(np.float32, order="C")
    place_tint, thing_tint = np.array(TINTS[scene.time], np.float32)[..., None, None]
    lit_CHW = pixels_CHW * (place_tint + (thing_tint - place_tint) * things)
    y = (np.arange(canvas.size, dtype=np.float32)[:, None] + 0.5) / canvas.size
    haze = np.array(mix(SKIES[scene.time][-1], (255, 255, 255), 0.1), np.float32)[:, None, None]
    strength = {"morning": 0.26, "sunset": 0.22, "night": 0.1}[scene.time]
    veil = np.exp(-np.abs(y - scene.horizon) / 0.12) * strength * (1 - 0.6 * things)
    lit_CHW += (haze - lit_CHW) * veil
    lit_CHW += (pixels_CHW - lit_CHW) * sky
    levels_CHW = lit_CHW.clip(0, 255).astype(np.uint8)
    image = Image.fromarray(rearrange(levels_CHW, "c h w -> h w c"))
    return _flakes(_bloom(canvas, image, scene), scene)


def _share(canvas: Canvas, first: int, last: int) -> np.ndarray:
    """Share of each pixel that segments `first` to `last` cover, float H W."""
    table = [255 if first <= v <= last else 0 for v in range(256)]
    covered = canvas.segments.point(table).reduce(canvas.factor)
    return np.asarray(covered, np.float32) / 255


def _bloom(canvas: Canvas, image: Image.Image, scene: Scene) -> Image.Image:
    """Lamps, windows and headlights shine once the sun is low."""
    if canvas.glow is None:
        return image
    glow = canvas.glow.reduce(canvas.factor)
    if scene.time == "sunset":
        glow = glow.point([v // 2 for v in range(256)] * 3)
    blur = ImageFilter.BoxBlur(canvas.size * 0.03)
    return ImageChops.screen(ImageChops.lighter(image, glow), glow.filter(blur).filter(blur))


def _flakes(image: Image.Image, scene: Scene) -> Image.Image:
    """Falling snow on some pictures of the snowy place."""
    rng = Random(scene.backdrop_seed + 1)
    if scene.place != "snow" or rng.random() < 0.45:
        return image
    size, factor = image.width, 3
    veil = Image.new("L", (size * factor, size * factor))
    draw = ImageDraw.Draw(veil)
    for _ in range(45):
        x, y, r = rng.random(), rng.random(), rng.uniform(0.003, 0.0075)
        draw.ellipse([v * size * factor for v in (x - r, y - r, x + r, y + r)], fill=235)
    image.paste((255, 255, 255), (0, 0), veil.reduce(factor))
    return image


def _landmarks(
    thing: Thing, segment: int, segments: np.ndarray, human: np.ndarray, size: int
) -> np.ndarray | None:
    """The landmarks in pixels, if the face is large enough and nothing covers it."""
    if thing.figure.landmarks is None:
        return None
    points = thing.frame.place(thing.figure.landmarks) * size
    if np.ptp(points[:, 0]) < FACE_SHARE * size:
        return None
    column, row = np.floor(points).astype(int).clip(0, size - 1).T
    if not ((segments[row, column] == segment) & (human[row, column] == FACE)).all():
        return None
    return points
