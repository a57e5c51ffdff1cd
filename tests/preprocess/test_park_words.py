"""Captions of the park world claim only what is true, and their facts say what they claim."""

import re
from collections import Counter
from random import Random

import pytest

from mas.text import mirror_caption
from preprocess.park_colours import COLOURS
from preprocess.park_compose import compose, find_held_out
from preprocess.park_paint import paint
from preprocess.park_scene import Group, Scene
from preprocess.park_truth import tell
from preprocess.park_words import (
    DEPTH_PHRASES,
    NUMBERS,
    PLACE_NOUNS,
    PLACE_PHRASES,
    RELATION_PHRASES,
    SIDE_PHRASES,
    SIZE_WORDS,
    TIME_PHRASES,
    WATER_PHRASES,
    fulfils,
    write_captions,
)
from preprocess.park_world import CLOTHES, HELD_OUT, KINDS, PLACES, RELATIONS, SPECIES, TIMES

SIZE = 32


@pytest.fixture(scope="module")
def told():
    """(truth, captions) of many scenes."""
    result = []
    for index in range(320):
        scene = compose(23, index)
        truth = tell(scene, paint(scene, SIZE))
        result.append((truth, write_captions(scene, truth["things"], Random(index))))
    return result


@pytest.fixture(scope="module")
def scenes():
    return [compose(31, index) for index in range(2500)]


def test_every_claim_is_true(told):
    for truth, captions in told:
        for caption in captions:
            facts = caption.facts()
            assert facts["place"] in (None, truth["place"])
            assert facts["time"] in (None, truth["time"])
            assert facts["things"], caption.text
            for claim in facts["things"]:
                ids = [t["id"] for t in truth["things"] if fulfils(t, claim)]
                assert claim["ids"] == ids, caption.text
                assert claim["count"] == len(ids), caption.text
            for relation in facts["relations"]:
                subjects = facts["things"][relation["subject"]]["ids"]
                objects = facts["things"][relation["object"]]["ids"]
                for a in subjects:
                    for b in objects:
                        assert [a, relation["relation"], b] in truth["relations"], caption.text


def spoken(text, phrases):
    return [p for p in phrases if re.search(rf"\b{re.escape(p)}\b", text)]


def test_facts_name_place_and_time_exactly_when_the_caption_does(told):
    for truth, captions in told:
        for caption in captions:
            text = caption.text.lower()
            place = truth["place"]
            here = PLACE_PHRASES[place] + PLACE_NOUNS[place] + WATER_PHRASES.get(place, ())
            assert (caption.place == place) == bool(spoken(text, here)), text
            assert (caption.time == truth["time"]) == bool(
                spoken(text, TIME_PHRASES[truth["time"]])
            ), text
            others = [p for t in TIMES if t != truth["time"] for p in TIME_PHRASES[t]]
            assert not spoken(text, others), text


def test_facts_name_colours_numbers_and_sizes_exactly_when_the_caption_does(told):
    for _, captions in told:
        for caption in captions:
            text = caption.text.lower().replace("green park", "park")
            claims = caption.things
            claimed = Counter(c["colour"] for c in claims if "colour" in c)
            claimed += Counter(v for c in claims for v in c.get("wears", {}).values())
            said = Counter(w for w in re.findall(r"\w+", text) if w in COLOURS)
            assert said == claimed, text
            plural = Counter(c["count"] for c in claims if c["count"] > 1)
            numbers = Counter(
                NUMBERS.index(w) for w in re.findall(r"\w+", text) if w in NUMBERS[2:]
            )
            numbers[2] += len(re.findall(r"\ba pair of\b", text))
            assert +numbers == plural, text
            sizes = [w for words in SIZE_WORDS.values() for w in words]
            assert len(re.findall(rf"\b({'|'.join(sizes)})\b", text)) == sum(
                "size" in c for c in claims
            ), text


def test_facts_name_relations_and_distances_when_the_caption_does(told):
    seen = Counter()
    for _, captions in told:
        for caption in captions:
            text = caption.text.lower()
            for claim in caption.things:
                if "depth" in claim:
                    assert spoken(text, DEPTH_PHRASES[claim["depth"]]), text
            for relation in caption.relations:
                seen[relation["relation"]] += 1
                if relation["relation"] != "holds":
                    assert spoken(text, RELATION_PHRASES[relation["relation"]]), text
    assert set(seen) == {*RELATIONS, "holds"}


def test_some_captions_leave_things_out(told):
    whole = partial = 0
    for truth, captions in told:
        for caption in captions:
            named = {i for claim in caption.things for i in claim["ids"]}
            everything = named == {t["id"] for t in truth["things"]}
            whole += everything and caption.place is not None and caption.time is not None
            partial += not everything
    assert whole > 100
    assert partial > 100


