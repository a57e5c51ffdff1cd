"""Which nodes of a cluster may work: each is asked what it lacks before any gets a worker.

In: a function that tells what a worker would miss where it is called, and the nodes on which no
worker could be made before. Out: what the fit nodes have, and the option that keeps Ray's workers
from the others, each of which is told of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from preprocess.needs import EXTRA, NeedsError, tell
from preprocess.run_folder import RUN, RunFolder

ANSWER_SECONDS = 60.0  # a node that has not answered by then is not left out
NODE_LABEL = "ray.io/node-id"  # Ray gives it to every node
NAMED = 3  # nodes in one line
LEFT_OUT = "left out until it is mended and the command given again"


class Nodes(NamedTuple):
    """What workers may be started on."""

    resources: Mapping[str, float]  # of all of them together
    options: dict[str, Any]  # of Ray, for every worker
    lacking: list[str]  # a line for each thing that others lack


def find_fit_nodes(
    lacks: Callable[[], list[str]],
    folder: RunFolder,
    options: dict[str, Any],
    failed: Mapping[str, str],
) -> Nodes:
    """Asks all nodes that have what a worker takes.

    Args:
        lacks: tells what a worker would miss where it is called; must pickle.
        folder: the output, which must be seen there as well.
        options: of Ray, that workers are started with.
        failed: of nodes on which workers could not be made, by id, a line that names the node.

    Raises:
        NeedsError: all nodes lack something.
    """
    import ray

    taken = {"CPU": options["num_cpus"], "GPU": options["num_gpus"] or 0}
    nodes = [
        node
        for node in ray.nodes()
        if node["Alive"] and all(node["Resources"].get(k, 0) >= n for k, n in taken.items())
    ]
    unfit = _ask([n for n in nodes if n["NodeID"] not in failed], lacks, folder, options)
    lacking = _describe(nodes, unfit)
    known = {node["NodeID"]: failed[node["NodeID"]] for node in nodes if node["NodeID"] in failed}
    unfit |= known
    if unfit and len(unfit) == len(nodes):
        reasons = [*lacking, *_shorten([*dict.fromkeys(known.values())])]
        raise NeedsError(f"no node can work: {'; '.join(reasons)}")
    resources = dict(ray.cluster_resources())
    for node in nodes:
        if node["NodeID"] in unfit:
            resources |= {k: resources.get(k, 0.0) - node["Resources"].get(k, 0.0) for k in taken}
    if unfit:
        options = {**options, "label_selector": {NODE_LABEL: f"!in({','.join(unfit)})"}}
    return Nodes(resources, options, lacking)


def find_unlike(error: Exception) -> str:
    """Of an error in unpickling on another machine: what differs there; "" for other errors."""
    unlike = ("ModuleNotFoundError: ", "ImportError: ", "AttributeError: ")
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line.startswith(unlike)), "")


def _ask(
    nodes: Sequence[Mapping[str, Any]],
    lacks: Callable[[], list[str]],
    folder: RunFolder,
    options: dict[str, Any],
) -> dict[str, str]:
    """Of the nodes that lack something, by id, what it is; all are asked at once, even busy ones.

    A GPU must be free, for Ray hides it from a task that takes no share.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        own = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
        look = ray.remote(_look).options(**options | own)
        asked[look.remote(lacks, folder)] = node["NodeID"]
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
    for reference in silent:
        ray.cancel(reference, force=True)
    unfit = {}
    for reference in answered:
        try:
            found = ray.get(reference)
        except ray.exceptions.RayError as error:
            unlike = find_unlike(error)  # else it may be anything, and a worker will tell
            found = [f"its packages are not those of this machine ({unlike}): {EXTRA}"]
            found = found if unlike else []
        if found:
            unfit[asked[reference]] = tell(found)
    return unfit


def _look(lacks: Callable[[], list[str]], folder: RunFolder) -> list[str]:
    """What the machine lacks that this is called on."""
    found = lacks()
    try:
        seen = folder.read(RUN) is not None
    except OSError as error:
        return [*found, f"the output {folder.path} cannot be read ({error})"]
    return found if seen else [*found, f"the output {folder.path} is not there: mount it"]


def _describe(nodes: Sequence[Mapping[str, Any]], unfit: Mapping[str, str]) -> list[str]:
    """One line for each thing that is lacking, with the nodes that lack it."""
    names = {node["NodeID"]: node["NodeManagerHostname"] for node in nodes}
    lacking = defaultdict(list)
    for node, what in unfit.items():
        lacking[what].append(names[node])
    return [
        f"{', '.join(_shorten(where))} ({len(where)} of {len(nodes)} nodes): {what}"
        for what, where in lacking.items()
    ]


def _shorten(names: Sequence[str]) -> list[str]:
    """The first few, and how many more there are."""
    if len(names) <= NAMED:
        return [*names]
    return [*names[: NAMED - 1], f"{names[NAMED - 1]} and {len(names) - NAMED} more"]
