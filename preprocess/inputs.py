"""What can be preprocessed, as shard jobs: tar shards, a folder of images, COCO's images.

In: what the person named. Out: jobs whose `source` a worker reads sample by sample. Folders and
COCO are cut into jobs by sorted key, so the same input always gives the same jobs.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import stat
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mas.errors import first_line
from mas.shards import (
    UNSAFE,
    OnReject,
    Sample,
    ShardError,
    expand_shards,
    in_utf8,
    is_safe_name,
    is_too_large,
    list_keys,
    local_path,
    read_shard,
)
from preprocess.find import find_files
from preprocess.photo import EXTENSIONS
from preprocess.rejects import Reject, RejectError
from preprocess.run_folder import HISTOGRAM
from preprocess.runner import Job

logger = logging.getLogger(__name__)

# What may lie beside a photo in a folder, as `stem.ending`; the longer endings first.
COMPANIONS = ("panoptic.png", "segments.json", "human.png", "landmarks.json", "json", "txt")
# Errors that are one file's; all others may be those of the disk, and fail the shard.
OF_ONE_FILE = {errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


@dataclass(frozen=True)
class TarSource:
    """The samples of one tar."""

    name: str  # path or URL
    size: int  # bytes, when it was listed

    def list_keys(self) -> list[str]:
        """Of all samples; ShardError for a broken tar."""
        return list_keys(self.name)

    def read(self, *, on_reject: OnReject) -> Iterator[Sample]:
        """The samples in order.

        Raises:
            ShardError: the tar is broken, or of another size by now: it is being written, and the
                fingerprint of its job is not that of what was read.
            OSError: it cannot be reached.
        """
        yield from read_shard(self.name, on_reject=on_reject)
        filesystem, inner = fsspec.core.url_to_fs(self.name)
        filesystem.invalidate_cache(inner)
        _check_size(self.name, before=self.size, now=filesystem.info(inner)["size"])


Entry = tuple[str, dict[str, str], dict[str, bytes]]  # key; ending -> path; ending -> content
Refusal = tuple[str, str, str]  # key, reason, detail


@dataclass(frozen=True)
class FilesSource:
    """Samples gathered from loose files."""

    name: str  # folder or URL
    entries: tuple[Entry, ...]
    refused: tuple[Refusal, ...] = ()  # what lay among them and is no sample
    size: int | None = None  # bytes of all files, when they were listed; None = not known

    def list_keys(self) -> list[str]:
        """Of all samples."""
        return [key for key, _, _ in self.entries]

    def read(self, *, on_reject: OnReject) -> Iterator[Sample]:
        """The samples in order; told are those that cannot be read, and what lay among them.

        Raises:
            ShardError: the files together are of another size by now, as for a tar.
            OSError: trouble that is not one file's alone.
        """
        size = self.size
        read = 0
        for key, paths, contents in self.entries:
            try:
                files = {ending: _read_member(path) for ending, path in paths.items()}
            except RejectError as error:
                on_reject(key, error.reason.value, error.detail)
                size = None  # of what could not be read nothing is known
                continue
            read += sum(map(len, files.values()))
            yield Sample(key, {**contents, **files})
        for refusal in self.refused:
            on_reject(*refusal)
        if size is not None:
            first, last = self.entries[0][0], self.entries[-1][0]
            _check_size(f"{self.name}: {first} to {last}", before=size, now=read)


def _check_size(name: str, *, before: int, now: int) -> None:
    """Raises ShardError for an input that is being written."""
    if now != before:
        raise ShardError(
            f"{name}: had {before} bytes when the run began and has {now} now; when nobody writes "
            "to it any more, give the command again with --retry-failed"
        )


class _State(NamedTuple):
    """What tells a file from an earlier one of its name; as small as millions of them want it."""

    size: int | None = None  # bytes; None = not known
    modified: float = 0.0  # seconds since 1970; 0 = not known


@dataclass
class _Listing:
    """Loose files sorted into samples, in the order of the shards to be made of them."""

    entries: list[Entry] = field(default_factory=list)
    refused: list[tuple[int, Refusal]] = field(default_factory=list)  # behind so many entries
    states: dict[str, _State] = field(default_factory=dict)  # of the files, by path

    def refuse(self, key: str, reason: Reject, detail: str) -> None:
        self.refused.append((len(self.entries), (key, reason.value, detail)))


def find_jobs(input: str, *, captions: str = "", samples_per_shard: int = 1000) -> list[Job]:
    """The shard jobs of an input.

    Args:
        input: tars as `expand_shards` takes them, or a folder of images: with a .txt beside each,
            or with `captions`.
        captions: COCO's captions JSON for a folder of images.
        samples_per_shard: for folders and COCO.

    Raises:
        ShardError: nothing is there, it is no tar, or two shards would be called the same.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    filesystem, inner = fsspec.core.url_to_fs(input)
    if captions:
        return _cut(input, _list_coco(input, captions), samples_per_shard)
    if filesystem.isdir(inner):
        names = filesystem.ls(inner, detail=False)
        if not any(name.endswith(".tar") for name in names):
            return _cut(input, _list_folder(input), samples_per_shard)
        # A run's own picture lies beside the shards it wrote.
        if pictures := [n for n in names if _is_picture(n) and not n.endswith(f"/{HISTOGRAM}")]:
            logger.warning(
                "%s: holds shards; what lies beside them is passed over (pictures: %d, as %s)",
                *(input, len(pictures), PurePosixPath(pictures[0]).name),
            )
    _list_once(filesystem, inner)
    jobs = []
    paths = expand_shards(input)
    _check_tars(input, [path for path in paths if not path.endswith(".tar")])
    for path in paths:
        details = fsspec.core.url_to_fs(path)[0].info(path)
        name, size = PurePosixPath(path).name.removesuffix(".tar"), details["size"]
        source, when = TarSource(path, size), _modified(details)
        jobs.append(Job(name, source, fingerprint=f"{size} bytes", modified=when))
    counts = Counter(job.name for job in jobs)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        alike = " and ".join([job.source.name for job in jobs if job.name == twice[0]][:2])
        raise ShardError(
            f"{input}: several shards are called {twice[0]}.tar, as {alike}; give them other names "
            "(links will do), or each folder an --output of its own"
        )
    return jobs


