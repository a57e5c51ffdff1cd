"""Offsets of the classes, found on scenes."""

import torch

from mas.metrics import SceneMetrics
from mas.scene import CLASSES, VOID
from mas.vqseg import VQSEG, VQSEGConfig
from mas.vqseg_tune import tune_decisions

GROUND, THING = 20, 40


def scenes(count=12, size=16):
    generator = torch.Generator().manual_seed(0)
    labels = torch.full((count, size, size), GROUND, dtype=torch.uint8)
    for index in range(count):
        row, column = torch.randint(0, size - 5, (2,), generator=generator).tolist()
        labels[index, row : row + 5, column : column + 5] = THING
    labels[:, -2:] = VOID
    return labels, torch.zeros_like(labels, dtype=torch.bool)


def trained():
    torch.manual_seed(0)
    sizes = dict(size=16, grid=8, codes=32, code_width=8, patch=2, width=32, groups=4)
    network = VQSEG(VQSEGConfig(**sizes, multipliers=(1,)))
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(60):
        total = network.loss(*scenes()).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return network.eval()


def miou(network):
    metrics = SceneMetrics()
    labels, edges = scenes()
    found = network.decode(network.encode(labels, edges))
    metrics.update(*found, true_labels_BHW=labels, true_edges_BHW=edges)
    return metrics.compute()["miou"], (found[0] == VOID)[labels == VOID].float().mean()


def test_offsets_undo_what_a_skewed_training_did_and_leave_void_and_tokens_alone():
    network = trained()
    straight, _ = miou(network)
    tokens = network.encode(*scenes())
    with torch.no_grad():
        network.head.classifier.bias[GROUND] -= 4  # as if the thing had been drawn far more often
        network.head.classifier.bias[THING] += 4
    skewed, _ = miou(network)
    assert skewed < straight - 0.1
    edge_bias = network.head.classifier.bias[CLASSES].clone()
    tuned = tune_decisions(network, *scenes())
    mended, void = miou(network)
    assert mended > straight - 0.02 and tuned.after > tuned.before
    assert tuned.offsets_K[GROUND] > tuned.offsets_K[THING]
    assert void > 0.95
    assert torch.equal(network.encode(*scenes()), tokens)
    assert network.head.classifier.bias[CLASSES] == edge_bias
    others = torch.ones(CLASSES, dtype=torch.bool)
    others[[GROUND, THING]] = False
    assert not tuned.offsets_K[others].any()  # what does not occur is not touched


def test_what_the_search_believes_is_what_decoding_shows():
    network = trained()
    labels, edges = scenes()
    tuned = tune_decisions(network, labels, edges)
    decoded, _ = network.decode(network.encode(labels, edges))
    ious = [
        ((decoded == c) & (labels == c)).sum() / ((decoded == c) | (labels == c)).sum()
        for c in (GROUND, THING, VOID)
    ]
    assert abs(torch.stack(ious).mean() - tuned.after) < 1e-3