def test_captions_are_short_clean_and_varied(told):
    texts = [c.text for _, captions in told for c in captions]
    assert len(set(texts)) > 0.95 * len(texts)
    for text in texts:
        assert text == text.strip() and "  " not in text and text.isascii()
        assert len(text.split()) <= 45
        assert not re.search(r"\ba [aeiou]", text), text
        assert not re.search(r"\ban [^aeiou]", text), text


def test_the_demo_sentence_is_in_the_language():
    scene = next(
        s
        for s in (compose(1, i) for i in range(20000))
        if s.place == "park"
        and [(g.name, g.count, g.pose) for g in s.groups] == [("elephant", 1, "walking")]
    )
    truth = tell(scene, paint(scene, SIZE))["things"]
    texts = {c.text for seed in range(6000) for c in write_captions(scene, truth, Random(seed))}
    assert "The elephant is walking around in the park" in texts


def test_every_class_place_time_colour_pose_and_relation_occurs(told, scenes):
    groups = [group for scene in scenes for group in scene.groups]
    assert {g.name for g in groups} == set(SPECIES)
    assert {s.place for s in scenes} == set(PLACES)
    assert {s.time for s in scenes} == set(TIMES)
    assert {(s.place, s.time) for s in scenes} == {(p, t) for p in PLACES for t in TIMES}
    assert {g.colour for g in groups if g.colour} == set(COLOURS)
    assert {c for g in groups for c in g.wears.values()} == set(CLOTHES)
    assert {g.kind for g in groups if g.kind} == set(KINDS)
    assert {g.size for g in groups} == {"small", "normal", "big"}
    assert {g.count for g in groups} == {1, 2, 3, 4}
    assert {g.holds for g in groups} == {None, "umbrella", "kite"}
    for name, species in SPECIES.items():
        assert {g.pose for g in groups if g.name == name} == set(species.poses)
    relations = {r for truth, _ in told for _, r, _ in truth["relations"]}
    assert relations == {*RELATIONS, "holds"}
    assert {t["depth"] for truth, _ in told for t in truth["things"]} == {"near", "middle", "far"}


def test_scenes_hold_one_to_four_things_and_what_people_carry(scenes):
    for scene in scenes:
        carried = [t for t in scene.things if t.holder is not None]
        assert 1 <= len(scene.things) - len(carried) <= 4
        assert len(scene.things) == sum(g.count + (g.holds is not None) for g in scene.groups)


def test_held_out_combinations_never_occur_by_default(scenes):
    assert not any(find_held_out(scene) for scene in scenes)
    for scene in scenes:
        colours = {(t.name, t.colour) for t in scene.things}
        names = {t.name for t in scene.things}
        assert ("giraffe", "purple") not in colours
        assert not ("boat" in names and scene.time == "night")
        assert not ("elephant" in names and scene.place == "snow")


def test_held_out_only_draws_one_in_every_scene_and_reaches_them_all():
    met = Counter()
    for index in range(1200):
        found = find_held_out(compose(3, index, held_out="only"))
        assert found
        met.update(found)
    assert set(met) == set(HELD_OUT)


def test_held_out_include_draws_them_like_any_other():
    found = [bool(find_held_out(compose(5, i, held_out="include"))) for i in range(400)]
    assert 0 < sum(found) < 200


def test_include_and_exclude_agree_on_scenes_without_a_held_out_combination():
    for index in range(60):
        scene = compose(5, index, held_out="include")
        if not find_held_out(scene):
            same = compose(5, index)
            assert same.groups == scene.groups
            assert [t.box for t in same.things] == [t.box for t in scene.things]


def test_nearer_ground_means_larger_things():
    from preprocess.park_scene import scale_at

    scene = Scene("park", "day", 0.5, 0.4, None, None, 0.5)
    scales = [scale_at(scene, y) for y in (0.5, 0.6, 0.7, 0.8, 0.95)]
    assert scales == sorted(scales)
    assert Group("dog", 1, "brown", None, "normal", "walking", {}).holds is None


def test_what_a_caption_claims_is_true_of_the_mirrored_picture_once_it_is_mirrored(told):
    swapped = {"left": "right", "right": "left", "left of": "right of", "right of": "left of"}
    seen = Counter()
    for _, captions in told:
        for caption in captions:
            facts, mirrored = caption.facts(), mirror_caption(caption.text)
            claims = [r["relation"] for r in facts["relations"] if r["relation"] in swapped]
            claims += [t["side"] for t in facts["things"] if t.get("side") in swapped]
            seen.update(claims)
            said = re.findall(r"\bleft\b|\bright\b", caption.text, re.IGNORECASE)
            assert len(said) == len(claims), caption.text  # no other word of it has a side
            phrases = {**RELATION_PHRASES, **SIDE_PHRASES}
            for claim in claims:
                assert any(p in mirrored for p in phrases[swapped[claim]]), mirrored
                assert not any(p in mirrored for p in phrases[claim]), mirrored
            assert claims or mirrored == caption.text
            assert mirror_caption(mirrored) == caption.text
    assert seen.keys() == swapped.keys()
