"""The studio's canvas in a browser: tools, keys, fingers, files, reloads, and strangers."""

import base64
import io
import json
import re
import signal
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from mas.__main__ import main
from mas.scene import CLASS_NAMES, VOID, SceneMap, find_edges

pytest.importorskip("gradio", reason="needs the extra studio")
from studio_visitor import Studio, Visitor, scene_of

SIZE = 32  # of the tiny model's scenes
DOG, CAT, SEA, SAND = (CLASS_NAMES.index(name) for name in ("dog", "cat", "sea", "sand"))
FACE, HAIR, LEFT, RIGHT = (
    CLASS_NAMES.index(name) for name in ("face", "hair", "left-arm", "right-arm")
)


def open_scene(visitor, folder, labels, things=None):
    scene = SceneMap.from_labels(labels.astype(np.uint8), things)
    scene.to_png(folder / "mine.png")
    visitor.open(folder / "mine.png")
    visitor.page.get_by_text("The scene is on the canvas.").wait_for()
    return scene


def said(visitor, text):
    visitor.page.locator("[data-is=said]").get_by_text(text).wait_for()


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
    visitor.page.get_by_role("radio", name="Stamp").check(force=True)
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
    visitor.page.get_by_role("radio", name="Stamp").check(force=True)
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
    visitor.page.get_by_role("radio", name="Stamp").check(force=True)
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
        visitor.page.get_by_role("radio", name="Rectangle").check(force=True)
        visitor.press(visitor.pixel(10, 10), visitor.pixel(13, 15))
        edges = visitor.scene().edges
        assert edges[9, 10:16].all() and edges[13, 10:16].all()
        visitor.click("Undo")
        visitor.page.locator("canvas").focus()


def test_the_eraser_takes_strokes_away_and_nothing_empties_the_scene(visitor, yard):
    visitor.choose("sea", "Rectangle")
    visitor.press(visitor.pixel(0, 0), visitor.pixel(31, 31))
    visitor.page.get_by_role("radio", name="Eraser").check(force=True)
    visitor.press(visitor.pixel(4, 0), visitor.pixel(4, 31))
    scene = visitor.scene()
    assert np.array_equal(scene.labels[4], yard.labels[4]) and (scene.labels[20:] == SEA).all()
    visitor.press(visitor.pixel(4, 0))
    said(visitor, "The eraser takes strokes away.")
    visitor.page.get_by_role("radio", name="nothing: the model decides").check(force=True)
    visitor.page.get_by_role("radio", name="Rectangle").check(force=True)
    visitor.press(visitor.pixel(0, 0), visitor.pixel(31, 31))
    visitor.click("Save the scene")
    said(visitor, "Nothing is drawn yet.")


def test_unfinished_work_is_saved_and_opened_unchanged(visitor, yard, tmp_path, tiny_folder):
    """Also by `mas sample`: what is undecided is void, and void there is for the model."""
    visitor.choose("cat", "Ellipse")
    visitor.press(visitor.pixel(1, 18), visitor.pixel(12, 30))
    visitor.page.get_by_role("radio", name="nothing: the model decides").check(force=True)
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


def test_a_reload_keeps_drawing_caption_and_the_picture_below(visitor, tmp_path):
    files = visitor.paint("a giraffe")
    visitor.click("Draw on the chosen scene")
    said(visitor, "The scene is on the canvas.")
    visitor.choose("dog", "Rectangle")
    visitor.press(visitor.pixel(1, 1), visitor.pixel(2, 2))
    drawn = visitor.save()
    visitor.page.reload()
    visitor.page.locator("[data-is=brush]").get_by_text("airplane").wait_for()
    assert visitor.save() == drawn
    assert visitor.page.get_by_label("Caption").input_value() == "a giraffe"
    new = visitor.paint("a giraffe")
    before, after = (np.asarray(Image.open(io.BytesIO(x["0000.png"]))) for x in (files, new))
    assert (before[16:] == after[16:]).all()
    assert (scene_of(new).labels[1:3, 1:3] == DOG).all()


