"""`mas tokenize`: scene shards in, token shards out, on the same executors as `mas preprocess`.

In: KEY.jpg, KEY.scene.png and the captions of scene shards; a text tokenizer, a VQ-SEG, a VQ-GAN.
Out: the arrays of mas/token_shards.py, those of the mirrored pictures too where asked for, and
manifest.json last.
Axes: B pictures, T tokens, H W pixels, C colours.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from mas.scene import SceneError, SceneMap
from mas.shards import (
    MANIFEST,
    TOKEN_FORMAT,
    Sample,
    ShardError,
    local_path,
    read_captions,
    write_token_shard,
)
from mas.storage import WEIGHTS_FILE, file_hash
from mas.text import Tokenizer, mirror_caption
from mas.vqgan import VQGAN
from mas.vqseg import VQSEG
from preprocess.batching import lacking_device, pick_device
from preprocess.executor import ExecutorConfig, Summary, check_numbers, execute
from preprocess.inputs import absolute, find_jobs
from preprocess.needs import (
    gather,
    lacking_filesystems,
    lacking_gpu,
    lacking_input,
    require,
)
from preprocess.run_folder import STATS, OtherSettingsError, RunFolder
from preprocess.runner import Job, Report

MAX_VOCABULARY = 2**16  # tokens are stored as uint16
LOOKED_INTO = 4  # shards, for a sample that tells what the input is; some may be empty or broken


@dataclass(frozen=True)
class TokenizerPaths:
    """The three files or folders that turn a sample into tokens."""

    tokenizer: str  # tokenizer.json
    vqseg: str  # folder
    vqgan: str  # folder

    @property
    def files(self) -> dict[str, Path]:
        """What decides the tokens, by stream."""
        return {
            "text": Path(self.tokenizer),
            "scene": Path(self.vqseg) / WEIGHTS_FILE,
            "image": Path(self.vqgan) / WEIGHTS_FILE,
        }

    def lacks(self) -> list[str]:
        """What to say of those that are not there."""
        absent = [f"{p} (makes the {s} tokens)" for s, p in self.files.items() if not p.is_file()]
        return [f"no such file: {', '.join(absent)}"] if absent else []

    def hashes(self) -> dict[str, str]:
        """sha256 of each, by stream."""
        if lacks := self.lacks():
            raise ValueError(lacks[0])
        return {stream: file_hash(path) for stream, path in self.files.items()}


class Tokenizers(NamedTuple):
    """All three, loaded."""

    text: Tokenizer
    scene: VQSEG
    image: VQGAN

    @classmethod
    def load(cls, paths: TokenizerPaths) -> Tokenizers:
        """Loads and checks them.

        Raises:
            ValueError: a part is missing, broken, or its tokens do not fit into the arrays.
        """
        loaded = cls(
            Tokenizer.from_file(paths.tokenizer),
            VQSEG.from_pretrained(paths.vqseg),
            VQGAN.from_pretrained(paths.vqgan),
        )
        for stream, part in loaded.describe().items():
            if part["vocabulary"] > MAX_VOCABULARY:
                raise ValueError(
                    f"the {stream} vocabulary has {part['vocabulary']} entries; token shards take "
                    f"at most {MAX_VOCABULARY}"
                )
        return loaded

    def describe(self) -> dict[str, dict[str, int]]:
        """Vocabulary and length of each stream, as in manifest.json."""
        return {
            "text": {"vocabulary": self.text.vocab_size, "length": self.text.length},
            "scene": {"vocabulary": self.scene.config.codes, "grid": self.scene.config.grid},
            "image": {"vocabulary": self.image.config.codes, "grid": self.image.config.grid},
        }


Streams = dict[str, np.ndarray]  # scene, image, text -> the tokens of a shard's pictures


class Pair(NamedTuple):
    """The tokens of one batch."""

    scene: np.ndarray  # uint16 B T
    image: np.ndarray  # uint16 B T


class TokenWorker:
    """Turns one scene shard into one token shard; holds the networks between jobs."""

    def __init__(
        self,
        paths: TokenizerPaths,
        output: str,
        *,
        mirror: bool = False,
        batch_size: int = 16,
        device: str = "auto",
    ) -> None:
        self.output, self.mirror = output, mirror
        self.batch_size = batch_size
        self.device = pick_device(device)
        self.parts = Tokenizers.load(paths)
        self.parts.scene.to(self.device)
        self.parts.image.to(self.device)

    def __call__(self, job: Job, report: Report) -> dict[str, Any]:
        """Writes the arrays of the shard and returns its counts.

        Raises:
            ShardError: the shard is broken, or a sample is not what mas preprocess writes.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # workers share the CPU, and sums do not depend on their number
        try:
            streams, row, mirrored = self._encode(job, report)
        finally:
            torch.set_num_threads(threads)
        write_token_shard(self.output, job.name, **streams, row=row, mirrored=mirrored)
        pictures = len(streams["scene"])
        counts = {"photos_in": pictures, "photos_out": pictures}
        return {**counts, "pictures": pictures, "captions": len(row)}

    def _encode(self, job: Job, report: Report) -> tuple[Streams, np.ndarray, Streams | None]:
        """The streams of all pictures, `row`, and the streams of the mirrored pictures."""
        plain: list[Pair] = []
        mirrored: list[Pair] = []
        captions: list[str] = []
        rows: list[int] = []
        scene_size, image_size = self.parts.scene.config.size, self.parts.image.config.size
        samples = job.source.read(on_reject=partial(_refuse, job.source.name))
        while batch := list(islice(samples, self.batch_size)):
            for number, sample in enumerate(batch, start=self.batch_size * len(plain)):
                own = read_captions(sample) or [""]
                captions += own
                rows += [number] * len(own)
            try:
                scenes = [_read_scene(sample, scene_size) for sample in batch]
                photos = [_read_photo(sample, image_size) for sample in batch]
                plain.append(self._encode_pictures(scenes, photos))
                if self.mirror:  # before they are resized: what mirrored files would give
                    flipped = [scene.mirrored() for scene in scenes], [_flip(p) for p in photos]
                    mirrored.append(self._encode_pictures(*flipped))
            except (ShardError, SceneError, OSError) as error:
                raise ShardError(f"{job.source.name}: {error}") from error
            report(len(batch))
        streams = self._join(plain, captions)
        row = np.array(rows, np.int32)
        if not self.mirror:
            return streams, row, None
        return streams, row, self._join(mirrored, [mirror_caption(text) for text in captions])

    def _join(self, batches: Sequence[Pair], captions: Sequence[str]) -> Streams:
        described = self.parts.describe()
        return {
            "scene": _concatenate([b.scene for b in batches], described["scene"]["grid"] ** 2),
            "image": _concatenate([b.image for b in batches], described["image"]["grid"] ** 2),
            "text": self.parts.text.encode(captions).numpy().astype(np.uint16),
        }

    @torch.inference_mode()
    def _encode_pictures(self, scenes: Sequence[SceneMap], photos: Sequence[Image.Image]) -> Pair:
        network = self.parts.scene
        scenes = [scene.resized(network.config.size) for scene in scenes]
        labels_BHW = torch.from_numpy(np.stack([scene.labels for scene in scenes]))
        edges_BHW = torch.from_numpy(np.stack([scene.edges for scene in scenes]))
        scene_BT = network.encode(labels_BHW.to(self.device), edges_BHW.to(self.device))
        images = [_resized(photo, self.parts.image.config.size) for photo in photos]
        image_BCHW = rearrange(torch.from_numpy(np.stack(images)), "b h w c -> b c h w")
        image_BT = self.parts.image.encode(image_BCHW.to(self.device).float() / 255)
        return Pair(*(tokens.cpu().numpy().astype(np.uint16) for tokens in (scene_BT, image_BT)))


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Turn scene shards into token shards for training the GPT.

    A run that was cut goes on where it was when the same command is given again.

    Args:
        input: scene shards: a folder, a glob or 'DIR/{00000..00099}.tar'.
        output: folder for the token shards.
        vqseg: folder of the VQ-SEG, as trained or from a model folder.
        vqgan: folder of the VQ-GAN.
        tokenizer: the text tokenizer's tokenizer.json.
        batch_size: pictures given to a network at a time.
        device: of the networks: cpu, cuda, cuda:1; auto = the GPU where the worker has one, so on
            Ray give --gpus-per-worker as well.
        executor: ray, or serial = one shard after the other in this process.
        workers: processes that share the work; default: as many as CPUs and GPUs allow; 0 = serial.
        address: of a Ray cluster; auto = the one this machine belongs to; default: Ray on this
            machine alone.
        gpus_per_worker: share of a GPU each worker holds, as in 0.5.
        retry_failed: also try the shards that failed and were set aside.
        mirror: also write every picture mirrored, left and right exchanged in its captions too, for
            data.flip of the GPT's training; takes twice the time and the space.
    """

    input: str
    output: str
    vqseg: str
    vqgan: str
    tokenizer: str
    batch_size: int = 16
    device: str = "auto"
    executor: Literal["ray", "serial"] = "ray"
    workers: int | None = None
    address: str | None = None
    gpus_per_worker: float = 0.0
    retry_failed: bool = False
    mirror: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, batch_size=1, workers=0, gpus_per_worker=0)
        if local_path(self.output) is None:
            raise ValueError(
                f"{self.output}: training maps token shards into memory; name a local folder"
            )

    @property
    def paths(self) -> TokenizerPaths:
        """Of the tokenizers, as seen from any folder."""
        return TokenizerPaths(*map(absolute, (self.tokenizer, self.vqseg, self.vqgan)))

    @property
    def execution(self) -> ExecutorConfig:
        """Where and how wide the run is."""
        return ExecutorConfig(
            kind=self.executor,
            workers=self.workers,
            address=self.address,
            gpus_per_worker=self.gpus_per_worker,
            networks=self.device != "cpu",
            retry_failed=self.retry_failed,
        )


def tokenize(config: TokenizeConfig) -> int:
    """Makes the token shards that are not made yet, then the manifest; returns the exit status.

    Raises:
        ValueError: settings that cannot work; a tokenizer or the input is missing or broken, the
            input holds photos without scene maps, or not one sample.
        OSError: input or output cannot be reached.
    """
    require(lacking_filesystems(config.input))
    output, paths = absolute(config.output), config.paths
    hashes, jobs = paths.hashes(), find_jobs(config.input)
    if not any(name.endswith(STATS) for name in RunFolder(output).list_names()):
        _check_scenes(config.input, jobs)
    loaded = Tokenizers.load(paths)
    described = loaded.describe()
    streams = {name: {**described[name], "sha256": hashes[name]} for name in hashes}
    worker = partial(
        TokenWorker,
        paths,
        output,
        mirror=config.mirror,
        batch_size=config.batch_size,
        device=config.device,
    )
    lacks = partial(
        gather,
        paths.lacks,
        partial(lacking_device, config.device),
        partial(lacking_input, absolute(jobs[0].source.name)),
        partial(lacking_gpu, config.gpus_per_worker),
    )
    with _named(paths, config.output):
        summary = execute(
            jobs,
            worker,
            output,
            command="tokenize",
            settings={**streams, **({"mirror": True} if config.mirror else {})},
            config=config.execution,
            unit="picture",
            lacks=lacks,
        )
    if summary.failed:
        return _tell_of_failures(summary)
    for stream, network in (("scene", loaded.scene), ("image", loaded.image)):
        streams[stream] = {**streams[stream], "tokens_sha256": network.token_hash()}
    shards = _write_manifest(RunFolder(output), streams, jobs, mirror=config.mirror)
    pictures, captions = (sum(shard[k] for shard in shards) for k in ("pictures", "captions"))
    print(
        f"{summary.done} of {summary.shards} shards done, {summary.skipped} were done before; "
        f"{pictures} pictures, {captions} captions"
    )
    if not pictures:
        raise ValueError(f"{config.input}: there is not one sample in it")
    return 0


def _check_scenes(input: str, jobs: Sequence[Job]) -> None:
    """Looks at the first sample before a run begins; what cannot be read the run will tell of.

    Raises:
        ShardError: it is a photo that mas preprocess has not seen.
    """
    for job in jobs[:LOOKED_INTO]:
        sample = None
        with suppress(ShardError, OSError):
            sample = next(job.source.read(on_reject=lambda *_: None), None)
        if sample is None:
            continue
        if "scene.png" in sample.files:
            return
        raise ShardError(
            f"{input}: holds photos without scene maps ({sample.key} has no scene.png); run mas "
            "preprocess on it first, and name its --output here"
        )


@contextmanager
def _named(paths: TokenizerPaths, output: str) -> Iterator[None]:
    """Names the file that makes other tokens than those that are there, whose hash tells nobody."""
    try:
        yield
    except OtherSettingsError as error:
        stream = error.key.partition(".")[0]
        if stream not in paths.files:
            raise
        raise ValueError(
            f"{paths.files[stream]} is not what the {stream} tokens in {output} were made with: "
            "give that one, or choose another --output"
        ) from error


def _tell_of_failures(summary: Summary) -> int:
    for name, error in sorted(summary.failed.items()):
        print(f"failed: {name}: {error}")
    print(
        f"{len(summary.failed)} shards failed, so no {MANIFEST} was written; mend the input, "
        "then run the same command with --retry-failed"
    )
    return summary.status


def _write_manifest(
    folder: RunFolder, streams: dict[str, dict[str, Any]], jobs: Sequence[Job], *, mirror: bool
) -> list[dict[str, Any]]:
    """Writes manifest.json from the counts of all shards; returns its list of shards."""
    shards = []
    for job in jobs:
        stats = folder.read(job.name + STATS) or {}
        counts = {key: stats[key] for key in ("pictures", "captions")}
        shards.append({"name": job.name, **counts})
    mirrored = {"mirrored": True} if mirror else {}
    folder.update(MANIFEST, {"format": TOKEN_FORMAT, **mirrored, **streams, "shards": shards})
    return shards


def _read_scene(sample: Sample, size: int) -> SceneMap:
    scene = SceneMap.from_png(io.BytesIO(_member(sample, "scene.png")))
    _check_size(sample.key, scene.size, size, "VQ-SEG")
    return scene


def _read_photo(sample: Sample, size: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(_member(sample, "jpg")), formats=["JPEG"]).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ShardError(f"{sample.key}.jpg: {error}") from error
    _check_size(sample.key, image.size, size, "VQ-GAN")
    return image


def _flip(photo: Image.Image) -> Image.Image:
    return photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _resized(photo: Image.Image, size: int) -> np.ndarray:
    """uint8 H W C; larger photos are reduced with antialiasing."""
    if photo.width != size:
        photo = photo.resize((size, size), Image.Resampling.LANCZOS)
    return np.array(photo)


def _check_size(key: str, found: tuple[int, int], size: int, network: str) -> None:
    if found[0] != found[1] or found[0] < size:
        raise ShardError(
            f"{key} has {found[0]}x{found[1]} pixels and the {network} takes {size}x{size}: "
            f"preprocess with --photo.size {size}"
        )


def _member(sample: Sample, extension: str) -> bytes:
    if extension not in sample.files:
        raise ShardError(
            f"{sample.key} has no {extension}; mas tokenize takes what mas preprocess writes"
        )
    return sample.files[extension]


def _concatenate(parts: list[np.ndarray], length: int) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros((0, length), np.uint16)


def _refuse(path: str, key: str, reason: str, detail: str) -> None:
    raise ShardError(f"{path}: {key}: {reason} ({detail})")
