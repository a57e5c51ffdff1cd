"""The judge: which claims of a caption hold."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from mas.obedience import (
    COLOURS,
    FORMAT,
    Obedience,
    Seen,
    judge,
    read_colour,
    relates,
    wilson_interval,
)
from mas.scene import CLASS_NAMES, from_coco, merge
from mas.things import find_things
from preprocess.park_colours import COLOURS as PAINT
from preprocess.park_truth import FORMAT as WRITTEN
from preprocess.park_truth import picture
from preprocess.park_words import RELATION_PHRASES
from tests.mas.test_things import BUS, DOG, draw

CLAIM = {"class": "dog", "count": 2, "colour": "brown"}
TWO_DOGS = draw((DOG, 4, 30, 20, 44), (DOG, 40, 30, 56, 44))


def see(scene, colour="brown", **read):
    pixels = np.full((64, 64, 3), (100, 160, 90), np.uint8)
    for things in find_things(scene).values():
        for thing in things:
            pixels[thing.mask_HW] = COLOURS[colour]
    return Seen(scene=scene, pixels_HWC=pixels, **read)


def facts(*things, relations=(), **rest):
    return {"place": None, "time": None, "things": things, "relations": relations, **rest}


def test_the_colours_are_those_of_the_world():
    assert dict(COLOURS) == dict(PAINT)


def test_every_relation_of_the_world_is_known():
    assert not relates([], "holds", [], counts=(1, 1))
    for relation in RELATION_PHRASES:
        relates([], relation, [], counts=(1, 1))
    with pytest.raises(ValueError, match="no relation 'above'; known are left of"):
        relates([], "above", [], counts=(1, 1))


def test_a_caption_that_is_kept():
    verdict = judge(facts(CLAIM, place="park", time="day"), see(TWO_DOGS, place="park", time="day"))
    assert verdict == {
        "class": [True], "number": [True], "colour": [True], "relation": [],
        "place": [True], "time": [True],
    }  # fmt: skip


def test_each_broken_claim_is_seen():
    asked = facts(CLAIM, place="park", time="day")
    one = draw((DOG, 4, 30, 20, 44))
    assert judge(asked, see(one))["number"] == [False]
    assert judge(asked, see(one))["class"] == [True]
    assert judge(asked, see(one))["colour"] == [True]  # all that were found
    assert judge(asked, see(draw((BUS, 4, 30, 40, 44))))["class"] == [False]
    assert judge(asked, see(draw((BUS, 4, 30, 40, 44))))["colour"] == [False]
    assert judge(asked, see(TWO_DOGS, "blue"))["colour"] == [False]
    assert judge(asked, see(TWO_DOGS, place="beach"))["place"] == [False]
    assert judge(asked, see(TWO_DOGS, time="night"))["time"] == [False]
    assert "place" not in judge(asked, see(TWO_DOGS))  # nobody read it


def test_mentions_of_one_class_add_up():
    asked = facts({**CLAIM, "count": 1}, {**CLAIM, "count": 1, "colour": "black"})
    assert judge(asked, see(TWO_DOGS))["number"] == [True]
    assert judge(asked, see(TWO_DOGS))["colour"] == [True, False]


LEFT, RIGHT = (DOG, 4, 30, 20, 44), (BUS, 40, 30, 60, 44)
FAR, NEAR = (DOG, 20, 20, 40, 30), (BUS, 18, 26, 44, 50)


@pytest.mark.parametrize(
    ("first", "relation", "second", "holds"),
    [
        (LEFT, "left of", RIGHT, True),
        (RIGHT, "left of", LEFT, False),
        (RIGHT, "right of", LEFT, True),
        (LEFT, "right of", RIGHT, False),
        (FAR, "behind", NEAR, True),
        (NEAR, "behind", FAR, False),
        (NEAR, "in front of", FAR, True),
        (LEFT, "behind", RIGHT, False),
        (LEFT, "next to", RIGHT, False),
        ((DOG, 4, 30, 20, 44), "next to", (BUS, 22, 28, 60, 44), True),
        ((DOG, 4, 30, 20, 44), "holds", (BUS, 10, 20, 30, 34), True),
        (LEFT, "holds", RIGHT, False),
    ],
)
def test_relations_follow_the_boxes(first, relation, second, holds):
    found = find_things(draw(*sorted((first, second), key=lambda thing: thing[4])))
    subjects, others = found[first[0]], found[second[0]]
    assert relates(subjects, relation, others, counts=(1, 1)) == holds


def test_a_relation_needs_as_many_as_are_claimed():
    scene = draw(LEFT, (DOG, 4, 2, 20, 16), (BUS, 40, 30, 60, 44))
    dogs, bus = find_things(scene)[DOG], find_things(scene)[BUS]
    assert relates(dogs, "left of", bus, counts=(2, 1))
    moved = draw(LEFT, (DOG, 42, 2, 60, 16), (BUS, 40, 30, 60, 44))
    dogs, bus = find_things(moved)[DOG], find_things(moved)[BUS]
    assert relates(dogs, "left of", bus, counts=(1, 1))
    assert not relates(dogs, "left of", bus, counts=(2, 1))


def test_a_relation_is_part_of_the_verdict_and_one_within_a_class_is_not():
    claims = ({**CLAIM, "count": 1}, {"class": "bus", "count": 1}, {"class": "dog", "count": 1})
    left = {"subject": 0, "relation": "left of", "object": 1}
    within = {"subject": 0, "relation": "left of", "object": 2}
    asked = facts(*claims, relations=[left, within])
    assert judge(asked, see(draw(LEFT, RIGHT)))["relation"] == [True]
    assert judge(asked, see(draw(LEFT)))["relation"] == [False]


@pytest.mark.parametrize("name", COLOURS)
def test_a_colour_is_read_through_shading_and_light(name):
    rng = np.random.default_rng(0)
    light = np.array([0.74, 0.76, 0.92])
    shade = rng.uniform(0.9, 1.05, (500, 1))
    pixels = np.clip(np.array(COLOURS[name]) * light * shade, 0, 255).astype(np.uint8)
    assert read_colour(pixels, light) == name


def test_windows_and_wheels_do_not_hide_a_bright_colour():
    pixels = np.array([COLOURS["black"]] * 6 + [COLOURS["red"]] * 4, np.uint8)
    assert read_colour(pixels) == "red"


def test_shares_are_of_claims_and_nan_where_nothing_was_claimed():
    judge_all = Obedience({})
    judge_all.update(facts(CLAIM), see(TWO_DOGS))
    judge_all.update(facts(CLAIM), see(draw(LEFT), "blue"))
    shares = judge_all.compute()
    assert shares["class"] == 1 and shares["number"] == 0.5 and shares["colour"] == 0.5
    assert shares["all"] == 0.5
    assert np.isnan(shares["relation"]) and np.isnan(shares["place"])


def test_every_share_comes_with_what_it_was_counted_from():
    judge_all = Obedience({})
    for scene in (TWO_DOGS, TWO_DOGS, draw(LEFT)):
        judge_all.update(facts(CLAIM), see(scene))
    counted, shares = judge_all.count(), judge_all.compute()
    assert counted.keys() == shares.keys()
    assert (counted["class"]["kept"], counted["class"]["count"]) == (3, 3)
    assert (counted["number"]["kept"], counted["number"]["count"]) == (2, 3)
    assert (counted["all"]["kept"], counted["all"]["count"]) == (2, 3)
    assert counted["place"] == {"kept": 0, "count": 0, "interval": None}
    for claim, share in shares.items():
        if counted[claim]["count"]:
            low, high = counted[claim]["interval"]
            assert share == counted[claim]["kept"] / counted[claim]["count"]
            assert 0 <= low <= share <= high <= 1 and low < high


@pytest.mark.parametrize(("kept", "count"), [(109, 119), (0, 5), (100, 100), (1, 1), (7, 18)])
def test_intervals_are_wilsons(kept, count):
    z, share = 1.959964, kept / count  # of 95 %
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    spread = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + (z / count / 2) ** 2)
    assert wilson_interval(kept, count) == pytest.approx((middle - spread, middle + spread))


def test_true_park_pictures_keep_nearly_all_claims():
    judge_all, n = Obedience({}), 60
    assert FORMAT == WRITTEN
    for i in range(n):
        files = picture(7, i, size=128)
        park = json.loads(files["json"])["park"]
        judge_all.lights[park["time"]] = np.array(park["light"])
        ids = np.array(Image.open(io.BytesIO(files["panoptic.png"])))
        segments = from_coco(ids, json.loads(files["segments.json"])["segments_info"])
        human = np.array(Image.open(io.BytesIO(files["human.png"])))
        scene = merge(panoptic=segments, human=human)
        pixels = np.array(Image.open(io.BytesIO(files["jpg"])))
        seen = Seen(scene=scene, pixels_HWC=pixels, place=park["place"], time=park["time"])
        for claims in park["facts"]:
            judge_all.update(claims, seen)
            assert {claim["class"] for claim in claims["things"]} <= set(CLASS_NAMES)
    shares = judge_all.compute()
    assert shares["class"] == shares["place"] == shares["time"] == 1
    assert shares["number"] > 0.92 and shares["colour"] > 0.93 and shares["relation"] > 0.85
