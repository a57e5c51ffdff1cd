"""The studio's page: what it offers, and in a browser that captions and scenes become pictures."""

import io
import json
import re
import signal
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mas.__main__ import main
from mas.model import MakeAScene
from mas.scene import CLASS_NAMES, PALETTE, SceneMap

gr = pytest.importorskip("gradio", reason="needs the extra studio")
from studio_visitor import Studio, Visitor, scene_of  # noqa: E402

from mas.painter import Painter  # noqa: E402
from mas.studio import check_address  # noqa: E402
from mas.studio_canvas import MOST_OPENING, NOTHING, build_canvas, colour_of  # noqa: E402
from mas.studio_page import Page, address_of, legend, renew, tell  # noqa: E402

LABELS = np.full((32, 32), CLASS_NAMES.index("grass-merged"), np.uint8)
LABELS[:10] = CLASS_NAMES.index("sea")
DOG = CLASS_NAMES.index("dog")


def component(page, kind, label):
    found = [
        x for x in page.blocks.values() if isinstance(x, kind) and getattr(x, "label", "") == label
    ]
    assert len(found) == 1, (kind, label)
    return found[0]


def offered(page):
    [canvas] = [x for x in page.blocks.values() if isinstance(x, gr.HTML) and "classes" in x.props]
    return [choice["name"] for choice in canvas.props["classes"]]


def test_the_page_offers_what_the_model_knows_and_its_own_settings(parts, tmp_path):
    from mas.filter import Sampling, StreamSampling
    from mas.model import MakeAScene

    sampling = StreamSampling(
        scene=Sampling(guidance=2, top_p=0.9), image=Sampling(temperature=0.4)
    )
    model = MakeAScene(**parts, sampling=sampling, classes=("dog", "sea"))
    page = Page(Painter(model), "mine", tmp_path).build()
    assert offered(page) == [NOTHING, "dog", "sea"]
    for label, value in (
        ("Guidance, scene", 2),
        ("Top-p, scene", 0.9),
        ("Guidance, picture", 3),
        ("Temperature, picture", 0.4),
        ("Top-p, picture", 1.0),
    ):
        assert component(page, gr.Slider, label).value == value
    judged = component(page, gr.Slider, "Scenes drawn for a picture; the judge takes one")
    assert not judged.visible  # this model has none
    unknown = Page(Painter(MakeAScene(**parts)), "mine", tmp_path).build()
    assert offered(unknown) == [NOTHING, *sorted(CLASS_NAMES)]


def test_visitors_are_told_apart_by_address_unless_it_is_this_machines():
    for host, address in (("127.0.0.1", ""), ("::1", ""), ("192.0.2.1", "192.0.2.1")):
        request = gr.Request(client=SimpleNamespace(host=host))
        assert address_of(request) == address
    assert address_of(gr.Request(client=None)) == ""


def test_files_are_opened_one_after_the_other(monkeypatch):
    """A small file may hold a large scene: many at once would take all memory."""
    open_now, most, go_on = [], [], threading.Event()
    go_on.set()

    def read(content):
        go_on.wait()
        open_now.append(content)
        most.append(len(open_now))
        time.sleep(0.02)
        open_now.remove(content)
        return SceneMap.from_labels(LABELS), []

    monkeypatch.setattr("mas.studio_canvas._read_file", read)
    canvas = build_canvas(32, 4, ["dog"])
    [open_scene] = [x for x in canvas.server_fns if x.__name__ == "open_scene"]
    with ThreadPoolExecutor(4) as threads:
        assert all("drawing" in answer for answer in threads.map(open_scene, range(4)))
    assert len(most) == 4 and max(most) == 1
    go_on.clear()
    with ThreadPoolExecutor(MOST_OPENING + 1) as threads:  # nobody takes all threads of the page
        answers = [threads.submit(open_scene, i) for i in range(MOST_OPENING + 1)]
        try:
            refused = next(as_completed(answers, timeout=20)).result()
        finally:
            go_on.set()
    assert "try again in a moment" in refused["error"]
    assert sum("drawing" in answer.result() for answer in answers) == MOST_OPENING


def test_a_full_line_is_said_and_what_was_painted_stays(tiny_model, tmp_path, monkeypatch):
    page = Page(Painter(tiny_model), "mine", tmp_path)
    page.build()
    monkeypatch.setattr(page, "_read_wish", lambda asked: None)
    monkeypatch.setattr("mas.painter.MOST_WAITING", 0)
    answers = list(page.paint({}, SimpleNamespace(session_hash="a visitor", client=None)))
    assert answers == [{page.status: tell("0 wishes wait already: try again later.")}]


def test_only_the_seed_that_was_painted_is_renewed():
    assert renew(0, (0, 4)) == (4, None)
    for seed, renewed in ((77, (0, 4)), (None, (0, 4)), (5, None)):  # None: nothing was painted
        assert renew(seed, renewed) == (gr.skip(), None)


