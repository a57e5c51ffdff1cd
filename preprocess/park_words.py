"""Captions of the park world, each with the facts it claims.

In: a composed scene. Out: sentences of a small varied grammar, and per sentence a list of claims
in the terms of the truth, so that nobody ever has to parse a caption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from preprocess.park_scene import Group, Scene, relate
from preprocess.park_world import KINDS, SPECIES

Claim = dict[str, Any]

PLACE_PHRASES: Mapping[str, tuple[str, ...]] = {
    "park": ("in the park", "in a park", "in a green park"),
    "beach": ("on the beach", "at the beach", "by the sea", "at the seaside"),
    "street": ("on the street", "in the street", "in the city", "in town", "on a city street"),
    "snow": ("in the snow", "in a snowy field", "in a snowy landscape", "in winter"),
    "mountains": ("in the mountains", "up in the mountains", "among the mountains"),
    "farm": ("on the farm", "on a farm", "at the farm", "in the countryside"),
}
WATER_PHRASES: Mapping[str, tuple[str, ...]] = {
    "beach": ("on the sea", "at the beach", "by the beach"),
    "park": ("on the river in the park", "in the park"),
    "mountains": ("on a lake in the mountains", "in the mountains"),
}
PLACE_NOUNS: Mapping[str, tuple[str, ...]] = {
    "park": ("a park", "a green park"),
    "beach": ("a beach", "a sandy beach"),
    "street": ("a street", "a city street", "a town"),
    "snow": ("a snowy field", "a winter landscape"),
    "mountains": ("a mountain landscape", "mountains"),
    "farm": ("a farm", "the countryside"),
}
TIME_PHRASES: Mapping[str, tuple[str, ...]] = {
    "morning": ("in the morning", "early in the morning", "at sunrise", "on a fresh morning"),
    "day": ("during the day", "on a sunny day", "in the daytime", "at noon", "in bright daylight"),
    "sunset": ("at sunset", "at dusk", "in the evening", "as the sun goes down"),
    "night": ("at night", "late at night", "by moonlight", "under the stars", "on a dark night"),
}
RELATION_PHRASES: Mapping[str, tuple[str, ...]] = {
    "left of": ("to the left of", "on the left of", "left of"),
    "right of": ("to the right of", "on the right of", "right of"),
    "behind": ("behind",),
    "in front of": ("in front of",),
    "next to": ("next to", "beside", "close to"),
}
SIZE_WORDS: Mapping[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "big": ("big", "large", "huge"),
}
DEPTH_PHRASES: Mapping[str, tuple[str, ...]] = {
    "near": ("in the foreground", "up close", "very near"),
    "far": ("in the distance", "far away", "in the background"),
}
SIDE_PHRASES: Mapping[str, tuple[str, ...]] = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
}
NUMBERS = ("", "one", "two", "three", "four")
CHILDREN = (("child", "children"), ("kid", "kids"))
GARMENTS: Mapping[str, tuple[str, ...]] = {
    "shirt": ("shirt", "t-shirt", "top"),
    "coat": ("coat", "jacket"),
    "dress": ("dress",),
    "skirt": ("skirt",),
    "pants": ("pants", "trousers"),
    "shorts": ("shorts",),
    "cap": ("cap",),
    "sun hat": ("hat", "sun hat"),
    "woolly hat": ("hat", "woolly hat", "winter hat"),
}


@dataclass(frozen=True, slots=True)
class Caption:
    """A sentence and exactly what it says."""

    text: str
    things: list[Claim] = field(default_factory=list)
    relations: list[Claim] = field(default_factory=list)
    place: str | None = None
    time: str | None = None

    def facts(self) -> dict[str, Any]:
        return {
            "place": self.place,
            "time": self.time,
            "things": self.things,
            "relations": self.relations,
        }


def fulfils(thing: Mapping[str, Any], claim: Claim) -> bool:
    """Whether a thing of the truth is what a claim describes, number aside."""
    if thing["class"] != claim["class"]:
        return False
    if "age" in claim and thing["kind"] not in ("boy", "girl"):
        return False
    keys = ("colour", "kind", "size", "depth", "side", "pose")
    if any(key in claim and thing[key] != claim[key] for key in keys):
        return False
    return all(thing["wears"].get(g) == colour for g, colour in claim.get("wears", {}).items())


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


class _Speaker:
    """Makes captions of one scene; each collects its claims."""

    def __init__(self, scene: Scene, truth: Sequence[Mapping[str, Any]], rng: Random) -> None:
        self.scene, self.truth, self.rng = scene, truth, rng
        self.claims: list[Claim] = []
        self.relations: list[Claim] = []

    def members(self, group: int) -> list[int]:
        """Indices of a group's things, what they hold left out."""
        return [i for i, t in enumerate(self.scene.things) if t.group == group and t.holder is None]

    def claim(self, claim: Claim) -> bool:
        """Records a claim; false (and nothing recorded) when its number would not be exact."""
        ids = [t["id"] for t in self.truth if fulfils(t, claim)]
        if len(ids) != claim["count"]:
            return False
        self.claims.append({**claim, "ids": ids})
        return True

    def describe(self, number: int, *, detail: float, definite: bool = False) -> str:
        """The noun phrase of a group; `detail` (0-1) is how likely each attribute is named."""
        group = self.scene.groups[number]
        for effort in (detail, 1.0):
            words, claim = self._noun(group, effort)
            if self.claim(claim):
                phrase = self._count(words, group.count, definite)
                return phrase + self._clothes(group, claim, detail) + self._held(group, detail)
        raise AssertionError("groups are distinct when fully described")

    def _noun(self, group: Group, detail: float) -> tuple[str, Claim]:
        rng = self.rng
        claim: Claim = {"class": group.name, "count": group.count}
        plural = group.count > 1
        nouns = SPECIES[group.name].nouns
        noun = nouns[0] if rng.random() < 0.75 else rng.choice(nouns)
        if group.kind:
            generic = rng.random() < 0.12 and detail < 1
            if generic and group.kind in ("boy", "girl") and rng.random() < 0.6:
                noun = rng.choice(CHILDREN)
                claim["age"] = "child"
            elif not generic:
                noun = rng.choice(KINDS[group.kind])
                claim["kind"] = group.kind
        words = noun[plural]
        if group.colour and rng.random() < detail:
            claim["colour"] = group.colour
            words = f"{group.colour} {words}"
        if group.size != "normal" and rng.random() < detail:
            claim["size"] = group.size
            words = f"{rng.choice(SIZE_WORDS[group.size])} {words}"
        return words, claim

    def _count(self, words: str, count: int, definite: bool) -> str:
        rng = self.rng
        if count == 1:
            if definite:
                return "the " + words
            return "one " + words if rng.random() < 0.1 else _article(words)
        if definite:
            return f"the {NUMBERS[count]} {words}"
        if count == 2 and rng.random() < 0.1:
            return f"a pair of {words}"
        return f"{NUMBERS[count]} {words}"

    def _clothes(self, group: Group, claim: Claim, detail: float) -> str:
        """Such as "in a red coat", "wearing blue trousers"; amends the claim on record."""
        garments = [g for g in group.wears if self.rng.random() < detail * 0.6][:2]
        if not garments:
            return ""
        amended = {**claim, "wears": {g: group.wears[g] for g in garments}}
        recorded = self.claims.pop()
        if not self.claim(amended):
            self.claims.append(recorded)
            return ""
        spoken = []
        for garment in garments:
            word = self.rng.choice(GARMENTS[garment])
            colour = group.wears[garment]
            if garment in ("pants", "shorts"):
                spoken.append(f"{colour} {word}")
            elif group.count > 1:
                spoken.append(f"{colour} {word}{'es' if word.endswith('s') else 's'}")
            else:
                spoken.append(_article(f"{colour} {word}"))
        return self.rng.choice((" in ", " wearing ", " in ")) + " and ".join(spoken)

    def _held(self, group: Group, detail: float) -> str:
        if not group.holds or self.rng.random() > detail + 0.15:
            return ""
        claim: Claim = {"class": group.holds, "count": 1}
        words = SPECIES[group.holds].nouns[0][0]
        if self.rng.random() < max(detail, 0.5):
            claim["colour"] = group.holds_colour
            words = f"{group.holds_colour} {words}"
        subject = len(self.claims) - 1
        if not self.claim(claim):
            return ""
        self.relations.append({"subject": subject, "relation": "holds", "object": subject + 1})
        ways = (" with ", " holding ", " under ")
        if group.holds == "kite":
            ways = (" with ", " flying ", " holding ")
        return self.rng.choice(ways) + _article(words)

    def where(self) -> str:
        place = self.scene.place
        boats = all(g.name == "boat" for g in self.scene.groups)
        phrases = WATER_PHRASES[place] if boats else PLACE_PHRASES[place]
        return " " + self.rng.choice(phrases)

    def when(self) -> str:
        return " " + self.rng.choice(TIME_PHRASES[self.scene.time])

    def verb(self, number: int) -> str:
        """Such as "is walking", "are sitting"."""
        group = self.scene.groups[number]
        choices = SPECIES[group.name].verbs[group.pose]
        return ("is " if group.count == 1 else "are ") + self.rng.choice(choices)

    def caption(self, text: str, *, place: bool, time: bool, sentence: bool = False) -> Caption:
        text = " ".join(text.split())
        if sentence and self.rng.random() < 0.7:
            text = text[0].upper() + text[1:] + ("." if self.rng.random() < 0.6 else "")
        scene = self.scene
        return Caption(
            text,
            self.claims,
            self.relations,
            scene.place if place else None,
            scene.time if time else None,
        )


