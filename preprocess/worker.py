"""The scene worker: one shard of photos in, one shard of photos with scene maps out.

In: the samples of a shard job. Out: NAME.tar, NAME.rejects.jsonl, and the counts for
NAME.stats.json, which the executor writes last. A plain callable that knows nothing of Ray; the
bytes it writes depend on its input and config only. Make-A-Scene, section 3.1.
"""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

import fsspec
import numpy as np

from mas.scene import PERSON, SceneError, SceneMap, Segments, merge
from mas.shards import (
    Sample,
    ShardError,
    ShardWriter,
    list_keys,
    read_shard,
    remove_temporary,
    store_errors,
    write_file,
)
from preprocess.captions import Texts, dump_fields, read_texts
from preprocess.landmarks import draw_faces
from preprocess.needs import require
from preprocess.photo import (
    EXTENSIONS,
    PhotoConfig,
    Square,
    cut_square,
    decode,
    encode_jpeg,
    pillow_rules,
    sample_square,
)
from preprocess.rejects import Reject, RejectError
from preprocess.run_folder import STATS, RunFolder
from preprocess.runner import Job, Report
from preprocess.segment import (
    FaceConfig,
    HumanConfig,
    PanopticConfig,
    Photo,
    build_face,
    build_human,
    build_panoptic,
    lacks_of_sources,
)
from preprocess.tally import Tally

REJECTS = ".rejects.jsonl"
NOTHING = Segments(np.empty((0, 0), np.uint8), np.empty((0, 0), np.int32))

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """Everything that decides what a scene shard holds."""

    photo: PhotoConfig = field(default_factory=PhotoConfig)
    panoptic: PanopticConfig = field(default_factory=PanopticConfig)
    human: HumanConfig = field(default_factory=HumanConfig)
    face: FaceConfig = field(default_factory=FaceConfig)
    max_caption_bytes: int = 10_000  # samples with a longer caption are rejected


@dataclass
class _Picture:
    """A sample on its way through the stages."""

    index: int  # in the shard
    photo: Photo
    texts: Texts
    panoptic: Segments = NOTHING  # as the segmenter gave it
    square: Segments = NOTHING  # of the square that is written
    human: np.ndarray | None = None  # as the parser gave it
    faces: list[np.ndarray] = field(default_factory=list)  # landmarks in pixels of the photo


@dataclass(frozen=True)
class _Kept:
    """A sample that an earlier run has finished."""

    index: int  # in the shard
    sample: Sample  # as it was written


