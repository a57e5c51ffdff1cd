"""The Ray half of the executor: Ray Data over an actor pool, one shard = one row.

Each actor holds one worker and writes its shards itself; only outcomes come back. An actor that is
killed is started again by Ray and its shard with it; what was half written has a temporary name.
One that has met an error which is not the data's leaves, so that a fresh process makes the next
attempt. One that cannot work where it is keeps its shard while others are at work; then that is
made on other nodes.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import re
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from mas.errors import first_line
from preprocess.executor import ExecutorConfig
from preprocess.needs import EXTRA, NeedsError
from preprocess.progress import ProgressBar
from preprocess.ray_counter import Beat, Counter, sit_out
from preprocess.ray_nodes import LEFT_OUT, Nodes, find_fit_nodes, find_unlike
from preprocess.ray_start import REACH_SECONDS, TOKEN_MEND, silence, start_ray
from preprocess.run_folder import RunFolder
from preprocess.runner import Job, Outcome, Runner, mark_waiting, say
from preprocess.termination import catch_sigterm
from preprocess.weights import FOLDER_VARIABLE

logger = logging.getLogger(__name__)

START_SECONDS = 30.0  # without a worker; then a line says so
PROCESSES = 3  # of a worker that are killed while it is made, as by the OOM killer


class _Head:
    """Warns when the head node has gone: Ray then ends the driver's process without a word."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.next_look = time.monotonic() + REACH_SECONDS
        self.answered = True

    def look(self) -> None:
        if time.monotonic() < self.next_look:
            return
        answers = silence(self.address) is None
        if self.answered and not answers:
            logger.warning(
                "the head node of Ray, %s, does not answer; if it has gone, this command ends "
                "within a minute: then give it again",
                self.address,
            )
        self.answered = answers
        self.next_look = time.monotonic() + REACH_SECONDS


class _Watch:
    """Asks a counter for the progress bar; warns when no worker comes up, or nodes or the head go.

    Args:
        counter: handle of a `Counter`.
        config: of the run.
    """

    def __init__(self, counter: Any, config: ExecutorConfig) -> None:
        import ray

        self.counter = counter
        self.config = config
        self.failed: dict[str, str] = {}  # nodes, by id, on which a worker could not be made: why
        self.deadline = time.monotonic() + START_SECONDS
        self.head = _Head(ray.get_runtime_context().gcs_address)

    def pull(self) -> int | None:
        import ray

        self.head.look()
        if not ray.is_initialized():  # it would start another one
            return None
        try:
            items, started, failed = ray.get(self.counter.take.remote())
        except ray.exceptions.RayError:  # its process was killed: only the rate suffers
            return None
        known = set(self.failed.values())
        for line in dict.fromkeys(line for line in failed.values() if line not in known):
            logger.warning("%s: %s", LEFT_OUT, line)
        self.failed |= failed
        if started:
            self.deadline = math.inf
        if time.monotonic() > self.deadline:
            self.deadline = math.inf
            logger.warning(
                "no worker has started after %g s; each waits for a free CPU and %g GPUs",
                START_SECONDS,
                self.config.gpus_per_worker,
            )
        return items