def _joined(phrases: Sequence[str]) -> str:
    if len(phrases) < 2:
        return phrases[0]
    return ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _listing(
    s: _Speaker, groups: Sequence[int], *, place: bool, time: bool, detail: float
) -> Caption:
    """Such as "two brown dogs and a woman with a red umbrella on the beach at sunset"."""
    rng = s.rng
    things = _joined([s.describe(g, detail=detail) for g in groups])
    where, when = s.where() if place else "", s.when() if time else ""
    form = rng.random()
    if form < 0.15 and place:
        noun = rng.choice(PLACE_NOUNS[s.scene.place])
        return s.caption(f"{noun}{when} with {things}", place=True, time=time)
    if form < 0.3:
        art = rng.choice(("a picture of", "a drawing of", "a painting of", "an illustration of"))
        return s.caption(f"{art} {things}{where}{when}", place=place, time=time)
    if form < 0.45 and time:
        return s.caption(f"{when}, {things}{where}", place=place, time=True)
    if form < 0.6:
        verb = "is" if s.scene.groups[groups[0]].count == 1 else "are"
        return s.caption(
            f"there {verb} {things}{where}{when}", place=place, time=time, sentence=True
        )
    return s.caption(f"{things}{where}{when}", place=place, time=time)


def _acting(
    s: _Speaker, groups: Sequence[int], *, place: bool, time: bool, detail: float
) -> Caption:
    """Such as "The elephant is walking around in the park"; several actions are joined by "and"."""
    rng = s.rng
    clauses = []
    for g in groups:
        phrase = s.describe(g, detail=detail, definite=rng.random() < 0.4)
        group = s.scene.groups[g]
        for claim in s.claims:
            if claim["class"] == group.name and set(claim["ids"]) <= {
                s.truth[i]["id"] for i in s.members(g)
            }:
                claim["pose"] = group.pose
        clauses.append(f"{phrase} {s.verb(g)}")
    text = rng.choice((" and ", " while ")).join(clauses)
    where, when = s.where() if place else "", s.when() if time else ""
    if time and rng.random() < 0.25:
        return s.caption(f"{when}, {text}{where}", place=place, time=time, sentence=True)
    return s.caption(f"{text}{where}{when}", place=place, time=time, sentence=True)


