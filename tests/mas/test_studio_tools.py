"""The tools of the studio's canvas in a browser: what each of them makes of a scene."""

import numpy as np
import pytest
from studio_visitor import open_scene, said

from mas.__main__ import main
from mas.scene import CLASS_NAMES, VOID, SceneMap, find_edges

pytest.importorskip("gradio", reason="needs the extra studio")

SIZE = 32  # of the tiny model's scenes
DOG, CAT, SEA, SAND = (CLASS_NAMES.index(name) for name in ("dog", "cat", "sea", "sand"))
FACE, HAIR, LEFT, RIGHT = (
    CLASS_NAMES.index(name) for name in ("face", "hair", "left-arm", "right-arm")
)


@pytest.fixture
def yard(visitor, tmp_path):
    """Opened: two dogs side by side, parted by an edge, and a person, on sand."""
    labels = np.full((SIZE, SIZE), SAND)
    labels[4:10, 4:16] = DOG
    things = np.zeros((SIZE, SIZE), np.int32)
    things[4:10, 4:10] = 1
    labels[16:18, 20:24] = HAIR
    labels[18:22, 20:24] = FACE
    labels[22:28, 20:22] = LEFT
    labels[22:25, 22:24] = RIGHT
    return open_scene(visitor, tmp_path, labels, things)


@pytest.mark.parametrize("tool", ["Rectangle", "Ellipse"])
def test_shapes_are_drawn_from_corner_to_corner(visitor, tool):
    visitor.choose("dog", tool)
    visitor.press(visitor.pixel(19, 25), visitor.pixel(30, 30), visitor.pixel(4, 6))
    labels = visitor.scene().labels
    rows, columns = np.nonzero(labels == DOG)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 19, 6, 25)
    assert set(np.unique(labels)) == {DOG, VOID}
    share = len(rows) / (16 * 20)
    assert share == 1 if tool == "Rectangle" else abs(share - np.pi / 4) < 0.03


def test_fill_covers_what_hangs_together_and_nothing_else(visitor):
    visitor.choose("dog", "Rectangle")
    visitor.press(visitor.pixel(4, 4), visitor.pixel(20, 20))
    visitor.choose("cat", "Rectangle")
    visitor.press(visitor.pixel(6, 6), visitor.pixel(18, 18))
    visitor.choose("sea", "Fill")
    visitor.press(visitor.pixel(0, 31))
    labels = visitor.scene().labels
    assert (labels[4:21, 4:21] != SEA).all() and (labels == SEA).sum() == SIZE**2 - 17**2
    visitor.choose("sand", "Fill")
    visitor.press(visitor.pixel(5, 5))  # the dog, a ring
    labels = visitor.scene().labels
    assert (labels == SAND).sum() == 17**2 - 13**2 and (labels == CAT).sum() == 13**2
    assert not (labels == DOG).any()


def test_fill_stops_at_the_edge_between_two_things(visitor, yard):
    visitor.choose("cat", "Fill")
    visitor.press(visitor.pixel(6, 12))
    labels = visitor.scene().labels
    assert (labels[4:10, 10:16] == CAT).all() and (labels == CAT).sum() == 6 * 6


