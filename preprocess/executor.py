"""Runs a worker over shard jobs, here or on Ray, and knows nothing of what the worker does.

In: jobs, a factory of workers, the output folder. Out: per shard NAME.stats.json, written last, or
NAME.error.json. Finished shards are passed over, so a run that was cut goes on where it was; a
shard that fails is tried again, then set aside while the others go on.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import socket
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from tqdm.contrib.logging import logging_redirect_tqdm

from preprocess.needs import EXTRA, has_module, require
from preprocess.progress import ProgressBar
from preprocess.run_folder import CHANGED, ERROR, STATS, ReadOnlyError, RunFolder, settings_hash
from preprocess.runner import Job, Outcome, Runner, Worker
from preprocess.termination import terminated_in_order

logger = logging.getLogger(__name__)

# When so many shards have failed, none because of its data, and none has been made, the run ends.
# With more workers than that it takes as many failures as workers: failing is quicker than making.
TROUBLED = 5


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
    workers: int | None = None  # None = as many as the CPUs and GPUs that Ray sees allow
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
    mended: Callable[[Job], None] | None = None,
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
        mended: raises ShardError where a shard that has dropped items may not be made again from
            a source that was changed since; None = none may.
        lacks: tells what a worker would miss on this machine.

    Raises:
        NeedsError: what `lacks` names, and Ray, where it is to be used.
        FolderError: the folder holds something else or was made with other settings.
        ShardError: a finished shard was made from another input.
        OSError: the output cannot be written to, is full, or is not the one that the workers see.
    """
    folder, summary = RunFolder(output), Summary(len(jobs))
    with contextlib.ExitStack() as stack:
        find_pending = partial(
            _find_pending, jobs, folder, summary, config, passing, mended, settings
        )
        try:
            stack.enter_context(folder.prepared(command, settings, shards=len(jobs)))
        except ReadOnlyError as error:
            _check_nothing_left(find_pending(), jobs, error)
            return summary
        stack.enter_context(terminated_in_order())
        stack.enter_context(_swept(folder))
        bar = stack.enter_context(ProgressBar(folder, len(jobs), unit=unit))
        stack.enter_context(logging_redirect_tqdm())
        pending = find_pending()
        bar.skip(summary.skipped, failed=len(summary.failed))
        _check_machine(pending, config, lacks)
        common = {"settings": settings_hash(settings), "python": platform.python_version()}
        make_runner = partial(Runner, factory, folder, common, lacks=lacks)
        outcomes = _outcomes(pending, make_runner, config, bar, lacks)
        made = _take_in(stack.enter_context(contextlib.closing(outcomes)), summary, bar)
    _check_visible(made, folder)
    return summary


@contextlib.contextmanager
def _swept(folder: RunFolder) -> Iterator[None]:
    """Removes what workers left behind that were killed for good: an earlier run's, then ours."""
    folder.sweep()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the output may be what broke
            folder.sweep()


def _check_nothing_left(pending: Sequence[Job], jobs: Sequence[Job], error: ReadOnlyError) -> None:
    """An output that is only read, as an archive, may be looked at by the command that made it."""
    if pending:
        raise OSError(
            f"{error}, and {len(pending)} of {len(jobs)} shards are still to be made; make it "
            "writable, or choose another --output"
        ) from error
    logger.info("%s; nothing is left to be made", error)


def _check_machine(
    pending: Sequence[Job], config: ExecutorConfig, lacks: Callable[[], list[str]]
) -> None:
    """Looks before Ray starts; on a cluster each node finds out later what it lacks itself.

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
            if troubled >= max(TROUBLED, bar.workers) and left and not made:
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


def _warn_of_later_inputs(
    jobs: Sequence[Job], done: Mapping[str, Mapping[str, Any]], folder: RunFolder
) -> None:
    """Warns once of inputs that are newer than their finished shards.

    A fingerprint does not show a change that keeps the size, and a time also changes when a file
    is copied. So nothing is made again; what was said is noted, so that the next run is silent.
    """
    finished = {job.name: done[job.name].get("finished", 0.0) for job in jobs}
    times = {job.name: job.modified for job in jobs if job.modified > finished[job.name]}
    later = folder.note_later_inputs(times)
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
    mended: Callable[[Job], None] | None,
    settings: Mapping[str, Any],
) -> list[Job]:
    """Jobs that are neither done nor set aside, and those to be tried again; counts the others.

    A shard that was set aside with other settings or another input gets its first try with these.
    """
    pending, first_tries = [], 0
    made_with = {"settings": settings_hash(settings)}
    present = set(folder.list_names())
    retry = config.retry_rejected
    fingerprints = {job.name: job.fingerprint for job in jobs}
    done = folder.finished(fingerprints, mended=retry and mended is not None)
    kept = [job for job in jobs if job.name in done and CHANGED not in done[job.name]]
    _warn_of_later_inputs(kept, done, folder)
    for job in jobs:
        if job.name in done:
            if mended and CHANGED in done[job.name]:
                mended(job)
                pending.append(replace(job, again=True, anew=True))
            elif retry and set(passing) & set(done[job.name].get("rejected", {})):
                pending.append(replace(job, again=True))
            else:
                summary.skipped += 1
        elif job.name + ERROR in present and not config.retry_failed:
            record = folder.read(job.name + ERROR) or {}
            if _is_as_recorded(record, {**made_with, "input": job.fingerprint}):
                summary.failed[job.name] = record.get("error", "")
            else:
                first_tries += 1
                pending.append(job)
        else:
            pending.append(job)
    if first_tries:
        logger.info(
            "%d shards that failed with other settings or input are tried again", first_tries
        )
    return pending


def _is_as_recorded(record: Mapping[str, Any], made_with: Mapping[str, Any]) -> bool:
    """Whether a failure was met with these; older versions did not record with what it was."""
    return all(record.get(key, value) == value for key, value in made_with.items())


def _outcomes(
    jobs: Sequence[Job],
    make_runner: Callable[..., Runner],
    config: ExecutorConfig,
    bar: ProgressBar,
    lacks: Callable[[], list[str]],
) -> Generator[Outcome, None, None]:
    if not jobs:
        return
    if config.serial:
        runner = make_runner()
        for job in jobs:
            yield runner.run(job, bar.add)
        return
    from preprocess.ray_executor import run_on_ray  # a serial run needs no Ray

    yield from run_on_ray(jobs, make_runner, config, bar, lacks=lacks)
