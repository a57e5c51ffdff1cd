"""Shapes of the park world and how they become paint: curves, figures, shading, soft shadows.

A figure is a list of filled outlines in its own units (x right, y up, feet at y = 0). `Canvas`
rasterises figures back to front on an enlarged picture and, from the same outlines, on two maps
without antialiasing: which segment and which human part is seen at each point. The picture is
averaged down, the maps are sampled at the pixel centres, so the three always agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from math import ceil, floor

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from preprocess.park_colours import Colour
from preprocess.park_curves import Outline, Outlines

NEUTRAL = 127  # grey that leaves a colour as it is under hard light


@dataclass(slots=True)
class Shape:
    """One filled outline of a figure."""

    points: Outline
    colour: Colour
    part: int  # LIP id of a human part, 0 = none
    relief: float  # strength of the shading, 0 = flat
    clip: Outline | None  # of an earlier shape: only what lies inside is painted, in its part
    glow: Colour | None  # light it gives off in the dark


@dataclass(slots=True)
class Figure:
    """Outlines back to front, with the points others attach to."""

    shapes: list[Shape] = field(default_factory=list)
    anchors: dict[str, tuple[float, float]] = field(default_factory=dict)
    landmarks: np.ndarray | None = None  # float 68 2, of a face that looks at the viewer
    extent: tuple[float, float, float, float] | None = None  # what `bounds` found

    def add(
        self,
        points: Outline,
        colour: Colour,
        *,
        part: int = 0,
        relief: float = 1.0,
        clip: Outline | None = None,
        glow: Colour | None = None,
    ) -> None:
        self.shapes.append(Shape(points, colour, part, relief, clip, glow))

    def bounds(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 of the finished figure in its units."""
        if self.extent is None:
            self.extent = self.silhouette().bounds()
        return self.extent

    def silhouette(self) -> Outlines:
        """The outlines that together cover what the figure covers."""
        return Outlines.join([shape.points for shape in self.shapes if shape.clip is None])


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a figure stands: picture coordinates are fractions of the side, y down."""

    x: float  # of the figure's origin
    y: float
    scale: float  # picture sides per figure unit
    mirrored: bool = False

    def place(self, points: Outline) -> Outline:
        sign = -1.0 if self.mirrored else 1.0
        return points * (sign * self.scale, -self.scale) + (self.x, self.y)


@dataclass(frozen=True, slots=True)
class Sun:
    """Where the light of a picture comes from."""

    side: float  # -1 from the left ... 1 from the right
    length: float  # of a shadow, in heights of the thing
    shadow: float  # opacity of shadows, 0-1
    dark: bool  # lamps and windows are lit


@cache
def _noise(kind: str, side: int) -> Image.Image:
    """Grey tile around NEUTRAL: 'fine' grain, or 'soft' clouds of a few periods a tile."""
    rng = np.random.default_rng(len(kind) * 1000 + side)
    if kind == "fine":
        values = rng.normal(NEUTRAL, 16, (side, side))
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).filter(
            ImageFilter.BoxBlur(0.6)
        )
    values = np.zeros((side, side), np.float32)
    for cells, strength in ((5, 22.0), (11, 14.0), (24, 9.0)):
        coarse = rng.normal(0, strength, (cells, cells)).astype(np.float32)
        coarse = np.pad(coarse, ((0, 1), (0, 1)), mode="wrap")
        values += np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
    return Image.fromarray((values + NEUTRAL).clip(0, 255).astype(np.uint8))


@cache
def _paved(kind: str, side: int) -> Image.Image:
    """Four tiles of noise, two by two: any square of one tile's size can be cut from them."""
    paved = Image.new("L", (2 * side, 2 * side))
    for corner in ((0, 0), (side, 0), (0, side), (side, side)):
        paved.paste(_noise(kind, side), corner)
    return paved


