"""The studio's page: what it offers, and in a browser that a stroke becomes a scene."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
import zipfile

import numpy as np
import pytest
from PIL import Image

from mas.__main__ import main
from mas.scene import CLASS_NAMES, PALETTE, SceneMap

gr = pytest.importorskip("gradio", reason="needs the extra studio")
from mas.painter import Painter  # noqa: E402
from mas.studio import NOTHING, Page, colour_of, legend  # noqa: E402

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
LABELS = np.full((32, 32), CLASS_NAMES.index("grass-merged"), np.uint8)
LABELS[:10] = CLASS_NAMES.index("sea")
DOG = CLASS_NAMES.index("dog")


@pytest.fixture(scope="module")
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address(tiny_folder, free_port):
    """Of a studio that runs as users run it."""
    command = [sys.executable, "-m", "mas", "studio", "--model", str(tiny_folder)]
    server = subprocess.Popen(
        [*command, "--port", str(free_port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    said = server.stdout.readline()
    assert said == f"http://127.0.0.1:{free_port} (Ctrl-C ends it)\n"
    yield said.split()[0]
    server.send_signal(signal.SIGINT)
    rest, _ = server.communicate(timeout=30)
    assert server.returncode == 0, rest
    assert "Traceback" not in rest, rest


def component(page, kind, label):
    found = [
        x for x in page.blocks.values() if isinstance(x, kind) and getattr(x, "label", "") == label
    ]
    assert len(found) == 1, (kind, label)
    return found[0]


def test_the_page_offers_what_the_model_knows_and_its_own_settings(parts, tmp_path):
    from mas.filter import Sampling, StreamSampling
    from mas.model import MakeAScene

    sampling = StreamSampling(
        scene=Sampling(guidance=2, top_p=0.9), image=Sampling(temperature=0.4)
    )
    model = MakeAScene(**parts, sampling=sampling, classes=("dog", "sea"))
    page = Page(Painter(model), "mine", tmp_path).build()
    brush = component(page, gr.Dropdown, "Brush: what is drawn")
    assert [name for name, _ in brush.choices] == [NOTHING, "dog", "sea"]
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
    brush = component(unknown, gr.Dropdown, "Brush: what is drawn")
    assert len(brush.choices) == 1 + len(CLASS_NAMES)


def test_the_legend_names_every_class_once_the_largest_first():
    text = legend([SceneMap.from_labels(LABELS), SceneMap.from_labels(LABELS)])
    assert re.findall(r"</i>([^<]+)<", text) == ["grass-merged", "sea"]
    assert re.findall(r"background:(#\w{6})", text) == [colour_of("grass-merged"), colour_of("sea")]
    assert colour_of("dog") == "#" + bytes(PALETTE[DOG]).hex()
    assert colour_of(NOTHING) == "#000000"


def test_a_port_that_cannot_be_had_is_said_in_one_line(tiny_folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["studio", "--model", str(tiny_folder), "--port", port]) == 1
    assert f"127.0.0.1:{port} is taken" in capsys.readouterr().err
    assert main(["studio", "--model", str(tiny_folder), "--port", "70000"]) == 1
    assert "--port is 70000, use a number from 1 to 65535" in capsys.readouterr().err
    assert main(["studio", "--model", "nowhere"]) == 1
    assert "nowhere: no such model folder" in capsys.readouterr().err


def test_the_server_shows_files_of_its_own_only(address, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    with urllib.request.urlopen(address) as answer:
        assert b"mini Make-A-Scene" in answer.read()
    for path in ("/etc/hostname", __file__):
        with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
            urllib.request.urlopen(f"{address}/gradio_api/file={path}")


class Visitor:
    """Somebody in front of the page."""

    def __init__(self, page, address):
        self.page = page
        page.goto(address)
        page.wait_for_selector("canvas")
        page.get_by_role("button", name="Brush", exact=True).wait_for()
        self.slow()

    def slow(self, milliseconds=700):
        self.page.wait_for_timeout(milliseconds)  # the editor has no sign that it is ready

    def click(self, name):
        self.page.get_by_role("button", name=name, exact=True).click()

    def take(self, name):
        self.click("Brush")
        box = self.page.get_by_role("combobox", name="Brush: what is drawn")
        box.click()
        box.fill(name)
        box.press("Enter")
        self.slow()

    def open(self, file):
        self.page.get_by_test_id("Open a scene-upload-button").set_input_files(file)

    def stroke(self, *points):
        """Draws through points given in pixels of the screen from the middle of the canvas."""
        area = self.page.locator("canvas").first.bounding_box()
        x, y = area["x"] + area["width"] / 2, area["y"] + area["height"] / 2
        (first_x, first_y), *rest = points
        self.page.mouse.move(x + first_x, y + first_y)
        self.page.mouse.down()
        for right, down in rest:
            self.page.mouse.move(x + right, y + down, steps=8)
        self.page.mouse.up()
        self.slow()

    def paint(self, caption=""):
        seed = self.page.get_by_label("Seed of the first").input_value()
        self.page.get_by_label("Caption").fill(caption)
        self.click("Paint")
        self.page.get_by_text(f"seed {seed} to ").wait_for()
        self.slow()  # the page changes one part after the other
        with self.page.expect_download() as download:
            self.page.get_by_text("Download all").click()
        with zipfile.ZipFile(download.value.path()) as files:
            return {name: files.read(name) for name in files.namelist()}


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not os.path.exists(CHROMIUM):
        pytest.skip("needs chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visitor(chromium, address):
    page = chromium.new_page(viewport={"width": 1400, "height": 1300})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    # Nothing is loaded from anywhere else: the page works without a network, and tells nobody.
    page.on(
        "request", lambda r: r.url.startswith((address, "data:", "blob:")) or errors.append(r.url)
    )
    yield Visitor(page, address)
    page.close()
    assert not errors


def scene_of(files, name="0000.scene.png"):
    return SceneMap.from_png(io.BytesIO(files[name]))


def test_a_caption_becomes_pictures_and_all_files_that_sample_writes(visitor, tiny_model):
    files = visitor.paint("a giraffe in the park")
    assert len(files) == 4 * 2 + 2
    about = json.loads(files["samples.json"])
    assert about["caption"] == "a giraffe in the park" and about["seed"] == 0
    expected = tiny_model.generate("a giraffe in the park", count=4)
    for i, image in enumerate(expected.images):
        picture = Image.open(io.BytesIO(files[f"{i:04}.png"]))
        assert np.array_equal(np.asarray(picture), np.asarray(image))
        assert picture.text["caption"] == "a giraffe in the park"
    assert visitor.page.get_by_label("Seed of the first").input_value() == "4"
    assert json.loads(visitor.paint("a giraffe")["samples.json"])["seed"] == 4


def test_strokes_stay_where_they_are_drawn(visitor):
    visitor.page.get_by_label("stays empty").check()
    visitor.take("dog")
    visitor.stroke((-150, -100), (150, -100))
    visitor.take("sea")
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


def test_a_scene_file_is_opened_drawn_on_and_its_result_drawn_on_again(visitor, tmp_path):
    SceneMap.from_labels(LABELS).to_png(tmp_path / "mine.png")
    visitor.open(tmp_path / "mine.png")
    visitor.slow(2000)
    assert np.array_equal(scene_of(visitor.paint()).labels, LABELS)
    visitor.take("dog")
    visitor.stroke((-100, 60), (100, 60))
    painted = scene_of(visitor.paint())
    dogs = painted.labels == DOG
    assert 20 < dogs.sum() < 200 and not dogs[:16].any()
    assert np.array_equal(painted.labels[~dogs], LABELS[~dogs])
    visitor.click("Draw on the chosen scene")
    visitor.slow(2000)
    assert scene_of(visitor.paint()) == painted


def test_a_file_that_is_no_scene_is_named(visitor, tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "wide.png")
    visitor.open(tmp_path / "wide.png")
    visitor.page.get_by_text("wide.png: a scene must be square, this one is 40x20").wait_for()
