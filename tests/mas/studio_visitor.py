"""A studio that runs as users run it, and somebody in front of its page."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile

import numpy as np
from PIL import Image

from mas.scene import CLASS_NAMES, PALETTE, VOID, SceneMap

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
LOOK, LOOKED_AT = (40, -60), (12, 18)  # in pixels from the canvas' middle; row, column of a scene
# Resolves when nothing has moved for ten frames on end; a busy page draws none.
AT_REST = """() => new Promise((resolve) => {
  let last = null;
  let calm = 0;
  const look = () => {
    const { x, y, width } = document.querySelector('canvas').getBoundingClientRect();
    const now = String([x, y, width, scrollX, scrollY, document.documentElement.scrollHeight]);
    calm = now === last ? calm + 1 : 0;
    last = now;
    if (calm < 10) requestAnimationFrame(look);
    else resolve();
  };
  look();
})"""


class Studio:
    """A studio that runs as users run it."""

    def __init__(self, model, folder, port=None):
        if port is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
        self.port = port
        self.address = f"http://127.0.0.1:{self.port}"
        self.log, self.temporary = folder / "log.txt", folder / "temporary"
        self.temporary.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "mas", "studio", "--model", str(model)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                stdout=log,
                stderr=log,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as behind an &
                env=os.environ
                | {
                    "OMP_NUM_THREADS": "1",
                    "TMPDIR": str(self.temporary),
                    "PYTHONFAULTHANDLER": "1",
                },
            )
        for _ in range(600):
            if f"{self.address} (Ctrl-C ends it)\n" in self.log.read_text():
                return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def end(self, number):
        """Sends a signal; the studio must end in order and leave nothing behind."""
        self.process.send_signal(number)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # says where each thread is
        assert self.process.wait(timeout=60) == 0, self.log.read_text()
        assert self.log.read_text().endswith("The studio is closed.\n")
        assert not list(self.temporary.glob("mas-studio-*"))


class Visitor:
    """Somebody in front of the page, who looks before doing the next thing."""

    def __init__(self, page, address):
        self.page = page
        self.colour = None  # of the brush
        page.goto(address)
        self.arrive()
        self.see(LOOK, (255, 255, 255))

    def arrive(self):
        """Waits until the canvas answers to hands, and lies where it will stay."""
        self.page.locator("[data-is=brush]").get_by_text("airplane").wait_for()
        self.settle()

    def settle(self):
        """Waits until the page has come to rest."""
        self.page.evaluate(AT_REST)

    def reload(self):
        self.page.reload()
        self.arrive()

    def click(self, name):
        self.page.get_by_role("button", name=name, exact=True).click()

    def place(self, point):
        """Where on the screen a point lies that is given in pixels from the canvas' middle."""
        area = self.page.locator("canvas").bounding_box()
        return area["x"] + area["width"] / 2 + point[0], area["y"] + area["height"] / 2 + point[1]

    def pixel(self, row, column, size=32):
        """The middle of a pixel of the scene, as a point."""
        side = self.page.locator("canvas").bounding_box()["width"]
        return tuple((2 * x + 1 - size) * side / size / 2 for x in (column, row))

    def see(self, point, colour):
        """Waits until the canvas has this colour there."""
        colour = tuple(map(int, colour))
        self.page.locator("canvas").scroll_into_view_if_needed()
        for _ in range(300):
            x, y = self.place(point)
            shot = self.page.screenshot(clip={"x": x, "y": y, "width": 1, "height": 1})
            found = Image.open(io.BytesIO(shot)).convert("RGB").getpixel((0, 0))
            if found == colour:
                return
            self.page.wait_for_timeout(100)
        raise AssertionError(f"{point} of the canvas is {found}, not {colour}")

    def choose(self, name, tool="Brush"):
        """Chooses what is drawn, and with what."""
        box = self.page.get_by_label("Find a class")
        box.fill(name)
        box.press("Enter")
        self.take(tool)
        self.colour = PALETTE[CLASS_NAMES.index(name)]

    def take(self, name):
        """Clicks on a tool or a class, wherever it moves meanwhile."""
        radio = self.page.get_by_role("radio", name=name, exact=True)
        radio.locator("xpath=..").click()
        assert radio.is_checked()

    def press(self, *points):
        """Presses the mouse at the first point of the canvas, moves through all, lets it go."""
        self.settle()
        places = [self.place(point) for point in points]
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*place, steps=8)
        self.page.mouse.up()
        self.page.mouse.move(2, 2)  # so that no outline of the tool is seen

    def stroke(self, *points):
        """Draws through points of the canvas, see `place`."""
        self.press(*points)
        for point in points:
            self.see(point, self.colour)

    def save(self):
        """The file that holds what is on the canvas."""
        with self.page.expect_download() as download:
            self.click("Save the scene")
        assert download.value.suggested_filename == "scene.png"
        return download.value.path().read_bytes()

    def scene(self):
        """What is on the canvas."""
        return SceneMap.from_png(io.BytesIO(self.save()))

    def open(self, file):
        self.page.get_by_label("Scene to open").set_input_files(file)

    def see_scene(self, scene):
        """Waits until the canvas shows a scene, as far as one look tells."""
        assert scene.labels[LOOKED_AT] != VOID  # which is white, as the canvas was before
        self.see(LOOK, PALETTE[scene.labels[LOOKED_AT]])

    def paint(self, caption=""):
        """Presses the button, waits, and unpacks what there is to download."""
        box = self.page.get_by_label("Seed of the first")
        seed = int(box.input_value())
        self.page.get_by_label("Caption").fill(caption)
        self.click("Paint")
        self.page.get_by_text(f"seed {seed} to ").wait_for()
        for _ in range(50):
            with self.page.expect_download() as download:
                self.page.get_by_text("Download all").click()
            with zipfile.ZipFile(download.value.path()) as files:
                found = {name: files.read(name) for name in files.namelist()}
            if json.loads(found["samples.json"])["seed"] == seed:
                past = "([box, seed]) => box.value !== seed"  # it changes last
                self.page.wait_for_function(past, arg=[box.element_handle(), str(seed)])
                return found
            self.page.wait_for_timeout(100)  # the page changes one part after the other
        raise AssertionError("the download is of an older result")


def launch(playwright):
    return playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def scene_of(files, name="0000.scene.png"):
    return SceneMap.from_png(io.BytesIO(files[name]))


def open_scene(visitor, folder, labels, things=None):
    scene = SceneMap.from_labels(labels.astype(np.uint8), things)
    scene.to_png(folder / "mine.png")
    visitor.open(folder / "mine.png")
    visitor.page.get_by_text("The scene is on the canvas.").wait_for()
    return scene


def said(visitor, text):
    visitor.page.locator("[data-is=said]").get_by_text(text).wait_for()