def _hard_light(area_CHW: np.ndarray, light_HW: np.ndarray) -> np.ndarray:
    """`ImageChops.hard_light` of colours under a grey light, in half the time.

    Light above NEUTRAL brightens exactly as its opposite darkens the opposite colour.
    """
    flip_HW = (light_HW >> 7) * np.uint8(255)  # where above: 255 - v is v ^ 255
    product_CHW = (area_CHW ^ flip_HW).astype(np.uint16)
    product_CHW *= (light_HW ^ flip_HW).astype(np.uint16)
    product_CHW //= NEUTRAL
    return product_CHW.astype(np.uint8) ^ flip_HW


def _relief_palette() -> bytes:
    """Relief as a coloured light: shadows lean to violet, highlights to warm."""
    colours = []
    for value in range(256):
        dark, light = min(value, NEUTRAL), max(value - NEUTRAL, 0)
        blue = NEUTRAL - (NEUTRAL - dark) * 0.86 + light * 0.8
        colours += [round(dark * 0.94) + light, round(dark * 0.95) + light, round(blue)]
    colours[NEUTRAL * 3 : NEUTRAL * 3 + 3] = [NEUTRAL] * 3
    return bytes(colours)


_RELIEF_PALETTE = _relief_palette()


def _flat(points: Outline) -> list[float]:
    return points.ravel().tolist()


