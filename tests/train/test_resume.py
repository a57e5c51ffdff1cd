"""A run that is killed and resumed equals, bit for bit, one that was not."""

import csv

import pytest
import torch

from train.cli import train
from train.stage import Stage

STEPS = 7  # of 4 pictures from 20: more than an epoch
VALIDATED = 4


class Killed(Exception):
    """Stands for SIGKILL: nothing in the run reacts to it by saving."""


@pytest.fixture
def at_step(monkeypatch):
    """at_step(k, act): calls `act` when optimiser step k (from 0) begins; at_step(None) undoes."""
    original = Stage.on_train_batch_start

    def arrange(step, act=None):
        def hook(self, batch, batch_idx):
            if self.global_step == step:
                act()
            original(self, batch, batch_idx)

        monkeypatch.setattr(Stage, "on_train_batch_start", hook if act else original)

    return arrange


def kill():
    raise Killed


def read_run(folder):
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return checkpoint, [{k: v for k, v in row.items() if v} for row in rows]


def assert_equal(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{path}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def assert_equal_runs(a, b):
    (checkpoint_a, rows_a), (checkpoint_b, rows_b) = read_run(a), read_run(b)
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        assert_equal(checkpoint_a[part], checkpoint_b[part], part)
    for checkpoint in (checkpoint_a, checkpoint_b):
        loop = checkpoint["loops"]["fit_loop"]
        assert loop["state_dict"]["combined_loader"] == [{"consumed": STEPS * 4}]
        assert checkpoint["global_step"] == STEPS
    assert rows_a == rows_b


@pytest.mark.parametrize("stage", ["vqseg", "vqgan", "gpt"])
def test_killed_and_resumed_equals_uninterrupted(stage, words, at_step, tmp_path):
    settings = dict(trainer__max_steps=STEPS, checkpoints__every_n_steps=1)
    assert train(words(stage, "straight", **settings)) == 0
    for step in (2, VALIDATED, STEPS - 1):
        folder = f"killed at {step}"
        at_step(step, kill)
        with pytest.raises(Killed):
            train(words(stage, folder, **settings))
        at_step(None)
        assert train([*words(stage, folder, **settings), "--ckpt_path=last"]) == 0
        assert_equal_runs(tmp_path / "straight", tmp_path / folder)
