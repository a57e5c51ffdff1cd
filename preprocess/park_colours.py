"""Paint of the park world: the named colours and how one is made darker, lighter or mixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

Colour: TypeAlias = tuple[int, int, int]  # sRGB, 0-255

COLOURS: Mapping[str, Colour] = {
    "red": (208, 44, 40),
    "orange": (240, 134, 36),
    "yellow": (246, 208, 58),
    "green": (66, 158, 66),
    "blue": (52, 108, 206),
    "purple": (134, 78, 182),
    "pink": (244, 142, 184),
    "brown": (140, 88, 54),
    "black": (48, 46, 54),
    "white": (244, 242, 236),
    "grey": (146, 148, 154),
}
BRIGHT = ("red", "orange", "yellow", "green", "blue", "purple", "pink")


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """`first` with `share` (0-1) of `second` in it."""
    r, g, b = first
    red, green, blue = second
    return (
        round(r + (red - r) * share),
        round(g + (green - g) * share),
        round(b + (blue - b) * share),
    )


def darker(colour: Colour, share: float = 0.25) -> Colour:
    return mix(colour, (30, 22, 45), share)


def lighter(colour: Colour, share: float = 0.3) -> Colour:
    return mix(colour, (255, 250, 240), share)
