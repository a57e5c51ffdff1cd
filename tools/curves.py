"""Draws the curves of training runs, one over the other: is my loss normal?

    python tools/curves.py docs/curves/tiny-gpt.csv runs/tiny/gpt --output curves.png

In: run folders of `mas train`, or their metrics.csv. Out: one PNG with a panel a metric; lines are
training steps, dots validations, a colour a run. `--only loss image` draws these metrics alone.
"""

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from plain_errors import run_tool

PARTS = ("train/", "validation/")
PANEL = (380, 230)  # pixels, width and height
COLUMNS = 3
MARGIN = (52, 30, 14, 26)  # pixels around a plot: left, top, right, bottom
TICKS = 4  # at least so many intervals on an axis, where the numbers allow it
SCALE = 2  # drawn larger and reduced: smooth lines
BACKGROUND, INK, FAINT = (250, 249, 246), (45, 45, 48), (222, 220, 214)
COLOURS = [(36, 98, 166), (206, 92, 44), (60, 132, 78), (140, 80, 150), (120, 112, 40)]

Points = list[tuple[int, float]]  # step, value
Curves = dict[str, dict[str, Points]]  # metric -> "train/" or "validation/" -> points


def read_curves(path: Path) -> Curves:
    """The metrics of a run.

    Raises:
        ValueError: the file is missing or not a metrics.csv.
    """
    path = path / "metrics.csv" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give run folders of mas train or metrics.csv")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            points = [
                (column, int(row["step"]), float(value))
                for row in csv.DictReader(file)
                for column, value in row.items()
                if value and column != "step"
            ]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path}: holds no metrics of mas train ({error})") from error
    curves: Curves = defaultdict(lambda: defaultdict(list))
    for column, step, value in points:
        part = next((part for part in PARTS if column.startswith(part)), "")
        curves[column.removeprefix(part)][part or PARTS[0]].append((step, value))
    if not curves:
        raise ValueError(f"{path}: holds no metrics of mas train")
    return curves


def ticks(low: float, high: float) -> list[float]:
    """Round numbers that lie between two others, TICKS or a few more of them."""
    step = 10 ** math.floor(math.log10((high - low) / TICKS))
    step *= max(factor for factor in (1, 2, 5) if step * factor * TICKS <= high - low)
    first = math.ceil(low / step)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


class Panel:
    """The plot of one metric."""

    def __init__(self, name: str, runs: list[dict[str, Points]]) -> None:
        self.name, self.runs = name, runs
        points = [p for run in runs for part in run.values() for p in part if math.isfinite(p[1])]
        self.last = max([1, *(step for step, _ in points)])
        values = sorted(value for _, value in points) or [0.0]
        self.low, self.high = (
            values[0],
            values[math.ceil(0.995 * (len(values) - 1))],
        )  # spikes may stick out
        pad = 0.05 * (self.high - self.low) or abs(self.high) or 1.0
        self.low, self.high = self.low - pad, self.high + pad

    def place(self, step: float, value: float) -> tuple[float, float]:
        """Where a point lies, in pixels of the enlarged panel."""
        left, top, right, bottom = MARGIN
        x = left + (PANEL[0] - left - right) * step / self.last
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        y = PANEL[1] - bottom - (PANEL[1] - top - bottom) * share
        return x * SCALE, y * SCALE

    def draw(self) -> Image.Image:
        image = Image.new("RGB", (PANEL[0] * SCALE, PANEL[1] * SCALE), BACKGROUND)
        draw = ImageDraw.Draw(image)
        font = ImageFont.load_default(size=11 * SCALE)
        title = ImageFont.load_default(size=13 * SCALE)
        draw.text((MARGIN[0] * SCALE, 8 * SCALE), self.name, fill=INK, font=title)
        for value in ticks(self.low, self.high):
            x, y = self.place(0, value)
            draw.line((x, y, self.place(self.last, value)[0], y), fill=FAINT, width=SCALE)
            draw.text((x - 5 * SCALE, y), f"{value:.5g}", fill=INK, font=font, anchor="rm")
        for step in ticks(0, self.last):
            x, y = self.place(step, self.low)
            draw.text((x, y + 5 * SCALE), f"{step:,.0f}", fill=INK, font=font, anchor="mt")
        for run, colour in zip(self.runs, self._colours(), strict=True):
            line = [
                self.place(*point) for point in run.get(PARTS[0], []) if math.isfinite(point[1])
            ]
            if len(line) > 1:
                draw.line(line, fill=colour, width=int(1.5 * SCALE), joint="curve")
            for point in run.get(PARTS[1], []):
                x, y = self.place(*point)
                radius = 4 * SCALE
                draw.ellipse(
                    (x - radius, y - radius, x + radius, y + radius),
                    fill=colour,
                    outline=BACKGROUND,
                )
        return image.resize(PANEL, Image.Resampling.LANCZOS)

    def _colours(self) -> list[tuple[int, int, int]]:
        return [COLOURS[i % len(COLOURS)] for i in range(len(self.runs))]


def draw_page(runs: dict[str, Curves], only: list[str] | None) -> Image.Image:
    """All panels under a line that names the runs.

    Raises:
        ValueError: a metric asked for is in no run.
    """
    known = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    missing = [name for name in only or [] if name not in known]
    if missing:
        raise ValueError(f"no metric {missing[0]!r}; there are {', '.join(known)}")
    names = only or known
    columns = min(COLUMNS, len(names))
    head = 34
    size = (columns * PANEL[0], head + -(-len(names) // columns) * PANEL[1])
    page = Image.new("RGB", size, BACKGROUND)
    draw, font, x = ImageDraw.Draw(page), ImageFont.load_default(size=13), MARGIN[0]
    for i, label in enumerate(runs):
        draw.rectangle((x, 15, x + 14, 25), fill=COLOURS[i % len(COLOURS)])
        draw.text((x + 20, 12), label, fill=INK, font=font)
        x += 44 + int(font.getlength(label))
    for i, name in enumerate(names):
        panel = Panel(name, [curves.get(name, {}) for curves in runs.values()])
        page.paste(panel.draw(), (i % columns * PANEL[0], head + i // columns * PANEL[1]))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or their metrics.csv")
    parser.add_argument("--output", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--only", nargs="+", help="metrics to draw, without train/; default all")
    options = parser.parse_args()
    try:
        runs = {str(path): read_curves(path) for path in options.runs}
        page = draw_page(runs, options.only)
    except ValueError as error:
        parser.error(str(error))
    page.quantize(64, dither=Image.Dither.NONE).save(options.output, optimize=True)
    print(options.output)


if __name__ == "__main__":
    run_tool(main)