def _check_tars(input: str, paths: Sequence[str]) -> None:
    """Refuses files that are no tars before any is called a broken one.

    Raises:
        ShardError: tells what --input takes.
    """
    takes = "--input takes tar shards, or a folder of pictures with captions in NAME.txt beside"
    if pictures := [path for path in paths if _is_picture(path)]:
        raise ShardError(
            f"{input}: names {len(pictures)} pictures one by one, {takes}; name their folder"
            if len(pictures) > 1
            else f"{input}: is a single picture; {takes}: put it into a folder of its own with its "
            "caption, and name the folder"
        )
    if paths and not _is_tar(paths[0]):  # the first speaks for all: opening each may take hours
        raise ShardError(f"{paths[0]}: is no tar; {takes}")


def _is_tar(path: str) -> bool:
    try:
        with _open(path) as file:
            return tarfile.is_tarfile(file)
    except IsADirectoryError:
        return False


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix[1:].lower() in EXTENSIONS


def _list_once(filesystem: Any, pattern: str) -> None:
    """Lists the folder of a brace pattern, so that a store is not asked about shard after shard.

    fsspec answers questions about files of a folder from its listing.
    """
    folder = pattern.rpartition("/")[0]
    if "{" in pattern and "{" not in folder and not isinstance(filesystem, LocalFileSystem):
        with contextlib.suppress(FileNotFoundError):
            filesystem.ls(folder)