def _relating(s: _Speaker, *, place: bool, time: bool, detail: float) -> Caption | None:
    """Such as "a cat to the left of two red cars"; none when no relation is beyond doubt."""
    rng, scene = s.rng, s.scene
    found = []
    for a in range(len(scene.groups)):
        for b in range(len(scene.groups)):
            if a != b:
                pairs = [(i, j) for i in s.members(a) for j in s.members(b)]
                common = set.intersection(
                    *(relate(scene.things[i], scene.things[j]) for i, j in pairs)
                )
                found += [(a, b, relation) for relation in sorted(common)]
    if not found:
        return None
    kinds = sorted({relation for _, _, relation in found})
    kind = rng.choices(kinds, [3 if k == "next to" else 2 for k in kinds])[0]
    a, b, relation = rng.choice([f for f in found if f[2] == kind])
    definite = rng.random() < 0.3
    first = s.describe(a, detail=detail, definite=definite)
    subject = 0
    second_at = len(s.claims)
    second = s.describe(b, detail=detail, definite=definite)
    s.relations.append({"subject": subject, "relation": relation, "object": second_at})
    spoken = rng.choice(RELATION_PHRASES[relation])
    where, when = s.where() if place else "", s.when() if time else ""
    sentence = rng.random() < 0.45
    verb = (" is" if scene.groups[a].count == 1 else " are") if sentence else ""
    return s.caption(
        f"{first}{verb} {spoken} {second}{where}{when}", place=place, time=time, sentence=sentence
    )


