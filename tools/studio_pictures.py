"""Pictures of the studio's page for docs/studio.md: somebody draws, paints, and draws on.

Needs chromium, playwright and the extra studio. From the main folder:

    python tools/studio_pictures.py [--output docs/pictures/studio] [--chromium /usr/bin/chromium]
"""

from __future__ import annotations

import argparse
import io
import socket
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

WIDTH, HEIGHT = 1500, 1240  # of the window
CAPTION = "a dog and a red umbrella on the beach at sunset"
BEACH = [  # tool, class, and points in shares of the canvas
    ("Rectangle", "sea", [(0, 0.45), (0.999, 0.62)]),
    ("Fill", "sand", [(0.5, 0.9)]),
    ("Ellipse", "dog", [(0.2, 0.66), (0.44, 0.76)]),
    ("Brush", "dog", [(0.24, 0.72), (0.24, 0.84)]),
    ("Brush", "dog", [(0.4, 0.72), (0.4, 0.84)]),
    ("Brush", "dog", [(0.41, 0.68), (0.44, 0.63), (0.5, 0.65)]),
    ("Brush", "dog", [(0.2, 0.68), (0.16, 0.62)]),
]
RADIUS = 4
DOG, BESIDE, SMALLER = (0.3, 0.71), (0.75, 0.87), "80"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("docs/pictures/studio"), help="folder of the pictures"
    )
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser to run")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "mas", "studio", "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        address = server.stdout.readline().split()[0]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=arguments.chromium, args=["--no-sandbox"]
            )
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.goto(address)
            page.locator("canvas").wait_for()
            page.wait_for_timeout(1000)
            page.get_by_label("Radius").fill(str(RADIUS))
            for tool, name, points in BEACH:
                draw(page, tool, name, points)
            paint(page, CAPTION)
            shoot(page, arguments.output / "drawn.jpg")
            page.get_by_role("button", name="Draw on the chosen scene").click()
            page.get_by_text("The scene is on the canvas.").wait_for()
            stamp(page)
            paint(page, CAPTION.replace("a dog", "two dogs"))
            shoot(page, arguments.output / "drawn-on.jpg")
            browser.close()
    finally:
        server.terminate()  # leaves as by Ctrl-C
        server.wait()


def place(page: Page, point: tuple[float, float]) -> tuple[float, float]:
    area = page.locator("canvas").bounding_box()
    assert area is not None
    return area["x"] + point[0] * area["width"], area["y"] + point[1] * area["height"]


def draw(page: Page, tool: str, name: str, points: list[tuple[float, float]]) -> None:
    box = page.get_by_label("Find a class")
    box.fill(name)
    box.press("Enter")
    page.get_by_role("radio", name=tool, exact=True).check(force=True)
    page.mouse.move(*place(page, points[0]))
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*place(page, point), steps=8)
    page.mouse.up()


def stamp(page: Page) -> None:
    """A second dog, as the first one but smaller and flipped."""
    page.get_by_role("radio", name="Stamp", exact=True).check(force=True)
    page.mouse.click(*place(page, DOG))
    page.get_by_label("Size, %").fill(SMALLER)
    page.get_by_role("button", name="Flip").click()
    page.mouse.click(*place(page, BESIDE))


def paint(page: Page, caption: str) -> None:
    seed = page.get_by_label("Seed of the first").input_value()
    page.get_by_label("Caption").fill(caption)
    page.get_by_role("button", name="Paint", exact=True).click()
    page.get_by_text(f"seed {seed} to ").wait_for(timeout=120_000)
    page.wait_for_timeout(1500)


def shoot(page: Page, path: Path) -> None:
    page.evaluate("scrollTo(0, 0)")
    page.mouse.move(5, 5)
    page.wait_for_timeout(500)
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(path, quality=70)


if __name__ == "__main__":
    main()
