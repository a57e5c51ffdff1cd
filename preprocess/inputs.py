"""What can be preprocessed, as shard jobs: tar shards, a folder of images, COCO's images.

In: what the person named. Out: jobs whose `source` a worker reads sample by sample. Folders and
COCO are cut into jobs by sorted key, so the same input always gives the same jobs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mas.shards import OnReject, Sample, ShardError, expand_shards, local_path, read_shard
from preprocess.executor import Job
from preprocess.photo import EXTENSIONS

# What may lie beside a photo in a folder, as `stem.ending`; the longer endings first.
COMPANIONS = ("panoptic.png", "segments.json", "human.png", "landmarks.json", "json", "txt")


@dataclass(frozen=True)
class TarSource:
    """The samples of one tar."""

    name: str  # path or URL

    def read(self, *, on_reject: OnReject) -> Iterator[Sample]:
        return read_shard(self.name, on_reject=on_reject)


Entry = tuple[str, dict[str, str], dict[str, bytes]]  # key; ending -> path; ending -> content
Sizes = dict[str, int]  # bytes of the files, by path


@dataclass(frozen=True)
class FilesSource:
    """Samples gathered from loose files."""

    name: str  # folder or URL
    entries: tuple[Entry, ...]

    def read(self, *, on_reject: OnReject) -> Iterator[Sample]:
        for key, paths, contents in self.entries:
            files = dict(contents)
            try:
                for ending, path in paths.items():
                    files[ending] = _read(path)
            except FileNotFoundError as error:
                on_reject(key, "no_photo", f"{error.filename or path} is not there")
                continue
            yield Sample(key, files)


def find_jobs(input: str, *, captions: str = "", samples_per_shard: int = 1000) -> list[Job]:
    """The shard jobs of an input.

    Args:
        input: tars as `expand_shards` takes them, or a folder of images: with a .txt beside each,
            or with `captions`.
        captions: COCO's captions JSON for a folder of images.
        samples_per_shard: for folders and COCO.

    Raises:
        ShardError: nothing is there, or two shards would be called the same.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    filesystem, inner = fsspec.core.url_to_fs(input)
    if captions:
        return _cut(input, _coco_entries(input, captions), {}, samples_per_shard)
    if filesystem.isdir(inner):
        shards = any(name.endswith(".tar") for name in filesystem.ls(inner, detail=False))
        if not shards:
            return _cut(input, *_folder_entries(input), samples_per_shard)
    _list_once(filesystem, inner)
    jobs = []
    for path in expand_shards(input):
        size = fsspec.core.url_to_fs(path)[0].size(path)
        name = PurePosixPath(path).name.removesuffix(".tar")
        jobs.append(Job(name, TarSource(path), fingerprint=f"{size} bytes"))
    names = [job.name for job in jobs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ShardError(f"{input}: several shards are called {twice[0]}.tar; run them one by one")
    return jobs


def _list_once(filesystem: Any, pattern: str) -> None:
    """Lists the folder of a brace pattern, so that a store is not asked about shard after shard.

    fsspec answers questions about files of a folder from its listing.
    """
    folder = pattern.rpartition("/")[0]
    if "{" in pattern and "{" not in folder and not isinstance(filesystem, LocalFileSystem):
        with contextlib.suppress(FileNotFoundError):
            filesystem.ls(folder)


def _cut(name: str, entries: Sequence[Entry], sizes: Sizes, samples_per_shard: int) -> list[Job]:
    jobs: list[Job] = []
    for start in range(0, len(entries), samples_per_shard):
        part = tuple(entries[start : start + samples_per_shard])
        told = [
            (key, [(ending, sizes.get(path)) for ending, path in paths.items()], contents)
            for key, paths, contents in part
        ]
        digest = hashlib.sha256(repr(told).encode()).hexdigest()[:16]
        jobs.append(Job(f"{len(jobs):05d}", FilesSource(name, part), fingerprint=f"files {digest}"))
    return jobs


def _folder_entries(folder: str) -> tuple[list[Entry], Sizes]:
    """Every image below `folder` with its companions; the key is its path without the ending."""
    filesystem, inner = fsspec.core.url_to_fs(folder)
    root = inner.rstrip("/") + "/"
    found: dict[str, dict[str, str]] = defaultdict(dict)
    images: set[str] = set()
    sizes: Sizes = {}
    for path, details in sorted(filesystem.find(inner, detail=True).items()):
        relative = path.removeprefix(root)
        companion = next((c for c in COMPANIONS if relative.lower().endswith(f".{c}")), None)
        ending = companion or PurePosixPath(relative).suffix[1:].lower()
        stem = relative[: -len(ending) - 1]
        if companion or ending in EXTENSIONS:
            url = _url(filesystem, path, folder)
            found[stem].setdefault(ending, url)
            sizes[url] = details["size"]
        if not companion and ending in EXTENSIONS:
            images.add(stem)
    if not images:
        raise ShardError(f"{folder}: holds neither .tar shards nor {', '.join(EXTENSIONS)} images")
    entries: dict[str, dict[str, str]] = {}
    for stem in sorted(images):
        key = _key(stem)
        if key in entries:
            raise ShardError(f"{folder}: {stem} and another image would share the key {key}")
        entries[key] = found[stem]
    return [(key, paths, {}) for key, paths in entries.items()], sizes


def _coco_entries(folder: str, captions: str) -> list[Entry]:
    """Every image of COCO's captions JSON; its fields and all its captions become KEY.json."""
    try:
        content = json.loads(_read(captions))
        sentences: dict[int, list[str]] = defaultdict(list)
        for annotation in sorted(content["annotations"], key=lambda a: a["id"]):
            sentences[annotation["image_id"]].append(annotation["caption"].strip())
        entries = {}
        for image in content["images"]:
            key = _key(str(PurePosixPath(image["file_name"]).with_suffix("")))
            ending = PurePosixPath(image["file_name"]).suffix[1:].lower()
            fields = {**image, "image_id": image["id"], "captions": sentences[image["id"]]}
            path = f"{folder.rstrip('/')}/{image['file_name']}"
            entries[key] = (key, {ending: path}, {"json": json.dumps(fields).encode()})
    except FileNotFoundError:
        raise ShardError(f"{captions}: no such file") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{captions}: not COCO's captions JSON ({error!r})") from error
    filesystem, inner = fsspec.core.url_to_fs(folder)
    if not filesystem.isdir(inner):
        raise ShardError(f"{folder}: no such folder")
    return [entries[key] for key in sorted(entries)]


def _key(stem: str) -> str:
    """A key that survives a tar, where it ends at the first dot of the name."""
    path = PurePosixPath(stem)
    return str(path.with_name(path.name.replace(".", "_")))


def _url(filesystem: Any, path: str, like: str) -> str:
    return path if local_path(like) is not None else filesystem.unstrip_protocol(path)


def _read(path: str) -> bytes:
    with fsspec.open(path, "rb") if local_path(path) is None else open(path, "rb") as file:
        return file.read()