def _placing(s: _Speaker, *, place: bool, time: bool, detail: float) -> Caption | None:
    """Such as "a red car on the left", "a dog far away"."""
    rng = s.rng
    options = []
    for g in range(len(s.scene.groups)):
        members = [s.truth[i] for i in s.members(g)]
        for key, phrases in (("side", SIDE_PHRASES), ("depth", DEPTH_PHRASES)):
            values = {m[key] for m in members}
            if len(values) == 1 and (value := values.pop()) in phrases:
                options.append((g, key, value, phrases[value]))
    if not options:
        return None
    g, key, value, spoken = rng.choice(options)
    first = s.describe(g, detail=detail)
    s.claims[0][key] = value
    others = [k for k in range(len(s.scene.groups)) if k != g]
    tail = ""
    if others and rng.random() < 0.5:
        tail = " and " + s.describe(rng.choice(others), detail=detail)
    where, when = s.where() if place else "", s.when() if time else ""
    return s.caption(f"{first} {rng.choice(spoken)}{tail}{where}{when}", place=place, time=time)


def write_captions(scene: Scene, truth: Sequence[Mapping[str, Any]], rng: Random) -> list[Caption]:
    """Three captions: the first says nearly everything, the others less or otherwise.

    Args:
        scene: what is told about.
        truth: the things of the scene as `preprocess.park_truth` describes them.
        rng: decides the words.
    """
    everything = list(range(len(scene.groups)))
    captions: list[Caption] = []

    def speaker() -> _Speaker:
        return _Speaker(scene, truth, rng)

    rng.shuffle(everything)
    whole = _listing if rng.random() < 0.6 or len(everything) > 2 else _acting
    captions.append(
        whole(speaker(), everything, place=rng.random() < 0.95, time=rng.random() < 0.9, detail=0.9)
    )
    place, time = rng.random() < 0.75, rng.random() < 0.55
    second = (
        _relating(speaker(), place=place, time=time, detail=0.6) if rng.random() < 0.8 else None
    )
    if second is None:
        second = _acting(speaker(), everything[:2], place=place, time=time, detail=0.6)
    captions.append(second)
    place, time = rng.random() < 0.6, rng.random() < 0.4
    third = None
    if rng.random() < 0.3:
        third = _relating(speaker(), place=place, time=time, detail=0.5)
    elif rng.random() < 0.6:
        third = _placing(speaker(), place=place, time=time, detail=0.5)
    if third is None:
        some = everything[: rng.randint(1, len(everything))]
        third = (_listing if rng.random() < 0.5 else _acting)(
            speaker(), some, place=place, time=time, detail=0.35
        )
    captions.append(third)
    return captions
