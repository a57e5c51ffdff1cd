"""One training at a time in a run folder.

In: the folder. Out: a lock that the process of rank 0 holds as long as the training lasts. Other
ranks write nothing there and need none.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from mas.lock import locked

LOCK = ".lock"  # file in the run folder
# What tells the processes of a training apart: torchrun and Lightning, SLURM, Lightning by hand.
RANKS = ("LOCAL_RANK", "SLURM_PROCID", "NODE_RANK")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other trainings out of `folder`, and removes it where it is new and stays empty.

    Where it cannot be written nobody is kept out: the training says it when it writes.

    Raises:
        ValueError: another training is at work there; names its process.
    """
    if not is_first(os.environ) or (folder.exists() and not folder.is_dir()):
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    since = datetime.now().strftime("%Y-%m-%d %H:%M")
    note = f"process {os.getpid()} on {socket.gethostname()}, since {since}"
    with ExitStack() as stack:
        stack.callback(_remove_empty, made)
        other = None
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            other = stack.enter_context(locked(folder / LOCK, note=note))
        if other is not None:
            raise ValueError(
                f"another training is at work in {folder} ({other or 'it has just begun'}); wait "
                "for it or stop it, or give another --trainer.default_root_dir"
            )
        yield


def is_first(environment: Mapping[str, str]) -> bool:
    """Whether this process is rank 0 of its training, or the only one."""
    if "RANK" in environment:
        return environment["RANK"] == "0"
    return all(environment.get(name, "0") == "0" for name in RANKS)


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # something is there
        for path in folders:
            path.rmdir()
