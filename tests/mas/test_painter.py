"""Strokes become scenes; wishes become pictures, can be stopped, and get in nobody's way."""

import itertools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from einops import repeat

from mas.drawing import CANVAS, canvas_side, draw_scene, free_cells, read_drawing, widen
from mas.painter import Painter, Wish
from mas.request import fill_void
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
    assert read_drawing(nothing, None, SIZE).scene is None


def test_no_class_is_as_white_as_the_canvas():
    assert not (PALETTE == 255).all(-1).any()


def test_strokes_become_their_classes_at_the_size_of_the_model():
    scene = read_drawing(
        drawing(layer((BOTTOM, ALL, GRASS, 255), (TOP, LEFT, DOG, 255))), None, SIZE
    ).scene
    assert (scene.labels[16:] == GRASS).all()
    assert (scene.labels[:16, :8] == DOG).all()
    assert (scene.labels[:16, 8:] == VOID).all()
    assert np.array_equal(scene.edges, find_edges(scene.labels))


def test_blurred_rims_are_snapped_to_the_nearest_class():
    rgba = layer((ALL, ALL, DOG, 255))
    rgba[:, LEFT, :3] ^= np.array([3, 1, 2], np.uint8)
    assert (read_drawing(drawing(rgba), None, SIZE).scene.labels == DOG).all()


def test_things_of_one_class_on_two_layers_are_two_things():
    together = drawing(layer((TOP, LEFT, DOG, 255), (TOP, MIDDLE, DOG, 255)))
    apart = drawing(layer((TOP, LEFT, DOG, 255)), layer((TOP, MIDDLE, DOG, 255)))
    one, two = (read_drawing(x, None, SIZE).scene for x in (together, apart))
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
    assert read_drawing(draw_scene(two_dogs), two_dogs, SIZE).scene == two_dogs


def test_strokes_cover_the_scene_and_its_edges(two_dogs):
    shown = draw_scene(two_dogs)
    shown["layers"] = [layer((slice(4 * 16, 8 * 16), ALL, GRASS, 255))]
    scene = read_drawing(shown, two_dogs, SIZE).scene
    assert (scene.labels[4:8] == GRASS).all()
    assert not scene.edges[4:7, 11].any()  # where there is no dog any more
    assert scene.edges[8:12, 11].all()  # where there are two still
    assert not scene.edges[4:7, :3].any()  # grass on grass is grass


def test_stuff_has_no_instances():
    meadow = drawing(layer((TOP, ALL, GRASS, 255)), layer((BOTTOM, ALL, GRASS, 255)))
    assert not read_drawing(meadow, None, SIZE).scene.edges.any()


def test_edges_of_another_scene_than_the_shown_one_are_of_no_use(two_dogs):
    other = SceneMap(two_dogs.labels[::-1].copy(), two_dogs.edges)
    scene = read_drawing(draw_scene(two_dogs), other, SIZE).scene
    assert np.array_equal(scene.edges, find_edges(two_dogs.labels))


def test_cells_are_free_where_most_of_them_is_void():
    labels = np.full((SIZE, SIZE), VOID, np.uint8)
    labels[: CELL + 5] = GRASS  # the first row of cells, and five eighths of the second
    labels[2 * CELL : 2 * CELL + 3] = DOG  # three eighths of the third
    scene = free_cells(SceneMap.from_labels(labels), GRID)
    assert (scene.labels[: CELL + 6] == GRASS).all()
    assert (scene.labels[CELL + 6] != VOID).all()
    assert (scene.labels[2 * CELL - 1] == DOG).all()  # the nearest may lie in a free cell
    assert (scene.labels[2 * CELL :] == VOID).all()
    assert np.array_equal(scene.edges, find_edges(scene.labels))
    assert free_cells(scene, GRID) == scene


def test_specks_take_what_is_around_them_and_edges_stay(two_dogs):
    scene = free_cells(two_dogs, GRID)
    assert (scene.labels != VOID).all()
    drawn = two_dogs.labels != VOID
    assert np.array_equal(scene.labels[drawn], two_dogs.labels[drawn])
    assert scene.edges[4:12, 11].all()


