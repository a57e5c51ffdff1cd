"""Files of shards, local or remote: finding them, reading them, writing them whole or not at all.

Split off mas/shards.py, which is what everybody else imports.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import IO

import braceexpand
import fsspec
from fsspec.implementations.local import LocalFileSystem

from mas.errors import first_line, naming_full

CAN_SYNC = os.name != "nt"  # Windows syncs no folder, nor a file that is only read


class ShardError(ValueError):
    """A shard or folder that cannot be used as a whole; the message names it and the mend."""


class StoreError(OSError):
    """A store that cannot be reached; the message names the URL."""


def local_path(path: str) -> str | None:
    """The path in the local file system, None for a URL that lies elsewhere."""
    filesystem, inner = fsspec.core.url_to_fs(path)
    return inner if isinstance(filesystem, LocalFileSystem) else None


@contextlib.contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Makes a `StoreError` of what a store raises without a connection or an account.

    s3fs hands on botocore's errors, gcsfs those of aiohttp and google.auth.
    """
    try:
        yield
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # of whatever package
        if local_path(url) is not None:
            raise
        raise StoreError(f"{url}: cannot be reached: {first_line(error)}") from error


def write_file(path: str, content: bytes) -> None:
    """Writes all of `content` or nothing: temporary name, fsync, rename."""
    with replacing(path) as file:
        file.write(content)


def remove_temporary(path: str) -> None:
    """Removes what writers of `path` that were killed left behind. No writer may be at work."""
    local = local_path(path)
    if local is not None:
        folder, name = os.path.split(local)
        for leftover in glob.glob(f".{glob.escape(name)}.*.tmp", root_dir=folder or "."):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, leftover))


@contextlib.contextmanager
def replacing(path: str) -> Iterator[IO[bytes]]:
    """A file to write to that becomes `path` on a clean exit and vanishes on any other."""
    local = local_path(path)
    if local is None:  # object stores show a file only once it is closed; fill a local one first
        with tempfile.TemporaryFile() as spool:
            yield spool
            spool.seek(0)
            with store_errors(path), fsspec.open(path, "wb") as target:
                shutil.copyfileobj(spool, target, 2**20)
        return
    with replacing_path(local) as temporary, open(temporary, "xb") as file:
        yield file


@contextlib.contextmanager
def replacing_path(path: str) -> Iterator[str]:
    """A name for a local file that becomes `path` on a clean exit and vanishes on any other."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with naming_full(path):
            yield temporary
            _sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, OSError) and error.filename == temporary:
            raise OSError(error.errno, error.strerror, path) from error  # the name people know
        raise
    _sync(folder or ".")  # the rename itself survives a power cut


def _sync(path: str) -> None:
    if not CAN_SYNC:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def seekable(path: str) -> Iterator[IO[bytes]]:
    """The file opened for reading at any place; a remote one is copied to a nameless local file."""
    local = local_path(path)
    if local is not None:
        with open(local, "rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as spool:
        with store_errors(path), fsspec.open(path, "rb") as source:
            shutil.copyfileobj(source, spool, 2**20)
        spool.seek(0)
        yield spool


def _name_what_it_holds(names: list[str]) -> str:
    """Of a folder without shards: what lies there instead, and what to do."""
    endings = {os.path.splitext(name)[1].lower() for name in names}
    if ".npy" in endings:
        return " but tokens: name the scene shards these were made from"
    if endings & {".jpg", ".jpeg", ".png", ".webp"}:
        return " but pictures: mas preprocess makes shards of them"
    return ""


def expand_shards(pattern: str) -> list[str]:
    """The shards a person means, sorted.

    Args:
        pattern: 'DIR/{00000..00099}.tar', a folder (its *.tar), a glob, or one tar; local or URL.

    Raises:
        ShardError: nothing is there, or some shards of a brace pattern are missing.
    """
    with store_errors(pattern):
        return _expand(pattern)


def _expand(pattern: str) -> list[str]:
    filesystem, inner = fsspec.core.url_to_fs(pattern)

    def full(path: str) -> str:
        return (
            path if isinstance(filesystem, LocalFileSystem) else filesystem.unstrip_protocol(path)
        )

    if filesystem.isfile(inner):
        return [full(inner)]
    if filesystem.isdir(inner):
        names = filesystem.ls(inner, detail=False)
        found = sorted(name for name in names if name.endswith(".tar"))
        if not found:
            raise ShardError(
                f"{pattern}: the folder holds no .tar shards{_name_what_it_holds(names)}"
            )
    elif "{" in inner:
        found = sorted(set(braceexpand.braceexpand(inner)))
        missing = [path for path in found if not filesystem.isfile(path)]
        if missing:
            raise ShardError(
                f"{pattern}: {len(missing)} of {len(found)} shards do not exist, the first is "
                f"{missing[0]}; name a folder or a glob to take what is there"
            )
    else:
        found = sorted(filesystem.glob(inner)) if any(c in inner for c in "*?[") else []
        if not found:
            raise ShardError(f"{pattern}: no such shard or folder")
    return [full(str(path)) for path in found]
