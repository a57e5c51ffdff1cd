"""What can be in the park world, and which pictures may not be: classes, colours, places, times.

In: nothing. Out: the tables that composition, painting, captions and truth share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from preprocess import park_animals, park_objects, park_pets
from preprocess.park_colours import BRIGHT, Colour
from preprocess.park_pen import Figure

PLACES = ("park", "beach", "street", "snow", "mountains", "farm")
TIMES = ("morning", "day", "sunset", "night")
RELATIONS = ("left of", "right of", "behind", "in front of", "next to")
HELD_OUT_MODES = ("exclude", "only", "include")

CLOTHES = (*BRIGHT, "black", "white", "grey", "brown")
NATURAL: Mapping[str, Colour] = {"giraffe": (232, 184, 104), "zebra": (246, 243, 238)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Species:
    """One class of things: how it looks, how large it is, where it is met."""

    draw: Callable[[Random, Colour, str], Figure] | None  # None: people, who are dressed first
    height: float  # of its unit, in heights of a grown-up
    places: Mapping[str, float]  # weight per place; a place that is missing is never visited
    poses: tuple[str, ...] = ("still",)
    natural: tuple[str, ...] = ()  # colours met in nature; "" = a natural coat without a name
    bright: float = 0.0  # share of things in any of the bright colours
    layer: str = "ground"  # ground, road, water, air
    fur: float = 0.1  # strength of the grain, 0-1
    nouns: tuple[tuple[str, str], ...] = ()  # singular and plural
    verbs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # pose -> how one says it


def _everywhere(usual: float = 1.0, /, **changes: float) -> dict[str, float]:
    weights = dict.fromkeys(PLACES, usual) | changes
    return {place: weight for place, weight in weights.items() if weight}


_WALKERS = ("standing", "walking", "walking")
_WALK = ("walking", "walking around", "strolling", "taking a walk")
_STAND = ("standing", "standing still", "waiting")
_SIT = ("sitting", "sitting down", "resting")
_RUN = ("running", "running around", "racing along")
_GRAZE = ("eating", "looking for food", "grazing")
_FLY = ("flying", "flying high up", "soaring")
_MOVES = {
    "walking": _WALK,
    "standing": _STAND,
    "sitting": _SIT,
    "running": _RUN,
    "grazing": _GRAZE,
    "flying": _FLY,
}
_DRIVE = {"still": ("driving", "driving along", "on its way")}

SPECIES: Mapping[str, Species] = {
    "person": Species(
        draw=None,
        height=1.0,
        places=_everywhere(5, mountains=4),
        poses=("standing", "walking", "walking", "running"),
        fur=0.08,
        verbs=_MOVES,
        nouns=(("person", "people"),),
    ),
    "elephant": Species(
        draw=park_animals.elephant,
        height=1.3,
        places=_everywhere(3.2, park=4.5, street=2.2, snow=2.2),
        poses=_WALKERS,
        natural=("grey",),
        bright=0.35,
        fur=0.3,
        verbs=_MOVES,
        nouns=(("elephant", "elephants"),),
    ),
    "giraffe": Species(
        draw=park_animals.giraffe,
        height=1.65,
        places=_everywhere(2.6, street=2.0, snow=1.8),
        poses=_WALKERS,
        natural=("",),
        bright=0.35,
        fur=0.25,
        verbs=_MOVES,
        nouns=(("giraffe", "giraffes"),),
    ),
    "zebra": Species(
        draw=park_animals.zebra,
        height=1.0,
        places=_everywhere(1.8, street=1.3, snow=1.3),
        poses=(*_WALKERS, "grazing", "running"),
        natural=("",),
        verbs=_MOVES,
        nouns=(("zebra", "zebras"),),
    ),
    "horse": Species(
        draw=park_animals.horse,
        height=1.05,
        places=_everywhere(1.4, farm=2.8),
        poses=(*_WALKERS, "grazing", "running"),
        natural=("brown", "black", "white", "grey"),
        bright=0.25,
        fur=0.2,
        verbs=_MOVES,
        nouns=(("horse", "horses"), ("pony", "ponies")),
    ),
    "cow": Species(
        draw=park_animals.cow,
        height=0.88,
        places=_everywhere(1.4, farm=3),
        poses=(*_WALKERS, "grazing"),
        natural=("brown", "black", "white"),
        bright=0.25,
        fur=0.2,
        verbs=_MOVES,
        nouns=(("cow", "cows"),),
    ),
    "sheep": Species(
        draw=park_pets.sheep,
        height=0.66,
        places=_everywhere(0.8, farm=2, mountains=1.3),
        poses=(*_WALKERS, "grazing"),
        natural=("white", "white", "black", "brown", "grey"),
        bright=0.25,
        fur=0.35,
        verbs=_MOVES,
        nouns=(("sheep", "sheep"),),
    ),
    "bear": Species(
        draw=park_pets.bear,
        height=0.95,
        places=_everywhere(1.0, mountains=1.8, snow=1.6, street=0.7),
        poses=(*_WALKERS, "sitting"),
        natural=("brown", "brown", "black", "white"),
        bright=0.2,
        fur=0.35,
        verbs=_MOVES,
        nouns=(("bear", "bears"),),
    ),
    "dog": Species(
        draw=park_pets.dog,
        height=0.56,
        places=_everywhere(park=2.5, street=2, beach=2, farm=1.5),
        poses=(*_WALKERS, "sitting", "running"),
        natural=("brown", "brown", "black", "white", "grey"),
        bright=0.22,
        fur=0.25,
        verbs=_MOVES,
        nouns=(("dog", "dogs"), ("puppy", "puppies")),
    ),
    "cat": Species(
        draw=park_pets.cat,
        height=0.46,
        places=_everywhere(park=1.5, street=2, farm=1.5),
        poses=(*_WALKERS, "sitting", "sitting"),
        natural=("orange", "black", "white", "grey", "brown"),
        bright=0.2,
        fur=0.25,
        verbs=_MOVES,
        nouns=(("cat", "cats"), ("kitten", "kittens")),
    ),
    "bird": Species(
        draw=park_pets.bird,
        height=0.42,
        places=_everywhere(0.8, park=1, beach=1),
        poses=("standing", "flying"),
        natural=("brown", "black", "grey", "white"),
        bright=0.55,
        fur=0.15,
        verbs=_MOVES,
        nouns=(("bird", "birds"),),
    ),
    "teddy bear": Species(
        draw=park_pets.teddy_bear,
        height=0.5,
        places=_everywhere(0.8),
        natural=("brown", "brown", "white", "grey"),
        bright=0.5,
        fur=0.4,
        nouns=(("teddy bear", "teddy bears"), ("teddy", "teddies")),
        verbs={"still": _SIT},
    ),
    "car": Species(
        draw=park_objects.car,
        height=0.72,
        places={"street": 5, "park": 0.6, "snow": 1.6, "mountains": 1.6, "farm": 1.2, "beach": 0.8},
        natural=("black", "white", "grey"),
        bright=0.75,
        layer="road",
        fur=0.06,
        verbs=_DRIVE,
        nouns=(("car", "cars"),),
    ),
    "bus": Species(
        draw=park_objects.bus,
        height=1.12,
        places={"street": 6, "snow": 2, "mountains": 2, "farm": 1.6},
        natural=("white", "grey"),
        bright=0.85,
        layer="road",
        fur=0.06,
        verbs=_DRIVE,
        nouns=(("bus", "buses"),),
    ),
    "truck": Species(
        draw=park_objects.truck,
        height=1.0,
        places={"street": 4.5, "snow": 1.6, "mountains": 1.6, "farm": 2.4},
        natural=("white", "grey", "black", "brown"),
        bright=0.75,
        layer="road",
        fur=0.06,
        verbs=_DRIVE,
        nouns=(("truck", "trucks"), ("lorry", "lorries")),
    ),
    "bicycle": Species(
        draw=park_objects.bicycle,
        height=0.62,
        places=_everywhere(1.5, street=2),
        natural=("black", "white"),
        bright=0.85,
        fur=0.05,
        verbs={"still": _STAND},
        nouns=(("bicycle", "bicycles"), ("bike", "bikes")),
    ),
    "boat": Species(
        draw=park_objects.boat,
        height=1.05,
        places={"beach": 4, "park": 1.6, "mountains": 2.2},
        natural=("white", "brown"),
        bright=0.85,
        layer="water",
        fur=0.06,
        verbs={"still": ("sailing", "floating", "out on the water")},
        nouns=(("boat", "boats"), ("ship", "ships")),
    ),
    "airplane": Species(
        draw=park_objects.airplane,
        height=0.66,
        places=_everywhere(0.8),
        natural=("white", "grey"),
        bright=0.7,
        layer="air",
        fur=0.05,
        verbs={"still": _FLY},
        nouns=(("airplane", "airplanes"), ("plane", "planes")),
    ),
    "kite": Species(
        draw=park_objects.kite,
        height=0.5,
        places=_everywhere(0.4, beach=0.7, street=0.2),
        bright=1.0,
        layer="air",
        fur=0.08,
        verbs={"still": _FLY},
        nouns=(("kite", "kites"),),
    ),
    "sports ball": Species(
        draw=park_objects.ball,
        height=0.36,
        places=_everywhere(0.7, beach=1.1, park=1.1),
        natural=("white", "black"),
        bright=0.88,
        fur=0.12,
        verbs={"still": ("lying", "rolling")},
        nouns=(("ball", "balls"),),
    ),
    "umbrella": Species(
        draw=park_objects.umbrella,
        height=0.85,
        places={"beach": 2.5, "park": 0.6},
        natural=("white", "black"),
        bright=0.88,
        fur=0.1,
        verbs={"still": _STAND},
        nouns=(("umbrella", "umbrellas"), ("parasol", "parasols")),
    ),
    "bench": Species(
        draw=park_objects.bench,
        height=0.55,
        places={"park": 2, "street": 1.2, "snow": 0.8, "mountains": 0.5, "beach": 0.5},
        natural=("brown", "brown", "white"),
        bright=0.6,
        fur=0.2,
        verbs={"still": _STAND},
        nouns=(("bench", "benches"),),
    ),
}

KINDS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "man": (("man", "men"),),
    "woman": (("woman", "women"), ("lady", "ladies")),
    "boy": (("boy", "boys"),),
    "girl": (("girl", "girls"),),
}
KIND_HEIGHTS: Mapping[str, float] = {"man": 1.04, "woman": 0.98, "boy": 0.74, "girl": 0.72}
SIZES: Mapping[str, float] = {"small": 0.66, "normal": 1.0, "big": 1.4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Combination:
    """A class together with a colour, a time of day or a place."""

    name: str  # the class
    colour: str | None = None
    time: str | None = None
    place: str | None = None

    def describe(self) -> dict[str, str]:
        fields = {"class": self.name, "colour": self.colour, "time": self.time, "place": self.place}
        return {key: value for key, value in fields.items() if value}


# Never drawn unless asked for: what a model trained on the default pictures has not seen.
_HELD_OUT_COLOURS = {
    "elephant": "green", "giraffe": "purple", "horse": "orange", "cow": "blue", "sheep": "red",
    "bear": "pink", "dog": "blue", "cat": "purple", "bird": "pink", "teddy bear": "green",
    "car": "purple", "bus": "pink", "truck": "orange", "bicycle": "yellow", "boat": "purple",
    "airplane": "green", "kite": "orange", "sports ball": "green", "umbrella": "pink",
    "bench": "blue",
}  # fmt: skip
HELD_OUT: tuple[Combination, ...] = (
    *(Combination(name=name, colour=colour) for name, colour in _HELD_OUT_COLOURS.items()),
    Combination(name="boat", time="night"),
    Combination(name="giraffe", time="sunset"),
    Combination(name="bicycle", time="morning"),
    Combination(name="zebra", time="night"),
    Combination(name="elephant", place="snow"),
    Combination(name="bear", place="beach"),
    Combination(name="bus", place="mountains"),
    Combination(name="cow", place="street"),
)
