"""`mas inspect`: what scene shards look like, to the eye and in numbers.

In: a scene shard or a folder of them. Out: a contact sheet with a row a sample (photo, scene,
overlay, caption) and a printed class histogram.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
from PIL import Image

from mas.scene import CLASS_NAMES, SceneError, SceneMap
from mas.shards import (
    Sample,
    ShardError,
    ShardIndex,
    expand_shards,
    local_path,
    read_captions,
    write_file,
)
from mas.sheet import contact_sheet, overlay

MEMBERS = ("jpg", "scene.png", "txt", "json")
COLUMNS = ("photo", "scene, edges white, void black", "overlay", "key, caption, classes")
REMOTE_SHARDS = 4  # of a run may have to be copied
CLASSES_SHOWN = 8  # of each sample, the largest first
SMALL = 0.005  # share of a scene; smaller classes are not named beside it
ROWS_PRINTED = 25  # of the histogram


def inspect(shards: str, *, output: str, count: int = 16, as_json: bool = False) -> None:
    """Draw a contact sheet of scene shards and print their class histogram.

    Args:
        shards: a scene shard, a folder of them, a glob or a brace pattern; local or URL.
        output: PNG to write; its folder is made where it is missing.
        count: samples on the sheet, spread evenly over the shards.
        as_json: print one JSON object instead of a table.
    """
    if count < 1:
        raise ValueError(f"--count must be at least 1, got {count}")
    if Path(output).suffix.lower() != ".png":
        raise ValueError(f"--output must end in .png, got {output}")
    paths = expand_shards(shards)
    rows, photos, pixels = [], Counter[str](), Counter[str]()
    void, seen = 0.0, 0
    for sample in choose(paths, count):
        photo, scene = read_pair(sample)
        counts = scene.histogram()
        rows.append((photo, scene.to_rgb(edges=True), overlay(photo, scene), _words(sample, scene)))
        photos.update(counts.keys())
        pixels.update({name: n / scene.labels.size for name, n in counts.items()})
        void, seen = void + scene.void_fraction(), seen + 1
    if not rows:
        raise ShardError(f"{shards}: the shards hold no samples")
    buffer = io.BytesIO()
    contact_sheet(rows, header=COLUMNS).save(buffer, "PNG")
    if (local := local_path(output)) is not None:
        Path(local).parent.mkdir(parents=True, exist_ok=True)
    write_file(output, buffer.getvalue())
    classes = {
        name: {"photos": photos[name], "share": round(pixels[name] / seen, 4)}
        for name in sorted(CLASS_NAMES, key=lambda name: -pixels[name])
        if photos[name]
    }
    report = {"samples": seen, "void": round(void / seen, 4), "classes": classes}
    print(json.dumps(report) if as_json else _describe(report))


def choose(paths: Sequence[str], count: int) -> Iterator[Sample]:
    """`count` samples spread evenly over the shards, or all where there are fewer.

    Of remote shards, which are copied whole, only a few are looked at.

    Raises:
        ShardError: a broken shard, or a sample without photo or scene.
    """
    remote = any(local_path(path) is None for path in paths)
    most = min(count, REMOTE_SHARDS) if remote else count
    chosen = [paths[i] for i in _evenly(len(paths), most)]
    with tempfile.TemporaryDirectory() as folder:
        index = ShardIndex([_fetch(path, folder) for path in chosen], extensions=MEMBERS)
        for path in (path for path in paths if path not in chosen):
            if len(index):
                break  # else those that were chosen hold no samples
            index = ShardIndex([_fetch(path, folder)], extensions=MEMBERS)
        for i in _evenly(len(index), count):
            yield index.read(i)


def read_pair(sample: Sample) -> tuple[Image.Image, SceneMap]:
    """Photo and scene of a sample of a scene shard.

    Raises:
        ShardError: one cannot be read, or they differ in size.
    """
    try:
        photo = Image.open(io.BytesIO(sample.files["jpg"]), formats=["JPEG"]).convert("RGB")
        scene = SceneMap.from_png(io.BytesIO(sample.files["scene.png"]))
    except (OSError, SyntaxError, SceneError) as error:
        raise ShardError(f"{sample.key}: {error}") from error
    if photo.size != scene.size:
        raise ShardError(f"{sample.key}: photo {photo.size} and scene {scene.size} differ in size")
    return photo, scene


def _fetch(path: str, folder: str) -> str:
    """A local shard where it is, a remote one as a copy in `folder`."""
    if local_path(path) is not None:
        return path
    filesystem, inner = fsspec.core.url_to_fs(path)
    copy = f"{folder}/{len(os.listdir(folder))}-{Path(inner).name}"  # two may have one name
    filesystem.get_file(inner, copy)
    return copy


def _evenly(length: int, count: int) -> list[int]:
    return [i * length // min(count, length) for i in range(min(count, length))]


def _words(sample: Sample, scene: SceneMap) -> str:
    shares = {name: n / scene.labels.size for name, n in scene.histogram().items()}
    largest = sorted(shares, key=lambda name: -shares[name])[:CLASSES_SHOWN]
    classes = ", ".join(f"{name} {shares[name]:.0%}" for name in largest if shares[name] >= SMALL)
    caption = (read_captions(sample) or [""])[0]
    return f"{sample.key}\nvoid {scene.void_fraction():.0%}\n\n{caption}\n\n{classes}"


def _describe(report: dict[str, Any]) -> str:
    classes = report["classes"]
    lines = [f"{report['samples']} samples, {len(classes)} classes, void {report['void']:.1%}"]
    width = max(len(name) for name in CLASS_NAMES)
    for name, counts in list(classes.items())[:ROWS_PRINTED]:
        bar = "#" * round(40 * counts["share"])
        lines.append(f"{name:{width}} {counts['photos']:5d} photos {counts['share']:6.1%} {bar}")
    if len(classes) > ROWS_PRINTED:
        lines.append(f"… and {len(classes) - ROWS_PRINTED} smaller classes; --json shows all")
    return "\n".join(lines)