class Canvas:
    """The picture being painted, enlarged, with its segment, part and glow maps."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.factor = 4 if size < 96 else 3 if size < 192 else 2
        self.side = size * self.factor
        square = (self.side, self.side)
        self.image = Image.new("RGB", square)
        self.segments = Image.new("L", square)
        self.parts = Image.new("L", square)
        self.glow: Image.Image | None = None  # RGB, once something gives off light
        self.draw = ImageDraw.Draw(self.image)
        self._segment_draw = ImageDraw.Draw(self.segments)

    def fill(self, points: Outline, colour: Colour, segment: int) -> None:
        """Paints a flat outline given in picture coordinates."""
        flat = _flat(points * self.side)
        self.draw.polygon(flat, fill=colour)
        self._segment_draw.polygon(flat, fill=segment)

    def stroke(self, points: Outline, colour: Colour, width: float) -> None:
        """A line on the picture alone: it belongs to whatever it lies on."""
        pixels = max(1, round(width * self.side))
        self.draw.line(_flat(points * self.side), fill=colour, width=pixels, joint="curve")

    def box(self, box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
        """Picture coordinates to whole pixels of the enlarged picture, clipped to it."""
        x0, y0, x1, y1 = (round(v * self.side) for v in box)
        limit = self.side
        return max(x0, 0), max(y0, 0), min(x1, limit), min(y1, limit)

    def gradient(
        self, box: tuple[float, float, float, float], colours: Sequence[Colour], segment: int
    ) -> None:
        """Vertical gradient through `colours` in a box."""
        x0, y0, x1, y1 = self.box(box)
        if x1 <= x0 or y1 <= y0:
            return
        column = Image.new("RGB", (1, len(colours)))
        column.putdata([*colours])
        span = (0, 0.5, 1, len(colours) - 0.5) if len(colours) > 1 else None
        band = column.resize((1, y1 - y0), Image.Resampling.BILINEAR, box=span)
        wide = band.resize((x1 - x0, y1 - y0), Image.Resampling.NEAREST)
        self.image.paste(wide, (x0, y0))
        self.segments.paste(segment, (x0, y0, x1, y1))

    def texture(
        self,
        box: tuple[float, float, float, float],
        layers: Sequence[tuple[str, float]],
        shift: tuple[float, float],
    ) -> None:
        """Clouds of light ('soft') and grain ('fine') over a box, as uneven paint has them.

        Args:
            box: in picture coordinates.
            layers: kind and strength of each.
            shift: of the noise, in picture sides.
        """
        x0, y0, x1, y1 = self.box(box)
        if x1 <= x0 or y1 <= y0:
            return
        area = self.image.crop((x0, y0, x1, y1))
        area_CHW = np.array([np.asarray(band) for band in area.split()])
        left, top = (-int(s * self.side) % self.side for s in shift)
        for kind, strength in layers:
            tile = _paved(kind, self.side).crop((left, top, left + x1 - x0, top + y1 - y0))
            tile = Image.blend(Image.new("L", tile.size, NEUTRAL), tile, strength)
            area_CHW = _hard_light(area_CHW, np.asarray(tile))
        grained = Image.merge("RGB", [Image.fromarray(band) for band in area_CHW])
        self.image.paste(grained, (x0, y0))

    def shade(
        self, outlines: Sequence[Outline], colour: Colour, opacity: float, blur: float
    ) -> None:
        """A soft-edged veil of colour over outlines, on the picture alone."""
        points, ends = Outlines.join(outlines)
        veiled = Outlines(points * self.side, ends)
        self._veil(veiled, colour, opacity, blur * self.side * 0.6)

    def _veil(self, outlines: Outlines, colour: Colour, opacity: float, blur: float) -> None:
        """The same in enlarged pixels."""
        left, top, right, bottom = outlines.bounds()
        x0, y0 = (max(floor(v - 2 * blur - 1), 0) for v in (left, top))
        x1, y1 = (min(ceil(v + 2 * blur + 1), self.side) for v in (right, bottom))
        if x1 <= x0 or y1 <= y0:
            return
        veil = Image.new("L", (x1 - x0, y1 - y0))
        draw, grey = ImageDraw.Draw(veil), round(255 * opacity)
        for flat in Outlines(outlines.points - (x0, y0), outlines.ends).flat():
            draw.polygon(flat, fill=grey)
        veil = veil.filter(ImageFilter.BoxBlur(blur)).filter(ImageFilter.BoxBlur(blur))
        self.image.paste(colour, (x0, y0, x1, y1), veil)

    def cast(self, figure: Figure, frame: Frame, sun: Sun) -> None:
        """The soft shadow of a figure on the ground."""
        lean, squash = -sun.side * sun.length, 0.1 + 0.22 * sun.length
        outlines, ends = figure.silhouette()
        points = frame.place(outlines)
        height = frame.y - points[:, 1]
        points[:, 0] += height * lean
        points[:, 1] = frame.y - height * squash + 0.006
        blur = self.side * (0.003 + 0.008 * frame.scale)
        self._veil(Outlines(points * self.side, ends), (28, 26, 58), sun.shadow, blur)

    def paint(
        self, figure: Figure, frame: Frame, segment: int, sun: Sun, *, fur: float = 0.0
    ) -> None:
        """Paints a figure: colours, rounded shading from the sun's side, grain of `fur`."""
        outlines, ends = Outlines.join([shape.points for shape in figure.shapes])
        placed = Outlines(frame.place(outlines) * self.side, ends)
        left, top, right, bottom = placed.bounds()
        x0, y0 = max(floor(left) - 2, 0), max(floor(top) - 2, 0)
        x1, y1 = min(ceil(right) + 2, self.side), min(ceil(bottom) + 2, self.side)
        if x1 <= x0 or y1 <= y0:
            return
        box, extent = (x0, y0, x1, y1), (x1 - x0, y1 - y0)
        local = Outlines(placed.points - (x0, y0), ends)
        flats, bright = local.flat(), local.inset((sun.side * 0.55, -0.8)).flat()
        paints = _lay_paints(figure.shapes, flats, extent)
        light = _shape_light(figure.shapes, flats, bright, extent)
        blur = max(0.6, 0.011 * frame.scale * self.side)
        light = light.filter(ImageFilter.BoxBlur(blur)).filter(ImageFilter.BoxBlur(blur))
        if fur:
            tile = _noise("fine", self.side).crop((0, 0, *extent))
            light = Image.blend(light, ImageChops.add(light, tile, 1, -NEUTRAL), fur)
        light.putpalette(_RELIEF_PALETTE)
        lit = ImageChops.hard_light(paints.colours(), light.convert("RGB"))
        mask = paints.mask()
        self.image.paste(lit, (x0, y0), mask)
        self.segments.paste(segment, box, mask)
        self.parts.paste(paints.parts(), box, mask)
        if self.glow is not None:
            self.glow.paste((0, 0, 0), box, mask)
        if sun.dark and any(shape.glow for shape in figure.shapes):
            self._shine(figure.shapes, placed)

    def _shine(self, shapes: Sequence[Shape], outlines: Outlines) -> None:
        """The light that shapes give off in the dark."""
        if self.glow is None:
            self.glow = Image.new("RGB", (self.side, self.side))
        draw = ImageDraw.Draw(self.glow)
        for shape, flat in zip(shapes, outlines.flat(), strict=True):
            if shape.glow:
                draw.polygon(flat, fill=shape.glow)

    def maps(self) -> tuple[np.ndarray, np.ndarray]:
        """Segment and human-part map at the pixel centres, uint8 H W each."""
        square = (self.size, self.size)
        segments = self.segments.resize(square, Image.Resampling.NEAREST)
        return np.asarray(segments), np.asarray(self.parts.resize(square, Image.Resampling.NEAREST))


