"""`mas bench train` on the smallest networks, and the architecture it compares with."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from mas.__main__ import main
from mas.gpt import GPT, GPTConfig
from train.bench import (
    SMALL,
    Setting,
    bench_train,
    compare,
    measure,
    measure_loader,
    read_network,
)
from train.reference import ReferenceGPT

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = GPTConfig(
    layers=2,
    width=32,
    heads=2,
    text_vocabulary=60,
    scene_vocabulary=16,
    image_vocabulary=24,
    text_length=8,
    scene_grid=2,
    image_grid=4,
)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "gpt.yaml"
    network = {k: v for k, v in vars(TINY).items() if k != "dropout"}
    path.write_text(yaml.safe_dump({"model": {"network": network}, "data": {"input": "x"}}))
    return str(path)


@pytest.mark.slow
def test_the_command_prints_the_fixed_keys(config, capsys):
    words = ["bench", "train", "--config", config, "--steps=1", "--precision=32-true"]
    assert main([*words, "--compile=false", "--device=cpu", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["parameters"] == sum(p.numel() for p in GPT(TINY).parameters())
    assert figures["tokens_per_second"] > 0 and figures["loader_tokens_per_second"] > 0
    assert 0 < figures["mfu"] < 1.5 and figures["compiled"] is False
    (ours,), (reference,) = figures["results"], figures["reference"]
    assert ours["peak_mb"] > 50 and reference["peak_mb"] > 50
    ratio = ours["tokens_per_second"] / reference["forward_backward_tokens_per_second"]
    assert figures["over_reference"]["best"] == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_is_never_faster_than_its_passes(precision, reference):
    setting = Setting(
        network=TINY,
        batch_size=2,
        steps=2,
        device="cpu",
        precision=precision,
        reference=reference,
    )
    result = measure(setting)
    assert result["tokens_per_second"] <= result["forward_backward_tokens_per_second"]
    assert ("mfu" in result) is not reference


def test_the_default_is_the_small_config():
    assert read_network(str(CONFIGS / "small/gpt.yaml")) == SMALL


def test_the_loader_reads_every_stream():
    assert measure_loader(TINY, 4, seconds=0.05) > 0


def test_ratios_compare_the_best_of_each():
    ours = [
        {"precision": p, "tokens_per_second": t, "forward_backward_tokens_per_second": t + 2}
        for p, t in (("32-true", 10), ("32-true", 12), ("bf16-mixed", 30))
    ]
    references = [
        {"precision": p, "forward_backward_tokens_per_second": t}
        for p, t in (("32-true", 8), ("bf16-mixed", 10))
    ]
    ratios = compare(ours, references)
    assert ratios == {"best": 3, "best_passes": 3.2, "32-true": 1.5, "bf16-mixed": 3}


def test_the_reference_has_our_size_and_sees_no_later_token():
    torch.manual_seed(0)
    reference = ReferenceGPT(TINY).eval()
    sizes = [sum(p.numel() for p in network.parameters()) for network in (reference, GPT(TINY))]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
    x_BTD = torch.randn(1, 6, 32)
    changed_BTD = x_BTD.clone()
    changed_BTD[:, 4] += 1
    before, after = reference.blocks(x_BTD), reference.blocks(changed_BTD)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])
    tokens = [torch.randint(1, s.vocabulary, (2, s.length)) for s in TINY.layout.streams]
    loss = reference.loss(*tokens)
    loss.backward()
    chance = torch.tensor([60.0, 40.0]).log().sum()  # a network that knows nothing yet
    assert float(loss.detach()) == pytest.approx(float(chance), rel=0.05)
    assert all(p.grad is not None for p in reference.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size and --steps"),
        ({"config": "nowhere.yaml"}, r"nowhere\.yaml: not a config of mas train gpt"),
        ({"device": "cuda"}, "no usable GPU here"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        bench_train(**options)
