"""SIGTERM of a run: an orderly end as by Ctrl-C. Batch systems send it when a job's time is up."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)


class Terminated(SystemExit):
    """Raised in the main thread by SIGTERM; ends the process with status 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextlib.contextmanager
def terminated_in_order() -> Iterator[None]:
    """Within the block SIGTERM raises `Terminated`, which everything is tidied up by."""
    before = signal.getsignal(signal.SIGTERM)
    catch_sigterm()
    try:
        yield
    except SystemExit as end:
        if end.code not in (Terminated().code, signal.SIGTERM):  # the latter by Ray's own handler
            raise
        logger.warning("ended by SIGTERM; the same command goes on where this one was")
        raise Terminated from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def catch_sigterm() -> None:
    """Sets the handler; once more after Ray has set its own. Only the main thread may."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the tidying short
    raise Terminated
