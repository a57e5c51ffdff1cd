"""Every stage through the real `mas train`: what a run leaves behind, and how it refuses."""

import csv
import json
import re
import warnings

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

from mas.__main__ import main
from mas.gpt import GPT
from mas.judge import SceneJudge
from mas.refiner import Refiner
from mas.shards import TokenShards
from mas.vqgan import VQGAN
from mas.vqseg import VQSEG
from train import progress
from train.cli import train
from train.runner import JOBS

NETWORKS = {"vqseg": VQSEG, "vqgan": VQGAN, "gpt": GPT, "judge": SceneJudge, "refiner": Refiner}


@pytest.mark.parametrize("stage", NETWORKS)
def test_the_run_folder_is_the_averaged_network(stage, words, tmp_path):
    assert train(words(stage, trainer__max_steps=4)) == 0
    run = tmp_path / "run"
    network = NETWORKS[stage].from_pretrained(run)
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    averaged, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    exported = load_file(run / "model.safetensors")
    assert exported.keys() == network.state_dict().keys()
    for name, weight in exported.items():
        assert torch.equal(weight, averaged[f"network.{name}"])
    assert any(not torch.equal(exported[n], current[f"network.{n}"]) for n in exported)
    assert torch.load(run / "checkpoints/best.ckpt", weights_only=True)["global_step"] == 4
    assert yaml.safe_load((run / "config.yaml").read_text()) == yaml.safe_load(checkpoint["config"])
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["train/loss"]] == ["0", "1", "2", "3"]
    assert [row["step"] for row in rows if row["validation/loss"]] == ["4"]
    assert any((run / "tensorboard").iterdir())
    if stage in ("vqseg", "vqgan", "refiner"):
        with Image.open(run / "pictures/00000004.png") as sheet:
            assert sheet.height > 4 * 128  # the four held-out pictures
    leftovers = [path.name for path in run.rglob(".*")]
    assert not leftovers