def test_all_that_is_done_is_undone_and_done_again(visitor, tmp_path):
    """Strokes, shapes, fill, stamps, an opened scene, an emptied canvas."""
    steps = [None]

    def look():
        steps.append(visitor.scene() if (visitor.page.evaluate(DRAWN)) else None)

    visitor.choose("dog", "Ellipse")
    visitor.press(visitor.pixel(2, 2), visitor.pixel(12, 12))
    look()
    visitor.choose("sea", "Fill")
    visitor.press(visitor.pixel(30, 2))
    look()
    visitor.choose("cat")
    visitor.press(visitor.pixel(25, 5), visitor.pixel(25, 25))
    look()
    visitor.choose("cat", "Eraser")
    visitor.press(visitor.pixel(25, 25))
    look()
    visitor.take("Stamp")
    visitor.press(visitor.pixel(6, 6))  # takes it, which changes nothing
    visitor.press(visitor.pixel(20, 20))
    look()
    visitor.click("Empty")
    look()
    open_scene(visitor, tmp_path, np.full((SIZE, SIZE), SAND))
    look()
    assert steps[-2] is None and len({str(x and x.labels.tobytes()) for x in steps[1:]}) == 7
    visitor.page.locator("canvas").focus()
    for keys, wanted in (
        *(("Control+z", step) for step in steps[-2::-1]),
        ("Control+z", None),
        *(("Control+y", step) for step in steps[1:]),
        ("Control+Shift+z", steps[-1]),
    ):
        visitor.page.keyboard.press(keys)
        assert (visitor.scene() if visitor.page.evaluate(DRAWN) else None) == wanted
    said(visitor, "Saved as scene.png.")
    visitor.click("Redo")
    said(visitor, "There is nothing to do again.")
    visitor.click("Undo")
    visitor.page.keyboard.press("Control+z")
    assert visitor.scene() == steps[-3]
    visitor.press(visitor.pixel(6, 6))
    visitor.click("Redo")
    said(visitor, "There is nothing to do again.")


DRAWN = """() => {
  const canvas = document.querySelector('canvas');
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  return data.some((x) => x !== 255);
}"""


def test_a_stamp_is_one_thing_and_stands_for_itself(visitor, yard, tmp_path):
    visitor.take("Stamp")
    visitor.press(visitor.pixel(6, 6))  # the left dog
    said(visitor, "A stamp of dog")
    visitor.press(visitor.pixel(23, 6))
    scene = visitor.scene()
    new = np.zeros((SIZE, SIZE), np.bool_)
    new[20:26, 3:9] = True
    assert np.array_equal(scene.labels == DOG, (yard.labels == DOG) | new)
    visitor.press(visitor.pixel(23, 12))  # touches the one before: another dog
    assert visitor.scene().edges[20:25, 8].all()
    open_scene(visitor, tmp_path, np.full((SIZE, SIZE), SEA))
    visitor.press(visitor.pixel(12, 12))  # it is still at hand
    assert (visitor.scene().labels == DOG).sum() == 36
    visitor.click("Take another thing")
    visitor.press(visitor.pixel(20, 20))
    said(visitor, "A stamp of sea")


def test_a_person_is_stamped_whole_flipped_and_at_any_size(visitor, yard):
    visitor.take("Stamp")
    visitor.press(visitor.pixel(20, 21))
    visitor.page.keyboard.press("x")
    visitor.press(visitor.pixel(22, 8))  # its middle: 12 rows, 4 columns
    labels = visitor.scene().labels
    assert (labels[16:18, 6:10] == HAIR).all() and (labels[18:22, 6:10] == FACE).all()
    assert (labels[22:25, 6:8] == LEFT).all()  # what was the right arm, on the other side
    assert (labels[22:28, 8:10] == RIGHT).all() and (labels[25:28, 6:8] == SAND).all()
    visitor.page.get_by_label("Size, %").fill("50")
    visitor.press(visitor.pixel(24, 15))
    labels = visitor.scene().labels
    assert (labels[21:27, 14:16] >= HAIR).sum() == 6 * 2 - 2
    assert (labels[:, 11:14] < HAIR).all() and (labels[:16] < HAIR).all()


