"""What a composed park picture is: its things with their boxes, and how they relate.

All measures are fractions of the picture's side, y down, so a scene does not depend on the
picture's size in pixels. Painting, captions and truth are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from preprocess.park_pen import Figure, Frame
from preprocess.park_world import SPECIES

NEAREST = 0.95  # y of feet that stand right in front of the viewer
GROWN_UP = 0.56  # height of a grown-up there, in picture sides


class Box(NamedTuple):
    """x0, y0, x1, y1 in picture fractions, y down."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def area(self) -> float:
        return max(self.x1 - self.x0, 0) * max(self.y1 - self.y0, 0)

    @property
    def middle(self) -> float:
        return (self.x0 + self.x1) / 2

    def shared(self, other: Box) -> float:
        """Area of the overlap."""
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return width * height if width > 0 and height > 0 else 0.0


NOWHERE = Box(0, 0, 0, 0)


@dataclass(slots=True)
class Thing:
    """One thing: what it is (for the truth) and how it is drawn (for the brush)."""

    name: str  # COCO class
    group: int  # things of one group share class, kind, colour, size
    colour: str | None  # named colour; None = natural coat, or a person
    kind: str | None  # man, woman, boy, girl
    size: str  # small, normal, big
    pose: str
    wears: dict[str, str]  # garment -> colour name
    figure: Figure
    frame: Frame
    depth: str = "middle"  # near, middle, far
    holder: int | None = None  # index of the person who holds it
    box: Box = NOWHERE

    @property
    def foot(self) -> float:
        return self.frame.y

    def hand(self) -> tuple[float, float]:
        """Where a person's higher hand is in the picture."""
        hands = [self.figure.anchors[name] for name in ("left hand", "right hand")]
        x, y = max(hands, key=lambda hand: hand[1])
        return self.frame.x + x * self.frame.scale, self.frame.y - y * self.frame.scale

    @property
    def grounded(self) -> bool:
        """Whether it stands on the ground, not in the air or on the water."""
        return SPECIES[self.name].layer in ("ground", "road") and self.pose != "flying"


@dataclass(slots=True)
class Group:
    """Things that are alike."""

    name: str
    count: int
    colour: str | None
    kind: str | None
    size: str
    pose: str
    wears: dict[str, str]
    holds: str | None = None  # class of what its one person holds
    holds_colour: str | None = None


@dataclass(slots=True)
class Scene:
    """A composed picture."""

    place: str
    time: str
    sun_side: float  # -1 left ... 1 right
    horizon: float
    water: tuple[float, float] | None  # top and bottom of the water, where there is some
    road: tuple[float, float] | None
    ground: float  # y from which things may stand
    groups: list[Group] = field(default_factory=list)
    things: list[Thing] = field(default_factory=list)  # far to near
    backdrop_seed: int = 0


def scale_at(scene: Scene, y: float) -> float:
    """Height of a grown-up whose feet stand at `y`, in picture sides."""
    share = max(y - scene.horizon, 0.02) / (NEAREST - scene.horizon)
    return GROWN_UP * share**0.72


def relate(first: Thing, second: Thing) -> set[str]:
    """Relations of `first` to `second` that can be seen without doubt.

    left of, right of: the boxes hardly share a column and their middles lie 0.08 apart.
    behind, in front of: both on the ground, one well above the other, sharing columns.
    next to: both on the ground at the same depth, with little between them.
    """
    a, b = first.box, second.box
    shared = min(a.x1, b.x1) - max(a.x0, b.x0)
    narrow = min(a.x1 - a.x0, b.x1 - b.x0)
    found = set()
    if shared <= 0.2 * narrow and abs(a.middle - b.middle) > 0.08:
        found.add("left of" if a.middle < b.middle else "right of")
    if first.grounded and second.grounded:
        if shared >= 0.3 * narrow and abs(first.foot - second.foot) > 0.05:
            found.add("behind" if first.foot < second.foot else "in front of")
        if -0.09 < shared <= 0.2 * narrow and abs(first.foot - second.foot) < 0.07:
            found.add("next to")
    return found
