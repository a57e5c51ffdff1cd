"""What a node of a cluster is asked, and what becomes of the answer or of none."""

import importlib
import re
import socket
import time

import pytest

from preprocess.needs import NeedsError
from preprocess.ray_nodes import find_fit_nodes
from preprocess.run_folder import RunFolder

OPTIONS = {"num_cpus": 1, "num_gpus": None}
HERE = re.escape(f"{socket.gethostname()} (1 of 1 nodes): ")


@pytest.fixture
def output(tmp_path):
    folder = RunFolder(str(tmp_path))
    folder.write("run.json", {})
    return folder


@pytest.fixture
def ask(local_ray, output):
    """Asks the only node of a Ray that is up."""

    def ask(lacks=list, folder=output):
        return find_fit_nodes(lacks, folder, OPTIONS, {})

    return ask


class Elsewhere:
    """Can be made here and not on the machine of a worker."""

    def __reduce__(self):
        return importlib.import_module, ("no_such_package",)


def test_a_node_that_lacks_nothing_may_work(ask, local_ray):
    assert ask() == (local_ray.cluster_resources(), OPTIONS, [])


def test_all_that_nodes_lack_is_told_of(ask, tmp_path):
    with pytest.raises(NeedsError, match=f"^no node can work: {HERE}the weights x are missing$"):
        ask(lambda: ["the weights x are missing"])
    missing = RunFolder(str(tmp_path / "elsewhere"))
    said = f"2 things are missing: \\(1\\) a; \\(2\\) the output {missing.path} is not there"
    with pytest.raises(NeedsError, match=HERE + said):
        ask(lambda: ["a"], missing)
    with pytest.raises(NeedsError, match=HERE + r".*'no_such_package'\): pip install") as caught:
        ask(Elsewhere())
    assert "\n" not in str(caught.value)


def test_a_node_that_gives_no_answer_is_not_left_out(ask, monkeypatch):
    def fail():
        raise RuntimeError("who knows")

    assert ask(fail).options == OPTIONS
    monkeypatch.setattr("preprocess.ray_nodes.ANSWER_SECONDS", 0.2)
    assert ask(lambda: time.sleep(60)).options == OPTIONS


def test_a_cluster_whose_nodes_are_yet_to_come_is_not_asked(monkeypatch, local_ray, ask):
    monkeypatch.setattr(local_ray, "nodes", list)
    assert ask().options == OPTIONS


@pytest.fixture
def cluster(monkeypatch, local_ray):
    """Nine nodes: seven that would do, one without a GPU, one that is gone; the first five lack x.

    Yields the names of those that were asked.
    """

    def node(number, **resources):
        return {
            "NodeID": f"{number:056x}",
            "NodeManagerHostname": f"node{number}",
            "Alive": True,
            "Resources": {"CPU": 4.0, "GPU": 1.0, **resources},
        }

    asked = []

    def answer(nodes, *_, **__):
        asked.extend(n["NodeManagerHostname"] for n in nodes)
        return {n["NodeID"]: "it lacks x" for n in nodes[:5]}

    nodes = [*(node(i) for i in range(7)), node(7, GPU=0.0), {**node(8), "Alive": False}]
    monkeypatch.setattr(local_ray, "nodes", lambda: nodes)
    monkeypatch.setattr(local_ray, "cluster_resources", lambda: {"CPU": 32.0, "GPU": 7.0, "x": 1.0})
    monkeypatch.setattr("preprocess.ray_nodes._ask", answer)
    return asked


GPU = {"num_cpus": 1, "num_gpus": 0.5}


def test_workers_are_counted_and_started_on_the_fit_nodes_alone(cluster, output):
    fit = find_fit_nodes(list, output, GPU, {})
    assert cluster == [f"node{i}" for i in range(7)]
    assert fit.resources == {"CPU": 12.0, "GPU": 2.0, "x": 1.0}
    listed = ",".join(f"{i:056x}" for i in range(5))
    assert fit.options["label_selector"] == {"ray.io/node-id": f"!in({listed})"}
    (line,) = fit.lacking
    assert line.endswith("node0, node1, node2 and 2 more (5 of 7 nodes): it lacks x")


def test_nodes_that_have_failed_are_not_asked_again(cluster, output):
    failed = {f"{i:056x}": f"node{i}: the GPU is lost" for i in range(5, 7)}
    with pytest.raises(NeedsError) as caught:
        find_fit_nodes(list, output, GPU, failed)
    assert cluster == [f"node{i}" for i in range(5)]
    said = "it lacks x; node5: the GPU is lost; node6: the GPU is lost"
    assert str(caught.value).endswith(said)
    fit = find_fit_nodes(list, output, GPU, {f"{6:056x}": "node6: the GPU is lost"})
    assert fit.resources["GPU"] == 1.0 and f"{6:056x}" in str(fit.options)