@pytest.mark.parametrize("size", [32, 96, 128, 256, 300, 640])
def test_a_canvas_of_any_size_gives_back_its_scene(size):
    rng = np.random.default_rng(size)
    labels = rng.choice(np.array([DOG, GRASS, VOID], np.uint8), (size, size))
    scene = SceneMap(labels, find_edges(labels, rng.integers(0, 3, (size, size))))
    shown = draw_scene(scene)
    assert len(shown["background"]) == canvas_side(size) >= min(size, CANVAS // 2)
    read = read_drawing(shown, scene, size)
    assert read.scene == scene and read.on_loaded and not read.drawn.any()


def test_cells_near_a_stroke_are_painted_anew():
    drawn = np.zeros((SIZE, SIZE), np.bool_)
    assert not widen(drawn, GRID, 64).any()
    drawn[3, 20] = True  # more than half a cell from the row below, less from the left column
    cells = np.zeros((GRID, GRID), np.bool_)
    cells[0, 2:4] = True
    assert np.array_equal(widen(drawn, GRID, 64), repeat(cells, "h w -> (h 16) (w 16)"))


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
    filled = fill_void(free_cells(half, GRID), np.arange(GRID)[:, None].repeat(GRID, 1) >= 2)
    kept = painter.model.vqseg.encode(*batch(filled)).reshape(GRID, GRID)
    results = [list(painter.paint(wish(scene=half, seed=s, count=1)))[-1].result for s in range(4)]
    tokens = [r.tokens.scene.reshape(GRID, GRID) for r in results]
    assert all(np.array_equal(t[:2], kept[:2]) for t in tokens)
    assert len({t[2:].numpy().tobytes() for t in tokens}) > 1
    whole = list(painter.paint(wish(scene=half, keep_void=True, count=1)))[-1].result
    assert whole.scenes == [half]


def test_a_picture_is_kept_where_nothing_is_drawn_on_its_scene(painter):
    first = list(painter.paint(wish(count=1)))[-1].result
    shown = draw_scene(first.scenes[0])
    shown["layers"] = [layer((slice(16, 48), slice(16, 48), DOG, 255))]  # in the first cell
    drawing = read_drawing(shown, first.scenes[0], SIZE)
    assert drawing.on_loaded and drawing.drawn.sum() == 4
    again = wish(
        scene=drawing.scene, picture=first.images[0], drawn=drawing.drawn, count=4, seed=10
    )
    seen = list(painter.paint(again))
    anew = widen(drawing.drawn, GRID, SIZE)
    assert 0 < anew.sum() < anew.size / 2
    before = np.asarray(first.images[0])
    for images in (shown.images for shown in seen if shown.images):
        assert all(np.array_equal(np.asarray(x)[~anew], before[~anew]) for x in images)
    assert len({np.asarray(x)[anew].tobytes() for x in seen[-1].images}) > 1


def test_a_canvas_that_was_emptied_keeps_no_picture(two_dogs):
    emptied = drawing(layer((TOP, LEFT, DOG, 255)))
    assert not read_drawing(emptied, two_dogs, SIZE).on_loaded
    assert not read_drawing(draw_scene(two_dogs), None, SIZE).on_loaded


def batch(scene):
    return torch.from_numpy(scene.labels)[None], torch.from_numpy(scene.edges)[None]


def test_a_wish_that_cannot_be_is_said_and_the_next_one_is_served(painter):
    with pytest.raises(ValueError, match="the caption is empty"):
        list(painter.paint(wish(caption="")))
    with pytest.raises(ValueError, match="top_p"):
        list(painter.paint(wish(scene_sampling={**SETTINGS, "top_p": 0.0})))
    assert list(painter.paint(wish()))[-1].result is not None


def test_the_drawing_comes_with_the_result_as_sample_takes_it(painter, two_dogs):
    labels = two_dogs.labels.copy()
    labels[2 * CELL - 3 :] = VOID  # into the second row of cells
    shown = list(painter.paint(wish(scene=SceneMap.from_labels(labels), count=1)))[-1]
    again = painter.model.generate(
        wish().caption,
        scene=shown.held,
        scene_free=shown.held.labels == VOID,  # --fill-void
        seed=3,
        scene_sampling=SETTINGS,
        image_sampling=SETTINGS,
    )
    assert torch.equal(again.tokens.scene, shown.result.tokens.scene)
    assert pixels(again.images) == pixels(shown.images)
    assert list(painter.paint(wish(count=1)))[-1].held is None


def test_strokes_that_hold_no_cell_are_said(painter):
    thin = np.full((SIZE, SIZE), VOID, np.uint8)
    thin[5] = DOG
    with pytest.raises(ValueError, match="too thin to hold a cell"):
        list(painter.paint(wish(scene=SceneMap.from_labels(thin))))


class Slow:
    """Stands for a model whose generations last until they are stopped."""

    def __init__(self):
        self.begun = threading.Event()
        self.count = 0

    def pictures_that_fit(self):
        return 1

    def generate(self, caption, *, on_progress, **_):
        self.count += 1
        self.begun.set()
        for done in itertools.count():
            on_progress(SimpleNamespace(done=done, total=10**9, rows=0, new_scene=0, new_rows=0))
            time.sleep(0.001)


@pytest.fixture
def slow():
    painter = Painter(Slow())
    yield painter
    painter.close()


def test_a_stopped_wish_ends_without_a_result_and_stops_nobody_else(slow):
    slow.stop("nobody")  # has not asked for anything
    running = slow.paint(wish(), "me")
    next(running)
    slow.stop("somebody else")
    assert next(running).result is None
    slow.stop("me")
    assert all(shown.result is None for shown in running)


def test_who_waits_is_told_and_may_stop_too(slow):
    first, second = slow.paint(wish(), "first"), slow.paint(wish(), "second")
    next(first)
    assert next(second).ahead == 1
    slow.stop("second")
    assert all(shown.ahead == 1 for shown in second)
    assert slow.model.count == 1
    third = slow.paint(wish(), "third")
    assert next(third).ahead == 1
    slow.stop("first")
    assert next(shown for shown in third if not shown.ahead).share == 0
    assert slow.model.count == 2


def test_a_second_wish_of_a_visitor_stops_the_first_and_can_be_stopped(slow):
    first = slow.paint(wish(), "me")
    next(first)
    second = slow.paint(wish(), "me")
    seen = itertools.islice(second, 10)  # without end if the first were never stopped
    assert next(shown for shown in seen if not shown.ahead).share == 0
    assert all(shown.result is None for shown in first)
    slow.stop("me")
    assert all(shown.result is None for shown in second)


def test_who_leaves_holds_nobody_up(slow):
    running = slow.paint(wish(), "left")
    next(running)
    running.close()
    other = slow.paint(wish(), "stays")
    assert next(shown for shown in other if not shown.ahead).share == 0


def test_closing_ends_all_that_runs_and_all_that_waits(slow):
    running = [slow.paint(wish(), str(i)) for i in range(3)]
    for generator in running:
        next(generator)
    slow.close()
    assert all(shown.result is None for generator in running for shown in generator)
    assert slow.model.count == 1