def test_the_legend_names_every_class_once_the_largest_first():
    text = legend([SceneMap.from_labels(LABELS), SceneMap.from_labels(LABELS)])
    assert re.findall(r"</i>([^<]+)<", text) == ["grass-merged", "sea"]
    assert re.findall(r"background:(#\w{6})", text) == [colour_of("grass-merged"), colour_of("sea")]
    assert colour_of("dog") == "#" + bytes(PALETTE[DOG]).hex()


def test_a_port_that_cannot_be_had_is_said_in_one_line(tiny_folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["studio", "--model", str(tiny_folder), "--port", port]) == 1
    assert f"127.0.0.1:{port} cannot be served at (Address already in use)" in (
        capsys.readouterr().err
    )
    for host in ("::1", "no.such.host.invalid"):
        assert main(["studio", "--model", str(tiny_folder), "--host", host]) == 1
        assert f"{host}:7860 cannot be served at" in capsys.readouterr().err
    assert main(["studio", "--model", str(tiny_folder), "--port", "70000"]) == 1
    assert "--port is 70000, use a number from 1 to 65535" in capsys.readouterr().err
    assert main(["studio", "--model", "nowhere"]) == 1
    assert "nowhere: no such model folder" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["localhost", "127.1", "127.0.0.1"])
def test_the_address_is_told_in_numbers_whatever_it_is_called(host):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert check_address(host, port) == "127.0.0.1"


def test_an_empty_host_could_be_any():
    with pytest.raises(ValueError, match=r"--host is empty, use 127\.0\.0\.1"):
        check_address("", 7860)


