"""A GPT moved to the tokens of another VQ-SEG knows what it knew."""

import dataclasses

import pytest
import torch

from mas.gpt import GPT, GPTConfig
from mas.vqseg import VQSEG, VQSEGConfig
from train.moving import check_sizes, count_pairs, move, shares

SEG = VQSEGConfig(
    size=16, grid=4, codes=16, code_width=4, width=8, groups=4, patch=2, features=8, embedding=4
)
SIZES = GPTConfig(
    layers=1, width=32, heads=2, text_vocabulary=30, scene_vocabulary=16, image_vocabulary=8,
    text_length=4, scene_grid=4, image_grid=2,
)  # fmt: skip


def build(network_class, config, seed=0):
    torch.manual_seed(seed)
    network = network_class(config).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def scenes(count=40):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 157, (count, 16, 16), dtype=torch.uint8, generator=generator)
    return labels, torch.rand(labels.shape, generator=generator) < 0.3


def shuffled(network, order):
    """The same VQ-SEG, whose code b is the old code order[b]."""
    other = build(VQSEG, network.config)
    other.load_state_dict(network.state_dict())
    other.quantizer.codebook.copy_(network.quantizer.codebook[order])
    return other


def test_for_renamed_codes_the_moved_gpt_says_the_same():
    before, gpt = build(VQSEG, SEG), build(GPT, SIZES)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    after, given = shuffled(before, order), scenes()
    check_sizes(gpt, before, after)
    counts_AB = count_pairs(before, after, *given)
    assert counts_AB.sum() == 40 * 16  # cells
    seen_B = counts_AB.sum(0) > 0
    assert seen_B.sum() > 4
    assert (counts_AB[order, torch.arange(16)] == counts_AB.sum(0)).all()
    moved = move(gpt, counts_AB)
    for part in ("embeddings.scene.weight", "heads.scene.weight"):
        old, new = gpt.state_dict()[part], moved.state_dict()[part]
        assert torch.allclose(new[seen_B], old[order][seen_B])


def test_a_code_is_the_mean_of_those_it_lies_on_and_the_rest_stays():
    gpt = build(GPT, SIZES)
    counts_AB = torch.zeros(16, 24)
    counts_AB[3, 0], counts_AB[5, 0] = 3, 1
    counts_AB[7, 20] = 4
    moved = move(gpt, counts_AB)
    assert moved.config == dataclasses.replace(SIZES, scene_vocabulary=24)
    before, after = gpt.state_dict(), moved.state_dict()
    for name in ("embeddings.scene.weight", "heads.scene.weight"):
        old, new = before.pop(name), after.pop(name)
        assert torch.allclose(new[0], 0.75 * old[3] + 0.25 * old[5])
        assert torch.allclose(new[20], old[7])
        # Of a code that was not seen nothing is known but how frequent the old ones are.
        assert torch.allclose(new[9], (3 * old[3] + old[5] + 4 * old[7]) / 8)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor)
    assert torch.allclose(shares(counts_AB).sum(0), torch.ones(24))


def test_networks_that_do_not_fit_are_refused():
    gpt, before = build(GPT, SIZES), build(VQSEG, SEG)
    other = build(VQSEG, dataclasses.replace(SEG, codes=12))
    with pytest.raises(ValueError, match="reads 16 codes on a grid of 4, the VQ-SEG before has 12"):
        check_sizes(gpt, other, before)
    larger = build(VQSEG, dataclasses.replace(SEG, size=32, patch=4))
    with pytest.raises(ValueError, match="size 32, not 16: cells must be the same"):
        check_sizes(gpt, before, larger)
