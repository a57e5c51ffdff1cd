"""The studio's canvas in a browser: keys, fingers, files, reloads, and strangers."""

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

from mas.scene import CLASS_NAMES, VOID, SceneMap

pytest.importorskip("gradio", reason="needs the extra studio")
from studio_visitor import Studio, Visitor, open_scene, said, scene_of

SIZE = 32  # of the tiny model's scenes
DOG, CAT, SEA = (CLASS_NAMES.index(name) for name in ("dog", "cat", "sea"))


def test_a_reload_keeps_drawing_caption_and_the_picture_below(visitor):
    files = visitor.paint("a giraffe")
    visitor.click("Draw on the chosen scene")
    said(visitor, "The scene is on the canvas.")
    visitor.choose("dog", "Rectangle")
    visitor.press(visitor.pixel(1, 1), visitor.pixel(2, 2))
    drawn = visitor.save()
    visitor.reload()
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
        visitor.reload()
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
    visitor.reload()
    labels = visitor.scene().labels
    assert (labels[:10] == SEA).all() and (labels[10:] == DOG).all()
    page.close()
    studio.end(signal.SIGINT)


def test_a_drawing_of_another_model_is_fitted(page, address):
    visitor = Visitor(page, address)
    strokes = np.full((64, 64), 254, np.uint8)
    strokes[:, :32] = DOG
    kept = {"size": 64, "strokes": base64.b64encode(strokes).decode(), "picture": "of another size"}
    page.evaluate("kept => sessionStorage.setItem('mas-studio-drawing', kept)", json.dumps(kept))
    visitor.reload()
    labels = visitor.scene().labels
    assert (labels[:, :16] == DOG).all() and (labels[:, 16:] == VOID).all()


def test_what_was_kept_and_cannot_be_read_holds_nobody_up(page, address):
    Visitor(page, address)
    strokes = base64.b64encode(np.full((SIZE, SIZE), 200, np.uint8)).decode()
    unknown = json.dumps({"size": SIZE, "strokes": strokes})
    for junk in (unknown, "{", '{"size": 32, "labels": "AAAA"}', "[]", '{"size": -1}'):
        page.evaluate("junk => sessionStorage.setItem('mas-studio-drawing', junk)", junk)
        visitor = Visitor(page, address)  # which waits for an empty canvas
        visitor.choose("dog", "Fill")
        visitor.press(visitor.pixel(5, 5))
        assert (visitor.scene().labels == DOG).all()


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
    page.get_by_text("No class has this name.").wait_for()
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
    visitor.settle()
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
    for tool in ("Brush", "Fill"):
        visitor.take(tool)
        page.locator("canvas").scroll_into_view_if_needed()
        visitor.settle()
        send("touchStart", (20, 8))  # with two fingers the page is moved, nothing is drawn
        send("touchStart", (20, 8), (20, 20))
        send("touchEnd")
        assert np.array_equal(visitor.scene().labels, labels)
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_a_name_and_can_be_read(chromium, address, scheme):
    page = chromium.new_page(color_scheme=scheme, viewport={"width": 1400, "height": 1300})
    Visitor(page, address).take("Stamp")
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
    said(visitor, re.compile("^this file: 9000x9000 is too large for the studio, .* 16 million"))
    Image.fromarray(np.zeros((4001, 4000), np.uint8)).save(file)
    visitor.open(file)
    said(visitor, re.compile("^this file: 4000x4001 is too large for the studio"))
    assert (visitor.scene().labels == DOG).all()


def test_a_file_that_the_browser_cannot_read_is_said(visitor, tmp_path):
    visitor.page.evaluate(
        """FileReader.prototype.readAsDataURL = function () {
          const tell = (kind) => this.dispatchEvent(new ProgressEvent(kind));
          setTimeout(() => (tell('error'), tell('loadend')));
        }"""
    )
    SceneMap.from_labels(np.full((SIZE, SIZE), SEA, np.uint8)).to_png(tmp_path / "gone.png")
    visitor.open(tmp_path / "gone.png")
    said(visitor, "The browser cannot read this file; is it still there?")


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
