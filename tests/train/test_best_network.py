"""RUN/best is the network of best.ckpt, and a run that ends worse than its best says so."""

import logging

import pytest
import torch
from safetensors.torch import load_file

from mas.gpt import GPT
from mas.judge import SceneJudge
from mas.refiner import Refiner
from mas.rounding import narrow
from mas.vqgan import VQGAN
from mas.vqseg import VQSEG
from train import callbacks
from train.cli import train

NETWORKS = {"vqseg": VQSEG, "vqgan": VQGAN, "gpt": GPT, "judge": SceneJudge, "refiner": Refiner}
# The learning rate stands for a loss: rising while it warms up, falling on a cosine.
OFTEN = dict(trainer__max_steps=6, trainer__val_check_interval=2, checkpoints__every_n_steps=2)
OFTEN |= dict(checkpoints__monitor="learning_rate", pictures__count=0)
RISING = OFTEN | dict(model__optimiser__warmup_steps=100)
FALLING = OFTEN | dict(model__optimiser__warmup_steps=0)


class Killed(Exception):
    """Stands for SIGKILL: nothing in the run reacts to it by saving."""


@pytest.fixture
def kill_before_export(monkeypatch):
    """kill_before_export(n): the n-th write of best/ (from 1) is not reached; None undoes."""
    original = callbacks.save_network

    def arrange(number):
        reached = []

        def save(network, folder, **options):
            if folder.name == "best":
                reached.append(folder)
                if len(reached) == number:
                    raise Killed
            original(network, folder, **options)

        monkeypatch.setattr(callbacks, "save_network", save)

    return arrange


def read_step(run):
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]


