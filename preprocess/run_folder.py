"""The output folder of a run: what is done, running or failed is read from the files in it.

`run.json` tells what the folder is and how it was made; per shard NAME.running.json while a worker
is at it, NAME.stats.json when all of it is written, NAME.error.json when it failed;
`progress.json` is the driver's heartbeat, `lock.json` keeps others out before its first beat, and
`summary.json` is its last word. Local path or fsspec URL.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec

from mas.shards import ShardError, local_path, store_errors, write_file

logger = logging.getLogger(__name__)

RUN, PROGRESS, SUMMARY, LOCK = "run.json", "progress.json", "summary.json", "lock.json"
HISTOGRAM = "classes.png"
LATER = "later_inputs"  # in run.json: shard -> time of an input written after it, as was told
STATS, ERROR, RUNNING = ".stats.json", ".error.json", ".running.json"
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # the names `mas.shards` writes under

READERS = 16  # files read at the same time
READ_AHEAD = 256  # files
KEPT = ("finished", "rejected")  # what a run wants to know of a shard that is done
CHANGED = "changed"  # and whether its input is another one by now
ALIVE_SECONDS = 60.0  # a run whose heartbeat is older has stopped
FOREIGN_SECONDS = 20.0  # the same where its process cannot be looked up: on another machine
LISTEN_SECONDS = 12.0  # in which a run at work gives another heartbeat, whatever its clock says


class FolderError(ValueError):
    """An output folder that cannot take this run."""


class OtherSettingsError(FolderError):
    """An output folder whose shards were made with other settings; `key` names one of them."""

    def __init__(self, message: str, *, key: str) -> None:
        super().__init__(message)
        self.key = key


class ReadOnlyError(OSError):
    """An output folder that can be read and not written to; the message names it."""


class RunFolder:
    """Reads and writes the evidence of one run; cheap to pickle."""

    def __init__(self, path: str) -> None:
        self.path = path.rstrip("/") or path

    def file(self, name: str) -> str:
        return f"{self.path}/{name}"

    def list_names(self) -> list[str]:
        """Names of everything in the folder, sorted; empty where there is no folder."""
        with store_errors(self.path):
            filesystem, inner = fsspec.core.url_to_fs(self.path)
            filesystem.invalidate_cache(inner)
            if not filesystem.isdir(inner):
                return []
            entries = filesystem.ls(inner, False)
        names = (entry.rstrip("/").rpartition("/")[2] for entry in entries)
        return sorted(name for name in names if name)

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, None where it is missing.

        Raises:
            FolderError: it is there and is no JSON object.
        """
        try:
            with store_errors(self.path), fsspec.open(self.file(name), "rb") as file:
                text = file.read()
            content = json.loads(text)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise FolderError(f"{self.file(name)}: not readable ({error}); remove it") from error
        if not isinstance(content, dict):
            raise FolderError(f"{self.file(name)}: not a JSON object; remove it")
        return content

    def read_all(self, names: Sequence[str]) -> Iterator[dict[str, Any] | None]:
        """Many JSON files, some together: an object store takes its time over each.

        No more than `READ_AHEAD` are held, for the statistics of a shard may take 40 kB of memory.
        """
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(names), READ_AHEAD):
                yield from pool.map(self.read, names[start : start + READ_AHEAD])

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=1, ensure_ascii=False)
        write_file(self.file(name), (text + "\n").encode("utf-8", "backslashreplace"))

    def update(self, name: str, content: Mapping[str, Any]) -> bool:
        """Writes unless the file says so already; whether it did not.

        So a finished folder may be read-only.
        """
        with contextlib.suppress(FolderError):
            if self.read(name) == content:
                return False
        self.write(name, content)
        return True

    def remove(self, *names: str) -> None:
        """Removes files that may be there; half-written ones under other names are for `sweep`."""
        filesystem, inner = fsspec.core.url_to_fs(self.path)
        for name in names:
            with contextlib.suppress(FileNotFoundError), store_errors(self.path):
                filesystem.rm_file(f"{inner}/{name}")

    @contextlib.contextmanager
    def prepared(self, command: str, settings: Mapping[str, Any], *, shards: int) -> Iterator[None]:
        """Creates the folder, or makes sure that what is in it was made the same way.

        No other run works on it until the end of the `with`. (A store has no lock: there, one that
        is started in the same second is not noticed.)

        Args:
            command: what writes here, as in `preprocess`.
            settings: everything that decides what is written, JSON-able, nested.
            shards: how many there will be.

        Raises:
            FolderError: the folder holds something else, or another run is at work on it.
            OtherSettingsError: it holds shards made with other settings.
            ReadOnlyError: it cannot be written to.
        """
        self._check_content(command, settings)
        self._check_alone(self.read(PROGRESS), listening=True)
        filesystem, inner = fsspec.core.url_to_fs(self.path)
        with self._written_to():
            filesystem.makedirs(inner, exist_ok=True)
        with self._locked():
            self._check_alone(self.read(PROGRESS))
            self._check_content(command, settings)  # another run may have come in between
            content = {"command": command, "settings": settings, "shards": shards}
            with self._written_to():
                self.write(RUN, {**(self.read(RUN) or {}), **content, "started": time.time()})
            yield

    @contextlib.contextmanager
    def _written_to(self) -> Iterator[None]:
        """Tells a folder that is read-only from one that is full or broken."""
        try:
            yield
        except OSError as error:
            if isinstance(error, PermissionError) or error.errno == errno.EROFS:
                raise ReadOnlyError(
                    f"{self.path}: cannot be written to ({error.strerror or error})"
                ) from error
            raise

    def _check_content(self, command: str, settings: Mapping[str, Any]) -> None:
        # Names first: another run that begins in between has then written its run.json, too.
        names = [n for n in self.list_names() if n != LOCK and not n.startswith(f".{RUN}.")]
        run = self.read(RUN)
        if run is None and names:
            listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            raise FolderError(
                f"{self.path}: holds something else ({listed}); choose an empty --output folder"
            )
        if run is not None and any(name.endswith(STATS) for name in names):
            self._compare(run, command, json.loads(json.dumps(settings)))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds `lock.json`, which no two runs can create."""
        path = local_path(self.file(LOCK))
        if path is None:
            yield
            return
        mine = {"updated": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        with self._written_to():
            self._take(path, mine)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the output may be what broke
                if self._read_lock(path) == mine:
                    os.remove(path)

    def _take(self, path: str, mine: Mapping[str, Any]) -> None:
        while True:
            try:
                with open(path, "x") as file:
                    file.write(json.dumps(mine))
                return
            except FileExistsError:
                with contextlib.suppress(FileNotFoundError):  # let go of at this moment
                    held = self._read_lock(path)
                    self._check_alone(held)
                    self._remove_stale(path, held)
            except OSError:
                with contextlib.suppress(OSError):
                    os.remove(path)
                raise

    def _remove_stale(self, path: str, held: Mapping[str, Any]) -> None:
        """Removes the lock of a run that has stopped, not one that has taken it over meanwhile."""
        aside = os.path.join(os.path.dirname(path), f".{LOCK}.{uuid.uuid4().hex[:8]}.tmp")
        os.rename(path, aside)
        if self._read_lock(aside) == held:
            os.remove(aside)
        else:
            os.rename(aside, path)

    @staticmethod
    def _read_lock(path: str) -> dict[str, Any]:
        """Who holds the lock. One that is just being written has the age of its file."""
        try:
            with open(path) as file:
                return json.load(file)
        except ValueError:
            return {"updated": os.stat(path).st_mtime, "host": "", "pid": None}

    def _check_alone(self, sign: Mapping[str, Any] | None, *, listening: bool = False) -> None:
        """Two runs on one folder would remove each other's temporary files.

        Args:
            sign: of life of another run: its heartbeat or its lock.
            listening: wait for another heartbeat before an old one is taken for the last.
        """
        if sign is None or (sign["host"], sign["pid"]) == (socket.gethostname(), os.getpid()):
            return
        if is_fresh(sign) or (listening and self.is_at_work(sign)):
            age = abs(time.time() - sign["updated"])
            raise FolderError(
                f"{self.path}: another run is at work on it ({sign['host']}, process "
                f"{sign['pid']}, heard of {age if age < ALIVE_SECONDS else 0:.0f} s ago); stop "
                "that one, or wait for it"
            )

    def is_at_work(self, beat: Mapping[str, Any]) -> bool:
        """Whether the run that gave a heartbeat goes on.

        The clock of another machine may be wrong. So a heartbeat from there that is not of this
        moment, be it of the past or of the future, tells nothing: another one is waited for.
        """
        if is_fresh(beat) or beat["host"] == socket.gethostname():
            return is_fresh(beat)
        logger.info(
            "%s: the heartbeat of the run on %s is not of this moment; listening for another, %g s",
            *(self.path, beat["host"], LISTEN_SECONDS),
        )
        deadline = time.monotonic() + LISTEN_SECONDS
        while (found := self.read(PROGRESS)) == beat and time.monotonic() < deadline:
            time.sleep(LISTEN_SECONDS / 24)
        return found not in (None, beat)

    def _compare(self, run: dict[str, Any], command: str, settings: dict[str, Any]) -> None:
        if run.get("command") != command:
            raise FolderError(
                f"{self.path}: holds what mas {run.get('command')} wrote; choose another --output"
            )
        there, here = flatten(run.get("settings", {})), flatten(settings)
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                raise OtherSettingsError(
                    f"{self.path}: was made with other settings: {key} is {there.get(key)!r} there "
                    f"and {here.get(key)!r} here; choose another --output or the same settings",
                    key=key,
                )

    def finished(
        self, fingerprints: Mapping[str, str], *, mended: bool = False
    ) -> dict[str, dict[str, Any]]:
        """Of the statistics of those shards that are done `KEPT`, and `CHANGED`, by name.

        Args:
            fingerprints: of the input of each shard.
            mended: the input of one that rejected something may have changed since.

        Raises:
            ShardError: one was made from another input.
        """
        present = set(self.list_names())
        names = [name for name in fingerprints if name + STATS in present]
        done: dict[str, dict[str, Any]] = {}
        for name, stats in zip(names, self.read_all([n + STATS for n in names]), strict=True):
            if stats is None:
                continue
            done[name] = {key: stats[key] for key in KEPT if key in stats}
            if stats.get("input") == fingerprints[name]:
                continue
            if not (mended and stats.get("rejected")):
                mend = "add --retry-rejected if what it rejected was mended, "
                raise ShardError(
                    f"{self.file(name + STATS)}: the shard was made from another input "
                    f"({stats.get('input')} there, {fingerprints[name]} here); "
                    f"{mend if stats.get('rejected') else ''}remove this file to make it again, or "
                    "choose another --output; what is new is better given shards or a folder of "
                    "its own"
                )
            done[name][CHANGED] = True
        return done

    def note_later_inputs(self, times: Mapping[str, float]) -> list[str]:
        """Those of the shards that were not noted with this time of their input; notes them."""
        run = self.read(RUN) or {}
        noted = run.get(LATER, {})
        fresh = [name for name, when in times.items() if noted.get(name) != when]
        if fresh:
            with contextlib.suppress(OSError):  # where nothing can be noted, it is told again
                self.write(RUN, {**run, LATER: {**noted, **times}})
        return fresh

    def sweep(self) -> None:
        """Removes half-written files and marks of workers that were killed. None may be at work."""
        for name in self.list_names():
            if name.endswith(RUNNING) or TEMPORARY.fullmatch(name):
                self.remove(name)


def is_fresh(sign: Mapping[str, Any]) -> bool:
    """Whether a sign of life is of this moment; if given on this machine, by a process there is."""
    age = abs(time.time() - sign["updated"])
    if sign["host"] == socket.gethostname():
        return age < ALIVE_SECONDS and exists(sign["pid"])
    return age < FOREIGN_SECONDS  # its clock may be ahead


def exists(pid: int) -> bool:
    """Whether this machine has such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Sixteen hex digits that change with any setting."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
