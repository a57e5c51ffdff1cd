"""Steps of a demonstration, and the page that shows them.

In: commands of `mas` and how to show what each made. Out: OUTPUT/index.html, one file with all
pictures inside. Used by tools/demo.py and tools/demo_train.py.
"""

import base64
import csv
import io
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from mas.scene import SceneMap
from mas.shards import expand_shards, read_shard
from mas.sheet import overlay

TOOLS = Path(__file__).parent
CURVE = (240, 70)  # width and height of a loss


@dataclass(kw_only=True)
class Step:
    """One command, what it is for, and how to show what it made."""

    title: str
    text: str
    command: list[str]
    pictures: Callable[[], list["Picture"]] = field(default=list)
    cards: Callable[[], list["Card"]] = field(default=list)
    curves: Path | None = None  # metrics.csv of a training run
    seconds: float = 0.0

    @property
    def output(self) -> Path:
        """The folder or file the command writes."""
        option = "--trainer.default_root_dir" if self.command[0] == "train" else "--output"
        return Path(self.command[self.command.index(option) + 1])


@dataclass(frozen=True)
class Picture:
    """A picture on the page: its caption and the file it is read from, or the image itself."""

    caption: str
    image: Path | Image.Image

    def data_uri(self) -> str:
        """The picture itself, to stand in the page."""
        if isinstance(self.image, Path):
            content, kind = self.image.read_bytes(), self.image.suffix.lstrip(".")
        else:
            buffer = io.BytesIO()
            self.image.save(buffer, "PNG", optimize=True)
            content, kind = buffer.getvalue(), "png"
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True)
class Card:
    """Pictures that belong together, side by side, and the words below them."""

    words: str
    pictures: list[Picture]

    def describe(self) -> dict[str, Any]:
        return {
            "words": self.words,
            "pictures": [(picture.caption, picture.data_uri()) for picture in self.pictures],
        }


class Demo:
    """Runs steps in order, remembers them in OUTPUT/steps.json, writes the page.

    A second run skips the steps it finds done, as long as their commands are the same and in the
    same order, and resumes the one that was interrupted. From the first other command on, what
    lies in the way is removed and everything is made anew.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.steps: list[Step] = []
        self.record_file = output / "steps.json"
        self.record: list[dict[str, Any]] = []
        if self.record_file.is_file():
            self.record = json.loads(self.record_file.read_text())

    def run(self, step: Step) -> None:
        words = shlex.join(["mas", *step.command])
        position = len(self.steps)
        self.steps.append(step)
        print(f"\n\033[1m{step.title}\033[0m\n$ {words}", flush=True)
        known = self.record[position] if position < len(self.record) else {}
        if known.get("command") != words:
            self._remove(step)
            self.record = [*self.record[:position], {"command": words, "seconds": 0.0}]
        elif known.get("done"):
            step.seconds = known["seconds"]
            print(f"done before, in {step.seconds:.0f} s", flush=True)
            return
        entry, start = self.record[position], time.monotonic()
        self._save()
        status = subprocess.run([sys.executable, "-m", "mas", *step.command]).returncode
        entry["seconds"] += time.monotonic() - start
        entry["done"] = status == 0
        self._save()
        step.seconds = entry["seconds"]
        if status:
            raise SystemExit(f"{words}\nfailed with exit status {status}")

    def _remove(self, step: Step) -> None:
        if step.output.is_dir():
            shutil.rmtree(step.output)
        step.output.unlink(missing_ok=True)

    def _save(self) -> None:
        self.record_file.write_text(json.dumps(self.record, indent=2) + "\n")

    def write_page(self, title: str, intro: str, hero: Sequence[Card] = ()) -> Path:
        """Writes index.html: the cards of `hero` on top, then every step in order."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TOOLS), autoescape=True, undefined=jinja2.StrictUndefined
        )
        page = self.output / "index.html"
        html = environment.get_template("demo.html").render(
            title=title,
            intro=intro,
            hero=[card.describe() for card in hero],
            total=sum(step.seconds for step in self.steps),
            steps=[self._describe(step) for step in self.steps],
        )
        page.write_text(html, "utf-8")
        return page

    def _describe(self, step: Step) -> dict[str, Any]:
        return {
            "title": step.title,
            "text": step.text,
            "command": shlex.join(["mas", *step.command]),
            "seconds": step.seconds,
            "pictures": [(p.caption, p.data_uri()) for p in step.pictures()],
            "cards": [card.describe() for card in step.cards()],
            "curves": read_curves(step.curves) if step.curves else [],
        }


def sample_cards(folder: Path, *, scenes: bool = True) -> list[Card]:
    """A card for each picture that `mas sample` left in a folder: its scene, itself, its caption.

    Args:
        folder: output of `mas sample`.
        scenes: whether the scene stands beside the picture.
    """
    content = json.loads((folder / "samples.json").read_text("utf-8"))
    cards = []
    for entry in content["pictures"]:
        pictures = [Picture("picture", folder / entry["image"])]
        if scenes:
            scene = SceneMap.from_png(folder / entry["scene"])
            pictures.insert(0, Picture("scene", scene.to_rgb(edges=True)))
        cards.append(Card(entry["caption"], pictures))
    return cards


def shard_cards(folder: Path, count: int) -> list[Card]:
    """A card for each of the first pictures of a folder's shards, with its scene where it has one.

    Args:
        folder: photo or scene shards.
        count: cards.
    """
    cards = []
    for sample, _ in zip(read_shard(expand_shards(str(folder))[0]), range(count), strict=False):
        photo = Image.open(io.BytesIO(sample.files["jpg"]))
        pictures = [Picture("picture", photo)]
        if "scene.png" in sample.files:
            scene = SceneMap.from_png(io.BytesIO(sample.files["scene.png"]))
            pictures.append(Picture("scene", scene.to_rgb(edges=True)))
            pictures.append(Picture("both", overlay(photo, scene)))
        cards.append(Card(sample.files["txt"].decode(), pictures))
    return cards


def read_curves(path: Path) -> list[dict[str, Any]]:
    """Every loss of a metrics.csv as an SVG polyline with its first and last value."""
    width, height = CURVE
    rows = list(csv.DictReader(path.read_text().splitlines()))
    curves = []
    for name in rows[0] if rows else ():
        points = [(float(r["step"]), float(r[name])) for r in rows if r[name] and r.get("step")]
        if not name.startswith("train/") or "loss" not in name or len(points) < 2:
            continue
        steps, values = [p[0] for p in points], [p[1] for p in points]
        low, high = min(values), max(values)
        span, length = (high - low) or 1.0, (steps[-1] - steps[0]) or 1.0
        line = " ".join(
            f"{width * (s - steps[0]) / length:.1f},{height - height * (v - low) / span:.1f}"
            for s, v in points
        )
        curves.append({"name": name, "line": line, "first": values[0], "last": values[-1]})
    return curves
