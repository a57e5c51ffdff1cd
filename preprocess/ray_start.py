"""Starts Ray for a run: joins a cluster that is up, or makes one of this machine's cores.

In: where the run shall be. Out: a Ray that is initialized, or one line that says why there is none.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

from mas.errors import first_line
from mas.machine import usable_cores
from preprocess.executor import ExecutorConfig

logger = logging.getLogger(__name__)

REACH_SECONDS = 10.0
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
HOST_AND_PORT = re.compile(r"(\[[^][/]+\]|[^][/:]+):\d+")  # an IPv6 host is in brackets


def start_ray(config: ExecutorConfig) -> None:
    """Joins the cluster that the config names, or starts a Ray of this process's own.

    Raises:
        OSError: there is no such cluster, or Ray cannot start.
        ValueError: the address is none.
    """
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
    named = os.environ.get("RAY_ADDRESS") if address == "auto" else None
    if address == "auto":
        address = named or _started_here()
    if not HOST_AND_PORT.fullmatch(address):
        raise ValueError(
            f"RAY_ADDRESS is {named}: set it to HOST:PORT of the head node, or leave it out"
            if named
            else f"--address {address}: give auto, or HOST:PORT of the head node, on a machine of "
            "the cluster; an IPv6 host in brackets, as [fd00::2]:6379"
        )
    if error := silence(address):
        raise OSError(f"no Ray cluster answers at {address}: {error}") from error
    return address


def silence(address: str) -> OSError | None:
    """Why nothing can be reached at HOST:PORT or [IPv6]:PORT; None where something can."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
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
