"""A run that is killed and resumed equals, bit for bit, one that was not."""

import csv
import logging
import os
import signal

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.cli import train
from train.data import SceneData, TokenData
from train.metrics_log import MetricsLog
from train.stage import Stage

STEPS = 7  # of 4 pictures from 20: more than an epoch
VALIDATED = 4


class Killed(Exception):
    """Stands for SIGKILL: nothing in the run reacts to it by saving."""


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


def assert_equal_runs(a, b, *, samples=STEPS * 4, steps=STEPS, cut=None):
    """`cut`: step whose validation a signal cut in run `b`."""
    (checkpoint_a, rows_a), (checkpoint_b, rows_b) = read_run(a), read_run(b)
    rows_a = [row for row in rows_a if "validation/loss" not in row or row["step"] != str(cut)]
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        assert_equal(checkpoint_a[part], checkpoint_b[part], part)
    for checkpoint in (checkpoint_a, checkpoint_b):
        loop = checkpoint["loops"]["fit_loop"]
        assert loop["state_dict"]["combined_loader"] == [{"consumed": samples}]
        assert checkpoint["global_step"] == steps
    assert rows_a == rows_b


KILLS = [
    ("vqseg", (2,)),
    ("vqgan", (3,)),
    ("gpt", (1, VALIDATED, STEPS - 1)),
    ("judge", (5,)),
    ("refiner", (4,)),
]


@pytest.mark.parametrize(("stage", "steps"), KILLS)
def test_killed_and_resumed_equals_uninterrupted(stage, steps, words, at_step, tmp_path):
    settings = dict(trainer__max_steps=STEPS, checkpoints__every_n_steps=1)
    assert train(words(stage, "straight", **settings)) == 0
    for step in steps:
        folder = f"killed at {step}"
        at_step(step, kill)
        with pytest.raises(Killed):
            train(words(stage, folder, **settings))
        at_step(None)
        assert train([*words(stage, folder, **settings), "--ckpt_path=last"]) == 0
        assert_equal_runs(tmp_path / "straight", tmp_path / folder)


