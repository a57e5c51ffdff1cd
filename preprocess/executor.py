"""Runs a worker over shard jobs, here or on Ray, and knows nothing of what the worker does.

In: jobs, a factory of workers, the output folder. Out: per shard NAME.stats.json, written last, or
NAME.error.json. Finished shards are passed over, so a run that was cut goes on where it was; a
shard that fails is tried again, then set aside while the others go on.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import resource
import socket
import time
import traceback
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from tqdm.contrib.logging import logging_redirect_tqdm

from preprocess.progress import ProgressBar
from preprocess.run_folder import ERROR, RUNNING, STATS, RunFolder, settings_hash

logger = logging.getLogger(__name__)

Report = Callable[[int], None]  # a worker tells how many more items it has seen

ATTEMPTS = 3  # a shard that failed so often is set aside
WAIT_SECONDS = (1.0, 5.0)  # before the second and the third attempt
OUTPUT_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # no shard could be written: stop


@dataclass(frozen=True)
class Job:
    """One shard to make."""

    name: str  # of the output, without ending
    source: Any  # what the worker reads
    fingerprint: str  # changes when the source does
    again: bool = False  # was made before; items dropped for a passing reason get another try


class Worker(Protocol):
    """Makes one shard, all of it or nothing, and returns its statistics."""

    def __call__(self, job: Job, report: Report) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig:
    """Where and how wide a run is; has no influence on what it writes."""

    kind: Literal["ray", "serial"] = "ray"  # serial = in this process, one shard after the other
    workers: int | None = None  # None = one a CPU of the machine or the cluster
    address: str | None = None  # of a Ray cluster, "auto" = the one this machine is in
    gpus_per_worker: float = 0.0  # may be a fraction
    networks: bool = False  # what workers run gains from a GPU
    retry_failed: bool = False  # also try shards that were set aside
    retry_rejected: bool = False  # also remake shards with items dropped for a passing reason


@dataclass
class Outcome:
    """What became of one job."""

    name: str
    stats: dict[str, Any] | None = None
    error: str = ""
    fatal: bool = False  # the other jobs would fail as well: full disk, missing weights


@dataclass
class Summary:
    """What became of a run."""

    shards: int
    done: int = 0  # in this run
    skipped: int = 0  # were done before
    failed: dict[str, str] = field(default_factory=dict)  # name -> error
    seen: int = 0  # items the workers of this run have reported
    seconds: float = 0.0  # in which they were seen

    @property
    def status(self) -> int:
        """Exit status of the command."""
        return 1 if self.failed else 0


class Runner:
    """Takes jobs one by one: marks them as running, tries, writes the evidence. One a process."""

    def __init__(
        self, factory: Callable[[], Worker], folder: RunFolder, common: Mapping[str, Any]
    ) -> None:
        self.worker = factory()
        self.folder = folder
        self.common = common  # goes into every stats.json

    def run(self, job: Job, report: Report) -> Outcome:
        """Never raises for what one shard may be the cause of."""
        report(0)
        if not job.again and (stats := self.folder.read(job.name + STATS)):
            return Outcome(job.name, stats=stats)  # made, but the word of it was lost on its way
        try:
            return self._try(job, report)
        except OSError as error:  # not even the evidence can be written
            text = f"{self.folder.path} on {socket.gethostname()}: {error.strerror or error}"
            with contextlib.suppress(OSError):
                self.folder.remove(job.name + RUNNING)
            return Outcome(job.name, error=text, fatal=True)

    def _try(self, job: Job, report: Report) -> Outcome:
        """Up to `ATTEMPTS` times.

        Raises:
            OSError: nothing can be written to the output.
        """
        mark = job.name + RUNNING
        earlier = (self.folder.read(mark) or {}).get("attempt", 0)  # cut short by a killed worker
        text, trace = f"killed its worker {earlier} times", ""
        for attempt in range(earlier + 1, ATTEMPTS + 1):
            try:
                self.folder.write(mark, _whereabouts(attempt))
                return self._make(job, report)
            except Exception as error:  # one bad shard must not end the run
                plain = isinstance(error, (ValueError, OSError))
                text, trace = str(error) if plain else repr(error), traceback.format_exc()
                if isinstance(error, OSError) and error.errno in OUTPUT_FULL:
                    raise
                if isinstance(error, ValueError):  # the data; another attempt would see the same
                    break
                if attempt < ATTEMPTS:
                    time.sleep(WAIT_SECONDS[attempt - 1])
        self.folder.write(job.name + ERROR, {"error": text, "traceback": trace})
        self.folder.remove(mark)
        return Outcome(job.name, error=text)

    def _make(self, job: Job, report: Report) -> Outcome:
        start = time.time()
        stats = {
            **self.worker(job, report),
            **self.common,
            "input": job.fingerprint,
            "started": round(start, 3),
            "finished": round(time.time(), 3),
            "host": socket.gethostname(),
            "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        }
        self.folder.write(job.name + STATS, stats)
        self.folder.remove(job.name + RUNNING, job.name + ERROR)
        return Outcome(job.name, stats=stats)


def _whereabouts(attempt: int) -> dict[str, Any]:
    """Who is at a shard, for `mas preprocess-status` and for the next attempt."""
    host, pid = socket.gethostname(), os.getpid()
    return {"attempt": attempt, "host": host, "pid": pid, "started": round(time.time(), 3)}


def execute(
    jobs: Sequence[Job],
    factory: Callable[[], Worker],
    output: str,
    *,
    command: str,
    settings: Mapping[str, Any],
    config: ExecutorConfig,
    unit: str = "photo",
    passing: Collection[str] = (),
) -> Summary:
    """Makes all shards that are not made yet.

    Args:
        jobs: each with its own name.
        factory: makes the worker in the process it works in; must pickle.
        output: folder or URL, created here.
        command: what writes here, for run.json.
        settings: everything that decides what is written; must agree with an earlier run's.
        config: where to run.
        unit: what a worker reports, for the progress bar.
        passing: reasons of `rejected` in a shard's statistics that may be gone another time.

    Raises:
        FolderError: the folder holds something else or was made with other settings.
        ShardError: a finished shard was made from another input.
        OSError: the output cannot be written to, or is full.
    """
    folder = RunFolder(output)
    folder.prepare(command, settings, shards=len(jobs))
    folder.sweep()
    summary = Summary(len(jobs))
    pending = _find_pending(jobs, folder, summary, config, passing)
    common = {"settings": settings_hash(settings), "python": platform.python_version()}
    with (
        ProgressBar(folder, len(jobs), unit=unit, failed=len(summary.failed)) as bar,
        contextlib.closing(_outcomes(pending, factory, folder, common, config, bar)) as outcomes,
        logging_redirect_tqdm(),
    ):
        bar.skip(summary.skipped)
        for outcome in outcomes:
            if outcome.fatal:
                raise OSError(f"{outcome.error}; finished shards are kept: mend it and run again")
            if outcome.error:
                summary.failed[outcome.name] = outcome.error
                logger.error("shard %s failed: %s", outcome.name, outcome.error)
            else:
                summary.done += 1
                _warn_of_rejects(outcome)
            bar.shard_done(failed=bool(outcome.error))
        summary.seconds, summary.seen = bar.seconds, bar.items
    folder.sweep()  # what workers left behind that were killed for good
    return summary


def _warn_of_rejects(outcome: Outcome) -> None:
    """A shard without one good sample mostly means settings that do not fit the data."""
    stats = outcome.stats or {}
    rejected = stats.get("rejected", {})
    if rejected and not stats.get("photos_out"):
        reasons = ", ".join(f"{reason} {count}" for reason, count in rejected.items())
        logger.warning("shard %s: not one sample could be used: %s", outcome.name, reasons)


def _find_pending(
    jobs: Sequence[Job],
    folder: RunFolder,
    summary: Summary,
    config: ExecutorConfig,
    passing: Collection[str],
) -> list[Job]:
    """Jobs that are neither done nor set aside, and those to be tried again; counts the others."""
    pending = []
    present = set(folder.list_names())
    done = folder.finished({job.name: job.fingerprint for job in jobs})
    for job in jobs:
        if job.name in done:
            if config.retry_rejected and set(passing) & set(done[job.name].get("rejected", {})):
                pending.append(replace(job, again=True))
            else:
                summary.skipped += 1
        elif job.name + ERROR in present and not config.retry_failed:
            summary.failed[job.name] = (folder.read(job.name + ERROR) or {}).get("error", "")
        else:
            pending.append(job)
    return pending


def _outcomes(
    jobs: Sequence[Job],
    factory: Callable[[], Worker],
    folder: RunFolder,
    common: Mapping[str, Any],
    config: ExecutorConfig,
    bar: ProgressBar,
) -> Generator[Outcome, None, None]:
    if not jobs:
        return
    if config.kind == "serial" or config.workers == 0:
        runner = Runner(factory, folder, common)
        for job in jobs:
            yield runner.run(job, bar.add)
        return
    from preprocess.ray_executor import run_on_ray  # a serial run needs no Ray

    yield from run_on_ray(jobs, factory, folder, common, config, bar)
