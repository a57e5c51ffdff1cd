"""What the workers of a run on Ray report to its driver: an actor beside it.

It adds up what they have seen, and keeps those waiting that cannot work: a worker on a node that
has lost its GPU or lacks weights must neither end the run nor take job after job only to fail.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from typing import Any, NamedTuple

from preprocess.runner import Outcome

SIT_OUT_SECONDS = 1.0  # between two questions of a worker that waits


class News(NamedTuple):
    """What the driver is told."""

    items: int | None  # seen since it last asked; None = no word of any
    started: bool  # whether a worker's process has come up
    failed: dict[str, str]  # nodes, by Ray's id, on which no worker could be made: why


class Counter:
    """The actor.

    Args:
        names: of the jobs that are to be made.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.left = set(names)
        self.kept: set[str] = set()  # jobs of workers that sit out
        self.released = _is_restarted()  # it does not know what was made before
        self.news = News(None, started=False, failed={})

    def start(self) -> None:
        self.news = self.news._replace(started=True)

    def add(self, items: int) -> None:
        self.news = self.news._replace(items=(self.news.items or 0) + items)

    def settle(self, name: str) -> None:
        """A job that is made, or set aside for good."""
        self.left.discard(name)
        self.kept.discard(name)

    def may_leave(self, name: str, node: str, error: str) -> bool:
        """Whether a worker that cannot work may give its job back: when nothing else is left.

        Args:
            name: of the job.
            node: Ray's id of the worker's node.
            error: why it cannot, with the node's name.
        """
        self.news.failed.setdefault(node, error)
        self.kept.add(name)
        return self.released or self.left <= self.kept

    def release(self) -> None:
        """Nobody else is there to wait for."""
        self.released = True

    def take(self) -> News:
        news = self.news
        self.news = news._replace(items=None)
        return news


def sit_out(outcome: Outcome, counter: Any) -> None:
    """Waits, with the job it could not make, until the others have made all that they can.

    Args:
        outcome: of the job; `here`.
        counter: handle of the `Counter`.
    """
    import ray

    node = ray.get_runtime_context().get_node_id()
    while True:
        with contextlib.suppress(ray.exceptions.RayError):  # the counter is being started again
            if ray.get(counter.may_leave.remote(outcome.name, node, outcome.error)):
                return
        time.sleep(SIT_OUT_SECONDS)


def _is_restarted() -> bool:
    """Whether this is an actor that was killed before."""
    import ray

    context = ray.get_runtime_context() if ray.is_initialized() else None
    return bool(context and context.get_actor_id() and context.was_current_actor_reconstructed)
