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
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from tqdm.contrib.logging import logging_redirect_tqdm

from preprocess.needs import EXTRA, has_module, require
from preprocess.progress import ProgressBar
from preprocess.run_folder import ERROR, RUNNING, STATS, RunFolder, settings_hash
from preprocess.termination import terminated_in_order

logger = logging.getLogger(__name__)

Report = Callable[[int], None]  # a worker tells how many more items it has seen

ATTEMPTS = 3  # a shard that failed so often is set aside
WAIT_SECONDS = (1.0, 5.0)  # before the second and the third attempt
# So many shards that failed, none for its data, before any is made: no other would do better. Where
# more workers are at work, as many as they are, for what is good takes longer than what fails.
TROUBLED = 5
OUTPUT_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # no shard could be written: stop


@dataclass(frozen=True)
class Job:
    """One shard to make."""

    name: str  # of the output, without ending
    source: Any  # what the worker reads
    fingerprint: str  # changes when the source does
    modified: float = 0.0  # when the source was written last, seconds since 1970; 0 = not known
    again: bool = False  # was made before; items dropped for a passing reason get another try


class Worker(Protocol):
    """Makes one shard, all of it or nothing, and returns its statistics."""

    def __call__(self, job: Job, report: Report) -> dict[str, Any]: ...


def check_numbers(config: Any, **least: int) -> None:
    """Raises ValueError for the first number of a config below its least; None is no number."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            raise ValueError(f"{name} must be at least {bound}, got {value}")


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

    @property
    def serial(self) -> bool:
        """Whether this process does all the work."""
        return self.kind == "serial" or self.workers == 0

    @property
    def here(self) -> bool:
        """Whether all workers run on this machine."""
        return self.serial or self.address in (None, "local")


@dataclass
class Outcome:
    """What became of one job."""

    name: str
    stats: dict[str, Any] | None = None
    error: str = ""
    host: str = ""  # where it failed, unless the data were the cause
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
        leave: Callable[[], Any] | None = None,
    ) -> None:
        """Makes the worker.

        Args:
            factory: makes it, once more after each such error.
            folder: of the evidence.
            common: goes into every stats.json.
            leave: ends this process, after which the next attempt is another one's; None = all
                attempts are made here.
        """
        self.factory = factory
        self.worker: Worker | None = factory()
        self.folder = folder
        self.common = common
        self.leave = leave

    def run(self, job: Job, report: Report) -> Outcome:
        """Never raises for what one shard may be the cause of."""
        if self.worker is None and self.leave:
            self.leave()
        report(0)
        if not job.again and (stats := self.folder.read(job.name + STATS)):
            return Outcome(job.name, stats=stats)  # made, but the word of it was lost on its way
        try:
            return self._try(job, report)
        except StartError as error:
            return Outcome(job.name, error=str(error), fatal=True)
        except OSError as error:  # not even the evidence can be written
            text = f"{self.folder.path} on {socket.gethostname()}: {error.strerror or error}"
            with contextlib.suppress(OSError):
                self.folder.remove(job.name + RUNNING)
            return Outcome(job.name, error=text, fatal=True)

    def _try(self, job: Job, report: Report) -> Outcome:
        """Up to `ATTEMPTS` times.

        Raises:
            OSError: nothing can be written to the output.
            StartError: the worker cannot be made again, or a package is missing.
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
                return self._make(job, report)
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
        return self._set_aside(job, text, {**mark, "traceback": trace}, host=mark["host"])

    def _renew_worker(self) -> None:
        try:
            self.worker = self.worker or self.factory()
        except Exception as error:  # what the worker has lost, no shard is the cause of
            raise StartError(f"{socket.gethostname()}: {error}") from error

    def _wait_for(self, attempt: int, name: str, mark: Mapping[str, Any]) -> None:
        """Until the attempt after this one may be made, by another process where there is one."""
        time.sleep(WAIT_SECONDS[attempt - 1])
        if self.leave:
            self.folder.write(name, mark)
            self.leave()

    def _set_aside(self, job: Job, text: str, evidence: dict[str, Any], *, host: str) -> Outcome:
        self.folder.write(job.name + ERROR, {"error": text, **evidence})
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
            "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        }
        self.folder.write(job.name + STATS, stats)
        self.folder.remove(job.name + RUNNING, job.name + ERROR)
        return Outcome(job.name, stats=stats)


