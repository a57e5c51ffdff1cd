"""`mas bench preprocess`: how fast photos become scenes, and what the pipeline adds to networks.

In: generated photos of 640 x 480 with annotations, or shards of one's own. Out: one dictionary of
figures. Nothing is kept; shards lie in a temporary folder.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mas.scene import COCO_CATEGORY_IDS, PANOPTIC_CLASSES, PERSON, Segments
from mas.shards import Sample, ShardWriter, read_shard
from preprocess.executor import ExecutorConfig, execute
from preprocess.inputs import find_jobs
from preprocess.photo import PhotoConfig
from preprocess.run_folder import STATS, RunFolder
from preprocess.segment import FaceConfig, HumanConfig, PanopticConfig, Photo, check_sources
from preprocess.status import collect
from preprocess.worker import SceneConfig, SceneWorker

PHOTO, PANOPTIC, HUMAN, FACE = PhotoConfig(), PanopticConfig(), HumanConfig(), FaceConfig()
WIDTH, HEIGHT = 640, 480
DISTINCT = 50  # generated photos; they come again and again
SHARD_PHOTOS = 250  # a shard of generated photos; real ones are larger still
REGIONS = 12  # segments a generated photo, as many as COCO's have
QUALITY = 95  # makes generated photos about as long as those of COCO, 170 kB
NETWORK_PHOTOS = 400


def bench_preprocess(
    *,
    input: str = "",
    photos: int = 1000,
    photo: PhotoConfig = PHOTO,
    panoptic: PanopticConfig = PANOPTIC,
    human: HumanConfig = HUMAN,
    face: FaceConfig = FACE,
    network_ms: float = 50.0,
    threads: int = 2,
) -> dict[str, Any]:
    """Measure how fast photos become scenes: annotations instead of networks, then stub networks.

    Args:
        input: scene annotations of one's own, as for mas preprocess; default: generated photos.
        photos: processed in each measurement; an input that has fewer is repeated.
        photo: what becomes of a photo.
        panoptic: where panoptic segments come from.
        human: where human parts come from.
        face: where face landmarks come from.
        network_ms: milliseconds a photo that the three stub networks take together.
        threads: in each worker, to decode and encode while the stub networks run.
    """
    if photos < 1 or network_ms <= 0 or threads < 0:
        raise ValueError("--photos must be at least 1, --network-ms above 0, --threads at least 0")
    check_sources(panoptic, human, face)
    config = SceneConfig(photo=photo, panoptic=panoptic, human=human, face=face)
    with tempfile.TemporaryDirectory() as folder:
        shards = f"{folder}/in"
        samples = _read(input, photos) if input else make_samples(min(photos, SHARD_PHOTOS))
        write_shards(shards, samples, photos=photos)
        serial = _run(config, shards, f"{folder}/serial", ExecutorConfig(kind="serial"))
        on_ray = {
            n: _run(config, shards, f"{folder}/ray{n}", ExecutorConfig(workers=n)) for n in (1, 2)
        }
        overhead = measure_overhead(
            SceneConfig(photo=photo), folder, seconds=network_ms / 1000, threads=threads
        )
        sizes = [len(s.files["scene.png"]) for s in read_shard(f"{folder}/serial/00000.tar")]
    peaks = [stats["peak_mb"] for stats in on_ray[1]["shards"]]
    return {
        "photos_per_second_per_core": serial["rate"],
        "workers": {str(n): run["rate"] for n, run in on_ray.items()},
        "network_overhead": round(overhead, 4),
        "stage_seconds": serial["stages"],
        "worker_peak_mb": peaks[-1],
        "worker_growth_mb": round(peaks[-1] - peaks[len(peaks) // 4], 1),
        "scene_png_bytes": round(sum(sizes) / max(1, len(sizes)), 1),
        "photos": serial["photos"],
        "photos_per_cpu_second": serial["photos_per_cpu_second"],
        "network_ms": network_ms,
        "cores": os.cpu_count(),
    }


def make_samples(count: int) -> list[Sample]:
    """`count` samples with keys of their own; every `DISTINCT`th shows the same."""
    return [replace(make_sample(number % DISTINCT), key=f"{number:09d}") for number in range(count)]


@lru_cache(DISTINCT)
def make_sample(number: int) -> Sample:
    """A photo with the statistics of natural ones and annotations of all kinds."""
    random = np.random.default_rng(number)
    relief_RHW = np.stack([_clouds(random, steep=2.4) for _ in range(REGIONS)])
    ids_HW = relief_RHW.argmax(0).astype(np.uint32) + 1
    classes = [PERSON, *random.choice(len(PANOPTIC_CLASSES), REGIONS - 1, replace=False).tolist()]
    colours = random.integers(40, 216, (REGIONS + 1, 3))
    light_HW = 40 * _clouds(random, steep=1.2)
    rgb = (colours[ids_HW] + light_HW[..., None]).clip(0, 255).astype(np.uint8)
    panoptic = np.stack([ids_HW % 256, ids_HW // 256, ids_HW * 0], -1).astype(np.uint8)
    parts = np.where(ids_HW == 1, (relief_RHW[1] * 3 + 9).astype(int) % 20, 0).astype(np.uint8)
    info = [{"id": i + 1, "category_id": COCO_CATEGORY_IDS[c]} for i, c in enumerate(classes)]
    rows, columns = np.nonzero(ids_HW == 1)
    centre = (columns.mean(), rows.mean()) if len(rows) else (0.0, 0.0)
    angles = np.linspace(0, 2 * np.pi, 68, endpoint=False)
    face = np.array(centre) + 40 * np.stack([np.cos(angles), np.sin(angles)], -1)
    return Sample(
        f"{number:09d}",
        {
            "jpg": _encode(rgb, "JPEG", quality=QUALITY),
            "txt": b"a picture that was made to be measured with",
            "json": json.dumps({"width": WIDTH, "height": HEIGHT}).encode(),
            "panoptic.png": _encode(panoptic, "PNG"),
            "segments.json": json.dumps({"segments_info": info}).encode(),
            "human.png": _encode(parts, "PNG"),
            "landmarks.json": json.dumps([face.round(1).tolist()]).encode(),
        },
    )


def write_shards(folder: str, samples: Sequence[Sample], *, photos: int) -> None:
    """Shards of all `samples` each, until there are `photos`; a shard holds a key only once.

    Full shards are one file under many names, so that 20,000 photos take no more room than 250.
    """
    Path(folder).mkdir()
    first = f"{folder}/{0:05d}.tar"
    for number, start in enumerate(range(0, photos, len(samples))):
        path = f"{folder}/{number:05d}.tar"
        if number and photos - start >= len(samples):
            os.link(first, path)
            continue
        with ShardWriter(path) as writer:
            for sample in islice(samples, photos - start):
                writer.write(sample)


class StubNetwork:
    """Takes as long as it is told and gives the same answer for every photo."""

    def __init__(self, seconds: float, answer: Any) -> None:
        self.seconds = seconds  # a photo
        self.answer = answer
        self.busy = 0.0  # seconds in all, as measured

    def __call__(self, photos: list[Photo], segments: list[Segments] | None = None) -> list[Any]:
        start = time.perf_counter()
        time.sleep(self.seconds * len(photos))
        self.busy += time.perf_counter() - start
        return [self.answer] * len(photos)


def measure_overhead(config: SceneConfig, folder: str, *, seconds: float, threads: int) -> float:
    """How much longer a shard takes than the stub networks alone, as a fraction.

    The stubs sleep, as a process does whose networks run on a GPU: decoding and encoding have the
    CPU to themselves. Half of the time goes to the panoptic network, 3/10 to human parts, 2/10 to
    faces.
    """
    write_shards(f"{folder}/photos", make_samples(NETWORK_PHOTOS), photos=NETWORK_PHOTOS)
    Path(f"{folder}/networks").mkdir()
    labels = np.full((HEIGHT, WIDTH), PERSON, np.uint8)
    face = np.random.default_rng(0).uniform(200, 300, (68, 2))
    worker = SceneWorker(config, f"{folder}/networks", threads=threads)
    worker.panoptic = panoptic = StubNetwork(
        0.5 * seconds, Segments(labels, labels.astype(np.int32))
    )
    worker.human = human = StubNetwork(0.3 * seconds, labels % 20)
    worker.face = faces = StubNetwork(0.2 * seconds, [face])
    (job,) = find_jobs(f"{folder}/photos")
    start = time.perf_counter()
    worker(job, lambda _: None)
    wall = time.perf_counter() - start
    return wall / (panoptic.busy + human.busy + faces.busy) - 1


def _run(config: SceneConfig, shards: str, output: str, executor: ExecutorConfig) -> dict[str, Any]:
    """One run over all shards: its rate while shards were worked on, seconds a stage, statistics.

    Raises:
        ValueError: a shard failed, or no photo came out.
    """
    cpu = time.process_time()
    summary = execute(
        find_jobs(shards),
        partial(SceneWorker, config, output),
        output,
        command="bench",
        settings={},
        config=executor,
    )
    cpu = time.process_time() - cpu
    folder = RunFolder(output)
    totals = collect(folder)
    if summary.failed or not totals["photos_out"]:
        reasons = next(iter(summary.failed.values()), json.dumps(totals["rejected"]))
        raise ValueError(f"the photos cannot be measured with: {reasons}")
    count = totals["photos_in"]
    names = [name for name in folder.list_names() if name.endswith(STATS)]
    stats = sorted((folder.read(name) or {} for name in names), key=lambda s: s["finished"])
    return {
        "rate": totals["photos_per_second"],
        "photos": count,
        "photos_per_cpu_second": round(count / cpu, 1),
        "stages": {stage: round(s / count, 6) for stage, s in totals["seconds"].items()},
        "shards": stats,
    }


def _read(input: str, most: int) -> list[Sample]:
    """The first samples of the input.

    Raises:
        ValueError: there is none.
    """
    shards = (job.source.read(on_reject=lambda *_: None) for job in find_jobs(input))
    samples = list(islice(chain.from_iterable(shards), most))
    if not samples:
        raise ValueError(f"{input}: there is not one sample in it")
    return samples


def _clouds(random: np.random.Generator, *, steep: float) -> np.ndarray:
    """Noise whose spectrum falls with frequency as that of photos does; mean 0, deviation 1."""
    rows, columns = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf
    shape = frequency.shape
    spectrum = (random.normal(size=shape) + 1j * random.normal(size=shape)) / frequency**steep
    clouds = np.fft.irfft2(spectrum, s=(HEIGHT, WIDTH))
    return clouds / clouds.std()


def _encode(pixels: np.ndarray, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()