@pytest.mark.parametrize("stage", ["vqgan", "gpt"])
def test_accumulating_gradients_resumes_between_steps(stage, words, at_step, tmp_path):
    key = "model__accumulate" if stage == "vqgan" else "trainer__accumulate_grad_batches"
    settings = {"trainer__max_steps": 3, "checkpoints__every_n_steps": 1, key: 2}
    assert train(words(stage, "straight", **settings)) == 0
    at_step(2, kill, batch=5)  # half of step 2 is done and lost
    with pytest.raises(Killed):
        train(words(stage, "killed", **settings))
    at_step(None)
    assert train([*words(stage, "killed", **settings), "--ckpt_path=last"]) == 0
    assert_equal_runs(tmp_path / "straight", tmp_path / "killed", samples=3 * 2 * 4, steps=3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_from_there(number, words, at_step, tmp_path):
    settings = dict(trainer__max_steps=STEPS, checkpoints__every_n_steps=100, data__workers=1)
    handler = signal.getsignal(number)
    assert train(words("gpt", "straight", **settings)) == 0
    at_step(2, lambda: os.kill(os.getpid(), number))
    assert train(words("gpt", "stopped", **settings)) == 128 + number
    assert signal.getsignal(number) == handler
    assert read_run(tmp_path / "stopped")[0]["global_step"] == 3
    at_step(None)
    assert train([*words("gpt", "stopped", **settings), "--ckpt_path=auto"]) == 0
    assert_equal_runs(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("stage", ["vqseg", "vqgan", "gpt", "judge"])
def test_a_signal_amid_validation_leaves_the_rest_of_it_out(stage, words, monkeypatch, tmp_path):
    settings = dict(trainer__max_steps=STEPS, data__holdout=2, data__batch_size=2)
    assert train(words(stage, "straight", **settings)) == 0
    validated = []
    original = Stage.on_validation_batch_start

    def interrupt(self, batch, batch_idx, dataloader_idx=0):
        validated.append(batch_idx)
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, batch, batch_idx, dataloader_idx)

    monkeypatch.setattr(Stage, "on_validation_batch_start", interrupt)
    assert train(words(stage, "cut", **settings)) == 128 + signal.SIGTERM
    assert validated == [0, 1]  # of six
    checkpoint, rows = read_run(tmp_path / "cut")
    assert checkpoint["global_step"] == VALIDATED + 1
    assert not any("validation/loss" in row for row in rows)  # half of the pictures are no measure
    assert not (tmp_path / "cut/checkpoints/best.ckpt").exists()
    monkeypatch.undo()
    assert train([*words(stage, "cut", **settings), "--ckpt_path=last"]) == 0
    assert_equal_runs(tmp_path / "straight", tmp_path / "cut", samples=STEPS * 2, cut=VALIDATED)


def test_a_failed_write_leaves_the_last_checkpoint(words, monkeypatch, tmp_path):
    def save(content, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    assert train(words("gpt", trainer__max_steps=1)) == 0
    last = tmp_path / "run/checkpoints/last.ckpt"
    before = last.read_bytes()
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left"):
        train([*words("gpt", trainer__max_steps=2), "--ckpt_path=last"])
    assert last.read_bytes() == before
    assert list(last.parent.iterdir()) == [last]


def test_a_longer_run_goes_on_where_the_finished_one_stopped(words, tmp_path):
    settings = dict(model__optimiser__schedule="constant")
    assert train(words("gpt", "straight", trainer__max_steps=STEPS, **settings)) == 0
    assert train(words("gpt", "longer", trainer__max_steps=4, **settings)) == 0
    longer = words("gpt", "longer", trainer__max_steps=STEPS, **settings)
    assert train([*longer, "--ckpt_path=last"]) == 0
    assert_equal_runs(tmp_path / "straight", tmp_path / "longer")


def test_changed_settings_are_told_and_another_network_is_refused(words, caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="train")
    assert train(words("gpt", trainer__max_steps=1)) == 0
    changed = words("gpt", trainer__max_steps=2, model__caption_dropout__share=0.5)
    assert train([*changed, "--ckpt_path=last"]) == 0
    told = [r.getMessage() for r in caplog.records if "until this checkpoint" in r.getMessage()]
    assert len(told) == 2 and "model.caption_dropout.share was 0.3" in "".join(told)
    last = tmp_path / "run/checkpoints/last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    del checkpoint["network"]["text_head"]  # as those of earlier versions
    torch.save(checkpoint, last)
    assert train([*words("gpt", trainer__max_steps=3), "--ckpt_path=last"]) == 0
    other = words("gpt", trainer__max_steps=4, model__network__layers=1)
    with pytest.raises(ValueError, match="of another network: layers is 2, not 1"):
        train([*other, "--ckpt_path=last"])


@pytest.fixture
def held(monkeypatch):
    """held(n): all that is opened holds the first n pictures only."""

    def arrange(count):
        for data in (SceneData, TokenData):
            original = data.open
            monkeypatch.setattr(data, "open", lambda self, of=original: min(of(self), count))

    return arrange


@pytest.mark.parametrize("stage", ["vqseg", "gpt"])
def test_data_that_grew_or_shrank_is_told(stage, held, words, caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="train")

    def told():
        return [r.getMessage() for r in caplog.records if "pictures until" in r.getMessage()]

    assert train(words(stage, trainer__max_steps=1)) == 0
    assert train([*words(stage, trainer__max_steps=2), "--ckpt_path=last"]) == 0
    assert not told()
    held(20)
    assert train([*words(stage, trainer__max_steps=3), "--ckpt_path=last"]) == 0
    assert len(told()) == 1 and "held 24 pictures until this checkpoint, holds 20 now" in told()[0]
    assert train([*words(stage, trainer__max_steps=4), "--ckpt_path=last"]) == 0
    assert len(told()) == 1  # said once; the checkpoint of step 3 knows of 20


def test_a_checkpoint_that_does_not_say_how_many_pictures_there_were_goes_on(
    held, words, caplog, tmp_path
):
    assert train(words("gpt", trainer__max_steps=1)) == 0
    last = tmp_path / "run/checkpoints/last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint.pop("TokenData") == {"pictures": 24}
    torch.save(checkpoint, last)  # as those of earlier versions
    held(20)
    assert train([*words("gpt", trainer__max_steps=2), "--ckpt_path=last"]) == 0
    assert "pictures until" not in caplog.text
    assert torch.load(last, weights_only=True)["TokenData"] == {"pictures": 20}


@pytest.mark.parametrize("losses", [(1.0, 0.5, 0.8), (0.5, 0.5, 0.6), (1.0, 0.9, 0.8)])
def test_the_best_network_is_the_best_of_the_whole_run(losses, words, scripted, at_step, tmp_path):
    scripted(dict(zip((2, 4, 6), losses, strict=True)))
    settings = dict(trainer__max_steps=6, trainer__val_check_interval=2)
    settings |= dict(checkpoints__every_n_steps=2)
    at_step(5, kill)  # the last checkpoint is that of step 4, written before its validation
    with pytest.raises(Killed):
        train(words("vqseg", "run", **settings))
    at_step(None)
    assert train([*words("vqseg", "run", **settings), "--ckpt_path=last"]) == 0
    best = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)
    assert best["global_step"] == 2 * (1 + losses.index(min(losses)))
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("validation/loss")] == [2, 4, 6]