def test_pick_draws_on_at_the_thing_that_was_clicked(visitor, yard):
    visitor.choose("sea")
    visitor.page.keyboard.press("i")
    visitor.press(visitor.pixel(9, 14))  # the right dog
    visitor.page.get_by_text("What is drawn: dog").wait_for()
    visitor.page.keyboard.press("r")
    visitor.press(visitor.pixel(10, 10), visitor.pixel(13, 15))  # grows downwards
    joined = visitor.scene()
    assert (joined.labels[10:14, 10:16] == DOG).all() and not joined.edges[9, 10:15].any()
    visitor.click("Undo")
    visitor.click("New thing")
    visitor.press(visitor.pixel(14, 10), visitor.pixel(15, 15))  # a third dog, one further down
    for another in (lambda: visitor.click("New thing"), lambda: visitor.choose("dog", "Rectangle")):
        visitor.page.keyboard.press("i")
        visitor.press(visitor.pixel(9, 14))
        another()
        visitor.take("Rectangle")
        visitor.press(visitor.pixel(10, 10), visitor.pixel(13, 15))
        edges = visitor.scene().edges
        assert edges[9, 10:16].all() and edges[13, 10:16].all()
        visitor.click("Undo")
        visitor.page.locator("canvas").focus()


def test_the_eraser_takes_strokes_away_and_nothing_empties_the_scene(visitor, yard):
    visitor.choose("sea", "Rectangle")
    visitor.press(visitor.pixel(0, 0), visitor.pixel(31, 31))
    visitor.take("Eraser")
    visitor.press(visitor.pixel(4, 0), visitor.pixel(4, 31))
    scene = visitor.scene()
    assert np.array_equal(scene.labels[4], yard.labels[4]) and (scene.labels[20:] == SEA).all()
    visitor.press(visitor.pixel(4, 0))
    said(visitor, "The eraser takes strokes away.")
    visitor.take("nothing: the model decides")
    visitor.take("Rectangle")
    visitor.press(visitor.pixel(0, 0), visitor.pixel(31, 31))
    visitor.click("Save the scene")
    said(visitor, "Nothing is drawn yet.")


def test_unfinished_work_is_saved_and_opened_unchanged(visitor, yard, tmp_path, tiny_folder):
    """Also by `mas sample`: what is undecided is void, and void there is for the model."""
    visitor.choose("cat", "Ellipse")
    visitor.press(visitor.pixel(1, 18), visitor.pixel(12, 30))
    visitor.take("nothing: the model decides")
    visitor.press(visitor.pixel(14, 0), visitor.pixel(31, 12))
    file = tmp_path / "unfinished.png"
    file.write_bytes(visitor.save())
    scene = SceneMap.from_png(file)
    assert (scene.labels == VOID).any() and (scene.labels == CAT).any()
    assert scene.edges[4:9, 9].all() and not find_edges(scene.labels)[5, 9]
    visitor.click("Empty")
    visitor.open(file)
    visitor.page.get_by_text("The scene is on the canvas.").wait_for()
    assert visitor.save() == file.read_bytes()
    command = ["sample", "a cat", "--scene", str(file), "--model", str(tiny_folder)]
    for name, more in (("kept", ()), ("filled", ("--fill-void",))):
        assert main([*command, "--count", "1", "--output", str(tmp_path / name), *more]) == 0
    assert SceneMap.from_png(tmp_path / "kept" / "0000.scene.png") == scene
    assert SceneMap.from_png(tmp_path / "filled" / "0000.scene.png").void_fraction() == 0


@pytest.mark.parametrize("tool", ["Brush", "Eraser", "Rectangle", "Fill"])
def test_a_stroke_asks_the_page_a_few_times_only_however_many_pixels_it_has(visitor, tool):
    visitor.choose("dog", tool)
    visitor.page.get_by_label("Radius").evaluate("slider => { slider.value = slider.max; }")
    visitor.page.evaluate(
        """() => {
          const real = Element.prototype.querySelector;
          window.asked = 0;
          Element.prototype.querySelector = function (x) {
            window.asked++;
            return real.call(this, x);
          };
        }"""
    )
    visitor.press(visitor.pixel(1, 1), visitor.pixel(30, 30))  # in eight moves
    assert 0 < visitor.page.evaluate("window.asked") < 200