def _cut(name: str, listing: _Listing, samples_per_shard: int) -> list[Job]:
    """Shards of so many samples; what was refused goes to the shard it would have been in.

    A shard's fingerprint tells its samples only: they alone decide what is written.
    """
    entries, states = listing.entries, listing.states
    starts = range(0, len(entries), samples_per_shard)
    refused: list[list[Refusal]] = [[] for _ in starts]
    for place, refusal in listing.refused:
        refused[min(place // samples_per_shard, len(refused) - 1)].append(refusal)
    jobs: list[Job] = []
    for start in starts:
        part = tuple(entries[start : start + samples_per_shard])
        told = [
            (key, [(e, states.get(path, _State()).size) for e, path in paths.items()], contents)
            for key, paths, contents in part
        ]
        digest = hashlib.sha256(repr(told).encode()).hexdigest()[:16]
        sizes = [size for _, files, _ in told for _, size in files]
        known = [size for size in sizes if size is not None]
        size = sum(known) if len(known) == len(sizes) else None
        source = FilesSource(name, part, tuple(refused[len(jobs)]), size)
        times = (
            states.get(path, _State()).modified for _, paths, _ in part for path in paths.values()
        )
        job = Job(f"{len(jobs):05d}", source, fingerprint=f"files {digest}", modified=max(times))
        jobs.append(job)
    return jobs


def _modified(details: Mapping[str, Any]) -> float:
    """When a file was written last, in seconds since 1970; 0 where its file system does not say."""
    when = details.get("mtime", details.get("LastModified"))  # local, S3
    if isinstance(when, datetime):
        return when.timestamp()
    return float(when) if isinstance(when, int | float) else 0.0


def _list_folder(folder: str) -> _Listing:
    """Every image below `folder` with its companions; the key is its path without the ending.

    Files that are neither are passed over, unless they bear the name of a companion without image.
    """
    filesystem, inner = fsspec.core.url_to_fs(folder)
    root = inner.rstrip("/") + "/"
    listing = _Listing()
    groups: dict[str, dict[str, list[str]]] = defaultdict(dict)  # stem -> ending -> names
    urls: dict[str, str] = {}
    for path, about in find_files(filesystem, inner).items():
        name = path.removeprefix(root)
        stem, ending = _split(name)
        groups[stem].setdefault(ending, []).append(name)
        if ending in (*COMPANIONS, *EXTENSIONS):
            urls[name] = _url(filesystem, path, folder)
            listing.states[urls[name]] = _State(about["size"], _modified(about))
    kept: dict[str, str] = {}  # key -> name of the photo
    for stem, group in sorted(groups.items()):
        _add_group(listing, stem, group, urls, kept)
    if not kept:
        if tar := min((n for group in groups.values() for n in group.get("tar", ())), default=""):
            pattern = f"{folder.rstrip('/')}{'/*' * tar.count('/')}/*.tar"
            raise ShardError(f"{folder}: the shards lie deeper, as {tar}; name them: '{pattern}'")
        raise ShardError(f"{folder}: holds neither .tar shards nor {', '.join(EXTENSIONS)} images")
    return listing


def _add_group(
    listing: _Listing,
    stem: str,
    group: dict[str, list[str]],
    urls: dict[str, str],
    kept: dict[str, str],
) -> None:
    """Files of one stem: a sample, and what is too much or too little for one."""
    names = [name for ending in group for name in group[ending] if name in urls]
    if not names:
        return
    if not is_safe_name(names[0]):
        listing.refuse(in_utf8(names[0]), Reject.UNSAFE_NAME, UNSAFE)
        return
    key = _key(stem)
    photos = sorted(name for ending in EXTENSIONS for name in group.get(ending, ()))
    if not photos:
        endings = ", ".join(filter(None, group))
        listing.refuse(key, Reject.NO_PHOTO, f"no {', '.join(EXTENSIONS)} beside .{endings}")
        return
    used: dict[str, str] = {}
    first = kept.setdefault(key, photos[0])
    if first == photos[0]:
        used = {e: n[0] for e, n in group.items() if e in COMPANIONS or n[0] == first}
    for name in names:
        if name not in used.values():
            taken = used.get(_split(name)[1], first)
            listing.refuse(key, Reject.DUPLICATE_KEY, f"{name}: {taken} was kept")
    if used:
        listing.entries.append((key, {e: urls[name] for e, name in used.items()}, {}))


def _split(name: str) -> tuple[str, str]:
    """Stem and ending of a file: that of a companion, or what follows the last dot."""
    companion = next((c for c in COMPANIONS if name.lower().endswith(f".{c}")), None)
    ending = companion or PurePosixPath(name).suffix[1:].lower()
    return (name[: -len(ending) - 1], ending) if ending else (name, "")


def _list_coco(folder: str, captions: str) -> _Listing:
    """Every image of COCO's captions JSON; its fields and all its captions become KEY.json."""
    listing = _Listing()
    try:
        content = json.loads(_read(captions))
        _check_captions(captions, content)
        sentences: dict[int, list[str]] = defaultdict(list)
        for annotation in sorted(content["annotations"], key=lambda a: a["id"]):
            sentences[annotation["image_id"]].append(annotation["caption"].strip())
        entries: dict[str, Entry] = {}
        for image in content["images"]:
            name = image["file_name"]
            if not is_safe_name(name):
                listing.refuse(in_utf8(name), Reject.UNSAFE_NAME, UNSAFE)
                continue
            key = _key(str(PurePosixPath(name).with_suffix("")))
            fields = {**image, "image_id": image["id"], "captions": sentences[image["id"]]}
            if key in entries:
                (first,) = entries[key][1].values()
                listing.refuse(key, Reject.DUPLICATE_KEY, f"{name}: {first} was kept")
                continue
            paths = {PurePosixPath(name).suffix[1:].lower(): f"{absolute(folder)}/{name}"}
            entries[key] = (key, paths, {"json": json.dumps(fields).encode()})
    except FileNotFoundError:
        raise ShardError(f"{captions}: no such file") from None
    except ShardError:
        raise
    except UnicodeDecodeError as error:
        place = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        raise ShardError(f"{captions}: not UTF-8 ({place}): save it as UTF-8") from error
    except KeyError as error:
        raise ShardError(f"{captions}: not COCO's captions JSON (it has no {error})") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ShardError(f"{captions}: not COCO's captions JSON ({first_line(error)})") from error
    filesystem, inner = fsspec.core.url_to_fs(folder)
    if not filesystem.isdir(inner):
        raise ShardError(f"{folder}: no such folder")
    if not entries:
        raise ShardError(f"{captions}: names no image that could be used")
    listing.entries = [entries[key] for key in sorted(entries)]
    return listing


def _check_captions(path: str, content: Any) -> None:
    """Raises ShardError for COCO's JSON of masks or boxes in place of that of captions."""
    annotations = content["annotations"]
    first = annotations[0] if isinstance(annotations, list) and annotations else {}
    if "caption" in first:
        return
    for key, kind in (("segments_info", "panoptic"), ("category_id", "instances")):
        if key in first:
            raise ShardError(
                f"{path}: is COCO's {kind} JSON; give captions_train2017.json or the like"
            )


def absolute(path: str) -> str:
    """The same place for processes that work in another folder; URLs and "" stay as they are."""
    return (local_path(path) if path else None) or path.rstrip("/")


def _key(stem: str) -> str:
    """A key that survives a tar, where it ends at the first dot of the name."""
    path = PurePosixPath(stem)
    return str(path.with_name(path.name.replace(".", "_")))


def _url(filesystem: Any, path: str, like: str) -> str:
    return path if local_path(like) is not None else filesystem.unstrip_protocol(path)


def _read(path: str) -> bytes:
    with _open(path) as file:
        return file.read()


def _read_member(path: str) -> bytes:
    """Content of one file of a sample.

    Raises:
        RejectError: it is missing, no file, too large, or cannot be read for its own sake.
        OSError: the disk or the store cannot be read; a store that refuses everything, as it does
            when a key has run out, is among these.
    """
    try:
        if local_path(path) is not None and not stat.S_ISREG(os.stat(path).st_mode):
            raise RejectError(Reject.NOT_A_FILE, f"{path} is a folder, a pipe or a device")
        with _open(path) as file:
            size = file.seek(0, os.SEEK_END)
            if is_too_large(path, size):
                raise RejectError(Reject.MEMBER_TOO_LARGE, f"{path} has {size} bytes")
            file.seek(0)
            return file.read()
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno in OF_ONE_FILE:
            reason = error.strerror or "no such file"
            raise RejectError(Reject.NO_PHOTO, f"{path}: {reason}") from error
        raise


def _open(path: str) -> Any:
    return fsspec.open(path, "rb") if local_path(path) is None else open(path, "rb")
