"""What the canvas tells becomes a scene, and nothing else does."""

import base64
import io
import json

import numpy as np
import pytest
from einops import repeat
from PIL import Image

from mas.drawing import DrawingError, draw_scene, free_cells, read_drawing, widen
from mas.fill import fill_void
from mas.scene import CLASS_NAMES, PALETTE, VOID, SceneMap, find_edges
from mas.things import find_things

SIZE, GRID = 32, 4
CELL = SIZE // GRID
DOG, GRASS = (CLASS_NAMES.index(name) for name in ("dog", "grass-merged"))
UNTOUCHED = 254  # as the page says it
TOP, BOTTOM = slice(0, 16), slice(16, 32)
LEFT, MIDDLE = slice(0, 8), slice(8, 16)
ALL = slice(None)


def draw(*strokes, on=None):
    """What the page tells of strokes: (rows, columns, class id, number of the thing)."""
    told = {"size": SIZE} if on is None else json.loads(on)
    ids = np.full((SIZE, SIZE), UNTOUCHED, np.uint8)
    things = np.zeros((SIZE, SIZE), np.uint8)
    for rows, columns, index, number in strokes:
        ids[rows, columns], things[rows, columns] = index, number
    planes = {"strokes": ids, "things": things}
    return json.dumps(told | {name: to_text(plane) for name, plane in planes.items()})


def to_text(plane):
    return base64.b64encode(plane.tobytes()).decode()


@pytest.mark.parametrize(
    "nothing", [None, json.dumps({"size": SIZE}), draw(), draw((TOP, ALL, VOID, 1))]
)
def test_a_canvas_on_which_nothing_is_drawn_is_no_scene(nothing):
    assert read_drawing(nothing, SIZE).scene is None


def test_no_class_is_as_white_as_the_canvas():
    assert not (PALETTE == 255).all(-1).any()


def test_strokes_become_their_classes():
    scene = read_drawing(draw((BOTTOM, ALL, GRASS, 1), (TOP, LEFT, DOG, 1)), SIZE).scene
    assert (scene.labels[16:] == GRASS).all()
    assert (scene.labels[:16, :8] == DOG).all()
    assert (scene.labels[:16, 8:] == VOID).all()
    assert np.array_equal(scene.edges, find_edges(scene.labels))


def test_things_of_one_class_with_two_numbers_are_two_things():
    one, two = (
        read_drawing(draw((TOP, LEFT, DOG, 1), (TOP, MIDDLE, DOG, number)), SIZE).scene
        for number in (1, 2)
    )
    assert np.array_equal(one.labels, two.labels)
    assert not one.edges[:15, 7].any()
    assert two.edges[:15, 7].all()


def test_a_scene_on_the_canvas_is_read_as_it_was(two_dogs):
    assert two_dogs.edges[5, 11] and not find_edges(two_dogs.labels)[5, 11]
    assert read_drawing(draw_scene(two_dogs), SIZE).scene == two_dogs


def test_strokes_cover_the_scene_and_its_edges(two_dogs):
    told = draw((slice(4, 8), ALL, GRASS, 1), on=draw_scene(two_dogs))
    scene = read_drawing(told, SIZE).scene
    assert (scene.labels[4:8] == GRASS).all()
    assert not scene.edges[4:7, 11].any()  # where there is no dog any more
    assert scene.edges[8:12, 11].all()  # where there are two still
    assert not scene.edges[4:7, :3].any()  # grass on grass is grass


@pytest.mark.parametrize("number", [0, 1])
def test_a_thing_below_is_drawn_on_at_with_its_own_number_only(two_dogs, number):
    told = draw((slice(4, 12), slice(20, 24), DOG, number), on=draw_scene(two_dogs))
    scene = read_drawing(told, SIZE).scene
    assert (scene.edges[4:11, 19] == (number == 1)).all()


def test_stuff_has_no_instances():
    meadow = draw((TOP, ALL, GRASS, 1), (BOTTOM, ALL, GRASS, 2))
    assert not read_drawing(meadow, SIZE).scene.edges.any()


@pytest.mark.parametrize("size", [32, 96, 300])
def test_a_canvas_of_any_size_gives_back_scene_and_picture(size):
    rng = np.random.default_rng(size)
    labels = rng.choice(np.array([DOG, GRASS, VOID], np.uint8), (size, size))
    scene = SceneMap(labels, find_edges(labels, rng.integers(0, 3, (size, size))))
    picture = Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))
    read = read_drawing(draw_scene(scene, picture), size)
    assert read.scene == scene and not read.drawn.any()
    assert np.array_equal(np.asarray(read.picture), np.asarray(picture))
    assert read_drawing(draw_scene(scene), size).picture is None


def picture_of(width, height, form="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, form)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (7, "use the canvas of the page"),
        ({"size": SIZE}, "use the canvas of the page"),
        ("[]", "use the canvas of the page"),
        ("{", "this is no drawing"),
        ("[" * 100_000, "this is no drawing"),
        (json.dumps({}), "has None pixels a side, scenes of this model 32: reload the page"),
        (json.dumps({"size": 10**9}), "has 1000000000 pixels a side"),
        (json.dumps({"size": SIZE, "labels": 7}), "this is no drawing"),
        (json.dumps({"size": SIZE, "labels": "/etc/passwd!"}), "this is no drawing"),
        (json.dumps({"size": SIZE, "labels": "äöü"}), "this is no drawing"),
        (json.dumps({"size": SIZE, "labels": picture_of(8, 8)}), "pixels instead of 1024"),
        (draw((TOP, LEFT, 200, 1)), r"unknown class ids \[200\]"),
        (json.dumps({"size": SIZE, "picture": "AAAA"}), "the picture of the scene cannot be read"),
        (json.dumps({"size": SIZE, "picture": {}}), "this is no drawing"),
        (json.dumps({"size": SIZE, "picture": picture_of(9, 8)}), "no picture of a scene: 9x8"),
        (json.dumps({"size": SIZE, "picture": picture_of(4000, 4000)}), "4000x4000"),
        (json.dumps({"size": SIZE, "picture": picture_of(8, 8, "JPEG")}), "cannot be read"),
    ],
)
def test_what_a_stranger_sends_is_refused_with_a_reason(told, message):
    with pytest.raises(DrawingError, match=message):
        read_drawing(told, SIZE)


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


def test_things_that_touch_stay_apart_where_void_beside_them_is_filled():
    drawn = draw((slice(1, 14), slice(1, 12), DOG, 1), (slice(2, 15), slice(12, 23), DOG, 2))
    scene = read_drawing(drawn, SIZE).scene
    held = free_cells(scene, GRID)
    free = np.ones((GRID, GRID), np.bool_)
    free[:2, :3] = False
    assert (held.labels[: 2 * CELL, : 3 * CELL] == DOG).all()
    for given in (scene, held, fill_void(held, free), fill_void(held, free, reach=CELL)):
        assert len(find_things(given)[DOG]) == 2


def test_cells_near_a_stroke_are_painted_anew():
    drawn = np.zeros((SIZE, SIZE), np.bool_)
    assert not widen(drawn, GRID, 64).any()
    drawn[3, 20] = True  # more than half a cell from the row below, less from the left column
    cells = np.zeros((GRID, GRID), np.bool_)
    cells[0, 2:4] = True
    assert np.array_equal(widen(drawn, GRID, 64), repeat(cells, "h w -> (h 16) (w 16)"))