def best_of(run):
    """Step and network weights of best.ckpt."""
    checkpoint = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    state = checkpoint["state_dict"]
    return checkpoint["global_step"], {
        name.removeprefix("network."): weight
        for name, weight in state.items()
        if name.startswith("network.")
    }


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("ema", [0.9, 0])
@pytest.mark.parametrize("stage", NETWORKS)
def test_best_holds_the_network_of_the_best_checkpoint(stage, ema, words, tmp_path):
    assert train(words(stage, **RISING, ema_decay=ema)) == 0
    run = tmp_path / "run"
    step, weights = best_of(run)
    assert step == 2
    network = NETWORKS[stage].from_pretrained(run / "best")
    assert equal(dict(network.state_dict()), weights)
    assert not equal(load_file(run / "model.safetensors"), weights)
    files = {"config.json", "model.safetensors"}
    files |= {"tokens.json"} if stage in ("gpt", "judge", "refiner") else set()
    assert {path.name for path in (run / "best").iterdir()} == files
    for name in files - {"model.safetensors"}:
        assert (run / "best" / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.parametrize("weights", ["float16", "int8"])
def test_best_has_the_number_format_of_the_run(weights, words, tmp_path):
    assert train(words("vqseg", **RISING, checkpoints__weights=weights)) == 0
    expected = narrow(best_of(tmp_path / "run")[1], weights)
    assert equal(load_file(tmp_path / "run/best/model.safetensors"), expected)


@pytest.mark.parametrize(("killed", "step"), [(1, 2), (2, 4), (3, 6)])
def test_best_is_mended_after_a_kill_between_checkpoint_and_network(
    killed, step, words, kill_before_export, tmp_path
):
    kill_before_export(killed)
    with pytest.raises(Killed):
        train(words("gpt", **FALLING))
    run = tmp_path / "run"
    found, weights = best_of(run)
    assert found == step
    exported = run / "best/model.safetensors"
    assert not exported.exists() or not equal(load_file(exported), weights)
    kill_before_export(2)  # the next better validation comes after the mend
    try:
        train([*words("gpt", **FALLING), "--ckpt_path=last"])
    except Killed:
        assert step < 6
    else:
        assert step == 6
    assert equal(load_file(exported), weights)


@pytest.mark.parametrize("steps", [2, 4])
def test_the_last_network_of_a_finished_run_is_mended_after_a_kill(
    steps, words, monkeypatch, tmp_path
):
    settings = dict(trainer__max_steps=steps, checkpoints__every_n_steps=2)
    original = callbacks.save_network

    def save(network, folder, **options):
        if (folder / "checkpoints/last.ckpt").is_file() and read_step(folder) == steps:
            raise Killed
        original(network, folder, **options)

    monkeypatch.setattr(callbacks, "save_network", save)
    with pytest.raises(Killed):
        train(words("gpt", "killed", **settings))
    monkeypatch.undo()
    assert train([*words("gpt", "killed", **settings), "--ckpt_path=last"]) == 0
    assert train(words("gpt", "straight", **settings)) == 0
    for name in ("config.json", "model.safetensors"):
        files = [tmp_path / folder / name for folder in ("killed", "straight")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_best_is_that_of_the_whole_run_after_a_kill(words, kill_before_export, tmp_path):
    assert train(words("vqseg", "straight", **FALLING)) == 0
    kill_before_export(2)
    with pytest.raises(Killed):
        train(words("vqseg", "killed", **FALLING))
    kill_before_export(None)
    assert train([*words("vqseg", "killed", **FALLING), "--ckpt_path=last"]) == 0
    straight, killed = (tmp_path / folder for folder in ("straight", "killed"))
    assert best_of(straight)[0] == best_of(killed)[0] == 6
    name = "best/model.safetensors"
    assert (straight / name).read_bytes() == (killed / name).read_bytes()
    assert equal(load_file(killed / name), best_of(killed)[1])


def test_a_finished_run_of_before_gets_its_best_network(words, tmp_path):
    assert train(words("gpt", **RISING)) == 0
    run = tmp_path / "run"
    before = {path.name: path.read_bytes() for path in (run / "best").iterdir()}
    for path in (run / "best").iterdir():
        path.unlink()
    (run / "best").rmdir()
    assert train([*words("gpt", **RISING), "--ckpt_path=auto"]) == 0
    assert {path.name: path.read_bytes() for path in (run / "best").iterdir()} == before


def test_without_validation_there_is_no_best(words, tmp_path):
    assert train(words("vqseg", trainer__max_steps=2, checkpoints__monitor=None)) == 0
    assert train([*words("vqseg", trainer__max_steps=2), "--ckpt_path=last"]) == 0
    assert not (tmp_path / "run/best").exists()


def told(caplog):
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if "in place of" in message]


def test_a_run_that_ends_worse_than_its_best_says_so_once(words, caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="train")
    assert train(words("vqseg", **RISING)) == 0
    run = tmp_path / "run"
    assert told(caplog) == [
        f"learning_rate is 0.00018, at step 2 it was 6e-05: the network of that step is in "
        f"{run / 'best'}; give it to mas tokenize, mas assemble and others in place of {run}"
    ]


def test_a_run_that_went_on_still_knows_its_best(words, caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="train")
    assert train(words("vqseg", **RISING | dict(trainer__max_steps=2))) == 0
    assert not told(caplog)
    assert train([*words("vqseg", **RISING), "--ckpt_path=last"]) == 0
    assert len(told(caplog)) == 1 and "at step 2 it was" in told(caplog)[0]


def test_a_run_that_went_on_in_another_folder_names_nothing_it_lacks(words, caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="train")
    assert train(words("vqseg", "first", **RISING | dict(trainer__max_steps=2))) == 0
    best = tmp_path / "first/checkpoints/best.ckpt"
    assert train(words("vqseg", **RISING, ckpt_path=best)) == 0
    assert not (tmp_path / "run/best").exists() and not told(caplog)


@pytest.mark.parametrize("settings", [FALLING, OFTEN | dict(model__optimiser__schedule="constant")])
def test_a_run_that_ends_no_worse_says_nothing(settings, words, caplog):
    caplog.set_level(logging.INFO, logger="train")
    settings = settings | dict(model__optimiser__warmup_steps=0)
    assert train(words("vqseg", **settings)) == 0
    assert not told(caplog)


def test_a_run_without_a_best_names_none(words, scripted, caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="train")
    scripted(dict.fromkeys((2, 4, 6), float("nan")))
    settings = OFTEN | dict(checkpoints__monitor="validation/loss")
    assert train(words("vqseg", **settings)) == 0
    assert not (tmp_path / "run/best").exists() and not told(caplog)


@pytest.fixture(params=["empty", "half", "no checkpoint"])
def damage(request):
    """damage(file): as a full disk, a cut copy or another program leave it."""

    def spoil(path):
        content = path.read_bytes()
        spoilt = {"empty": b"", "half": content[: len(content) // 2], "no checkpoint": b"words"}
        path.write_bytes(spoilt[request.param])

    return spoil


def test_a_damaged_best_does_not_stop_a_run(damage, words, caplog, tmp_path):
    settings = FALLING | dict(trainer__max_steps=4)
    assert train(words("vqseg", **settings)) == 0
    run = tmp_path / "run"
    network = (run / "best/model.safetensors").read_bytes()
    damage(run / "checkpoints/best.ckpt")
    assert train([*words("vqseg", **settings), "--ckpt_path=last"]) == 0  # a finished run
    assert (run / "best/model.safetensors").read_bytes() == network
    assert train([*words("vqseg", **FALLING), "--ckpt_path=last"]) == 0
    assert best_of(run)[0] == 6
    warned = [r.getMessage() for r in caplog.records if "is damaged and passed over" in r.message]
    assert len(warned) == 2 and str(run / "checkpoints/best.ckpt") in warned[0]


def test_a_damaged_best_is_not_replaced_by_a_worse_one(damage, words, tmp_path):
    assert train(words("vqseg", **RISING | dict(trainer__max_steps=4))) == 0
    run = tmp_path / "run"
    network = (run / "best/model.safetensors").read_bytes()
    damage(run / "checkpoints/best.ckpt")
    assert train([*words("vqseg", **RISING), "--ckpt_path=last"]) == 0
    assert (run / "best/model.safetensors").read_bytes() == network


@pytest.mark.parametrize(("named", "other"), [("last", "best"), ("best", "last")])
def test_a_damaged_checkpoint_advises_the_one_beside_it(named, other, words, tmp_path):
    assert train(words("vqseg", **FALLING)) == 0
    folder = tmp_path / "run/checkpoints"
    damaged, whole = (folder / f"{name}.ckpt" for name in (named, other))
    damaged.write_bytes(b"words")
    longer = words("vqseg", **FALLING | dict(trainer__max_steps=8))
    with pytest.raises(ValueError, match=f"go on from the one beside it with --ckpt_path {whole}"):
        train([*longer, f"--ckpt_path={damaged}"])
    assert train([*longer, f"--ckpt_path={whole}"]) == 0
    assert read_step(tmp_path / "run") == 8
    whole.unlink()
    damaged.write_bytes(b"words")
    with pytest.raises(ValueError, match=r"mas train; start afresh in another folder \("):
        train([*longer, f"--ckpt_path={damaged}"])


def test_a_monitor_that_nothing_logs_is_told_of_once(words, caplog, tmp_path):
    settings = FALLING | dict(checkpoints__monitor="validation/lss")
    assert train(words("vqseg", **settings)) == 0
    said = [r.getMessage() for r in caplog.records if "nothing logs" in r.message]
    assert len(said) == 1 and "validation/lss" in said[0] and "validation/loss" in said[0]
    assert not (tmp_path / "run/checkpoints/best.ckpt").exists()
