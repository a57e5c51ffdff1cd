"""The pair of Muon and AdamW: which parameter goes where, and that a resumed run is exact."""

import pytest
import torch
from torch import nn

from mas.gpt import GPT, GPTConfig
from train.cli import train
from train.stage import Optimiser

SIZES = dict(
    layers=2, width=16, heads=2, text_vocabulary=30, scene_vocabulary=16, image_vocabulary=16,
    text_length=4, scene_grid=2, image_grid=2, dropout=0.0,
)  # fmt: skip
MUON = {"model__optimiser__kind": "muon", "model__optimiser__schedule": "constant"}


def network(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**SIZES, **changes))


def set_gradients(module):
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("gated", [False, True])
def test_only_the_matrices_of_the_blocks_go_to_muon(gated):
    gpt = network(gated=gated)
    first, *others = Optimiser(kind="muon").build(gpt).param_groups
    names = {id(p): name for name, p in gpt.named_parameters()}
    chosen = {names[id(p)] for p in first["params"]}
    assert chosen == {n for n, p in gpt.named_parameters() if n.startswith("blocks") and p.ndim > 1}
    rest = [names[id(p)] for group in others for p in group["params"]]
    assert len(rest) == len(set(rest)) and chosen.isdisjoint(rest)
    assert chosen.union(rest) == set(names.values())


def test_each_part_steps_as_it_would_alone():
    pair, muon, adamw = network(), network(), network()
    settings = Optimiser(kind="muon", learning_rate=0.01, weight_decay=0.1)
    optimiser = settings.build(pair)
    matrices = [p for n, p in muon.named_parameters() if n.startswith("blocks") and p.ndim > 1]
    alone = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    other = Optimiser(learning_rate=0.01, weight_decay=0.1).build(adamw)
    for _ in range(3):
        for module, step in ((pair, optimiser), (muon, alone), (adamw, other)):
            set_gradients(module)
            step.step()
    chosen = {id(p) for p in matrices}
    for mine, by_muon, by_adamw in zip(
        pair.parameters(), muon.parameters(), adamw.parameters(), strict=True
    ):
        assert torch.equal(mine, by_muon if id(by_muon) in chosen else by_adamw)


def test_a_loaded_state_goes_on_exactly():
    whole, half = network(), network()
    settings = Optimiser(kind="muon", learning_rate=0.01)
    first, second = settings.build(whole), settings.build(half)
    for module, optimiser in ((whole, first), (half, second)):
        set_gradients(module)
        optimiser.step()
    third = settings.build(half)
    third.load_state_dict(second.state_dict())
    for group in third.param_groups:
        group["lr"] = 0.02  # the schedule of a run sets it so
    for group in first.param_groups:
        group["lr"] = 0.02
    for optimiser in (first, third):
        optimiser.step()
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_repeats_an_uninterrupted_one(words, tmp_path):
    assert train(words("gpt", "whole", trainer__max_steps=4, **MUON)) == 0
    assert train(words("gpt", "half", trainer__max_steps=2, **MUON)) == 0
    assert train([*words("gpt", "half", trainer__max_steps=4, **MUON), "--ckpt_path=last"]) == 0
    whole, half = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)
        for name in ("whole", "half")
    )
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, half["state_dict"][name])
    states = whole["optimizer_states"][0]["state"], half["optimizer_states"][0]["state"]
    assert states[0].keys() == states[1].keys()


def test_networks_without_blocks_are_refused(words):
    with pytest.raises(ValueError, match="muon is for the gpt: set adamw"):
        Optimiser(kind="muon").build(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="muon is for the gpt"):
        train(words("vqseg", trainer__max_steps=1, **MUON))