class _RayRunner:
    """A `Runner` in the shape Ray Data wants: a batch of one pickled job in, one outcome out.

    The worker is made with the first job: an actor that cannot be constructed gives pages of
    traces, an outcome one line.
    """

    def __init__(
        self, make_runner: Callable[..., Runner], folder: RunFolder, counter: Any, alone: bool
    ) -> None:
        import ray

        self.make_runner = partial(make_runner, leave=_leave)
        self.folder = folder
        self.runner: Runner | None = None
        self.unable = ""  # why it cannot work where it is
        self.counter = counter
        self.alone = alone  # on the only machine: what cannot work here works nowhere
        self.name = str(ray.get_runtime_context().get_actor_id())
        self.beat = Beat(counter, self.name)
        counter.start.remote()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        (content,) = batch["job"]
        job = pickle.loads(content)
        self.beat.at_work = True
        outcome = self._run(job)
        self.beat.at_work = False
        if outcome.here and not self.alone:
            self.unable = outcome.error
            sit_out(outcome, self.counter)
        else:
            self.counter.settle.remote(self.name, job.name)
        return {"outcome": [pickle.dumps(outcome)]}

    def _run(self, job: Job) -> Outcome:
        if self.unable:
            return self._pass_on(job, self.unable)
        try:
            self.runner = self.runner or self._make_runner()
        except Exception as error:  # missing weights or packages, on this machine
            return self._pass_on(job, f"{socket.gethostname()}: {say(error)}")
        return self.runner.run(job, partial(self.counter.add.remote, self.name))

    def _pass_on(self, job: Job, reason: str) -> Outcome:
        """Leaves a job to other machines."""
        mark_waiting(self.folder, job.name)
        return Outcome(job.name, error=reason, fatal=True, here=True)

    def _make_runner(self) -> Runner:
        """Raises whatever the worker raises, and OSError after `PROCESSES` that did not live."""
        import ray

        processes = 1
        with contextlib.suppress(ray.exceptions.RayError):  # the counter is being started again
            processes = ray.get(self.counter.begin.remote(self.name))
        if processes > PROCESSES:
            raise OSError(f"{PROCESSES} processes were killed while they made a worker")
        runner = self.make_runner()
        self.counter.ready.remote(self.name)
        return runner


def _leave() -> None:
    """Ends the actor's process; Ray starts another one, perhaps elsewhere, with the same shard.

    Ray takes an orderly exit for an intended one and would start no other process.
    """
    os._exit(1)


def run_on_ray(
    jobs: Sequence[Job],
    make_runner: Callable[..., Runner],
    config: ExecutorConfig,
    bar: ProgressBar,
    *,
    lacks: Callable[[], list[str]],
) -> Iterator[Outcome]:
    """Yields outcomes as they come, in no order. Starts a local Ray unless there is one.

    Args:
        jobs: to be made.
        make_runner: called where a worker shall work, with `leave` for the runner.
        config: where to run.
        bar: shows how far the run is.
        lacks: tells what a worker would miss; nodes of a cluster that lack something are left out.

    Raises:
        NeedsError: all nodes lack something.
        OSError: no cluster can be joined, or Ray cannot start workers or has lost them for good, on
            all nodes.
        ValueError: GPUs are asked for that Ray does not see.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised as well
    started = not ray.is_initialized()
    try:
        if started:
            start_ray(config)
            catch_sigterm()
        yield from _Rounds(make_runner, config, bar, lacks).make(jobs)
    except ray.exceptions.RayError as error:
        raise OSError(f"{_explain(error)}; finished shards are kept") from error
    finally:
        bar.pull = lambda: None
        if started:
            ray.shutdown()


@dataclass
class _Rounds:
    """Makes jobs on all nodes that can work, then what is left on those that still can."""

    make_runner: Callable[..., Runner]
    config: ExecutorConfig
    bar: ProgressBar
    lacks: Callable[[], list[str]]
    failed: dict[str, str] = field(default_factory=dict)  # nodes, by id, that could not: why
    lacking: set[str] = field(default_factory=set)  # lines that were told
    begun: bool = False

    def make(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """One outcome of each job."""
        left = {job.name: job for job in jobs}
        made = False
        while left:
            nodes = self._choose_nodes(made=made)
            made = False
            with contextlib.closing(self._make_round(list(left.values()), nodes)) as outcomes:
                for outcome in outcomes:
                    if outcome.here and not self.config.here:  # and nobody else is at work
                        break
                    made = True
                    del left[outcome.name]
                    yield outcome

    def _make_round(self, jobs: Sequence[Job], nodes: Nodes) -> Generator[Outcome, None, None]:
        counter = _start_counter([job.name for job in jobs])
        watch = _Watch(counter, self.config)
        if not self.failed:
            _warn_of_idle_gpus(self.config, nodes.resources)
        self.bar.pull = watch.pull
        self.bar.workers = min(_count_workers(self.config, nodes.resources), len(jobs))
        arguments = self.make_runner, self.bar.folder, counter, self.config.here
        rows = _dataset(jobs, arguments, self.bar.workers, nodes.options).iter_rows()
        with contextlib.closing(iter(rows)) as outcomes:  # which ends the workers
            for row in outcomes:
                outcome = pickle.loads(row["outcome"])
                if outcome.here:  # what is known of its node comes first
                    self.bar.add(watch.pull())
                    self.failed |= watch.failed
                yield outcome
        self.bar.add(watch.pull())

    def _choose_nodes(self, *, made: bool) -> Nodes:
        """Where workers may be started, and with which options.

        Args:
            made: the round before has made something.
        """
        import ray

        options = _options(self.config)
        if self.config.here:  # the driver has looked
            return Nodes(ray.cluster_resources(), options, [])
        try:
            nodes = find_fit_nodes(self.lacks, self.bar.folder, options, self.failed)
        except NeedsError as error:
            if self.failed and made:  # a node may have lost one of its GPUs and work with others
                self.failed.clear()
                return self._choose_nodes(made=False)
            if not self.begun:
                raise
            raise OSError(f"{error}; finished shards are kept: mend it and run again") from error
        for line in nodes.lacking:
            if line not in self.lacking:
                logger.warning("%s: %s", LEFT_OUT, line)
        self.lacking |= {*nodes.lacking}
        self.begun = True
        return nodes


def _options(config: ExecutorConfig) -> dict[str, Any]:
    """What every worker is started with, of Ray's options."""
    return {"num_cpus": 1, "num_gpus": config.gpus_per_worker or None, **_handed_on(config)}


