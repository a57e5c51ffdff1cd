"""Boxes around faces and things: they hold what they should, and are drawn by the seed."""

import numpy as np
import pytest

from mas.scene import CLASS_NAMES, FACE_IDS, PERSON, SceneMap, find_edges
from train.boxes import draw_boxes, face_boxes, thing_boxes

SIZE = 64
GRASS, SHEEP = 125, CLASS_NAMES.index("sheep")
SKIN, COAT = CLASS_NAMES.index("face"), CLASS_NAMES.index("coat")
EYES, NOSE = FACE_IDS[1], FACE_IDS[2]


def paint(*things):
    """A meadow with (id, left, top, right, bottom) rectangles; each is an instance of its own."""
    labels = np.full((SIZE, SIZE), GRASS, np.uint8)
    instances = np.zeros((SIZE, SIZE), np.int32)
    for number, (label, left, top, right, bottom) in enumerate(things, start=1):
        labels[top:bottom, left:right] = label
        if label < PERSON + 80:
            instances[top:bottom, left:right] = number
    return SceneMap(labels, find_edges(labels, instances))


def test_each_of_two_sheep_side_by_side_has_its_box():
    scene = paint((SHEEP, 8, 20, 24, 36), (SHEEP, 24, 20, 44, 40))
    assert sorted(thing_boxes(scene).tolist()) == [[8, 20, 24, 36], [24, 20, 44, 40]]


def test_stuff_and_specks_have_no_box():
    assert len(thing_boxes(paint((SHEEP, 8, 20, 11, 23)))) == 0
    assert len(thing_boxes(paint())) == 0 and len(face_boxes(paint())) == 0


def test_a_person_is_one_thing_whatever_the_parts():
    scene = paint((PERSON, 10, 10, 30, 60), (COAT, 12, 30, 28, 50), (SKIN, 14, 12, 26, 24))
    assert thing_boxes(scene).tolist() == [[10, 10, 30, 60]]


def test_a_face_is_skin_with_parts_and_a_margin():
    head = (SKIN, 20, 20, 32, 36)
    assert len(face_boxes(paint(head))) == 0  # from behind
    scene = paint(head, (EYES, 22, 24, 25, 26), (EYES, 27, 24, 30, 26), (NOSE, 25, 28, 27, 31))
    margin = 4  # a quarter of 16 pixels
    assert face_boxes(scene).tolist() == [[20 - margin, 20 - margin, 32 + margin, 36 + margin]]


def test_boxes_end_at_the_border():
    scene = paint((SKIN, 0, 0, 12, 12), (NOSE, 5, 5, 8, 8))
    assert face_boxes(scene).tolist() == [[0, 0, 15, 15]]


def test_boxes_are_drawn_by_the_seed_without_repetition():
    boxes_N4 = np.arange(24).reshape(6, 4)
    first = draw_boxes(boxes_N4, 4, np.random.default_rng(1))
    assert np.array_equal(first, draw_boxes(boxes_N4, 4, np.random.default_rng(1)))
    assert len(np.unique(first[:, 0])) == 4
    draws = {tuple(draw_boxes(boxes_N4, 4, np.random.default_rng(s))[:, 0]) for s in range(9)}
    assert len(draws) > 1


@pytest.mark.parametrize("rng", [None, np.random.default_rng(0)])
def test_too_few_boxes_are_filled_up_with_zeros(rng):
    drawn = draw_boxes(np.array([[0, 0, 2, 2], [0, 0, 5, 5]]), 4, rng)
    assert drawn.shape == (4, 4) and not drawn[2:].any() and drawn[:2].any(axis=1).all()
    if rng is None:
        assert drawn[0].tolist() == [0, 0, 5, 5]  # the largest first
