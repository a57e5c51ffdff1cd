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

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from preprocess.park_colours import Colour
from preprocess.park_curves import Outline

NEUTRAL = 127  # grey that leaves a colour as it is under hard light


@dataclass(slots=True)
class Shape:
    """One filled outline of a figure."""

    points: Outline
    colour: Colour
    part: int  # LIP id of a human part, 0 = none
    relief: float  # strength of the shading, 0 = flat
    clip: Outline | None  # only what lies inside this outline is painted
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
            points = np.concatenate([s.points for s in self.shapes if s.clip is None])
            (x0, y0), (x1, y1) = points.min(0).tolist(), points.max(0).tolist()
            self.extent = x0, y0, x1, y1
        return self.extent


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
        self.glow = Image.new("RGB", square)
        self.draw = ImageDraw.Draw(self.image)
        self._segment_draw = ImageDraw.Draw(self.segments)
        self._glow_draw = ImageDraw.Draw(self.glow)

    def fill(
        self, points: Outline, colour: Colour, segment: int, *, glow: Colour | None = None
    ) -> None:
        """Paints a flat outline given in picture coordinates."""
        flat = _flat(points * self.side)
        self.draw.polygon(flat, fill=colour)
        self._segment_draw.polygon(flat, fill=segment)
        if glow:
            self._glow_draw.polygon(flat, fill=glow)

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
        self.image.paste(band.resize((x1 - x0, y1 - y0)), (x0, y0))
        self.segments.paste(segment, (x0, y0, x1, y1))

    def texture(
        self,
        box: tuple[float, float, float, float],
        kind: str,
        shift: tuple[float, float],
        *,
        strength: float = 1.0,
        mask: Image.Image | None = None,
    ) -> None:
        """Grain ('fine') or clouds of light ('soft') over a box, as uneven paint has them."""
        x0, y0, x1, y1 = self.box(box)
        if x1 <= x0 or y1 <= y0:
            return
        tile = _noise(kind, self.side)
        tile = ImageChops.offset(tile, int(shift[0] * self.side), int(shift[1] * self.side))
        tile = tile.crop((0, 0, x1 - x0, y1 - y0))
        if strength != 1:
            tile = Image.blend(Image.new("L", tile.size, NEUTRAL), tile, strength)
        area = self.image.crop((x0, y0, x1, y1))
        grained = ImageChops.hard_light(area, Image.merge("RGB", [tile] * 3))
        self.image.paste(grained, (x0, y0), mask and mask.crop((x0, y0, x1, y1)))

    def shade(
        self, outlines: Sequence[Outline], colour: Colour, opacity: float, blur: float
    ) -> None:
        """A soft-edged veil of colour over outlines, on the picture alone."""
        self._veil([o * self.side for o in outlines], colour, opacity, blur * self.side * 0.6)

    def _veil(
        self, outlines: Sequence[Outline], colour: Colour, opacity: float, blur: float
    ) -> None:
        """The same in enlarged pixels."""
        every = np.concatenate(outlines)
        x0, y0 = np.maximum(np.floor(every.min(0) - 2 * blur - 1), 0).astype(int).tolist()
        x1, y1 = np.minimum(np.ceil(every.max(0) + 2 * blur + 1), self.side).astype(int).tolist()
        if x1 <= x0 or y1 <= y0:
            return
        veil = Image.new("L", (x1 - x0, y1 - y0))
        draw = ImageDraw.Draw(veil)
        for points in outlines:
            draw.polygon(_flat(points - (x0, y0)), fill=round(255 * opacity))
        veil = veil.filter(ImageFilter.BoxBlur(blur)).filter(ImageFilter.BoxBlur(blur))
        self.image.paste(colour, (x0, y0, x1, y1), veil)

    def cast(self, figure: Figure, frame: Frame, sun: Sun) -> None:
        """The soft shadow of a figure on the ground."""
        lean, squash = -sun.side * sun.length, 0.1 + 0.22 * sun.length
        outlines = []
        for shape in figure.shapes:
            if shape.clip is None:
                points = frame.place(shape.points)
                height = frame.y - points[:, 1]
                points[:, 0] += height * lean
                points[:, 1] = frame.y - height * squash + 0.006
                outlines.append(points * self.side)
        blur = self.side * (0.003 + 0.008 * frame.scale)
        self._veil(outlines, (28, 26, 58), sun.shadow, blur)

    def paint(
        self, figure: Figure, frame: Frame, segment: int, sun: Sun, *, fur: float = 0.0
    ) -> None:
        """Paints a figure: colours, rounded shading from the sun's side, grain of `fur`."""
        placed = [frame.place(shape.points) * self.side for shape in figure.shapes]
        every = np.concatenate(placed)
        corner = np.maximum(np.floor(every.min(0)) - 2, 0).astype(int)
        x0, y0 = corner.tolist()
        x1, y1 = np.minimum(np.ceil(every.max(0)) + 2, self.side).astype(int).tolist()
        if x1 <= x0 or y1 <= y0:
            return
        extent = (x1 - x0, y1 - y0)
        colours, light = Image.new("RGB", extent), Image.new("L", extent, NEUTRAL)
        mask = Image.new("L", extent)
        parts = self.parts.crop((x0, y0, x1, y1)) if any(s.part for s in figure.shapes) else None
        colour_draw, light_draw = ImageDraw.Draw(colours), ImageDraw.Draw(light)
        mask_draw = ImageDraw.Draw(mask)
        part_draw = ImageDraw.Draw(parts) if parts else None
        toward = np.array([sun.side * 0.55, -0.8])
        for shape, points in zip(figure.shapes, placed, strict=True):
            points = points - corner
            flat = _flat(points)
            if shape.clip is not None:
                clip = _flat(frame.place(shape.clip) * self.side - corner)
                _paint_clipped(colours, flat, clip, shape.colour)
                continue
            colour_draw.polygon(flat, fill=shape.colour)
            mask_draw.polygon(flat, fill=255)
            if part_draw:
                part_draw.polygon(flat, fill=shape.part)
            if not shape.relief:
                light_draw.polygon(flat, fill=NEUTRAL)
                continue
            rim, body = round(NEUTRAL - 45 * shape.relief), round(NEUTRAL + 12 * shape.relief)
            light_draw.polygon(flat, fill=rim)
            light_draw.polygon(_flat(_inset(points, toward)), fill=body)
        blur = max(0.6, 0.011 * frame.scale * self.side)
        light = light.filter(ImageFilter.BoxBlur(blur)).filter(ImageFilter.BoxBlur(blur))
        if fur:
            tile = _noise("fine", self.side).crop((0, 0, *extent))
            light = Image.blend(light, ImageChops.add(light, tile, 1, -NEUTRAL), fur)
        light.putpalette(_RELIEF_PALETTE)
        self.image.paste(ImageChops.hard_light(colours, light.convert("RGB")), (x0, y0), mask)
        self.segments.paste(segment, (x0, y0, x1, y1), mask)
        self.parts.paste(parts or 0, (x0, y0, x1, y1), mask)
        self.glow.paste((0, 0, 0), (x0, y0, x1, y1), mask)
        if sun.dark:
            for shape, points in zip(figure.shapes, placed, strict=True):
                if shape.glow:
                    self._glow_draw.polygon(_flat(points), fill=shape.glow)

    def maps(self) -> tuple[np.ndarray, np.ndarray]:
        """Segment and human-part map at the pixel centres, uint8 H W each."""
        start = self.factor // 2
        pick = slice(start, None, self.factor)
        return np.asarray(self.segments)[pick, pick], np.asarray(self.parts)[pick, pick]


def _paint_clipped(
    colours: Image.Image, flat: list[float], clip: list[float], colour: Colour
) -> None:
    inside = Image.new("1", colours.size)
    ImageDraw.Draw(inside).polygon(clip, fill=1)
    pattern = Image.new("1", colours.size)
    ImageDraw.Draw(pattern).polygon(flat, fill=1)
    colours.paste(colour, (0, 0, *colours.size), ImageChops.logical_and(inside, pattern))


def _inset(points: Outline, toward: np.ndarray) -> Outline:
    """The outline drawn in a little and moved toward the light: where a round body is bright."""
    after = np.concatenate([points[1:], points[:1]])
    along = after - np.concatenate([points[-1:], points[:-1]])
    area = float(points[:, 0] @ after[:, 1] - after[:, 0] @ points[:, 1]) / 2
    depth = 0.1 * abs(area) ** 0.5
    inward = along[:, ::-1] * ((-depth, depth) if area > 0 else (depth, -depth))
    inward /= np.hypot(along[:, 0], along[:, 1])[:, None] + 1e-9
    return points + inward + toward * (depth * 0.8)