@pytest.mark.parametrize("stage", NETWORKS)
def test_every_stage_learns_its_tiny_world(stage, words, tmp_path):
    settings = dict(ema_decay=0, pictures__count=0, trainer__val_check_interval=100)
    assert train(words(stage, trainer__max_steps=40, **settings)) == 0
    with open(tmp_path / "run/metrics.csv", newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_pictures_of_the_gpt_follow_from_tokenizers_with_the_right_hashes(words, tmp_path):
    for stage in ("vqseg", "vqgan"):
        assert train(words(stage, stage, trainer__max_steps=1)) == 0
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        train(
            words(
                "gpt",
                trainer__max_steps=1,
                model__preview__tokenizer=tmp_path / "tokenizer.json",
                model__preview__vqseg=tmp_path / "vqseg",
                model__preview__vqgan=tmp_path / "vqgan",
            )
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainer__max_steps": None}, "set trainer.max_steps"),
        ({"trainer__max_epochs": 3}, "leave trainer.max_epochs alone"),
        ({"trainer__min_steps": 3}, "leave trainer.min_steps alone"),
        ({"trainer__min_epochs": 1}, "leave trainer.min_epochs alone"),
        ({"trainer__val_check_interval": 0}, "trainer.val_check_interval is 0: give the batches"),
        ({"trainer__val_check_interval": -3}, "trainer.val_check_interval is -3: give the batches"),
        ({"trainer__val_check_interval": 0.5}, "trainer.val_check_interval is 0.5: give the batch"),
        ({"trainer__val_check_interval": 1.0}, "a whole number of 1 or more"),
        ({"trainer__accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches is 0: give the"),
        ({"trainer__precision": "16-mixed"}, "trainer.precision 16-mixed needs a scaled loss"),
        ({"data__batch_size": 21}, "24 pictures .20 without those held out. are fewer than one"),
        ({"model__network__image_vocabulary": 64}, r"image vocabulary 32 \(the network 64\): set"),
        ({"ckpt_path": "last"}, "there is no checkpoint .*last.ckpt: start without --ckpt_path"),
        ({"ckpt_path": "other.ckpt"}, "there is no checkpoint other.ckpt"),
        ({"data__input": "no/tokens"}, "no/tokens: no manifest.json"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(settings, message, words):
    with pytest.raises(ValueError, match=message) as caught:
        train(words("gpt", **{"trainer__max_steps": 2, **settings}))
    assert "\n" not in str(caught.value)


def test_a_fresh_run_does_not_overwrite_another(words):
    assert train(words("gpt", trainer__max_steps=1)) == 0
    with pytest.raises(ValueError, match="already holds a run: go on with --ckpt_path last"):
        train(words("gpt", trainer__max_steps=1))


def test_a_run_from_elsewhere_does_not_overwrite_another(words, tmp_path):
    for folder in ("run", "other"):
        assert train(words("gpt", folder, trainer__max_steps=1)) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}
    elsewhere = tmp_path / "other/checkpoints/last.ckpt"
    with pytest.raises(ValueError, match="already holds a run, which one from"):
        train(words("gpt", trainer__max_steps=2, ckpt_path=elsewhere))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")} == before
    assert train(words("gpt", "new", trainer__max_steps=2, ckpt_path=elsewhere)) == 0
    own = tmp_path / "run/checkpoints/../checkpoints/last.ckpt"
    assert train(words("gpt", trainer__max_steps=2, ckpt_path=own)) == 0


def test_a_run_folders_config_starts_afresh_elsewhere(words, tmp_path):
    assert train(words("gpt", trainer__max_steps=1)) == 0
    assert train([*words("gpt", trainer__max_steps=2), "--ckpt_path=last"]) == 0
    new = tmp_path / "new"
    config = f"--config={tmp_path / 'run/config.yaml'}"
    assert train(["gpt", config, f"--trainer.default_root_dir={new}"]) == 0
    assert torch.load(new / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("vqseg", {}, "the checkpoint is one of mas train gpt, not of vqseg"),
        ("gpt", {"model__optimiser.kind": "muon"}, "was trained with adamw, whose state muon does"),
        ("gpt", {"model__network.width": 64}, "another network: width is 32, not 64"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(stage, settings, message, words):
    assert train(words("gpt", trainer__max_steps=1)) == 0
    with pytest.raises(ValueError, match=message):
        train([*words(stage, trainer__max_steps=2, **settings), "--ckpt_path=last"])


def test_a_run_without_held_out_pictures_says_what_it_lacks(words, caplog):
    assert train(words("gpt", trainer__max_steps=1, data__holdout=25)) == 0
    assert "nothing is validated" in caplog.text
    assert "of 24 pictures every 25-th would be held out, give more data, or set" in caplog.text
    assert "set data.holdout to 12 or less" in caplog.text


def test_a_finished_run_is_left_as_it_is(words, tmp_path, caplog):
    caplog.set_level("INFO", "train")
    assert train(words("gpt", trainer__max_steps=2)) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    assert train([*words("gpt", trainer__max_steps=2), "--ckpt_path=auto"]) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")} == before
    assert "nothing to do: the run has its 2 steps; raise trainer.max_steps" in caplog.text


def test_a_checkpoint_beyond_the_last_step_is_told_with_both_steps(words, tmp_path, caplog):
    caplog.set_level("INFO", "train")
    assert train(words("gpt", trainer__max_steps=2)) == 0
    last = f"--ckpt_path={tmp_path}/run/checkpoints/last.ckpt"
    for steps, folder in ((2, "second"), (1, "third")):
        caplog.clear()
        assert train([*words("gpt", folder, trainer__max_steps=steps), last]) == 0
        told = f"nothing to do: the checkpoint is at step 2, trainer.max_steps is {steps}: raise it"
        assert told in caplog.text


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half a zip file"])
def test_a_damaged_checkpoint_is_named(content, words, tmp_path):
    path = tmp_path / "damaged.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.ckpt: not a readable checkpoint"):
        train(words("gpt", trainer__max_steps=2, ckpt_path=path))


def spoil(monkeypatch, change):
    """Lets the GPT's image loss in training be `change(loss)`."""
    original = GPT.losses

    def losses(self, *tokens):
        result = original(self, *tokens)
        return result._replace(image=change(result.image)) if self.training else result

    monkeypatch.setattr(GPT, "losses", losses)


def blow_up(loss):
    return loss + (loss - loss.detach()) * 1e38 * 1e38  # the value stays, the gradient does not


@pytest.mark.parametrize(
    ("change", "reason"),
    [(lambda loss: loss * float("nan"), "the loss is nan"), (blow_up, "the gradient norm is")],
)
def test_what_is_no_number_stops_the_run_before_the_weights(
    change, reason, words, monkeypatch, tmp_path
):
    assert train(words("gpt", trainer__max_steps=1)) == 0
    before = (tmp_path / "run/model.safetensors").read_bytes()
    spoil(monkeypatch, change)
    with pytest.raises(ValueError, match=f"{reason}.* at step 1, batch of samples 4-7") as caught:
        train([*words("gpt", trainer__max_steps=2), "--ckpt_path=last"])
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run/model.safetensors").read_bytes() == before
    batch = torch.load(tmp_path / "run/failed_batch.pt", weights_only=True)
    assert batch["number"].tolist() == [4, 5, 6, 7]
    assert ", ".join(batch["key"]) in str(caught.value)
    shards = TokenShards(words("gpt")[1].partition("=")[2])
    pictures = [int(key.partition("/")[2]) for key in batch["key"]]
    for picture, image in zip(pictures, batch["image"], strict=True):
        assert image.tolist() == shards[picture][2].tolist()


def test_of_batches_whose_gradients_are_added_up_the_one_that_is_no_number_is_named(
    words, monkeypatch, tmp_path
):
    losses = iter([1.0, float("nan"), 1.0])
    spoil(monkeypatch, lambda loss: loss * next(losses))
    sums = {"trainer__max_steps": 1, "trainer__accumulate_grad_batches": 3}
    with pytest.raises(ValueError, match="the loss is nan at step 0, batch of samples 4-7"):
        train(words("gpt", **sums))
    batch = torch.load(tmp_path / "run/failed_batch.pt", weights_only=True)
    assert batch["number"].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("stage", "advice"),
    [
        ("gpt", "set model.checkpoint_blocks true, or divide data.batch_size and multiply trainer"),
        ("vqgan", "divide data.batch_size and multiply model.accumulate"),
    ],
)
def test_a_batch_that_does_not_fit_gets_advice(stage, advice, words, monkeypatch):
    def step(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(JOBS[stage].module, "training_step", step)
    with pytest.raises(ValueError, match=f"a batch of 4 pictures does not fit .*: {advice}"):
        train(words(stage, trainer__max_steps=1))


@pytest.mark.parametrize("path", ["notes.txt", "config.yaml", "model.safetensors"])
def test_a_folder_of_other_things_is_refused_and_left_alone(path, words, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / path).write_text("mine")
    for extra in ([], ["--ckpt_path=auto"]):
        with pytest.raises(ValueError, match=f"run holds {path}, which no mas train has written"):
            train([*words("gpt", trainer__max_steps=1), *extra])
    assert [p.name for p in (tmp_path / "run").rglob("*")] == [path]
    assert (tmp_path / "run" / path).read_text() == "mine"


def test_a_file_is_no_run_folder(words, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="run is a file: give a folder"):
        train(words("gpt", trainer__max_steps=1))


def test_refused_runs_leave_nothing_and_failed_ones_do_not_block_the_next(
    words, monkeypatch, tmp_path
):
    with pytest.raises(ValueError, match=r"image vocabulary 32 \(the network 64\)"):
        train(words("gpt", trainer__max_steps=1, model__network__image_vocabulary=64))
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as broken:
        spoil(broken, lambda loss: loss * float("nan"))
        with pytest.raises(ValueError, match="the loss is nan at step 0"):
            train(words("gpt", trainer__max_steps=1))
    assert (tmp_path / "run/config.yaml").exists()
    assert train(words("gpt", trainer__max_steps=1)) == 0


@pytest.mark.parametrize(
    ("stage", "unit"), [("gpt", r"[\d,.]+ tokens/s, MFU \d+%"), ("vqseg", r"[\d,.]+ pictures/s")]
)
def test_the_bar_shows_loss_throughput_and_how_much_of_the_machine_is_used(
    stage, unit, words, monkeypatch
):
    class Bar(tqdm):
        def update(self, done):
            super().update(done)
            return True  # as if it were time to show it

        def set_postfix_str(self, text, refresh):
            texts.append(text)

    texts = []
    monkeypatch.setattr(progress, "tqdm", Bar)
    assert train(words(stage, trainer__max_steps=5, trainer__accumulate_grad_batches=2)) == 0
    assert len(texts) == 5
    assert all(re.fullmatch(rf"(loss \d+\.\d{{4}}, )?{unit}", text) for text in texts), texts


@pytest.mark.parametrize(
    ("speed", "words"), [(1234567, "1,234,567"), (33.4, "33"), (6.62, "6.6"), (0.1625, "0.16")]
)
def test_a_slow_machine_is_not_told_that_it_stands_still(speed, words):
    assert progress.in_words(speed) == words


@pytest.mark.parametrize(("cores", "told"), [(1, True), (2, False)])
def test_more_processes_that_read_than_cores_are_told_once(cores, told, words, monkeypatch, caplog):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)), raising=False)
    settings = dict(trainer__max_steps=1, data__workers=2, trainer__val_check_interval=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert train(words("vqseg", **settings)) == 0
    assert not any("DataLoader" in str(warning.message) for warning in caught)
    said = [r.getMessage() for r in caplog.records if "data.workers" in r.getMessage()]
    expected = "data.workers is 2, more than this machine has cores: give --data.workers 1 or less"
    assert said == [expected] * told


def final_weights(run):
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def assert_close(a, b):
    for name, weight in a.items():
        torch.testing.assert_close(weight, b[name], rtol=1e-3, atol=1e-5)


def test_accumulated_gradients_equal_those_of_the_large_batch(words, tmp_path):
    settings = {
        "trainer__max_steps": 3,
        "model__network__dropout": 0,
        "model__caption_dropout__share": 0,
    }
    assert train(words("gpt", "large", data__batch_size=8, **settings)) == 0
    assert train(words("gpt", "small", trainer__accumulate_grad_batches=2, **settings)) == 0
    large, small = (final_weights(tmp_path / run) for run in ("large", "small"))
    assert_close(large, small)


def test_recomputed_blocks_train_the_same_weights(words, tmp_path):
    assert train(words("gpt", "kept", trainer__max_steps=3)) == 0
    recomputing = words("gpt", "recomputed", trainer__max_steps=3, model__checkpoint_blocks="true")
    assert train(recomputing) == 0
    assert_close(*(final_weights(tmp_path / run) for run in ("kept", "recomputed")))


@pytest.mark.parametrize(
    ("stage", "parts", "settings"),
    [
        ("gpt", 2, {"model__network__dropout": 0}),
        ("vqseg", 2, {}),
        ("vqgan", 7, {"model__adversary__start": 1}),  # of the decoder middle and four levels
    ],
)
def test_compiled_parts_train_the_same_weights(
    stage, parts, settings, words, monkeypatch, tmp_path
):
    def compile_quickly(part):
        compiled.append(part)
        original(part, backend="aot_eager")  # all of it but generating code

    compiled, original = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    settings = {"trainer__max_steps": 3, **settings}
    assert train(words(stage, "eager", **settings)) == 0
    assert not compiled
    assert train(words(stage, "compiled", model__compile="true", **settings)) == 0
    assert len(compiled) == parts
    assert_close(*(final_weights(tmp_path / run) for run in ("eager", "compiled")))


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("--model.network.layerz=3", "model.network.layerz"),
        ("--data.batchsize=3", "data.batchsize"),
        ("--trainer.max_stepz=3", "trainer.max_stepz"),
        ("--model.network.layers=many", "model.network.layers"),
    ],
)
def test_unknown_and_mistyped_keys_are_named_with_status_2(key, named, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", *words("gpt", trainer__max_steps=1), key])
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["vqvae"], ["--config", "x.yaml"]])
def test_without_a_stage_there_is_usage_and_status_2(arguments, capsys):
    assert main(["train", *arguments]) == 2
    assert "vqseg" in capsys.readouterr().err


def test_the_run_records_which_tokenizers_made_its_tokens(words, token_shards, tmp_path):
    assert train(words("gpt", trainer__max_steps=1)) == 0
    manifest = json.loads((token_shards / "manifest.json").read_text())
    recorded = json.loads((tmp_path / "run/tokens.json").read_text())
    assert recorded == {name: manifest[name] for name in ("text", "scene", "image")}
