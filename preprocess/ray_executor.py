"""The Ray half of the executor: Ray Data over an actor pool, one shard = one row.

Each actor holds one worker and writes its shards itself; only outcomes come back. An actor that is
killed is started again by Ray and its shard with it; what was half written has a temporary name.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from preprocess.executor import ExecutorConfig, Job, Outcome, Runner, Worker
from preprocess.progress import ProgressBar
from preprocess.run_folder import RunFolder

OBJECT_STORE_BYTES = 100 * 2**20  # jobs and outcomes are small
POLL_SECONDS = 0.5


class _Counter:
    """Adds up what the workers report."""

    def __init__(self) -> None:
        self.items = 0

    def add(self, items: int) -> None:
        self.items += items

    def take(self) -> int:
        items, self.items = self.items, 0
        return items


class _RayRunner:
    """A `Runner` in the shape Ray Data wants: a batch of one pickled job in, one outcome out.

    The worker is made with the first job: an actor that cannot be constructed gives pages of
    traces, an outcome one line.
    """

    def __init__(
        self,
        factory: Callable[[], Worker],
        folder: RunFolder,
        common: Mapping[str, Any],
        counter: Any,
    ) -> None:
        self.make_runner = lambda: Runner(factory, folder, common)
        self.runner: Runner | None = None
        self.counter = counter

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


def run_on_ray(
    jobs: Sequence[Job],
    factory: Callable[[], Worker],
    folder: RunFolder,
    common: Mapping[str, Any],
    config: ExecutorConfig,
    bar: ProgressBar,
) -> Iterator[Outcome]:
    """Yields outcomes as they come, in no order. Starts a local Ray unless there is one."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    for handler in logging.getLogger("ray.data").handlers:
        handler.setLevel(max(handler.level, logging.ERROR))
    started = not ray.is_initialized()
    if started:
        _start(config)
    try:
        limits = ray.data.ExecutionOptions(preserve_order=False)
        context = ray.data.DataContext.get_current()
        context.execution_options = limits
        context.enable_progress_bars = False
        workers = config.workers or int(ray.cluster_resources().get("CPU", 1))
        workers = max(1, min(workers, len(jobs)))
        counter = _as_actor(_Counter)
        rows = [{"job": pickle.dumps(job)} for job in jobs]
        outcomes = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _RayRunner,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            num_gpus=config.gpus_per_worker or None,
            fn_constructor_args=(factory, folder, common, counter),
        )
        with _Poll(lambda: bar.add(ray.get(counter.take.remote()))):
            for row in outcomes.iter_rows():
                yield pickle.loads(row["outcome"])
    finally:
        if started:
            ray.shutdown()


def _as_actor(kind: type) -> Any:
    import ray

    return ray.remote(kind).options(num_cpus=0).remote()


def _start(config: ExecutorConfig) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.address:
        ray.init(address=config.address, **quiet)
        return
    ray.init(
        num_cpus=config.workers or os.cpu_count(),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        **quiet,
    )


class _Poll:
    """Calls a function now and then beside the main thread, and once at the end."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> _Poll:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.function()

    def _loop(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.function()
