"""How samples lie on disk: tar shards of photos and scenes, and the arrays of their tokens.

In and out: `00000.tar` in the layout of img2dataset and webdataset: the members of one sample share
the name up to the first dot. Paths are local paths or fsspec URLs. Members are read in place, never
extracted; nothing is unpickled. File handling and the token arrays are in the two modules imported.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import TracebackType
from typing import IO
from unicodedata import category

import numpy as np

from mas.shard_files import (
    ShardError,
    StoreError,
    expand_shards,
    local_path,
    remove_temporary,
    replacing,
    seekable,
    store_errors,
    write_file,
)
from mas.token_shards import MANIFEST, TOKEN_FORMAT, TokenShards, write_token_shard

__all__ = [
    "MANIFEST",
    "TOKEN_FORMAT",
    "UNSAFE",
    "OnReject",
    "Sample",
    "ShardError",
    "ShardIndex",
    "ShardWriter",
    "StoreError",
    "TokenShards",
    "expand_shards",
    "in_utf8",
    "is_safe_name",
    "is_too_large",
    "list_keys",
    "local_path",
    "one_line",
    "read_captions",
    "read_shard",
    "remove_temporary",
    "store_errors",
    "write_file",
    "write_token_shard",
]

logger = logging.getLogger(__name__)

MAX_MEMBER_BYTES = 256 * 2**20  # no photo or annotation is larger; protects the memory
MAX_JSON_BYTES = 4 * 2**20  # nor such JSON, which takes fifty times its size when it is read
UNSAFE = "names must be relative, not hidden, and plain UTF-8 text"  # what `unsafe_name` says
_BLOCK = 512  # tar works in blocks of this many bytes
_MAX_PADDING = 2 * tarfile.RECORDSIZE  # bytes behind the last member, end marker included

OnReject = Callable[[str, str, str], None]  # key, reason, detail


@dataclass(frozen=True)
class Sample:
    """One picture with everything that belongs to it."""

    key: str
    files: dict[str, bytes]  # what follows the first dot of the name, lower case -> content


@dataclass
class _Entry:
    """Where the files of one sample lie in the tar."""

    spans: dict[str, tuple[int, int]] = field(default_factory=dict)  # extension -> offset, bytes
    repeated: list[str] = field(default_factory=list)  # extensions that came again


def read_shard(path: str, *, on_reject: OnReject | None = None) -> Iterator[Sample]:
    """Streams the samples of a tar in the order of their first members.

    The members of one sample need not lie next to each other. Directories are passed over.

    Args:
        path: local path or URL of an uncompressed tar.
        on_reject: told (key, reason, detail) of each member that cannot be used: `unsafe_name`,
            `not_a_file`, `member_too_large`, and `duplicate_key` (the first one is kept).
            Without it they are logged.

    Raises:
        ShardError: not a tar, compressed, truncated or broken inside, raised before any sample; or
            it has become shorter since.
    """
    with seekable(path) as file:
        for key, entry in _scan(file, path, on_reject or _log_reject(path)).items():
            files = {}
            for extension, (offset, size) in entry.spans.items():
                file.seek(offset)
                files[extension] = file.read(size)
                if len(files[extension]) != size:
                    raise ShardError(f"{path}: became shorter while it was in use")
            yield Sample(key, files)


def list_keys(path: str) -> list[str]:
    """The keys of a tar's samples in their order; nothing is said of members that are refused.

    Raises:
        ShardError: as for `read_shard`.
    """
    with seekable(path) as file:
        return list(_scan(file, path, lambda *_: None))


def read_captions(sample: Sample) -> list[str]:
    """The captions of a sample: `captions` of KEY.json when it has any, else KEY.txt; stripped,
    and of one line each.

    Blank captions are left out, so the list may be empty.

    Raises:
        ShardError: the JSON is no object, `captions` is no list of strings, or not UTF-8.
    """
    try:
        if "json" in sample.files:
            content = json.loads(sample.files["json"])
            if not isinstance(content, dict):
                raise ShardError(f"{sample.key}.json: not a JSON object")
            captions = content.get("captions") or []
            if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
                raise ShardError(f"{sample.key}.json: `captions` is not a list of strings")
            if captions:
                return [one_line(caption) for caption in captions if caption.strip()]
        caption = one_line(sample.files.get("txt", b"").decode("utf-8"))
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ShardError(f"{sample.key}: caption or JSON cannot be read ({error})") from error
    return [caption] if caption else []


def one_line(caption: str) -> str:
    """The caption stripped, its line breaks and the blanks around them single spaces."""
    return re.sub(r"\s*[\r\n]\s*", " ", caption.strip())


def is_safe_name(name: str) -> bool:
    """Whether a member may be called so: relative, not hidden, in characters that can be seen.

    Spaces of every width may be in it; systems put them into names of their own accord.
    """
    path = PurePosixPath(name)
    return not (
        path.name[:1] in ("", ".")
        or path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or not all(letter.isprintable() or category(letter) == "Zs" for letter in name)
    )


def is_too_large(name: str, size: int) -> bool:
    """Whether a file of a sample has so many bytes that it would fill the memory."""
    return size > (MAX_JSON_BYTES if name.lower().endswith(".json") else MAX_MEMBER_BYTES)


def in_utf8(name: str) -> str:
    """A file's name with an escape for each byte that is no UTF-8, and for what cannot be seen.

    So that no name tells a terminal what to do.
    """
    shown = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(x if x.isprintable() or category(x) == "Zs" else ascii(x)[1:-1] for x in shown)


def _scan(file: IO[bytes], path: str, on_reject: OnReject) -> dict[str, _Entry]:
    """Reads all headers of the tar at `file` and groups its members by key."""
    entries: dict[str, _Entry] = {}
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(2) == b"\x1f\x8b":
        raise ShardError(f"{path}: the tar is compressed; run gunzip on it")
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            before = -1
            while member := tar.next():
                if member.size < 0 or member.offset <= before:  # would be read for ever, or whole
                    raise tarfile.ReadError(
                        f"the member at byte {member.offset} has a size that cannot be"
                    )
                before = member.offset
                _add_member(entries, member, on_reject)
                tar.members.clear()  # type: ignore[attr-defined]  # keeps long tars out of memory
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError) as error:
        cut = "unexpected end" in str(error) or "truncated" in str(error)
        problem = "truncated" if cut else "not a readable tar"
        raise ShardError(f"{path}: {problem} ({error}); download or write it again") from error
    file.seek(end)
    marker = file.read(_BLOCK)
    if len(marker) < _BLOCK:  # tarfile takes a cut between two members for the end
        raise ShardError(f"{path}: truncated at byte {size}; download or write it again")
    if any(marker):  # tarfile takes a broken header for the end
        raise ShardError(f"{path}: broken tar header at byte {end}; download or write it again")
    if size - end > _MAX_PADDING or any(file.read()):
        # space set aside for a download that was cut reads as zeros, an appended tar is passed over
        raise ShardError(
            f"{path}: ends at byte {end} of {size}, what follows is not padding; download or write "
            "it again"
        )
    for key, entry in entries.items():
        if entry.repeated:
            names = ", ".join(entry.repeated)
            on_reject(key, "duplicate_key", f"{names} came again; the first was kept")
    return entries


def _add_member(entries: dict[str, _Entry], member: tarfile.TarInfo, on_reject: OnReject) -> None:
    if member.isdir():
        return
    if not is_safe_name(member.name):
        on_reject(in_utf8(member.name), "unsafe_name", UNSAFE)
        return
    name = PurePosixPath(member.name)
    stem, _, extension = name.name.partition(".")
    key = str(name.with_name(stem))
    if not member.isreg() or member.issparse():
        on_reject(key, "not_a_file", f"{name} is a link, a device or sparse")
        return
    if is_too_large(member.name, member.size):
        on_reject(key, "member_too_large", f"{name} has {member.size} bytes")
        return
    entry = entries.setdefault(key, _Entry())
    if extension.lower() in entry.spans:
        entry.repeated.append(extension.lower())
    else:
        entry.spans[extension.lower()] = (member.offset_data, member.size)


def _log_reject(path: str) -> OnReject:
    def log(key: str, reason: str, detail: str) -> None:
        logger.warning("%s: %s: %s (%s)", path, key, reason, detail)

    return log


class ShardIndex:
    """Random access to the samples of local shards; small enough to pickle to loader workers."""

    def __init__(
        self,
        paths: Sequence[str],
        *,
        extensions: Sequence[str] = ("jpg", "scene.png", "txt"),
    ) -> None:
        """Reads the headers of all shards.

        Raises:
            ShardError: a remote or broken shard, or a sample without one of the `extensions`.
        """
        self.paths: list[str] = []
        self.extensions = tuple(extensions)
        self.keys: list[str] = []
        spans: list[list[tuple[int, int]]] = []
        shard_ids: list[int] = []
        for path in paths:
            local = local_path(path)
            if local is None:
                raise ShardError(f"{path}: random access needs local files; copy the shards first")
            with open(local, "rb") as file:
                entries = _scan(file, path, _log_reject(path))
            for key, entry in entries.items():
                missing = [e for e in self.extensions if e not in entry.spans]
                if missing:
                    raise ShardError(
                        f"{path}: sample {key} has no {missing[0]}; name scene shards, which mas "
                        "preprocess writes"
                    )
                self.keys.append(key)
                spans.append([entry.spans[e] for e in self.extensions])
                shard_ids.append(len(self.paths))
            self.paths.append(local)
        self._spans = np.array(spans, np.int64).reshape(-1, len(self.extensions), 2)
        self._shards = np.array(shard_ids, np.int32)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int, *, only: Sequence[str] | None = None) -> Sample:
        """Sample `index`, in the order of the shards and of the samples in them.

        With `only`, no more than these of the index's extensions.
        """
        files = {}
        path = self.paths[self._shards[index]]
        with open(path, "rb", buffering=0) as file:
            for extension, (offset, size) in zip(self.extensions, self._spans[index], strict=True):
                if only is not None and extension not in only:
                    continue
                files[extension] = os.pread(file.fileno(), int(size), int(offset))
                if len(files[extension]) != size:
                    raise ShardError(f"{path}: became shorter while it was in use")
        return Sample(self.keys[index], files)


class ShardWriter:
    """Writes one tar whose bytes depend on nothing but its samples.

    Used as a context manager: the tar appears under its name on a clean exit, and not at all on
    any other. Members keep the order of `Sample.files`; times and owners are zero.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.count = 0

    def __enter__(self) -> ShardWriter:
        self._replacing = replacing(self.path)
        self._tar = tarfile.open(
            fileobj=self._replacing.__enter__(), mode="w", format=tarfile.PAX_FORMAT
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._tar.close()
        self._replacing.__exit__(kind, error, trace)

    def write(self, sample: Sample) -> None:
        for extension, content in sample.files.items():
            member = tarfile.TarInfo(f"{sample.key}.{extension}")
            member.size = len(content)
            member.mode = 0o644
            self._tar.addfile(member, io.BytesIO(content))
        self.count += 1
