"""A run ends when its validation has been no better for checkpoints.patience steps, exactly so."""

import csv
import logging

import pytest
import torch

from train.cli import train

# The validation after step 4 is the best; every second step is validated.
LOSSES = {2: 0.9, 4: 0.5, 6: 0.8, 8: 0.7, 10: 0.6, 12: 0.4}
OFTEN = dict(trainer__max_steps=12, trainer__val_check_interval=2, pictures__count=0)


class Killed(Exception):
    """Stands for SIGKILL: nothing in the run reacts to it by saving."""


def kill():
    raise Killed


def steps_of(run):
    """Steps of last.ckpt, of best.ckpt, and of the validations."""
    with open(run / "metrics.csv", newline="") as file:
        validated = [int(row["step"]) for row in csv.DictReader(file) if row["validation/loss"]]
    last, best = (
        torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)["global_step"]
        for name in ("last", "best")
    )
    return last, best, validated


def assert_equal_files(a, b):
    for name in ("metrics.csv", "model.safetensors", "best/model.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize(
    ("patience", "validated"),
    [(0, [2, 4, 6, 8, 10, 12]), (1, [2, 4, 6]), (4, [2, 4, 6, 8]), (5, [2, 4, 6, 8, 10])],
)
@pytest.mark.parametrize("every", [2, 5])
def test_a_run_ends_after_its_patience_and_is_saved(
    every, patience, validated, words, scripted, caplog, tmp_path
):
    caplog.set_level(logging.INFO, logger="train")
    scripted(LOSSES)
    settings = OFTEN | dict(checkpoints__every_n_steps=every, checkpoints__patience=patience)
    assert train(words("vqseg", **settings)) == 0
    best = min(validated, key=LOSSES.get)
    assert steps_of(tmp_path / "run") == (validated[-1], best, validated)
    assert ("no better than at step 4" in caplog.text) == bool(patience)


@pytest.mark.parametrize("stage", ["vqgan", "gpt", "judge", "refiner"])
def test_a_run_that_ended_early_leaves_the_network_it_ended_with(stage, words, tmp_path):
    # The learning rate stands for a loss: it rises while it warms up.
    settings = OFTEN | dict(checkpoints__every_n_steps=100, checkpoints__monitor="learning_rate")
    settings |= dict(model__optimiser__warmup_steps=100)
    assert train(words(stage, "early", **settings, checkpoints__patience=4)) == 0
    assert train(words(stage, "shorter", **settings | dict(trainer__max_steps=6))) == 0
    assert steps_of(tmp_path / "early") == (6, 2, [2, 4, 6])
    assert_equal_files(tmp_path / "early", tmp_path / "shorter")


@pytest.mark.parametrize("killed", [3, 5, 7])
def test_killed_and_resumed_it_ends_where_it_would_have(killed, words, scripted, at_step, tmp_path):
    scripted(LOSSES)
    settings = OFTEN | dict(checkpoints__every_n_steps=2, checkpoints__patience=4)
    assert train(words("vqseg", "straight", **settings)) == 0
    at_step(killed, kill)  # the last checkpoint was written before the validation of its step
    with pytest.raises(Killed):
        train(words("vqseg", "killed", **settings))
    at_step(None)
    assert train([*words("vqseg", "killed", **settings), "--ckpt_path=last"]) == 0
    assert steps_of(tmp_path / "killed") == steps_of(tmp_path / "straight")
    assert_equal_files(tmp_path / "killed", tmp_path / "straight")


def test_the_same_command_again_leaves_an_ended_run_as_it_is(words, scripted, caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="train")
    scripted(LOSSES)
    command = words("vqseg", **OFTEN, checkpoints__patience=4)
    assert train(command) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.*") if p.is_file()}
    assert train([*command, "--ckpt_path=auto"]) == 0
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.*") if p.is_file()} == before
    assert "nothing to do: the run ended at step 8" in caplog.text
    assert "raise checkpoints.patience to go on" in caplog.text


@pytest.mark.parametrize("patience", [0, 8])
def test_with_more_patience_it_goes_on_as_if_it_had_never_ended(
    patience, words, scripted, tmp_path
):
    scripted(LOSSES)
    assert train(words("vqseg", "straight", **OFTEN, checkpoints__patience=patience)) == 0
    assert train(words("vqseg", "ended", **OFTEN, checkpoints__patience=4)) == 0
    again = words("vqseg", "ended", **OFTEN, checkpoints__patience=patience)
    assert train([*again, "--ckpt_path=last"]) == 0
    assert steps_of(tmp_path / "ended") == (12, 12, [2, 4, 6, 8, 10, 12])
    assert_equal_files(tmp_path / "ended", tmp_path / "straight")


def test_averages_of_accumulated_steps_go_on_as_if_they_had_never_ended(words, tmp_path):
    settings = OFTEN | dict(trainer__accumulate_grad_batches=2, trainer__val_check_interval=4)
    settings |= dict(checkpoints__monitor="learning_rate", model__optimiser__warmup_steps=100)
    assert train(words("gpt", "straight", **settings)) == 0
    assert train(words("gpt", "ended", **settings, checkpoints__patience=4)) == 0
    assert steps_of(tmp_path / "ended")[0] == 6
    assert train([*words("gpt", "ended", **settings), "--ckpt_path=last"]) == 0
    assert steps_of(tmp_path / "ended")[0] == 12
    assert_equal_files(tmp_path / "ended", tmp_path / "straight")


def test_a_loss_that_is_no_number_is_no_better(words, scripted, tmp_path):
    scripted(LOSSES | dict.fromkeys((6, 8, 10), float("nan")))
    assert train(words("vqseg", **OFTEN, checkpoints__patience=4)) == 0
    assert steps_of(tmp_path / "run") == (8, 4, [2, 4, 6, 8])


def test_a_run_that_was_never_good_ends_where_it_would_have(words, scripted, at_step, tmp_path):
    scripted(dict.fromkeys(LOSSES, float("nan")))
    settings = OFTEN | dict(checkpoints__every_n_steps=2, checkpoints__patience=8)
    at_step(5, kill)
    with pytest.raises(Killed):
        train(words("vqseg", **settings))
    at_step(None)
    assert train([*words("vqseg", **settings), "--ckpt_path=last"]) == 0
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 8


def test_a_checkpoint_of_before_is_waited_for_from_its_own_step(words, scripted, tmp_path):
    scripted({2: 0.5, 4: 0.6, 6: 0.7, 8: 0.8, 10: 0.9})
    assert train(words("vqseg", **OFTEN | dict(trainer__max_steps=5))) == 0
    (tmp_path / "run/checkpoints/best.ckpt").unlink()  # which would tell the step
    last = tmp_path / "run/checkpoints/last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["callbacks"]["Checkpoints"].pop("best_step")
    torch.save(checkpoint, last)
    assert train([*words("vqseg", **OFTEN, checkpoints__patience=4), "--ckpt_path=last"]) == 0
    assert torch.load(last, weights_only=True)["global_step"] == 10  # 6 and 8 are within 4 of 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(checkpoints__patience=-1), "checkpoints.patience is -1, use 0 or more"),
        (
            dict(checkpoints__patience=4, checkpoints__monitor="null"),
            "checkpoints.patience waits for a better checkpoints.monitor, and that is null",
        ),
    ],
)
def test_a_patience_that_cannot_be_is_refused(settings, message, words, capsys):
    with pytest.raises((SystemExit, ValueError)) as refused:
        train(words("vqseg", **OFTEN, **settings))
    assert message in str(refused.value) + capsys.readouterr().err
