"""Two processes share one GPT (FSDP over gloo) and leave what any other training leaves."""

import csv

import pytest
import torch
from processes import finish, start
from test_ddp import RANKS, free_port, torchrun_environment

from mas.gpt import GPT
from train.cli import train


@pytest.fixture
def launch(words, tmp_path):
    """launch(folder, strategy, steps): runs both ranks as torchrun does, resuming what is there."""

    def launch(folder, strategy, steps, **changed):
        settings = {
            "trainer__max_steps": steps,
            "trainer__devices": len(RANKS),
            "trainer__strategy": strategy,
            "data__batch_size": 2,
            "model__optimiser__schedule": "constant",
            "ckpt_path": "auto",
        }
        arguments = words("gpt", folder, **settings | changed)
        port = free_port()
        processes = [
            start(
                arguments,
                log=tmp_path / f"{folder}.{rank}.log",
                environment=torchrun_environment(rank, port),
            )
            for rank in RANKS
        ]
        statuses = finish(*processes)
        assert statuses == [0, 0], (tmp_path / f"{folder}.0.log").read_text()

    return launch


def assert_close(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            assert_close(*pair)
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    else:
        assert a == b


@pytest.mark.slow
def test_sharded_and_unsharded_training_continue_each_other(launch, tmp_path):
    launch("ddp", "ddp", 4)
    launch("mixed", "fsdp", 2)
    launch("mixed", "fsdp", 3)
    launch("mixed", "ddp", 4)
    plain, mixed = (
        torch.load(tmp_path / folder / "checkpoints/last.ckpt", weights_only=True)
        for folder in ("ddp", "mixed")
    )
    parts = ("state_dict", "current_model_state", "averaging_state", "optimizer_states")
    for part in parts:
        assert_close(plain[part], mixed[part])
    exported = GPT.from_pretrained(tmp_path / "mixed").state_dict()
    for name, weight in exported.items():
        assert torch.equal(weight, mixed["state_dict"][f"network.{name}"])


def test_a_sharded_average_is_validated_like_a_whole_one(launch, tmp_path):
    validated = {}
    for strategy in ("ddp", "fsdp"):
        launch(strategy, strategy, 3, trainer__val_check_interval=1)
        with open(tmp_path / strategy / "metrics.csv") as file:
            losses = [row["validation/loss"] for row in csv.DictReader(file)]
        validated[strategy] = [float(loss) for loss in losses if loss]
    assert len(validated["ddp"]) == 3
    assert validated["fsdp"] == pytest.approx(validated["ddp"], rel=1e-4)


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("vqseg", {}, "fsdp is for gpt; vqseg fits every card: use ddp"),
        ("gpt", {"model__optimiser__kind": "muon"}, "muon needs whole ones"),
        ("gpt", {}, "shards the network over several processes, and here is one"),
        (
            "gpt",
            {f"model__preview__{name}": "x" for name in ("tokenizer", "vqseg", "vqgan")},
            "fsdp draws no sheets of samples",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(stage, settings, message, words):
    with pytest.raises(ValueError, match=message):
        train(words(stage, trainer__max_steps=1, trainer__strategy="fsdp", **settings))
