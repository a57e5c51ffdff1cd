"""Makes shards one by one in one process: marks, attempts, evidence; knows nothing of the content.

In: jobs, a factory of workers, the output folder. Out: per shard NAME.stats.json, written last, or
NAME.error.json, and an `Outcome` for whoever runs many of these (preprocess/executor.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from mas.errors import first_line
from mas.machine import peak_rss_mb
from preprocess.needs import tell
from preprocess.run_folder import ERROR, RUNNING, STATS, RunFolder

Report = Callable[[int], None]  # a worker tells how many more items it has seen

ATTEMPTS = 3  # a shard that failed so often is set aside
WAIT_SECONDS = (1.0, 5.0)  # before the second and the third attempt
START_SECONDS = (5.0, 30.0)  # before the second and the third try to make a worker
OUTPUT_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # no shard could be written: stop


@dataclass(frozen=True)
class Job:
    """One shard to make."""

    name: str  # of the output, without ending
    source: Any  # what the worker reads
    fingerprint: str  # changes when the source does
    modified: float = 0.0  # when the source was written last, seconds since 1970; 0 = not known
    again: bool = False  # was made before; items dropped for a passing reason get another try
    anew: bool = False  # … and the source has changed since: so do all others
    attempt: int = 1  # above 1, one that was killed may have left half-written files


class Worker(Protocol):
    """Makes one shard, all of it or nothing, and returns its statistics."""

    def __call__(self, job: Job, report: Report) -> dict[str, Any]: ...


@dataclass
class Outcome:
    """What became of one job."""

    name: str
    stats: dict[str, Any] | None = None
    error: str = ""
    host: str = ""  # where it failed, unless the data were the cause
    fatal: bool = False  # the other jobs would fail as well: full disk, missing weights
    here: bool = False  # … though perhaps on this machine alone


class StartError(Exception):
    """A worker that cannot be made again; the message names the machine and the reason."""


class Runner:
    """Takes jobs one by one: marks them as running, tries, writes the evidence. One a process.

    A worker that has met an error which is not the data's is not used again: what its process has
    lost, a GPU or a mount, it would lack for every shard to come.
    """

    def __init__(
        self,
        factory: Callable[[], Worker],
        folder: RunFolder,
        common: Mapping[str, Any],
        *,
        lacks: Callable[[], list[str]] = list,
        leave: Callable[[], Any] | None = None,
    ) -> None:
        """Makes the worker.

        Args:
            factory: makes it, once more after each such error.
            folder: of the evidence.
            common: goes into every stats.json and error.json.
            lacks: tells what a worker would miss on this machine.
            leave: ends this process, after which the next attempt is another one's; None = all
                attempts are made here.
        """
        self.factory = factory
        self.folder = folder
        self.common = common
        self.lacks = lacks
        self.leave = leave
        self.worker: Worker | None = self._make_worker()

    def run(self, job: Job, report: Report) -> Outcome:
        """Never raises for what one shard may be the cause of."""
        if self.worker is None and self.leave:
            self.leave()
        report(0)
        try:
            if not job.again and (stats := self.folder.read(job.name + STATS)):
                return Outcome(job.name, stats=stats)  # made, but word of it was lost on its way
            return self._try(job, report)
        except StartError as error:
            return self._give_up(job, str(error), here=True)
        except OSError as error:  # the evidence can be neither read nor written
            text = f"{self.folder.path} on {socket.gethostname()}: {error.strerror or error}"
            return self._give_up(job, text, here=error.errno not in OUTPUT_FULL)

    def _give_up(self, job: Job, text: str, *, here: bool) -> Outcome:
        with contextlib.suppress(OSError):  # the shard was not the cause: no attempt
            self.folder.remove(job.name + RUNNING)
        if here:
            mark_waiting(self.folder, job.name)
        return Outcome(job.name, error=text, fatal=True, here=here)

    def _try(self, job: Job, report: Report) -> Outcome:
        """Up to `ATTEMPTS` times.

        Raises:
            OSError: nothing can be written to the output.
            StartError: the worker cannot be made again, or something is missing on this machine.
        """
        name = job.name + RUNNING
        mark = self.folder.read(name) or {"attempt": 0}  # of an attempt in another process
        errors: list[dict[str, Any]] = mark.get("errors", [])
        text, trace = f"killed its worker {mark['attempt'] - len(errors)} times", ""
        for attempt in range(mark["attempt"] + 1, ATTEMPTS + 1):
            self._renew_worker()
            try:
                mark = {"attempt": attempt, **_whereabouts(), "errors": errors}
                self.folder.write(name, mark)
                return self._make(replace(job, attempt=attempt), report)
            except Exception as error:  # one bad shard must not end the run
                plain = isinstance(error, (ValueError, OSError))
                text, trace = str(error) if plain else repr(error), traceback.format_exc()
                if isinstance(error, OSError) and error.errno in OUTPUT_FULL:
                    raise
                if isinstance(error, ImportError):  # of this machine, whatever the shard
                    raise StartError(f"{mark['host']}: {error}") from error
                if isinstance(error, ValueError):  # the data; another attempt would see the same
                    return self._set_aside(job, text, {**mark, "traceback": trace}, host="")
                errors.append({"host": mark["host"], "pid": mark["pid"], "error": text})
                self.worker = None
            if attempt < ATTEMPTS:
                self._wait_for(attempt, name, mark)
        if errors and (lacking := self.lacks()):  # a mount has gone: of this machine again
            raise StartError(f"{socket.gethostname()}: {tell(lacking)}")
        return self._set_aside(job, text, {**mark, "traceback": trace}, host=mark["host"])

    def _make_worker(self) -> Worker:
        """Makes the worker; in a process of its own tries again after errors that may pass.

        The process before may not have released the GPU's memory yet, or a mount may not answer.
        Errors of our own (ValueError, OSError without a number) will not pass.
        """
        for wait in START_SECONDS if self.leave else ():
            try:
                return self.factory()
            except (ValueError, ImportError):
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.errno is None:
                    raise
                time.sleep(wait)
        return self.factory()

    def _renew_worker(self) -> None:
        try:
            self.worker = self.worker or self._make_worker()
        except Exception as error:  # of this machine: no shard is the cause
            raise StartError(f"{socket.gethostname()}: {say(error)}") from error

    def _wait_for(self, attempt: int, name: str, mark: Mapping[str, Any]) -> None:
        """Until the attempt after this one may be made, by another process where there is one."""
        time.sleep(WAIT_SECONDS[attempt - 1])
        if self.leave:
            self.folder.write(name, mark)
            self.leave()

    def _set_aside(self, job: Job, text: str, evidence: dict[str, Any], *, host: str) -> Outcome:
        made_with = {**self.common, "input": job.fingerprint}
        self.folder.write(job.name + ERROR, {"error": text, **evidence, **made_with})
        self.folder.remove(job.name + RUNNING)
        return Outcome(job.name, error=text, host=host)

    def _make(self, job: Job, report: Report) -> Outcome:
        assert self.worker is not None
        start = time.time()
        stats = {
            **self.worker(job, report),
            **self.common,
            "input": job.fingerprint,
            "started": round(start, 3),
            "finished": round(time.time(), 3),
            "host": socket.gethostname(),
            "peak_mb": round(peak_rss_mb(), 1),
        }
        self.folder.write(job.name + STATS, stats)
        self.folder.remove(job.name + RUNNING, job.name + ERROR)
        return Outcome(job.name, stats=stats)


def mark_waiting(folder: RunFolder, name: str) -> None:
    """Says that a shard waits for another machine; what was tried on it before is kept."""
    with contextlib.suppress(OSError):
        mark = folder.read(name + RUNNING) or {"attempt": 0, "errors": []}
        folder.write(name + RUNNING, {**mark, **_whereabouts(), "waiting": True})


def say(error: BaseException) -> str:
    """One line of an error, with its kind where the words may not tell it."""
    plain = isinstance(error, (ValueError, OSError, ImportError))
    line, kind = first_line(error), type(error).__name__
    return line if plain or line == kind else f"{kind}: {line}"


def _whereabouts() -> dict[str, Any]:
    """Who is at a shard, for `mas preprocess-status` and for the record of a failure."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": round(time.time(), 3),
    }
