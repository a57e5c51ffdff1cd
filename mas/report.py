"""The report of `mas evaluate` for people: Markdown, a sheet of samples, the sweep as a plot.

In: figures and rows of pictures. Out: NAME.json, NAME.md, NAME.samples.png, NAME.sweep.png.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mas.obedience import CLAIMS, CONFIDENCE
from mas.scene import SceneMap
from mas.shards import write_file
from mas.sheet import BACKGROUND, INK, contact_sheet
from mas.storage import write_json

LINES = {  # of the plot: distinguishable, also for those who see no red
    "class": (0, 114, 178),
    "number": (230, 159, 0),
    "colour": (213, 94, 0),
    "relation": (0, 158, 115),
    "place": (86, 180, 233),
    "time": (204, 121, 167),
}
PLOT = (640, 400)  # pixels
MARGIN = (52, 24, 120, 44)  # pixels left, above, right and below the axes
FINER = 3  # drawn larger by this and reduced, so that lines are smooth
CELL = 144  # pixels of a picture in the sheet
BLIND = 0.1  # mIoU of a reader on real pictures below which it is no judge


@dataclass(frozen=True, kw_only=True)
class Row:
    """One caption in the sheet of samples."""

    caption: str
    predicted: SceneMap  # scene that the model invented …
    picture: np.ndarray  # … and painted, uint8 H W C
    given: SceneMap  # scene it was given …
    painted: np.ndarray  # … and what it painted
    read: np.ndarray | None  # labels that the reader saw in it
    real: np.ndarray  # the picture of that scene


def write_report(output: Path, figures: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Writes all files of a report, each whole or not at all."""
    pictures = {"samples": draw_samples(rows)}
    if figures.get("sweep"):
        pictures["sweep"] = draw_sweep(figures["sweep"])
    output.parent.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)
        write_file(str(output.with_suffix(f".{name}.png")), buffer.getvalue())
    text = describe(figures, {name: f"{output.stem}.{name}.png" for name in pictures})
    write_file(str(output.with_suffix(".md")), text.encode())
    write_json(output, figures)


def draw_samples(rows: Sequence[Row]) -> Image.Image:
    """A row a caption: what the model made of it alone, and of it and its true scene."""
    header = ["caption", "predicted scene", "picture", "given scene", "picture"]
    if rows[0].read is not None:
        header.append("as it was read")
    header.append("real picture")
    return contact_sheet([_cells(row) for row in rows], cell=CELL, header=header)


def _cells(row: Row) -> list[Image.Image | str]:
    cells: list[Image.Image | str] = [
        row.caption,
        row.predicted.to_rgb(edges=True),
        Image.fromarray(row.picture),
        row.given.to_rgb(edges=True),
        Image.fromarray(row.painted),
    ]
    if row.read is not None:
        cells.append(SceneMap.from_labels(row.read).to_rgb(edges=True))
    return [*cells, Image.fromarray(row.real)]


def draw_sweep(sweep: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Obedience over guidance, one line a kind of claim."""
    entries = sorted(sweep, key=lambda entry: entry["guidance"])
    left, top, right, bottom = (FINER * m for m in MARGIN)
    width, height = PLOT[0] * FINER - left - right, PLOT[1] * FINER - top - bottom
    image = Image.new("RGB", (PLOT[0] * FINER, PLOT[1] * FINER), BACKGROUND)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=13 * FINER)
    low, high = entries[0]["guidance"], entries[-1]["guidance"]

    def place(guidance: float, share: float) -> tuple[float, float]:
        across = (guidance - low) / (high - low)
        return left + across * width, top + (1 - share) * height

    for tenth in range(0, 11, 2):
        x, y = place(low, tenth / 10)
        draw.line([(x, y), (x + width, y)], fill=(222, 218, 210), width=FINER)
        draw.text((x - 8 * FINER, y), f"{tenth * 10} %", fill=INK, font=font, anchor="rm")
    for entry in entries:
        x, y = place(entry["guidance"], 0)
        words = f"{entry['guidance']:g}"
        draw.text((x, y + 8 * FINER), words, fill=INK, font=font, anchor="mt")
    centre = (left + width / 2, PLOT[1] * FINER - 6 * FINER)
    draw.text(centre, "guidance", fill=INK, font=font, anchor="mb")
    lines = {name: _line(entries, name) for name in CLAIMS}
    lines = {name: line for name, line in lines.items() if line}
    names = sorted(lines, key=lambda name: lines[name][-1][1])
    step = 16 * FINER
    ceiling = float(top + height)
    for position, name in enumerate(names):  # lowest first, each name clear of the one below
        points = [place(*point) for point in lines[name]]
        draw.line(points, fill=LINES[name], width=2 * FINER, joint="curve")
        radius = 3 * FINER
        for x, y in points:
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=LINES[name])
        room = top + (len(names) - 1 - position) * step  # for the names above
        ceiling = max(min(ceiling, points[-1][1]), room)
        words = f"{name} {lines[name][-1][1]:.0%}"
        where = (left + width + 10 * FINER, ceiling)
        draw.text(where, words, fill=LINES[name], font=font, anchor="lm")
        ceiling -= step
    return image.resize(PLOT, Image.Resampling.LANCZOS)


def _line(entries: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """Guidance and share of one kind of claims, where any was judged."""
    return [
        (entry["guidance"], entry["caption"][name])
        for entry in entries
        if entry["caption"].get(name) is not None
    ]


def describe(figures: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The report as Markdown.

    Args:
        figures: as in the JSON.
        pictures: names of the files beside it, by kind.
    """
    asked = figures["input"]
    parts = [
        f"# Evaluation of {figures['model']['name']}",
        f"{asked['pictures']} captions and pictures of `{asked['shards']}`, "
        f"{name_guidance(figures['sampling'])}, seed {figures['seed']}. *Real* is what the same "
        "reading says of real scenes and pictures: the most that can be reached.",
        "Sampling of the scene: "
        + "; of the picture: ".join(
            _settings(figures["sampling"][stream]) for stream in ("scene", "image")
        )
        + ".",
        _obedience(figures),
        _scenes(figures),
        _others(figures),
    ]
    if "sweep" in pictures:
        parts.append(f"## Guidance\n\n![claims kept over guidance]({pictures['sweep']})")
        parts.append(_sweep(figures["sweep"]))
    parts.append(f"## Samples\n\n![samples]({pictures['samples']})")
    return "\n\n".join(part for part in parts if part) + "\n"


def name_guidance(sampling: Mapping[str, Mapping[str, Any]]) -> str:
    """The guidance of both streams in words."""
    scene, image = (sampling[stream]["guidance"] for stream in ("scene", "image"))
    if scene == image:
        return f"guidance {scene:g}"
    return f"guidance {scene:g} for scenes and {image:g} for pictures"


def _settings(sampling: Mapping[str, Any]) -> str:
    said = {name.replace("_", "-"): value for name, value in sampling.items() if value is not None}
    return ", ".join(name if value is True else f"{name} {value:g}" for name, value in said.items())


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_words(cell) for cell in line) + " |" for line in lines)


