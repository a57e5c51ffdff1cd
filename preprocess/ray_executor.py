"""The Ray half of the executor: Ray Data over an actor pool, one shard = one row.

Each actor holds one worker and writes its shards itself; only outcomes come back. An actor that is
killed is started again by Ray and its shard with it; what was half written has a temporary name.
One that has met an error which is not the data's leaves, so that a fresh process makes the next
attempt.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mas.errors import first_line
from mas.machine import usable_cores
from preprocess.executor import ExecutorConfig
from preprocess.needs import EXTRA
from preprocess.progress import ProgressBar
from preprocess.ray_nodes import Nodes, find_fit_nodes, find_unlike
from preprocess.run_folder import RunFolder
from preprocess.runner import Job, Outcome, Runner
from preprocess.termination import catch_sigterm
from preprocess.weights import FOLDER_VARIABLE

logger = logging.getLogger(__name__)

REACH_SECONDS = 10.0
START_SECONDS = 30.0  # without a worker; then a line says so
TOKEN_MEND = (
    "RAY_AUTH_MODE and RAY_AUTH_TOKEN must be here what they are on its nodes; where they are not "
    "set, `ray start` takes the token of ~/.ray/auth_token if there is one: then set "
    "RAY_AUTH_MODE=token here, else RAY_AUTH_MODE=disabled (docs/cluster.md)"
)
LOCAL_MEND = (
    "it needs a HOME that can be written to, and a temporary folder with a short path "
    "(RAY_TMPDIR); --executor serial does without Ray"
)
OBJECT_STORE_BYTES = 100 * 2**20  # jobs and outcomes are small


class _Counter:
    """Adds up what the workers report."""

    def __init__(self) -> None:
        self.items: int | None = None  # None = no word since the last `take`
        self.started = False  # a worker's process has come up

    def start(self) -> None:
        self.started = True

    def add(self, items: int) -> None:
        self.items = (self.items or 0) + items

    def take(self) -> tuple[int | None, bool]:
        items, self.items = self.items, None
        return items, self.started


class _Head:
    """Warns when the head node has gone: Ray then ends the driver's process without a word."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.next_look = time.monotonic() + REACH_SECONDS
        self.answered = True

    def look(self) -> None:
        if time.monotonic() < self.next_look:
            return
        answers = _silence(self.address) is None
        if self.answered and not answers:
            logger.warning(
                "the head node of Ray, %s, does not answer; if it has gone, this command ends "
                "within a minute: then give it again",
                self.address,
            )
        self.answered = answers
        self.next_look = time.monotonic() + REACH_SECONDS


class _Watch:
    """Asks a counter for the progress bar, and warns when no worker comes up or the head goes."""

    def __init__(self, counter: Any, config: ExecutorConfig) -> None:
        import ray

        self.counter = counter
        self.config = config
        self.deadline = time.monotonic() + START_SECONDS
        self.head = _Head(ray.get_runtime_context().gcs_address)

    def pull(self) -> int | None:
        import ray

        self.head.look()
        try:
            items, started = ray.get(self.counter.take.remote())
        except ray.exceptions.RayError:  # its process was killed: only the rate suffers
            return None
        if not started and time.monotonic() > self.deadline:
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

    def __init__(self, make_runner: Callable[..., Runner], counter: Any) -> None:
        self.make_runner = partial(make_runner, leave=_leave)
        self.runner: Runner | None = None
        self.counter = counter
        counter.start.remote()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        (content,) = batch["job"]
        job = pickle.loads(content)
        try:
            self.runner = self.runner or self.make_runner()
        except Exception as error:  # missing weights or packages, on this machine
            outcome = Outcome(job.name, error=f"{socket.gethostname()}: {error}", fatal=True)
        else:
            outcome = self.runner.run(job, self.counter.add.remote)
        return {"outcome": [pickle.dumps(outcome)]}