def test_two_tabs_have_two_drawings(chromium, address):
    context = chromium.new_context(viewport={"width": 1400, "height": 1300})
    first = Visitor(context.new_page(), address)
    first.choose("dog", "Fill")
    first.press(first.pixel(5, 5))
    second = Visitor(context.new_page(), address)  # which waits for an empty canvas
    second.choose("sea", "Fill")
    second.press(second.pixel(5, 5))
    for visitor, index in ((first, DOG), (second, SEA)):
        visitor.page.reload()
        visitor.page.locator("[data-is=brush]").get_by_text("airplane").wait_for()
        assert (visitor.scene().labels == index).all()
    context.close()


def test_a_drawing_outlives_the_studio(chromium, tiny_folder, tmp_path):
    studio = Studio(tiny_folder, tmp_path)
    page = chromium.new_page(viewport={"width": 1400, "height": 1300})
    visitor = Visitor(page, studio.address)
    visitor.choose("dog", "Fill")
    visitor.press(visitor.pixel(5, 5))
    studio.end(signal.SIGINT)
    visitor.choose("sea", "Rectangle")
    visitor.press(visitor.pixel(0, 0), visitor.pixel(9, 31))
    visitor.click("Save the scene")
    said(visitor, "The studio does not answer; the drawing stays in this tab.")
    studio = Studio(tiny_folder, tmp_path, port=studio.port)
    visitor.page.reload()
    visitor.page.locator("[data-is=brush]").get_by_text("airplane").wait_for()
    labels = visitor.scene().labels
    assert (labels[:10] == SEA).all() and (labels[10:] == DOG).all()
    page.close()
    studio.end(signal.SIGINT)


def test_a_drawing_of_another_model_is_fitted(page, address):
    page.goto(address)
    page.locator("canvas").wait_for()
    strokes = np.full((64, 64), 254, np.uint8)
    strokes[:, :32] = DOG
    kept = {"size": 64, "strokes": base64.b64encode(strokes).decode(), "picture": "of another size"}
    page.evaluate("kept => sessionStorage.setItem('mas-studio-drawing', kept)", json.dumps(kept))
    visitor = Visitor.__new__(Visitor)
    visitor.page = page
    page.reload()
    page.locator("[data-is=brush]").get_by_text("airplane").wait_for()
    labels = visitor.scene().labels
    assert (labels[:, :16] == DOG).all() and (labels[:, 16:] == VOID).all()


def test_what_was_kept_and_cannot_be_read_holds_nobody_up(page, address):
    page.goto(address)
    page.locator("canvas").wait_for()
    strokes = base64.b64encode(np.full((SIZE, SIZE), 200, np.uint8)).decode()
    unknown = json.dumps({"size": SIZE, "strokes": strokes})
    for junk in (unknown, "{", '{"size": 32, "labels": "AAAA"}', "[]", '{"size": -1}'):
        page.evaluate("junk => sessionStorage.setItem('mas-studio-drawing', junk)", junk)
        visitor = Visitor(page, address)  # which waits for an empty canvas
        visitor.choose("dog", "Fill")
        visitor.press(visitor.pixel(5, 5))
        assert (visitor.scene().labels == DOG).all()


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


def test_hands_that_use_no_mouse_draw_everything(visitor):
    page = visitor.page
    page.get_by_label("Find a class").focus()
    page.keyboard.type("dog")  # hot dog comes later in the list, and is no whole name
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.tagName") == "CANVAS"
    page.keyboard.press("r")
    page.keyboard.press("Space")  # one corner in the middle
    for key in ("ArrowRight", "ArrowDown", "Shift+ArrowDown"):
        page.keyboard.press(key)
    said(visitor, "dog")
    page.keyboard.press("Space")
    labels = visitor.scene().labels
    rows, columns = np.nonzero(labels == DOG)  # half a cell is four pixels
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 21, 16, 20)
    page.locator("canvas").focus()
    page.keyboard.press("b")
    before = page.get_by_label("Radius").input_value()
    page.keyboard.press("]")
    assert int(page.get_by_label("Radius").input_value()) == int(before) + 1
    page.keyboard.press("Space")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Escape")  # the stroke is broken off
    assert np.array_equal(visitor.scene().labels, labels)