def _dataset(
    jobs: Sequence[Job], arguments: tuple[Any, ...], workers: int, options: dict[str, Any]
) -> Any:
    """One row a job, made by a pool of so many `_RayRunner`, each with these arguments.

    `options` are Ray's, of each of them.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options = ray.data.ExecutionOptions(preserve_order=False)
    context.enable_progress_bars = False
    rows = [{"job": pickle.dumps(job)} for job in jobs]
    return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _RayRunner,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        fn_constructor_args=arguments,
        **options,
    )


def _explain(error: Exception) -> str:
    """One line of the pages that Ray gives when its workers do not come up or do not come back."""
    lines = [line.strip() for line in str(error).splitlines()] or [first_line(error)]
    if found := find_unlike(error):
        node = re.search(r"\bip=([^,)\s]+)", str(error))
        return (
            f"a worker{f' on {node[1]}' if node else ''} cannot start, its machine lacks a package "
            f"or has another version of it ({found}): {EXTRA} on each node, as on this one"
        )
    if "never ran" in lines[-1]:
        return f"the cluster does not start workers ({lines[-1]}); {TOKEN_MEND}"
    return f"Ray has lost the workers: {lines[-1]}"


def _handed_on(config: ExecutorConfig) -> dict[str, Any]:
    """What workers of a cluster, started by others, take over from the driver's environment."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not config.address or not folder:
        return {}
    path = os.path.abspath(os.path.expanduser(folder))
    return {"runtime_env": {"env_vars": {FOLDER_VARIABLE: path}}}


def _count_workers(config: ExecutorConfig, resources: Mapping[str, float]) -> int:
    """How many workers to start: as asked for, or as many as the CPUs and GPUs there are hold."""
    cluster = config.address not in (None, "local")
    gpus, share = resources.get("GPU", 0.0), config.gpus_per_worker
    if gpus < share and not (cluster and config.workers):
        scaled = ", or give --workers where an autoscaler will bring them" if cluster else ""
        raise ValueError(
            f"--gpus-per-worker {share:g}, but Ray sees {gpus:g} GPUs; leave it out{scaled}"
        )
    if config.workers:
        return config.workers
    cpus = max(1, int(resources.get("CPU", 1)))
    return min(cpus, int(gpus / share)) if share else cpus


def _warn_of_idle_gpus(config: ExecutorConfig, resources: Mapping[str, float]) -> None:
    """Ray hides the GPUs from a worker that has not asked for a share of one."""
    if config.networks and not config.gpus_per_worker and resources.get("GPU"):
        logger.warning(
            "the networks run on CPUs, and %g GPUs stay idle: give --gpus-per-worker 1, or 0.5",
            resources["GPU"],
        )


def _start_counter(names: Sequence[str]) -> Any:
    """One of these jobs, beside the driver, so that no other node takes it along when it goes."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Counter)
    return actor.options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote(names)