class SceneWorker:
    """Turns one shard job into one scene shard; holds the segmenters between jobs."""

    def __init__(
        self, config: SceneConfig, output: str, *, batch_size: int = 16, threads: int = 0
    ) -> None:
        """Builds the segmenters.

        Args:
            config: what is written.
            output: folder or URL; must exist.
            batch_size: photos a call of a segmenter.
            threads: that decode and encode beside the segmenters; 0 = none.

        Raises:
            OSError: this machine lacks packages, weights or a device; all of it is named.
        """
        require(lacks_of_sources(config.panoptic, config.human, config.face))
        self.config = config
        self.output = output
        self.batch_size = batch_size
        self.threads = threads
        self.panoptic = build_panoptic(config.panoptic)
        self.human = build_human(config.human)
        self.face = build_face(config.face)

    def __call__(self, job: Job, report: Report) -> dict[str, Any]:
        """Writes the shard and returns its statistics.

        A shard that is made again keeps the samples it has; the others get another try. Where its
        input has changed since, all of them do, and none that it has may be lost.

        Raises:
            ShardError: the input shard is broken, or a sample would be lost.
            OSError: input or output cannot be reached.
        """
        path, rejects_path = (f"{self.output}/{job.name}{end}" for end in (".tar", REJECTS))
        if job.attempt > 1:  # looks through all names of the output, which may be many
            remove_temporary(path)
            remove_temporary(rejects_path)
        tally = Tally()
        with ShardWriter(path) as writer, pillow_rules(self.config.photo):
            samples = tally.counted(job.source.read(on_reject=tally.reject), report)
            kept = read_shard(path) if job.again and not job.anew else iter(())
            lost = dict.fromkeys(list_keys(path) if job.anew else ())
            for sample in self._process(match(samples, kept), tally):
                with tally.time("write"):
                    writer.write(sample)
                lost.pop(sample.key, None)
            if lost:
                raise ShardError(_describe_loss(next(iter(lost)), job, tally))
            if job.again:  # from here on the shard is not done until the new statistics are there
                RunFolder(self.output).remove(job.name + STATS)
            write_file(rejects_path, tally.reject_lines())
        return tally.stats(photos_out=writer.count)

    def _process(
        self, samples: Iterable[tuple[Sample, Sample | None]], tally: Tally
    ) -> Iterator[Sample]:
        """The stages in a row; order is kept, rejected samples are missing."""
        with ThreadPoolExecutor(self.threads) if self.threads else nullcontext() as pool:
            window = self.batch_size + 2 * self.threads  # photos decoded ahead of the segmenters
            opened = map_ordered(pool, partial(self._open, tally), enumerate(samples), window)
            segmented = self._segment_all(filter(None, opened), tally)
            finished = map_ordered(pool, partial(self._finish, tally), segmented, window)
            yield from filter(None, finished)

    def _open(
        self, tally: Tally, numbered: tuple[int, tuple[Sample, Sample | None]]
    ) -> _Picture | _Kept | None:
        """Checks the texts and decodes the photo, unless it is finished."""
        index, (sample, written) = numbered
        if written is not None:
            return _Kept(index, written)
        try:
            with tally.time("decode"):
                texts = read_texts(sample, max_bytes=self.config.max_caption_bytes)
                content = next((sample.files[e] for e in EXTENSIONS if e in sample.files), None)
                if content is None:
                    raise RejectError(Reject.NO_PHOTO, f"no {', '.join(EXTENSIONS)}")
                image, original = decode(content, self.config.photo)
        except RejectError as error:
            tally.reject(sample.key, error.reason, error.detail, index=index)
            return None
        return _Picture(index, Photo(sample.key, image, sample, original), texts)

    def _segment_all(
        self, pictures: Iterable[_Picture | _Kept], tally: Tally
    ) -> Iterator[_Picture | _Kept]:
        pictures = iter(pictures)
        while batch := list(islice(pictures, self.batch_size)):
            kept = [p for p in batch if isinstance(p, _Kept)]
            fresh = [p for p in batch if isinstance(p, _Picture)]
            if fresh:
                fresh = self._segment(fresh, tally)
            both: list[_Picture | _Kept] = [*kept, *fresh]
            yield from sorted(both, key=lambda picture: picture.index)

    def _segment(self, batch: list[_Picture], tally: Tally) -> list[_Picture]:
        """The cascade: panoptic on all, human parts and faces where a person is in the square."""
        with tally.time("panoptic"):
            batch = self._call(lambda photos, _: self.panoptic(photos), batch, "panoptic", tally)
            for picture in batch:
                labels, instances = picture.panoptic
                size = self.config.photo.size
                picture.square = Segments(
                    sample_square(labels, size), sample_square(instances, size)
                )
        people = [p for p in batch if (p.square.labels == PERSON).any()]
        for stage, segmenter in (("human", self.human), ("faces", self.face)):
            if segmenter is not None and people:
                with tally.time(stage):
                    kept = self._call(segmenter, people, stage, tally)
                dropped = {p.index for p in people} - {p.index for p in kept}
                batch = [p for p in batch if p.index not in dropped]
                people = kept
        return batch

    def _call(
        self, segmenter: Callable[..., list], pictures: list[_Picture], stage: str, tally: Tally
    ) -> list[_Picture]:
        """Sets `stage` of the pictures; a photo that cannot be segmented is rejected alone."""
        try:
            results = segmenter([p.photo for p in pictures], [p.panoptic for p in pictures])
            assert len(results) == len(pictures), f"{stage}: {len(results)} of {len(pictures)}"
            for picture, result in zip(pictures, results, strict=True):
                if stage != "faces":
                    _check_aspect(stage, result, picture.photo)
                setattr(picture, stage, result)
            return pictures
        except (RejectError, SceneError) as error:
            if len(pictures) > 1:
                singles = (self._call(segmenter, [p], stage, tally) for p in pictures)
                return list(chain.from_iterable(singles))
            reject = error if isinstance(error, RejectError) else None
            reason = reject.reason if reject else Reject.NOT_SEGMENTED
            detail = reject.detail if reject else str(error)
            tally.reject(pictures[0].photo.key, reason, detail, index=pictures[0].index)
            return []

    def _finish(self, tally: Tally, picture: _Picture | _Kept) -> Sample | None:
        """Merges the three segmentations and encodes what is written, unless it is too large."""
        if isinstance(picture, _Kept):
            tally.add_scene(json.loads(picture.sample.files["json"])["scene"])
            return picture.sample
        key, config = picture.photo.key, self.config.photo
        with tally.time("merge"):
            scene, summary = self._merge(picture)
        try:
            with tally.time("encode"):
                fields = dump_fields({**picture.texts.fields, "scene": summary})
                png = io.BytesIO()
                scene.to_png(png)
        except RejectError as error:
            tally.reject(key, error.reason, error.detail, index=picture.index)
            return None
        with tally.time("photo"):
            jpeg = encode_jpeg(cut_square(picture.photo.image, config.size), config.quality)
        tally.add_scene(summary)
        caption = picture.texts.caption.encode()
        files = {"jpg": jpeg, "scene.png": png.getvalue(), "txt": caption, "json": fields}
        return Sample(key, files)

    def _merge(self, picture: _Picture) -> tuple[SceneMap, dict[str, Any]]:
        """The scene of the square, and what KEY.json says of it."""
        size = self.config.photo.size
        faces = [_to_square(face, picture.photo, size) for face in picture.faces]
        scene = merge(
            panoptic=picture.square,
            human=None if picture.human is None else sample_square(picture.human, size),
            face=draw_faces(faces, size, min_height=self.config.face.min_height) if faces else None,
        )
        labels, instances = picture.square
        return scene, {
            "classes": scene.histogram(),
            "void": round(scene.void_fraction(), 4),
            "people": len(np.unique(instances[labels == PERSON])),
        }