def test_a_loss_that_is_no_number_is_never_the_best(words, scripted, tmp_path):
    scripted({2: 0.5, 4: float("nan"), 6: 0.8})
    settings = dict(trainer__max_steps=6, trainer__val_check_interval=2)
    assert train(words("vqseg", **settings)) == 0
    best = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)
    assert best["global_step"] == 2


def test_without_averaging_a_run_goes_on_with_the_weights_it_trained(words, monkeypatch, tmp_path):
    assert train(words("vqseg", trainer__max_steps=3)) == 0
    checkpoint, _ = read_run(tmp_path / "run")
    seen = []
    original = Stage.on_train_batch_start

    def look(self, batch, batch_idx):
        seen.append({name: x.clone() for name, x in self.state_dict().items()})
        original(self, batch, batch_idx)

    monkeypatch.setattr(Stage, "on_train_batch_start", look)
    more = words("vqseg", trainer__max_steps=4, ema_decay=0)
    assert train([*more, "--ckpt_path=last"]) == 0
    trained, average = checkpoint["current_model_state"], checkpoint["state_dict"]
    assert any(not torch.equal(trained[name], average[name]) for name in trained)
    assert_equal(seen[0], dict(trained))


@pytest.mark.parametrize(("before", "now"), [(0.9, 0.0), (0.0, 0.9), (0.9, 0.5)])
def test_another_averaging_is_told_in_one_line(words, recwarn, caplog, before, now):
    assert train(words("vqseg", trainer__max_steps=1, ema_decay=before)) == 0
    more = words("vqseg", trainer__max_steps=2, ema_decay=now)
    assert train([*more, "--ckpt_path=last"]) == 0
    told = [record.getMessage() for record in caplog.records if "ema_decay" in record.getMessage()]
    assert told == [f"ema_decay was {before} until this checkpoint, is now {now}"]
    assert not [x for x in recwarn if "Averaging" in str(x.message)]


@pytest.mark.parametrize("stage", ["vqgan", "gpt"])
def test_a_validation_amid_a_step_changes_nothing(stage, words, tmp_path):
    key = "model__accumulate" if stage == "vqgan" else "trainer__accumulate_grad_batches"
    settings = {"trainer__max_steps": 4, key: 2}
    for interval in (3, 8):  # batches: amid the second step, and after the last
        folder = f"every {interval}"
        assert train(words(stage, folder, **settings, trainer__val_check_interval=interval)) == 0
    (amid, _), (after, _) = read_run(tmp_path / "every 3"), read_run(tmp_path / "every 8")
    assert_equal(dict(amid["current_model_state"]), dict(after["current_model_state"]))


def test_a_log_without_training_rows_can_be_gone_on_with(tmp_path):
    MetricsLog(tmp_path).log_metrics({"validation/loss": 1.0}, 2)
    log = MetricsLog(tmp_path, resumed_step=2)
    log.log_metrics({"validation/loss": 0.5}, 4)
    with open(log.path, newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "4"]
