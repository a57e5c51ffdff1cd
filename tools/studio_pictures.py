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
SIDE = 480  # of the canvas, in pixels of the window
CAPTION = "a dog and a red umbrella on the beach at sunset"
BEACH = {  # strokes in shares of the canvas, by class
    "sea": [((0, y), (1, y)) for y in (0.5, 0.54, 0.58)],
    "sand": [((0, y), (1, y)) for y in (0.64, 0.7, 0.76, 0.82, 0.88, 0.94)],
    "dog": [
        ((0.2, 0.68), (0.42, 0.68)),
        *[((x, 0.68), (x, 0.84)) for x in (0.2, 0.42)],
        ((0.43, 0.6), (0.49, 0.62)),
    ],
}
MORE = {"kite": [((0.7, 0.15), (0.78, 0.23)), ((0.78, 0.15), (0.7, 0.23))]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/studio"))
    parser.add_argument("--chromium", default="/usr/bin/chromium")
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
            page.get_by_role("button", name="Brush", exact=True).wait_for()
            page.wait_for_timeout(1000)
            draw(page, BEACH)
            paint(page, CAPTION)
            shoot(page, arguments.output / "drawn.jpg")
            page.get_by_role("button", name="Draw on the chosen scene").click()
            page.wait_for_timeout(3000)
            draw(page, MORE)
            paint(page, CAPTION + ", with a kite")
            shoot(page, arguments.output / "drawn-on.jpg")
            browser.close()
    finally:
        server.terminate()  # leaves as by Ctrl-C
        server.wait()


def draw(page: Page, strokes: dict[str, list[tuple[tuple[float, float], ...]]]) -> None:
    for name, lines in strokes.items():
        page.get_by_role("button", name="Brush", exact=True).click()
        box = page.get_by_role("combobox", name="Brush: what is drawn")
        box.click()
        box.fill(name)
        box.press("Enter")
        page.wait_for_timeout(1000)
        area = page.locator("canvas").first.bounding_box()
        assert area is not None
        for line in lines:
            places = [
                (
                    area["x"] + area["width"] / 2 + (x - 0.5) * SIDE,
                    area["y"] + area["height"] / 2 + (y - 0.5) * SIDE,
                )
                for x, y in line
            ]
            page.mouse.move(*places[0])
            page.mouse.down()
            for place in places[1:]:
                page.mouse.move(*place, steps=8)
            page.mouse.up()
            page.wait_for_timeout(200)


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
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(path, quality=80)


if __name__ == "__main__":
    main()