def test_keys_of_the_canvas_leave_text_alone(visitor):
    page = visitor.page
    visitor.choose("sea", "Fill")
    visitor.press(visitor.pixel(5, 5))
    for label in ("Caption", "Find a class"):
        page.get_by_label(label, exact=True).click()
        page.keyboard.type("brie")
        page.keyboard.press("Control+z")
    assert page.get_by_role("radio", name="Fill").is_checked()
    page.get_by_label("Find a class").fill("")
    assert (visitor.scene().labels == SEA).all()


def test_classes_are_found_among_all_157(visitor):
    page = visitor.page
    choices = page.get_by_role("radiogroup", name="What is drawn").get_by_role("radio")
    assert choices.count() == 1 + len(CLASS_NAMES)
    page.get_by_label("Find a class").fill("WALL-")
    shown = page.locator("[data-is=classes] label:visible")
    assert sorted(shown.all_inner_texts()) == [
        name for name in sorted(CLASS_NAMES) if name.startswith("wall-")
    ]
    page.get_by_label("Find a class").fill("unicorn")
    page.get_by_text("No class is called so.").wait_for()
    page.keyboard.press("Enter")
    page.get_by_text("What is drawn: airplane").wait_for()


@pytest.mark.parametrize("size", [(360, 740), (740, 360), (1000, 700)])
def test_fingers_draw_and_the_page_fits(chromium, address, size):
    context = chromium.new_context(
        viewport=dict(zip(("width", "height"), size, strict=True)), has_touch=True, is_mobile=True
    )
    page = context.new_page()
    visitor = Visitor(page, address)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    area = page.locator("canvas").bounding_box()
    assert abs(area["width"] - area["height"]) < 1 and 200 < area["height"] < size[1]
    page.get_by_label("Find a class").fill("dog")
    page.keyboard.press("Enter")
    page.locator("canvas").scroll_into_view_if_needed()
    page.wait_for_timeout(500)  # the page has come to rest
    top = page.evaluate("scrollY")
    touch = context.new_cdp_session(page)

    def send(kind, *points):
        places = [dict(zip("xy", visitor.place(visitor.pixel(*x)), strict=True)) for x in points]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

    send("touchStart", (8, 8))
    send("touchMove", (8, 24))
    send("touchEnd")
    assert page.evaluate("scrollY") == top
    labels = visitor.scene().labels
    assert (labels[8, 8:25] == DOG).all() and (labels[13:] == VOID).all()
    page.locator("canvas").scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    send("touchStart", (20, 8))  # with two fingers the page is moved, nothing is drawn
    send("touchStart", (20, 8), (20, 20))
    send("touchEnd")
    assert np.array_equal(visitor.scene().labels, labels)
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_a_name_and_can_be_read(chromium, address, scheme):
    page = chromium.new_page(color_scheme=scheme, viewport={"width": 1400, "height": 1300})
    Visitor(page, address)
    page.get_by_role("radio", name="Stamp").check(force=True)
    assert page.get_by_role("application").get_attribute("aria-label").startswith("Canvas")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('.editor :is(input, button, canvas)')].filter((x) =>
          !(x.ariaLabel || x.textContent.trim() || x.labels?.[0]?.textContent.trim()))
          .map((x) => x.outerHTML)"""
    )
    assert not nameless
    assert not page.evaluate(FAINT)
    page.close()


FAINT = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) =>
    0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const below = (x) => {
    for (; x; x = x.parentElement) {
      const colour = parse(getComputedStyle(x).backgroundColor);
      if ((colour[3] ?? 1) > 0.99) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll('.editor :is(span, b, button, label, summary, kbd, input)')]
    .filter((x) => x.textContent.trim() && x.checkVisibility())
    .map((x) => [x.textContent.trim(), light(parse(getComputedStyle(x).color)), light(below(x))])
    .map(([text, a, b]) => [text, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)])
    .filter(([, contrast]) => contrast < 4.5);
}"""


