"""Instances found again from edges: maps that are mirrored or resized keep their things apart."""

import numpy as np
import pytest

from mas.instances import find_instances
from mas.scene import MIRRORED, VOID, SceneMap, find_edges, nearest
from mas.things import find_things

SKY, DOG, HORSE = 119, 16, 17
SIZE = 128


def draw(seed):
    """Labels and instances of eight discs and squares of two classes that cover each other."""
    rng = np.random.default_rng(seed)
    labels, instances = np.full((SIZE, SIZE), SKY, np.uint8), np.zeros((SIZE, SIZE), np.int32)
    y, x = np.ogrid[:SIZE, :SIZE]
    for number in range(1, 9):
        (top, left), half = rng.integers(0, SIZE, 2), rng.integers(10, 30)
        down, across = abs(y - top), abs(x - left)
        inside = (down < half) & (across < half) if number % 2 else down**2 + across**2 < half**2
        labels[inside], instances[inside] = rng.choice([DOG, HORSE]), number
    return labels, instances


def count(scene):
    return {class_id: len(things) for class_id, things in find_things(scene).items()}


def compare(found, labels, instances):
    """Edges that differ from those of these segments, as a share of those between instances."""
    expected = SceneMap.from_labels(labels, instances)
    assert np.array_equal(found.labels, expected.labels)
    inner = expected.edges & ~find_edges(labels)
    return (found.edges != expected.edges).sum(), inner.sum()


def test_mirrored_things_that_touch_stay_apart():
    differing = []
    for seed in range(40):
        labels, instances = draw(seed)
        scene = SceneMap.from_labels(labels, instances)
        mirrored = scene.mirrored()
        differing.append(compare(mirrored, MIRRORED[labels[:, ::-1]], instances[:, ::-1]))
        other = SceneMap.from_labels(labels[:, ::-1].copy(), instances[:, ::-1].copy())
        assert count(mirrored) in (count(scene), count(other))
    wrong, inner = np.sum(differing, axis=0)
    assert wrong < 0.05 * inner  # small pieces that are nothing but edge


@pytest.mark.parametrize("size", [96, 127, 129, 200, 256])
def test_resized_things_that_touch_stay_apart(size):
    few = np.ix_(*2 * [nearest(SIZE, size)])
    differing, kept = [], []
    for seed in range(40):
        labels, instances = draw(seed)
        scene = SceneMap.from_labels(labels, instances)
        resized = scene.resized(size)
        differing.append(compare(resized, labels[few], instances[few]))
        expected = SceneMap.from_labels(labels[few], instances[few])
        kept.append(count(resized) in (count(scene), count(expected)))
    wrong, inner = np.sum(differing, axis=0)
    assert wrong < 0.07 * inner
    assert np.mean(kept) > 0.95


def test_edges_with_gaps_part_nothing():
    labels = np.full((8, 8), DOG, np.uint8)
    edges = np.zeros((8, 8), np.bool_)
    edges[2:6, 3] = True
    assert not np.diff(find_instances(labels, edges, edges & ~find_edges(labels))).any()
    edges[:, 3] = True
    instances = find_instances(labels, edges, edges & ~find_edges(labels))
    assert np.array_equal(find_edges(labels, instances), edges)


def test_void_and_maps_that_are_all_edge_come_through():
    labels = np.full((6, 6), VOID, np.uint8)
    for edges in (np.ones((6, 6), np.bool_), np.zeros((6, 6), np.bool_)):
        scene = SceneMap(labels, edges)
        assert scene.mirrored().resized(9) == SceneMap.from_labels(np.full((9, 9), VOID, np.uint8))