def match(
    samples: Iterable[Sample], written: Iterator[Sample]
) -> Iterator[tuple[Sample, Sample | None]]:
    """Pairs samples with those of an earlier shard, which are some of them in the same order."""
    candidate = next(written, None)
    for sample in samples:
        if candidate is not None and candidate.key == sample.key:
            yield sample, candidate
            candidate = next(written, None)
        else:
            yield sample, None
    if candidate is not None:
        raise ShardError(f"{candidate.key} is in the earlier shard and not in the input any more")


def check_mended(output: str, job: Job) -> None:
    """Whether a finished shard may be made again from a source that has changed since.

    It may where the samples are those that it has kept or rejected: then it is what was rejected
    that was mended, or a text or a photo that was edited.

    Raises:
        ShardError: one is lost or new; or one of the two shards is broken.
    """
    kept, keys = list_keys(f"{output}/{job.name}.tar"), job.source.list_keys()
    with store_errors(output), fsspec.open(f"{output}/{job.name}{REJECTS}", "rb") as file:
        rejected = {json.loads(line)["key"] for line in file}
    lost, new = set(kept).difference(keys), set(keys).difference(kept, rejected)
    if lost or new:
        what = f"{min(lost)} is not in it any more" if lost else f"{min(new)} is new in it"
        raise ShardError(
            f"{output}/{job.name}{STATS}: the shard was made from another input; --retry-rejected "
            f"takes one in which what was rejected is mended, and here {what} (a photo that is "
            "added to a folder moves those behind it from shard to shard); what is new is better "
            "given shards or a folder of its own, or choose another --output"
        )


def _describe_loss(key: str, job: Job, tally: Tally) -> str:
    return (
        f"{job.source.name}: {key} is in the shard that was made before and would be lost "
        f"({tally.why_rejected(key)}); mend it, or remove {job.name}{STATS} to make the shard "
        "without it"
    )


def map_ordered(
    pool: ThreadPoolExecutor | None,
    function: Callable[[In], Out],
    items: Iterable[In],
    window: int,
) -> Iterator[Out]:
    """`map` through a thread pool with at most `window` items under way; plain `map` without."""
    if pool is None:
        yield from map(function, items)
        return
    waiting: deque[Future[Out]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _check_aspect(stage: str, result: Segments | np.ndarray, photo: Photo) -> None:
    """A map of another shape than the photo belongs to another photo; one pixel is rounding."""
    map_HW = result.labels if isinstance(result, Segments) else result
    height, width = map_HW.shape
    photo_width, photo_height = photo.original or photo.image.shape[1::-1]
    tolerance = max(photo_width, photo_height)
    if abs(width * photo_height - height * photo_width) > tolerance:
        raise RejectError(
            Reject.BAD_ANNOTATION,
            f"{stage} map is {width}x{height}, the photo {photo_width}x{photo_height}",
        )


def _to_square(face: np.ndarray, photo: Photo, size: int) -> np.ndarray:
    """Landmarks from pixels of the photo to pixels of the square that is written."""
    left, top, side = Square.of(photo.image.shape[1], photo.image.shape[0])
    return (face - (left, top)) * (size / side)
