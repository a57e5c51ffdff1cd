"""What the workers of a run on Ray report to its driver: an actor beside it.

It adds up what they have seen, and keeps those waiting that cannot work: a worker on a node that
has lost its GPU or lacks weights must neither end the run nor take job after job only to fail.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter as Tally
from collections.abc import Collection
from typing import Any, NamedTuple

from preprocess.runner import Outcome

SIT_OUT_SECONDS = 1.0  # between two questions of a worker that waits
IDLE_SECONDS = 10.0  # in which nobody is at work: more than it takes to be given the next job
BEAT_SECONDS = 5.0  # between two words of a worker that is at work
SILENT_SECONDS = 60.0  # after which one without a word counts as gone


class News(NamedTuple):
    """What the driver is told."""

    items: int | None  # seen since it last asked; None = no word of any
    started: bool  # whether a worker's process has come up
    failed: dict[str, str]  # nodes, by Ray's id, on which a worker could not be made: why


class Counter:
    """The actor.

    Args:
        names: of the jobs that are to be made.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.left = set(names)
        self.heard: dict[str, float] = {}  # of a worker with a job: when it spoke last
        self.kept: set[str] = set()  # jobs of workers that wait
        self.idle_since: float | None = None
        self.begun: Tally[str] = Tally()  # of a worker: processes since it last was made
        self.news = News(None, started=False, failed={})

    def start(self) -> None:
        self.news = self.news._replace(started=True)

    def begin(self, worker: str) -> int:
        """Somebody makes a worker; how many of its processes have tried, this one included.

        Args:
            worker: Ray's id of the actor, which stays the same when it is started again.
        """
        self.hear(worker)
        self.begun[worker] += 1
        return self.begun[worker]

    def ready(self, worker: str) -> None:
        """It was made."""
        self.begun[worker] = 0

    def add(self, worker: str, items: int) -> None:
        self.hear(worker)
        self.news = self.news._replace(items=(self.news.items or 0) + items)

    def settle(self, worker: str, name: str) -> None:
        """A job that is made, or set aside for good."""
        self.left.discard(name)
        self.kept.discard(name)
        self.heard.pop(worker, None)

    def may_leave(self, worker: str, name: str, node: str, error: str) -> bool:
        """Whether a worker that cannot work may give its job back: when nobody else is at work.

        Args:
            worker: Ray's id of the actor.
            name: of the job.
            node: Ray's id of the worker's node.
            error: why it cannot, with the node's name.
        """
        self.news.failed.setdefault(node, error)
        self.kept.add(name)
        self.heard.pop(worker, None)
        now = time.monotonic()
        if any(now - when < SILENT_SECONDS for when in self.heard.values()):
            self.idle_since = None
        elif self.idle_since is None:
            self.idle_since = now
        idle = self.idle_since is not None and now - self.idle_since >= IDLE_SECONDS
        return idle or self.left <= self.kept

    def take(self) -> News:
        news = self.news
        self.news = news._replace(items=None)
        return news

    def hear(self, worker: str) -> None:
        """It is at work."""
        self.heard[worker] = time.monotonic()
        self.idle_since = None


class Beat:
    """Tells a counter every few seconds that a worker is at work: one that was killed falls silent.

    Args:
        counter: handle of the `Counter`.
        worker: Ray's id of the actor.
    """

    def __init__(self, counter: Any, worker: str) -> None:
        self.counter, self.worker = counter, worker
        self.at_work = False
        threading.Thread(target=self._loop, daemon=True).start()

    def _loop(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            if self.at_work:
                self.counter.hear.remote(self.worker)


def sit_out(outcome: Outcome, counter: Any) -> None:
    """Waits, with the job it could not make, while others are at work.

    Args:
        outcome: of the job; `here`.
        counter: handle of the `Counter`.
    """
    import ray

    context = ray.get_runtime_context()
    words = context.get_actor_id(), outcome.name, context.get_node_id(), outcome.error
    while True:
        with contextlib.suppress(ray.exceptions.RayError):  # the counter is being started again
            if ray.get(counter.may_leave.remote(*words)):
                return
        time.sleep(SIT_OUT_SECONDS)
