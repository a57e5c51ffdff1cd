"""Things are found and counted in scene maps."""

import numpy as np
import pytest

from mas.scene import CLASS_NAMES, PERSON, SceneMap, find_edges
from mas.things import find_things

GRASS, DOG, BUS = (CLASS_NAMES.index(name) for name in ("grass-merged", "dog", "bus"))
HAIR, NOSE = CLASS_NAMES.index("hair"), CLASS_NAMES.index("nose")


def draw(*things, size=64):
    """A scene of boxes (class, x0, y0, x1, y1), each an instance, the last ones nearest."""
    labels = np.full((size, size), GRASS, np.uint8)
    instances = np.zeros((size, size), np.int32)
    for number, (class_id, x0, y0, x1, y1) in enumerate(things, 1):
        labels[y0:y1, x0:x1] = class_id
        instances[y0:y1, x0:x1] = number
    return SceneMap(labels, find_edges(labels, instances))


def count(scene):
    return {CLASS_NAMES[k]: len(things) for k, things in find_things(scene).items()}


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_things_apart_are_counted(number):
    scene = draw(*((DOG, 14 * i, 20, 14 * i + 10, 32) for i in range(number)))
    assert count(scene) == {"dog": number}


def test_an_edge_between_two_of_a_class_separates_them():
    boxes = (DOG, 10, 20, 30, 40), (DOG, 30, 22, 50, 42)
    assert count(draw(*boxes)) == {"dog": 2}
    without = SceneMap(draw(*boxes).labels, np.zeros((64, 64), np.bool_))
    assert count(without) == {"dog": 1}


def test_an_edge_that_runs_diagonally_has_no_gap():
    labels = np.full((64, 64), DOG, np.uint8)
    instances = np.triu(np.ones((64, 64), np.int32)) + 1
    assert count(SceneMap(labels, find_edges(labels, instances))) == {"dog": 2}


def test_a_thin_diagonal_thing_stays_whole():
    labels = np.full((64, 64), GRASS, np.uint8)
    np.fill_diagonal(labels[5:40, 5:40], DOG)
    assert count(SceneMap.from_labels(labels)) == {"dog": 1}


def test_a_person_is_one_with_all_parts():
    scene = draw((PERSON, 20, 10, 40, 60), (HAIR, 24, 10, 36, 16), (NOSE, 29, 20, 31, 24))
    assert count(scene) == {"person": 1}
    assert find_things(scene)[PERSON][0].box == (20 / 64, 10 / 64, 40 / 64, 60 / 64)


def test_a_piece_cut_off_by_what_stands_in_front_is_no_thing():
    legs = draw((DOG, 10, 20, 50, 36), (BUS, 44, 10, 47, 60))
    assert count(legs) == {"dog": 1, "bus": 1}
    far = draw((DOG, 4, 20, 30, 36), (DOG, 50, 20, 54, 27))
    assert count(far) == {"dog": 1}  # far away it could be one, but is a tenth of the other
    assert count(draw((DOG, 4, 20, 30, 36), (DOG, 50, 20, 58, 28))) == {"dog": 2}


def test_specks_and_stuff_are_no_things():
    assert count(draw((DOG, 10, 10, 11, 11))) == {}
    assert count(draw()) == {}