def test_the_server_shows_files_of_its_own_only(address, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    with urllib.request.urlopen(address) as answer:
        assert b"mini Make-A-Scene" in answer.read()
    for path in ("/etc/hostname", __file__):
        with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
            urllib.request.urlopen(f"{address}/gradio_api/file={path}")


def test_a_caption_becomes_pictures_and_all_files_that_sample_writes(visitor, tiny_folder):
    files = visitor.paint("a giraffe in the park")
    assert len(files) == 4 * 2 + 2
    about = json.loads(files["samples.json"])
    assert about["caption"] == "a giraffe in the park" and about["seed"] == 0
    model = MakeAScene.from_pretrained(tiny_folder, device="cpu")
    expected = model.generate("a giraffe in the park", count=4)
    for i, image in enumerate(expected.images):
        picture = Image.open(io.BytesIO(files[f"{i:04}.png"]))
        assert np.array_equal(np.asarray(picture), np.asarray(image))
        assert picture.text["caption"] == "a giraffe in the park"
    assert visitor.page.get_by_label("Seed of the first").input_value() == "4"
    assert json.loads(visitor.paint("a giraffe")["samples.json"])["seed"] == 4


def test_a_seed_typed_while_it_paints_stays(chromium, tmp_path):
    studio = Studio("park", tmp_path)  # which is slow enough to be typed into
    visitor = Visitor(chromium.new_page(viewport={"width": 1400, "height": 1300}), studio.address)
    visitor.page.get_by_label("number input for Pictures").fill("1")
    visitor.page.get_by_label("Caption").fill("two dogs")
    visitor.click("Paint")
    visitor.page.get_by_text(re.compile(r"[1-9]\d?%")).wait_for()
    visitor.page.get_by_label("Seed of the first").fill("77")
    visitor.page.get_by_text("two dogs, seed 0:").wait_for()
    visitor.click("Paint")
    visitor.page.get_by_text("two dogs, seed 77:").wait_for()
    visitor.page.close()
    studio.end(signal.SIGTERM)


def test_strokes_stay_where_they_are_drawn(visitor):
    visitor.page.get_by_label("stays empty").check()
    visitor.choose("dog")
    visitor.stroke((-150, -100), (150, -100))
    visitor.choose("sea")
    visitor.stroke((-150, 100), (150, 100))
    scene = scene_of(visitor.paint())
    found = {name: np.nonzero(scene.labels == CLASS_NAMES.index(name)) for name in ("dog", "sea")}
    assert set(scene.histogram()) == {"dog", "sea"}
    for name, (rows, columns) in found.items():
        assert 30 < len(rows) < 300
        assert (rows < 16).all() == (name == "dog")
        assert abs(columns.mean() - 15.5) < 1.5
    legend_entries = visitor.page.locator(".legend span").all_inner_texts()
    assert sorted(legend_entries) == ["dog", "sea"]


def test_nothing_to_go_by_is_said_on_the_page(visitor):
    visitor.click("Paint")
    visitor.page.get_by_text("the caption is empty: say what to paint, or give a scene").wait_for()


def test_a_scene_file_is_opened_and_drawn_on(visitor, tmp_path):
    SceneMap.from_labels(LABELS).to_png(tmp_path / "mine.png")
    visitor.open(tmp_path / "mine.png")
    visitor.see_scene(SceneMap.from_labels(LABELS))
    assert np.array_equal(scene_of(visitor.paint()).labels, LABELS)
    visitor.choose("dog")
    visitor.stroke((-100, 60), (100, 60))
    painted = scene_of(visitor.paint())
    dogs = painted.labels == DOG
    assert 20 < dogs.sum() < 200 and not dogs[:16].any()
    assert np.array_equal(painted.labels[~dogs], LABELS[~dogs])


@pytest.mark.parametrize("keep", [True, False])
def test_a_result_is_drawn_on_and_its_picture_kept_if_wanted(visitor, keep):
    files = visitor.paint("a giraffe")
    scene = scene_of(files)
    new_class = next(name for name in ("dog", "sea", "cat") if name not in scene.histogram())
    visitor.click("Draw on the chosen scene")
    visitor.see_scene(scene)
    visitor.page.get_by_label("keep the picture where nothing is drawn").set_checked(keep)
    visitor.choose(new_class)
    visitor.stroke((-200, -200), (-190, -200))
    new = visitor.paint("a giraffe")
    before, after = (np.asarray(Image.open(io.BytesIO(x["0000.png"]))) for x in (files, new))
    drawn = scene_of(new).labels == CLASS_NAMES.index(new_class)
    assert drawn[:10, :10].any() and not drawn[16:].any()
    assert (before[16:] == after[16:]).all() == keep


def test_who_waits_is_told_and_may_stop(chromium, tmp_path):
    studio = Studio("park", tmp_path)  # which is slow enough to be interrupted
    pages = [chromium.new_page(viewport={"width": 1400, "height": 1300}) for _ in range(2)]
    first, second = (Visitor(page, studio.address) for page in pages)
    pictures = first.page.get_by_label("number input for Pictures")
    pictures.fill("16")  # so that the second one comes before they are painted
    pictures.press("Tab")
    assert first.page.get_by_label("range slider for Pictures").input_value() == "16"
    for visitor in (first, second):
        visitor.page.get_by_label("Caption").fill("two dogs")
        visitor.click("Paint")
    second.page.get_by_text("Waiting for 1 before you …").wait_for()
    second.click("Stop")
    second.page.get_by_text("Stopped.").wait_for()
    first.page.get_by_text(re.compile(r"[1-9]\d?%")).wait_for()
    assert 0 < first.page.get_by_role("progressbar").evaluate("bar => bar.value") < 1
    studio.end(signal.SIGTERM)  # while it paints
    for page in pages:
        page.close()


def test_the_chosen_scene_is_the_one_that_is_drawn_on(visitor):
    files = visitor.paint("a giraffe in the park")
    visitor.page.locator(".shown").nth(1).locator("button.thumbnail-item").nth(2).click()
    visitor.click("Draw on the chosen scene")  # though nobody has answered yet
    chosen = scene_of(files, "0002.scene.png")
    visitor.see_scene(chosen)
    assert np.array_equal(scene_of(visitor.paint()).labels, chosen.labels)


def test_captions_are_text_whatever_they_hold(visitor):
    """Also the picture of another server: the fixture would tell of the request."""
    visitor.paint("a ![dog](http://example.com/x.png) <b>on</b> <img src='http://example.com/y'>")
    assert visitor.page.get_by_text("<b>on</b> <img").count() == 1


def test_all_results_are_seen_on_a_narrow_screen(chromium, address):
    visitor = Visitor(chromium.new_page(viewport={"width": 360, "height": 740}), address)
    visitor.paint("a giraffe")
    for gallery in visitor.page.locator(".shown").all():
        frame = gallery.bounding_box()
        shown = gallery.locator("button.thumbnail-item").all()
        assert len(shown) == 4
        for box in (thumbnail.bounding_box() for thumbnail in shown):
            assert frame["x"] <= box["x"] and box["width"] > 50
            assert box["x"] + box["width"] <= frame["x"] + frame["width"]
    visitor.page.close()


def test_numbers_that_are_missing_or_impossible_are_said(visitor):
    visitor.page.get_by_label("Caption").fill("a giraffe")
    for value, message in (
        ("", "fill in a number: Seed of the first"),
        ("1.5", "fill in a whole number: Seed of the first"),
        ("-3", "seed is -3"),
        ("9007199254740993", "a browser would round the seed: use 9007199254740988 or less"),
        ("9007199254740989", "a browser would round the seed: use 9007199254740988 or less"),
    ):
        visitor.page.get_by_label("Seed of the first").fill(value)
        visitor.click("Paint")
        visitor.page.get_by_text(message).wait_for()


def test_the_largest_seeds_are_the_ones_that_were_typed(visitor):
    visitor.page.get_by_label("Seed of the first").fill("9007199254740988")
    pictures = json.loads(visitor.paint("a giraffe")["samples.json"])["pictures"]
    assert [about["seed"] for about in pictures] == list(range(2**53 - 4, 2**53))


def test_a_setting_that_cannot_be_is_again_what_it_was(visitor):
    visitor.page.get_by_text("More settings").click()
    field = visitor.page.get_by_label("number input for Guidance, picture")
    for value, kept in (("4.5", "4.5"), ("", "4.5"), ("-3", "4.5"), ("11", "4.5"), ("0", "0")):
        field.fill(value)
        field.press("Tab")
        assert field.input_value() == kept
    field.fill("2")
    field.press("Tab")
    field.fill("")  # and nothing else before it is painted
    settings = json.loads(visitor.paint("a giraffe")["samples.json"])["settings"]
    assert settings["image"]["guidance"] == 2