def _leave() -> None:
    """Ends the actor's process; Ray starts another one, perhaps elsewhere, with the same shard.

    It would take any gentler end for one that was meant.
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
        OSError: no cluster can be joined, or Ray cannot start workers or has lost them for good.
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
            _start(config)
            catch_sigterm()
        nodes = _choose_nodes(config, bar.folder, lacks)
        counter = _start_counter()
        watch = _Watch(counter, config)
        bar.pull = watch.pull
        _warn_of_idle_gpus(config, nodes.resources)
        bar.workers = min(_count_workers(config, nodes.resources), len(jobs))
        arguments = make_runner, counter
        for row in _dataset(jobs, arguments, bar.workers, nodes.options).iter_rows():
            yield pickle.loads(row["outcome"])
        bar.add(watch.pull())
    except ray.exceptions.RayError as error:
        raise OSError(f"{_explain(error)}; finished shards are kept") from error
    finally:
        bar.pull = lambda: None
        if started:
            ray.shutdown()


def _choose_nodes(
    config: ExecutorConfig, folder: RunFolder, lacks: Callable[[], list[str]]
) -> Nodes:
    """Where workers may be started, and with which options."""
    import ray

    options = {
        "num_cpus": 1,
        "num_gpus": config.gpus_per_worker or None,
        **_handed_on(config),
    }
    if config.here:  # the driver has looked
        return Nodes(ray.cluster_resources(), options)
    return find_fit_nodes(lacks, folder, options)


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


def _start_counter() -> Any:
    """A counter beside the driver, so that no other node takes it along when it goes."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(_Counter)
    return actor.options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()


def _start(config: ExecutorConfig) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.address not in (None, "local"):
        address = _find_cluster(config.address)
        try:
            ray.init(address=address, **quiet)
        except Exception as error:  # Ray has no common base class for what it raises here
            raise OSError(
                f"cannot join the Ray cluster {address}: {first_line(error)}; {TOKEN_MEND}"
            ) from error
        resources = ray.cluster_resources()
        sums = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
        logger.info("joined the Ray cluster %s: %g CPUs, %g GPUs", address, *sums)
        return
    own = quiet | {
        "address": "local",  # never one that `ray start` or RAY_ADDRESS offers unasked
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    try:
        ray.init(num_cpus=config.workers or _bound_cores(), **own)
        if not ray.cluster_resources().get("CPU"):  # it rounds a quota of half a CPU down
            ray.shutdown()
            ray.init(num_cpus=1, **own)
    except Exception as error:  # the same
        raise OSError(f"Ray cannot start: {first_line(error)}; {LOCAL_MEND}") from error


def _bound_cores() -> int | None:
    """CPUs this process is bound to, as by SLURM; None = Ray finds out, from a container's quota.

    Of the former Ray knows nothing.
    """
    cores = usable_cores()
    return cores if cores < (os.cpu_count() or 1) else None


def _find_cluster(address: str) -> str:
    """HOST:PORT of a cluster that answers; Ray itself tries for two minutes and shows a trace.

    Raises:
        OSError: there is none, or it does not answer.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or _started_here()
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        raise ValueError(
            f"--address {address}: give auto, or HOST:PORT of the head node, on a machine of the "
            "cluster"
        )
    if error := _silence(address):
        raise OSError(f"no Ray cluster answers at {address}: {error}") from error
    return address


def _silence(address: str) -> OSError | None:
    """Why nothing can be reached at HOST:PORT; None where something can."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
    except OSError as error:
        return error
    return None


def _started_here() -> str:
    """What `ray start` has noted; Ray's own search would also find other runs' private Rays."""
    own = os.environ.get("TMPDIR") if sys.platform == "linux" else None
    folder = os.environ.get("RAY_TMPDIR") or own or "/tmp"
    note = Path(folder, "ray", "ray_current_cluster")
    if not note.is_file():
        raise OSError(
            "--address auto: `ray start` was not called on this machine; call it, or give "
            "HOST:PORT of the head node"
        )
    return note.read_text().strip()