def _words(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _obedience(figures: Mapping[str, Any]) -> str:
    columns = {
        "caption": "model",
        "caption_real": "real",
        "caption_unseen": "unseen combinations",
        "caption_unseen_real": "real",
    }
    there = [name for name in columns if figures.get(name)]
    if not there:
        return ""
    rows = [
        [
            kind if kind != "all" else "whole caption",
            *(_share(figures["claims"][name][kind]) for name in there),
        ]
        for kind in (*CLAIMS, "all")
    ]
    text = "## Claims of captions that hold\n\n"
    text += _table(["claim", *(columns[name] for name in there)], rows)
    return f"{text}\n\nIn brackets: {CONFIDENCE:.0%} confidence interval, number of claims."


def _share(claims: Mapping[str, Any]) -> str | None:
    """A share with its interval and what it was counted from."""
    if not claims["count"]:
        return None
    low, high = claims["interval"]
    share = claims["kept"] / claims["count"]
    return f"{share:.3f} ({low:.2f}-{high:.2f}, n={claims['count']})"


def _scenes(figures: Mapping[str, Any]) -> str:
    scene = figures.get("scene")
    if not scene:
        return ""
    groups = ("miou", "things_miou", "stuff_miou", "human_miou", "face_miou", "pixel_accuracy")
    suffixes = {
        "scene given": "",
        "real": "_real",
        "scene predicted": "_predicted",
        "scene of another caption given": "_contradicted",
    }
    rows = [
        [group.replace("_", " "), *(scene.get(group + suffix) for suffix in suffixes.values())]
        for group in groups
        if group in scene
    ]
    text = "## Pictures read again, against the scene they should show\n\n"
    text += _table(["", *suffixes], rows)
    if doubt := doubt_reader(scene):
        return f"{text}\n\nNote: {doubt}."
    return f"{text}\n\nThe model reaches {scene['share_of_real']:.1%} of what real pictures reach."


def doubt_reader(scene: Mapping[str, Any]) -> str:
    """Why what the reader sees in pictures says nothing; empty where it is a judge.

    Args:
        scene: the figures of `compare_scenes`.
    """
    seen = scene["miou_real"]
    if seen is not None and seen >= BLIND:
        return ""
    return (
        f"the reader's mIoU on real pictures is {seen or 0:.3f}, and it needs {BLIND} or more to "
        "judge: its figures of the model's pictures, and their share of the real ones, say "
        "nothing; train it longer, or on more pictures"
    )


def _others(figures: Mapping[str, Any]) -> str:
    titles = {
        "reader": "The reader on real pictures",
        "vqseg": "VQ-SEG on real scenes",
        "vqgan": "VQ-GAN on real pictures",
        "distribution": "Distance from real pictures (features of the reader, not of Inception)",
        "published_distance": "Distance from real pictures on features of a network from a file",
        "clip": "CLIP score: 100 max(cosine, 0) of pictures with captions",
        "diversity": "Diversity: pictures of one caption, beside real ones of different captions",
        "codes": "Codes used in generated pictures",
    }
    parts = []
    for name, title in titles.items():
        values = figures.get(name)
        if values:
            rows = [[key.replace("_", " "), value] for key, value in _flat(values)]
            parts.append(f"## {title}\n\n" + _table(["", ""], rows))
    return "\n\n".join(parts)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key} ")
        else:
            rows.append((prefix + key, value))
    return rows


def _sweep(sweep: Sequence[Mapping[str, Any]]) -> str:
    kinds = [kind for kind in (*CLAIMS, "all") if kind in sweep[0]["caption"]]
    rows = [
        [
            f"{entry['guidance']:g}",
            *(_share(entry["claims"]["caption"][kind]) for kind in kinds),
            entry["distribution"].get("fid"),
        ]
        for entry in sweep
    ]
    return _table(["guidance", *kinds, "FID"], rows)
