"""Validation metrics are those of all ranks together."""

import math
from types import SimpleNamespace

import pytest
import torch

from mas.gpt import GPT, GPTConfig
from mas.metrics import CodeMetrics, SceneMetrics
from mas.sequence import Streams
from mas.storage import parse_config
from train.gpt import StreamTotals, StreamWeights
from train.totals import log_totals


class Module:
    """Stands for the module of one of two ranks; the other rank has seen `others`."""

    device = torch.device("cpu")
    global_step = 7

    def __init__(self, others):
        theirs = iter([total for metric in others for total in metric.totals])
        strategy = SimpleNamespace(reduce=lambda total, reduce_op: total + next(theirs))
        self.trainer = SimpleNamespace(strategy=strategy, world_size=2)
        self.logged = {}

    def log_dict(self, values, *, sync_dist):
        self.logged |= values


def seen(labels, tokens):
    scenes, codes = SceneMetrics(), CodeMetrics(8)
    labels = torch.tensor(labels, dtype=torch.uint8)
    edges = torch.zeros_like(labels, dtype=torch.bool)
    truth = torch.full_like(labels, 3)
    scenes.update(labels, edges, true_labels_BHW=truth, true_edges_BHW=edges)
    codes.update(torch.tensor(tokens))
    return scenes, codes


def test_ranks_are_added_up_before_anything_is_divided():
    mine, theirs = seen([[[3, 3]]], [[0, 1]]), seen([[[4, 4], [4, 3]]], [[1, 1]])
    module = Module(theirs)
    log_totals(module, mine)
    assert module.logged["validation/miou"] == pytest.approx(3 / 6)  # means of ranks: 0.625
    assert module.logged["validation/usage"] == pytest.approx(2 / 8)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert module.logged["validation/perplexity"] == pytest.approx(math.exp(entropy))
    assert module.logged["step"] == 7


def test_what_nothing_was_seen_of_is_not_logged():
    module = Module(seen([[[3]]], [[0]]))
    log_totals(module, seen([[[3]]], [[0]]))
    assert "validation/face_iou" not in module.logged and "validation/edge_f1" not in module.logged
    assert module.logged["validation/miou"] == 1


@torch.no_grad()
def test_a_gpts_loss_is_that_of_all_tokens_whatever_the_batches(network_sizes):
    torch.manual_seed(0)
    network = GPT(parse_config(GPTConfig, network_sizes["gpt"], "conftest")).eval()
    tokens = Streams(
        *(torch.randint(1, s.vocabulary, (4, s.length)) for s in network.config.layout.streams)
    )
    for row, length in enumerate((8, 2, 3, 0)):  # captions
        tokens.text[row, length:] = 0
    weights = StreamWeights()
    whole = network.losses(*tokens)
    wanted = {"loss": weights.mean(whole), **whole._asdict()}
    for sizes in ((4,), (1, 1, 1, 1), (3, 1)):
        totals = StreamTotals(weights)
        for part in zip(*(stream.split(sizes) for stream in tokens), strict=True):
            totals.update(network.losses(*part), Streams(*part))
        assert totals.compute() == pytest.approx({k: float(v) for k, v in wanted.items()}, rel=1e-5)
