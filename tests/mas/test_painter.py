"""Strokes become scenes; wishes become pictures, can be stopped, and get in nobody's way."""

import numpy as np
import pytest
import torch
from einops import repeat

from mas.painter import CANVAS, Painter, Wish, draw_scene, find_free, read_drawing
from mas.scene import CLASS_NAMES, PALETTE, VOID, SceneMap, find_edges

SIZE, GRID = 32, 4
CELL = SIZE // GRID
DOG, GRASS = (CLASS_NAMES.index(name) for name in ("dog", "grass-merged"))
SETTINGS = {"guidance": 2.0, "temperature": 1.0, "top_p": 1.0}


def layer(*strokes):
    """An RGBA layer of the canvas with (rows, columns, class id, alpha) painted on it."""
    rgba = np.zeros((CANVAS, CANVAS, 4), np.uint8)
    for rows, columns, index, alpha in strokes:
        rgba[rows, columns, :3] = PALETTE[index]
        rgba[rows, columns, 3] = alpha
    return rgba


def drawing(*layers, background=None):
    return {"background": background, "layers": list(layers), "composite": None}


TOP, BOTTOM = slice(0, 256), slice(256, 512)
LEFT, MIDDLE, RIGHT = slice(0, 128), slice(128, 256), slice(256, 512)
ALL = slice(None)


@pytest.mark.parametrize(
    "nothing",
    [
        None,
        drawing(),
        drawing(layer()),
        drawing(background=np.full((CANVAS, CANVAS, 4), 255, np.uint8)),
        drawing(layer((TOP, ALL, DOG, 100))),  # less than half opaque
        drawing(layer((TOP, ALL, DOG, 255)), layer((TOP, ALL, VOID, 255))),  # emptied again
    ],
)
def test_a_canvas_on_which_nothing_is_drawn_is_no_scene(nothing):
    assert read_drawing(nothing, None, SIZE) is None


def test_no_class_is_as_white_as_the_canvas():
    assert not (PALETTE == 255).all(-1).any()


def test_strokes_become_their_classes_at_the_size_of_the_model():
    scene = read_drawing(
        drawing(layer((BOTTOM, ALL, GRASS, 255), (TOP, LEFT, DOG, 255))), None, SIZE
    )
    assert (scene.labels[16:] == GRASS).all()
    assert (scene.labels[:16, :8] == DOG).all()
    assert (scene.labels[:16, 8:] == VOID).all()
    assert np.array_equal(scene.edges, find_edges(scene.labels))


def test_blurred_rims_are_snapped_to_the_nearest_class():
    rgba = layer((ALL, ALL, DOG, 255))
    rgba[:, LEFT, :3] ^= np.array([3, 1, 2], np.uint8)
    assert (read_drawing(drawing(rgba), None, SIZE).labels == DOG).all()


def test_things_of_one_class_on_two_layers_are_two_things():
    together = drawing(layer((TOP, LEFT, DOG, 255), (TOP, MIDDLE, DOG, 255)))
    apart = drawing(layer((TOP, LEFT, DOG, 255)), layer((TOP, MIDDLE, DOG, 255)))
    one, two = (read_drawing(x, None, SIZE) for x in (together, apart))
    assert np.array_equal(one.labels, two.labels)
    assert not one.edges[:15, 7].any()
    assert two.edges[:15, 7].all()


@pytest.fixture
def two_dogs():
    """Two dogs side by side on grass, a hole of void below."""
    labels = np.full((SIZE, SIZE), GRASS, np.uint8)
    labels[4:12, 4:20] = DOG
    labels[20:24, 20:24] = VOID
    things = np.zeros((SIZE, SIZE), np.int32)
    things[4:12, 4:12] = 1
    return SceneMap.from_labels(labels, things)


def test_a_scene_on_the_canvas_is_read_as_it_was(two_dogs):
    assert two_dogs.edges[5, 11] and not find_edges(two_dogs.labels)[5, 11]
    assert read_drawing(draw_scene(two_dogs), two_dogs, SIZE) == two_dogs


def test_strokes_cover_the_scene_and_its_edges(two_dogs):
    shown = draw_scene(two_dogs)
    shown["layers"] = [layer((slice(4 * 16, 8 * 16), ALL, GRASS, 255))]
    scene = read_drawing(shown, two_dogs, SIZE)
    assert (scene.labels[4:8] == GRASS).all()
    assert not scene.edges[4:7, 11].any()  # where there is no dog any more
    assert scene.edges[8:12, 11].all()  # where there are two still


