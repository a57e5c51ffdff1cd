"""`mas preprocess-status`: how far a run is, from the files in its output folder alone."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

from tqdm import tqdm

from mas.scene import CLASS_NAMES
from preprocess.run_folder import (
    ERROR,
    PROGRESS,
    RUN,
    RUNNING,
    STATS,
    RunFolder,
)

LONGEST_SHOWN = 3  # of the shards at work


def preprocess_status(folder: str, *, as_json: bool = False) -> int:
    """Tell how far a preprocessing run is; exit status 1 when shards failed.

    Args:
        folder: output of mas preprocess (or mas tokenize), path or URL.
        as_json: print one JSON object instead.
    """
    run_folder = RunFolder(folder)
    run = run_folder.read(RUN)
    if run is None:
        raise ValueError(f"{folder}: no {RUN}; this is no output of mas preprocess")
    names = run_folder.list_names()
    made = {name.removesuffix(STATS) for name in names if name.endswith(STATS)}
    failed = [name.removesuffix(ERROR) for name in names if name.endswith(ERROR)]
    failed = [name for name in failed if name not in made]
    errors = {name: (run_folder.read(name + ERROR) or {}).get("error", "") for name in failed}
    progress = run_folder.read(PROGRESS) or {}
    alive = bool(progress) and run_folder.is_at_work(progress)
    totals = collect(run_folder)
    shards = max(run.get("shards", 0), len(made) + len(failed))
    left = shards - len(made) - len(failed)
    marked = _read_marks(run_folder, names) if alive else {}
    running = {name: mark for name, mark in marked.items() if not mark.get("waiting")}
    waiting = {name: mark["host"] for name, mark in marked.items() if mark.get("waiting")}
    status = {
        "shards": shards,
        "done": len(made),
        "running": len(running),
        "waiting": waiting,
        "left": left,
        "failed": errors,
        "longest": dict(list(running.items())[:LONGEST_SHOWN]),
        "alive": alive,
        "photos_per_second": _rate(progress) if alive else totals["photos_per_second"],
        "seconds_left": _seconds_left(progress, left) if alive else None,
        **{key: totals[key] for key in ("photos_in", "photos_out", "rejected")},
    }
    print(json.dumps(status) if as_json else _describe(status))
    return 1 if failed else 0


def collect(folder: RunFolder) -> dict[str, Any]:
    """Sums of all stats.json of a folder: photos, rejects, classes, seconds per stage."""
    sums: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    photos: Counter[str] = Counter()
    pixels: Counter[str] = Counter()
    spans: list[tuple[float, float]] = []
    made = [name for name in folder.list_names() if name.endswith(STATS)]
    for stats in filter(None, folder.read_all(made)):
        sums["shards"] += 1
        for key in ("photos_in", "photos_out", "people"):
            sums[key] += stats.get(key, 0)
        rejected.update(stats.get("rejected", {}))
        seconds.update(stats.get("seconds", {}))
        for label, counts in stats.get("classes", {}).items():
            photos[label] += counts["photos"]
            pixels[label] += counts["pixels"]
        spans.append((stats.get("started", 0.0), stats.get("finished", 0.0)))
    busy = _covered(spans)
    return {
        **{key: sums[key] for key in ("shards", "photos_in", "photos_out", "people")},
        "rejected": dict(rejected.most_common()),
        "photos_per_second": round(sums["photos_in"] / busy, 1) if busy else 0.0,
        "seconds": {stage: round(float(value), 3) for stage, value in seconds.items()},
        "classes": {
            name: {"photos": photos[name], "pixels": pixels[name]}
            for name in CLASS_NAMES
            if name in photos
        },
    }


def describe_rejects(rejected: dict[str, int]) -> str:
    """The tail of a sentence: how many samples were dropped, and why."""
    if not rejected:
        return ", none rejected"
    reasons = ", ".join(f"{reason} {count}" for reason, count in rejected.items())
    return f", {sum(rejected.values())} rejected: {reasons}"


def _covered(spans: list[tuple[float, float]]) -> float:
    """Seconds in which at least one shard was worked on; pauses between runs do not count."""
    total, until = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _rate(progress: dict[str, Any]) -> float:
    return round(progress["items"] / max(progress["seconds"], 1e-3), 1)


def _seconds_left(progress: dict[str, Any], left: int) -> float | None:
    """From the shards this run has made; None before the first."""
    made = progress.get("made", 0)
    return round(progress["seconds"] / made * left) if made else None


def _read_marks(folder: RunFolder, names: list[str]) -> dict[str, dict[str, Any]]:
    """The shards that workers are at, or wait with, the longest first."""
    marks = {name.removesuffix(RUNNING): name for name in names if name.endswith(RUNNING)}
    found = {shard: folder.read(mark) for shard, mark in marks.items()}
    shards = {
        shard: {**mark, "seconds": round(max(0.0, time.time() - mark["started"]), 1)}
        for shard, mark in found.items()
        if mark is not None  # finished meanwhile
    }
    return dict(sorted(shards.items(), key=lambda item: -item[1]["seconds"]))


def _describe(status: dict[str, Any]) -> str:
    failed, left = status["failed"], status["left"]
    state = "running" if status["alive"] else "finished" if not left else "stopped"
    lines = [
        f"{state}: {status['done']} of {status['shards']} shards done, "
        f"{status['running']} running, {len(failed)} failed, {left} left",
        f"{status['photos_in']} photos in, {status['photos_out']} out"
        + describe_rejects(status["rejected"]),
        f"{status['photos_per_second']} photos/s",
    ]
    if status["seconds_left"] is not None:
        lines[-1] += f", {tqdm.format_interval(status['seconds_left'])} left"
    for name, mark in status["longest"].items():
        lines.append(
            f"longest at work: {name}, for {tqdm.format_interval(mark['seconds'])}, "
            f"attempt {mark['attempt']}, process {mark['pid']} on {mark['host']}"
        )
    if waiting := status["waiting"]:
        hosts = ", ".join(sorted(set(waiting.values())))
        lines.append(
            f"waiting for another machine: {len(waiting)} shards, since {hosts} cannot work"
        )
    if state == "stopped":
        lines.append("the run is not at work; give the same command again to go on")
    lines += [f"failed: {name}: {error}" for name, error in failed.items()]
    return "\n".join(lines)
