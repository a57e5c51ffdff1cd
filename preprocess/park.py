"""`mas park`: the park world as annotated image-text shards.

In: nothing but a seed. Out: `00000.tar` … with, per picture, KEY.jpg, KEY.txt, KEY.json (captions
and the exact truth), KEY.panoptic.png + KEY.segments.json, KEY.human.png and KEY.landmarks.json,
and `park.json`, the settings they were made with. Picture i depends on (seed, i) alone, so neither
the count, nor the shard size, nor the number of workers changes a byte of it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import PIL

from mas.machine import end_with_parent, usable_cores
from mas.shards import Sample, ShardError, ShardWriter, remove_temporary, write_file
from preprocess.park_truth import picture
from preprocess.park_world import HELD_OUT_MODES
from preprocess.progress import counting
from preprocess.termination import terminated_in_order

SETTINGS_FILE = "park.json"
SMALLEST, LARGEST = 32, 1024  # sides in pixels
_CHUNK = 16  # pictures a worker makes at a time


@dataclass(frozen=True, kw_only=True)
class ParkConfig:
    """What decides the bytes of the shards."""

    count: int  # pictures
    seed: int  # of the world
    size: int  # side in pixels
    shard_size: int  # pictures a shard
    held_out: str  # exclude, only, include

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"--count must be at least 1, got {self.count}")
        if not SMALLEST <= self.size <= LARGEST:
            raise ValueError(f"--size must be {SMALLEST} to {LARGEST} pixels, got {self.size}")
        if self.shard_size < 1:
            raise ValueError(f"--shard-size must be at least 1, got {self.shard_size}")
        if self.held_out not in HELD_OUT_MODES:
            choices = ", ".join(HELD_OUT_MODES)
            raise ValueError(f"--held-out is one of {choices}, got {self.held_out!r}")

    def shards(self) -> dict[str, range]:
        """Indices of the pictures of each shard, by file name."""
        starts = range(0, self.count, self.shard_size)
        return {
            f"{number:05d}.tar": range(start, min(start + self.shard_size, self.count))
            for number, start in enumerate(starts)
        }


def park(
    *,
    output: str,
    count: int,
    seed: int = 0,
    size: int = 128,
    shard_size: int = 1000,
    held_out: str = "exclude",
    workers: int | None = None,
) -> None:
    """Writes the park world as annotated image-text shards.

    Running the same command again completes what is missing and touches nothing else.

    Args:
        output: folder for the shards; made when missing.
        count: how many pictures.
        seed: another seed gives other pictures of the same kind.
        size: side of the pictures in pixels, 32 to 1024.
        shard_size: pictures a shard.
        held_out: combinations kept for tests, such as a purple giraffe: "exclude" never draws
            one, "only" draws one in every picture, "include" draws them like any other.
        workers: processes; default: one for each core. Their number never changes the result.
    """
    config = ParkConfig(count=count, seed=seed, size=size, shard_size=shard_size, held_out=held_out)
    if workers is not None and workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}")
    folder = Path(output)
    _claim(folder, config)
    missing = {n: r for n, r in config.shards().items() if not (folder / n).exists()}
    indices = [index for span in missing.values() for index in span]
    processes = min(workers or usable_cores(), -(-len(indices) // _CHUNK))
    with terminated_in_order(), counting(len(indices), name="park", unit=" pictures") as tell:
        samples = _paint_all(config, indices, processes)
        for name, span in missing.items():
            remove_temporary(str(folder / name))  # of a run that was killed
            with ShardWriter(str(folder / name)) as writer:
                for _ in span:
                    writer.write(next(samples))
                    tell(1)
    kept = len(config.shards()) - len(missing)
    note = f", {kept} of them already there" if kept else ""
    print(f"{count} pictures of {size} px in {len(config.shards())} shards{note}: {folder}")


def _paint_all(config: ParkConfig, indices: list[int], processes: int) -> Iterator[Sample]:
    """The pictures of `indices` in order, made by `processes` processes."""
    chunks = [indices[k : k + _CHUNK] for k in range(0, len(indices), _CHUNK)]
    make = partial(_paint_chunk, config.seed, config.size, config.held_out)
    if processes <= 1:
        for chunk in chunks:
            yield from make(chunk)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=end_with_parent)
    try:
        for samples in pool.map(make, chunks):
            yield from samples
    except BrokenProcessPool:
        raise OSError(
            "a process that draws has been killed, perhaps for the memory: give the command again, "
            "with fewer --workers; shards that are there stay"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _paint_chunk(seed: int, size: int, held_out: str, indices: list[int]) -> list[Sample]:
    return [
        Sample(f"{index:09d}", picture(seed, index, size=size, held_out=held_out))
        for index in indices
    ]


def _claim(folder: Path, config: ParkConfig) -> None:
    """Makes the folder ours, or refuses it when it holds shards of other settings."""
    settings = {**asdict(config), "version": _version()}
    path = folder / SETTINGS_FILE
    if folder.exists() and not folder.is_dir():
        raise ShardError(f"{folder}: is a file; --output names a folder")
    if path.is_file():
        try:
            found = json.loads(path.read_text("utf-8"))
        except ValueError:
            found = {}
        if found == settings:
            return
        if any(folder.glob("*.tar")):
            differing = [
                k for k in settings if not isinstance(found, dict) or found.get(k) != settings[k]
            ]
            raise ShardError(
                f"{folder}: holds a park world with another {', '.join(differing)}; "
                "choose another --output or remove that folder"
            )
    elif foreign := _first_of_others(folder):
        raise ShardError(f"{folder}: holds something else ({foreign}); choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(str(path), (json.dumps(settings, indent=1) + "\n").encode())


def _first_of_others(folder: Path) -> str | None:
    """Something in the folder that is not a settings file a killed run was still writing."""
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    return next((name for name in names if not name.startswith(f".{SETTINGS_FILE}.")), None)


def _version() -> str:
    """Changes whenever the pictures may: a hash of the world's source and Pillow's version."""
    digest = hashlib.sha256(PIL.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("park_*.py")):
        digest.update(source.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()[:16]