def test_edges_of_another_scene_than_the_shown_one_are_of_no_use(two_dogs):
    other = SceneMap(two_dogs.labels[::-1].copy(), two_dogs.edges)
    scene = read_drawing(draw_scene(two_dogs), other, SIZE)
    assert np.array_equal(scene.edges, find_edges(two_dogs.labels))


def test_cells_are_free_where_most_of_them_is_void():
    labels = np.full((SIZE, SIZE), VOID, np.uint8)
    labels[: CELL + 5] = GRASS  # the first row of cells, and five eighths of the second
    labels[2 * CELL : 2 * CELL + 3] = DOG  # three eighths of the third
    scene, free = find_free(SceneMap.from_labels(labels), GRID)
    expected = repeat(np.array([False, False, True, True]), "h -> (h p) w", p=CELL, w=SIZE)
    assert np.array_equal(free, expected)
    assert (scene.labels[: CELL + 6] == GRASS).all()
    assert (scene.labels[2 * CELL - 1] == DOG).all()  # the nearest may lie in a free cell
    assert (scene.labels[CELL + 6] != VOID).all()
    assert np.array_equal(scene.labels[2 * CELL :], labels[2 * CELL :])


def test_specks_take_what_is_around_them_and_edges_stay(two_dogs):
    scene, free = find_free(two_dogs, GRID)
    assert free is None
    assert (scene.labels != VOID).all()
    drawn = two_dogs.labels != VOID
    assert np.array_equal(scene.labels[drawn], two_dogs.labels[drawn])
    assert scene.edges[4:12, 11].all()
    whole, _ = find_free(scene, GRID)
    assert whole is scene


@pytest.fixture(scope="module")
def painter(tiny_model):
    return Painter(tiny_model)


def wish(**changed):
    settings = {
        "caption": "a giraffe in the park",
        "scene": None,
        "keep_void": False,
        "count": 2,
        "seed": 3,
        "scene_sampling": SETTINGS,
        "image_sampling": SETTINGS,
        "candidates": 1,
        "refine": True,
    }
    return Wish(**settings | changed)


def pixels(images):
    return [np.asarray(image).tobytes() for image in images]


def test_scenes_come_before_pictures_and_both_are_those_of_the_model(painter):
    seen = list(painter.paint(wish()))
    shares = [shown.share for shown in seen]
    assert shares == sorted(shares) and shares[-1] == 1
    first = next(i for i, shown in enumerate(seen) if shown.scenes)
    assert all(shown.images is None for shown in seen[: first + 1])
    expected = painter.model.generate(
        wish().caption, count=2, seed=3, scene_sampling=SETTINGS, image_sampling=SETTINGS
    )
    assert seen[first].scenes == seen[-1].scenes == expected.scenes
    assert pixels(seen[-1].images) == pixels(expected.images)
    assert all(shown.result is None for shown in seen[:-1])
    assert seen[-1].result.seeds == [3, 4]


def test_what_is_drawn_stays_and_the_rest_is_invented(painter, two_dogs):
    labels = two_dogs.labels.copy()
    labels[2 * CELL :] = VOID
    half = SceneMap.from_labels(labels)
    kept = painter.model.vqseg.encode(*batch(find_free(half, GRID)[0])).reshape(GRID, GRID)
    results = [list(painter.paint(wish(scene=half, seed=s, count=1)))[-1].result for s in range(4)]
    tokens = [r.tokens.scene.reshape(GRID, GRID) for r in results]
    assert all(np.array_equal(t[:2], kept[:2]) for t in tokens)
    assert len({t[2:].numpy().tobytes() for t in tokens}) > 1
    whole = list(painter.paint(wish(scene=half, keep_void=True, count=1)))[-1].result
    assert whole.scenes == [half]


def batch(scene):
    return torch.from_numpy(scene.labels)[None], torch.from_numpy(scene.edges)[None]


def test_a_wish_that_cannot_be_is_said_and_the_next_one_is_served(painter):
    with pytest.raises(ValueError, match="the caption is empty"):
        list(painter.paint(wish(caption="")))
    with pytest.raises(ValueError, match="top_p"):
        list(painter.paint(wish(scene_sampling={**SETTINGS, "top_p": 0.0})))
    assert list(painter.paint(wish()))[-1].result is not None


def test_a_stopped_wish_ends_without_a_result_and_stops_nobody_else(painter):
    painter.stop("nobody")  # has not asked for anything
    running = painter.paint(wish(), "me")
    next(running)
    painter.stop("somebody else")
    painter.stop("me")
    assert all(shown.result is None for shown in running)
    assert list(painter.paint(wish(), "me"))[-1].result is not None


def test_who_leaves_lets_the_others_paint(painter):
    running = painter.paint(wish(), "left")
    next(running)
    running.close()
    assert list(painter.paint(wish(), "stays"))[-1].result is not None