@dataclass(slots=True)
class _Paints:
    """Which paint of a figure is seen at each point; a paint is a colour and a human part."""

    image: Image.Image  # L: number of the paint, 0 = none
    kinds: list[tuple[Colour, int]]  # of numbers 255, 254 ..., above 127 to be told from none

    def colours(self) -> Image.Image:
        none = bytes(3 * (256 - len(self.kinds)))
        image = self.image.copy()
        image.putpalette(none + b"".join(bytes(colour) for colour, _ in reversed(self.kinds)))
        return image.convert("RGB")

    def mask(self) -> Image.Image:
        return self.image.convert("1", dither=Image.Dither.NONE)

    def parts(self) -> Image.Image | int:
        """Map of the parts, or 0 where there are none."""
        parts = [part for _, part in reversed(self.kinds)]
        return self.image.point([0] * (256 - len(parts)) + parts) if any(parts) else 0


def _lay_paints(
    shapes: Sequence[Shape], flats: Sequence[list[float]], extent: tuple[int, int]
) -> _Paints:
    """Lays the paint of each shape over that of those before it."""
    kinds = list(dict.fromkeys((shape.colour, shape.part) for shape in shapes))
    assert len(kinds) <= 128, f"{len(kinds)} paints"
    numbers = {kind: 255 - k for k, kind in enumerate(kinds)}
    paints = Image.new("L", extent)
    places = {id(shape.points): flat for shape, flat in zip(shapes, flats, strict=True)}
    for clip, group in groupby(zip(shapes, flats, strict=True), lambda pair: id(pair[0].clip)):
        within = places.get(clip)
        layer = paints if within is None else paints.copy()
        draw = ImageDraw.Draw(layer)
        for shape, flat in group:
            draw.polygon(flat, fill=numbers[shape.colour, shape.part])
        if within is not None:
            inside = Image.new("1", extent)
            ImageDraw.Draw(inside).polygon(within, fill=1)
            paints.paste(layer, (0, 0), inside)
    return _Paints(paints, kinds)


def _shape_light(
    shapes: Sequence[Shape],
    flats: Sequence[list[float]],
    bright: Sequence[list[float]],
    extent: tuple[int, int],
) -> Image.Image:
    """The light on a figure, still with hard edges: each shape bright inside, dark at its rim."""
    light = Image.new("L", extent, NEUTRAL)
    draw = ImageDraw.Draw(light)
    for shape, flat, inner in zip(shapes, flats, bright, strict=True):
        if shape.clip is not None:
            continue
        draw.polygon(flat, fill=round(NEUTRAL - 45 * shape.relief))
        if shape.relief:
            draw.polygon(inner, fill=round(NEUTRAL + 12 * shape.relief))
    return light