def _whereabouts() -> dict[str, Any]:
    """Who is at a shard, for `mas preprocess-status` and for the record of a failure."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": round(time.time(), 3),
    }


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
    lacks: Callable[[], list[str]] = list,
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
        lacks: tells what a worker would miss on this machine.

    Raises:
        NeedsError: what `lacks` names, and Ray, where it is to be used.
        FolderError: the folder holds something else or was made with other settings.
        ShardError: a finished shard was made from another input.
        OSError: the output cannot be written to, is full, or is not the one that the workers see.
    """
    folder = RunFolder(output)
    with folder.prepared(command, settings, shards=len(jobs)), terminated_in_order():
        folder.sweep()
        summary = Summary(len(jobs))
        common = {"settings": settings_hash(settings), "python": platform.python_version()}
        try:
            with ProgressBar(folder, len(jobs), unit=unit) as bar, logging_redirect_tqdm():
                pending = _find_pending(jobs, folder, summary, config, passing)
                bar.skip(summary.skipped, failed=len(summary.failed))
                _check_machine(pending, config, lacks)
                with contextlib.closing(
                    _outcomes(pending, factory, folder, common, config, bar)
                ) as outcomes:
                    made = _take_in(outcomes, summary, bar)
        finally:
            with contextlib.suppress(OSError):  # the output may be what broke
                folder.sweep()  # what workers left behind that were killed for good, or stopped
    _check_visible(made, folder)
    return summary


def _check_machine(
    pending: Sequence[Job], config: ExecutorConfig, lacks: Callable[[], list[str]]
) -> None:
    """Before Ray starts; of workers on a cluster each finds out what its own machine lacks.

    Raises:
        NeedsError: there is work to do, and something that it needs is missing here.
    """
    if not pending:
        return
    found = lacks() if config.here else []
    if not config.serial and not all(map(has_module, ("ray", "pyarrow"))):  # Ray Data uses both
        found = [f"the executor needs ray[data]: {EXTRA}, or add --executor serial", *found]
    require(found)


def _take_in(outcomes: Iterable[Outcome], summary: Summary, bar: ProgressBar) -> list[str]:
    """Counts and shows outcomes as they come; returns the names of the shards that were made.

    Raises:
        OSError: what one shard has met, the others would meet as well.
    """
    made: list[str] = []
    troubled = 0
    for outcome in outcomes:
        if outcome.fatal:
            raise OSError(f"{outcome.error}; finished shards are kept: mend it and run again")
        if outcome.error:
            summary.failed[outcome.name] = outcome.error
            where = f" (on {outcome.host})" if outcome.host else ""
            logger.error("shard %s failed: %s%s", outcome.name, outcome.error, where)
            troubled += bool(outcome.host)
            left = summary.shards - summary.skipped - len(summary.failed)
            if troubled == max(TROUBLED, bar.workers) and left and not made:
                raise OSError(
                    f"{troubled} shards failed and none was made; it is not their data, the last "
                    f"one says: {outcome.error}{where}; mend it, then add --retry-failed"
                )
        else:
            summary.done += 1
            made.append(outcome.name)
            _warn_of_rejects(outcome)
        bar.shard_done(failed=bool(outcome.error))
    summary.seconds, summary.seen = bar.seconds, bar.items
    return made


def _check_visible(made: Sequence[str], folder: RunFolder) -> None:
    """Workers on other machines may have written to disks of their own."""
    present = set(folder.list_names())
    missing = [name for name in made if name + STATS not in present]
    found = folder.read_all([name + STATS for name in missing])  # NFS may list an older state
    missing = [name for name, stats in zip(missing, found, strict=True) if stats is None]
    if missing:
        raise OSError(
            f"{folder.path}: {len(missing)} of {len(made)} shards that were made are not to be "
            f"seen on {socket.gethostname()}, the first is {missing[0]}; is the output on a disk "
            "that every node sees?"
        )


def _warn_of_rejects(outcome: Outcome) -> None:
    """A shard without one good sample mostly means settings that do not fit the data.

    One without any sample is what img2dataset writes where no download was successful.
    """
    stats = outcome.stats or {}
    rejected = stats.get("rejected", {})
    if rejected and not stats.get("photos_out"):
        reasons = ", ".join(f"{reason} {count}" for reason, count in rejected.items())
        logger.warning("shard %s: not one sample could be used: %s", outcome.name, reasons)
    elif stats.get("photos_in") == 0:
        logger.warning("shard %s: holds no samples", outcome.name)


def _warn_of_later_inputs(jobs: Sequence[Job], done: Mapping[str, Mapping[str, Any]]) -> None:
    """A fingerprint tells no change that leaves the size; a time changes with a mere copy, too."""
    later = [job.name for job in jobs if job.modified > done[job.name].get("finished", 0.0)]
    if later:
        logger.warning(
            "%d finished shards have an input that was written after they were made, the first is "
            "%s; they are kept, for it may be a copy. If it is another content of the same size, "
            "remove %s%s and the like and give the command again",
            *(len(later), later[0], later[0], STATS),
        )


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
    _warn_of_later_inputs([job for job in jobs if job.name in done], done)
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
    if config.serial:
        runner = Runner(factory, folder, common)
        for job in jobs:
            yield runner.run(job, bar.add)
        return
    from preprocess.ray_executor import run_on_ray  # a serial run needs no Ray

    yield from run_on_ray(jobs, factory, folder, common, config, bar)