def test_what_the_model_warns_of_is_said_on_the_page(visitor, tmp_path):
    visitor.paint("a giraffe in the park " * 20)
    visitor.page.get_by_text("longer than 12 tokens and were cut").wait_for()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    visitor.open(tmp_path / "photo.png")
    said(visitor, re.compile("^this file: 9.* % of the pixels are in no palette colour"))


def test_a_file_that_was_changed_is_opened_again(visitor, tmp_path):
    for index in (DOG, CAT):
        open_scene(visitor, tmp_path, np.full((SIZE, SIZE), index))
        assert (visitor.scene().labels == index).all()
        visitor.click("Empty")


def test_a_file_that_is_no_scene_is_refused_and_the_drawing_stays(visitor, tmp_path):
    visitor.choose("dog", "Fill")
    visitor.press(visitor.pixel(5, 5))
    file = tmp_path / "mine.png"
    Image.new("RGB", (40, 20)).save(file)
    visitor.open(file)
    said(visitor, "this file: a scene must be square, this one is 40x20")
    Image.fromarray(np.full((40, 40), 200, np.uint8)).save(file)
    visitor.open(file)
    said(visitor, "this file: unknown class ids [200]")
    file.write_bytes(file.read_bytes()[:60])
    visitor.open(file)
    said(visitor, "this file: not a readable PNG")
    file.write_bytes(bytes(20_000_001))
    visitor.open(file)
    said(visitor, "This file is too large for a scene.")
    Image.fromarray(np.zeros((9000, 9000), np.uint8)).save(file)
    visitor.open(file)
    said(visitor, "this file: 9000x9000 is too large")
    assert (visitor.scene().labels == DOG).all()


def test_a_file_is_dropped_on_the_canvas(visitor, tmp_path):
    SceneMap.from_labels(np.full((SIZE, SIZE), SEA, np.uint8)).to_png(tmp_path / "mine.png")
    content = base64.b64encode((tmp_path / "mine.png").read_bytes()).decode()
    visitor.page.locator("canvas").evaluate(
        """(canvas, content) => {
          const dataTransfer = new DataTransfer();
          const bytes = Uint8Array.from(atob(content), (x) => x.charCodeAt(0));
          dataTransfer.items.add(new File([bytes], 'mine.png'));
          canvas.dispatchEvent(new DragEvent('drop', { dataTransfer, cancelable: true }));
        }""",
        content,
    )
    said(visitor, "The scene is on the canvas.")
    assert (visitor.scene().labels == SEA).all()


def ask(address, value, *, component, name="save_scene"):
    """Calls a function of a component as a stranger's program does."""
    body = {
        "data": value,
        "component_id": component,
        "fn_name": name,
        "session_hash": "stranger",
    }
    request = urllib.request.Request(
        f"{address}/gradio_api/component_server",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_strangers_get_reasons_and_no_files(address):
    with urllib.request.urlopen(f"{address}/config") as answer:
        config = json.load(answer)
    [canvas] = [
        x["id"] for x in config["components"] if "save_scene" in x["props"].get("server_fns", ())
    ]
    for value in (7, "{", [], {"size": SIZE}, "/etc/passwd", json.dumps({"size": 10**6})):
        assert set(ask(address, value, component=canvas)) == {"error"}
    assert ask(address, None, component=canvas) == {"error": "Nothing is drawn yet."}
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(address, None, component=canvas, name="__class__")
    for value in (None, 7, "/etc/passwd", "AAAA", ["/etc/passwd"], {"path": "/etc/passwd"}):
        answer = ask(address, value, component=canvas, name="open_scene")
        assert set(answer) == {"error"} and "/" not in answer["error"]
    many = ask(address, "A" * 30_000_000, component=canvas, name="open_scene")
    assert many == {"error": "this file is no scene"}
