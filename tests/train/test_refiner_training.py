"""The refiner learns the outlines of the scene, on top of a VQ-GAN that stays as it is."""

import csv

import pytest
import torch

from mas.reader import Reader, ReaderConfig
from mas.refiner import Refiner
from mas.vqgan import VQGAN
from tests.train.conftest import COMMON
from train.cli import train
from train.refiner import Before


def read(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_refined_picture_is_nearer_to_the_photo(words, tmp_path):
    settings = {
        "trainer.max_steps": 120,
        "trainer.val_check_interval": 120,
        "model.adversary.weight": 0,
        "model.optimiser.learning_rate": 0.01,
        "data.batch_size": 8,
        "model.exchanged": 0,
        "ema_decay": 0,
    }
    assert train(words("refiner", **settings)) == 0
    (last,) = [row for row in read(tmp_path / "run") if row["validation/loss"]]
    # The VQ-GAN knows nothing: all that is right comes from the scene.
    assert float(last["validation/psnr"]) > float(last["validation/decoded_psnr"]) + 6


def test_all_terms_and_the_discriminator_go_with_it(words, tmp_path):
    assert train(words("refiner", **{"trainer.max_steps": 4})) == 0
    steps = [row for row in read(tmp_path / "run") if row["train/loss"]]
    assert [bool(row["train/adversarial"]) for row in steps] == [False, False, True, True]
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert not [name for name in checkpoint["state_dict"] if "before" in name or "vqgan" in name]


def test_a_reader_reads_the_scene_from_what_was_refined(words, scene_shards, tmp_path):
    torch.manual_seed(0)
    sizes = {"size": 32, "width": 16, "multipliers": (1, 2), "groups": 4, "features": 16}
    Reader(ReaderConfig(**sizes)).save_pretrained(tmp_path / "start")
    settings = {
        "trainer.max_steps": 60,
        "trainer.default_root_dir": tmp_path / "reader",
        "model.optimiser.learning_rate": 0.01,
        "model.init_from": tmp_path / "start",
        "data.input": scene_shards,
        "ema_decay": 0,
        **{
            f"model.network.{key}": list(v) if key == "multipliers" else v
            for key, v in sizes.items()
        },
    }
    common = {**COMMON, **settings}
    assert train(["reader", *(f"--{key}={value}" for key, value in common.items())]) == 0
    settings = {
        "trainer.max_steps": 60,
        "model.adversary.weight": 0,
        "model.perceptual.reader": tmp_path / "reader",
        "model.perceptual.weight": 0.1,
        "model.consistency": 1.0,
        "model.optimiser.learning_rate": 0.01,
        "data.batch_size": 8,
        "ema_decay": 0,
    }
    assert train(words("refiner", **settings)) == 0
    steps = [row for row in read(tmp_path / "run") if row["train/loss"]]
    names = ("reconstruction", "perceptual", "consistency")
    values = [[float(row[f"train/{name}"]) for name in names] for row in steps]
    for (pixels, perceptual, consistency), row in zip(values, steps, strict=True):
        total = pixels + 0.1 * perceptual + consistency
        assert float(row["train/loss"]) == pytest.approx(total, rel=1e-4)
    first, last = (sum(value[2] for value in part) for part in (values[:5], values[-5:]))
    assert last < 0.6 * first


def test_consistency_without_a_reader_or_below_nothing_is_refused(words):
    for weight, message in ((0.1, "model.consistency needs a reader"), (-1, "use 0 or more")):
        with pytest.raises(ValueError, match=message):
            train(words("refiner", **{"trainer.max_steps": 1, "model.consistency": weight}))


def test_exchanged_tokens_are_as_many_as_is_said(vqgan_folder, monkeypatch):
    before = Before(str(vqgan_folder))
    seen = []
    monkeypatch.setattr(
        VQGAN, "decode", lambda self, tokens_BT: seen.append(tokens_BT) or tokens_BT
    )
    image_BCHW = torch.rand(64, 3, 32, 32)
    torch.manual_seed(0)
    before.decode(image_BCHW, exchanged=0.0)
    before.decode(image_BCHW, exchanged=0.5)
    plain_BT, other_BT = seen
    assert torch.equal(plain_BT, before.network.encode(image_BCHW))
    share_B = (plain_BT != other_BT).float().mean(1)
    assert 0.15 < share_B.mean() < 0.35  # a quarter on average, half at most
    assert share_B.max() < 0.8 and share_B.std() > 0.1


def test_a_refiner_starts_from_another(words, tmp_path):
    settings = {"trainer.max_steps": 1, "ema_decay": 0, "pictures.count": 0}
    assert train(words("refiner", folder="first", **settings)) == 0
    settings |= {"model.init_from": tmp_path / "first", "model.optimiser.learning_rate": 1e-30}
    assert train(words("refiner", folder="second", **settings)) == 0
    first, second = (Refiner.from_pretrained(tmp_path / name) for name in ("first", "second"))
    for name, tensor in second.state_dict().items():
        torch.testing.assert_close(tensor, first.state_dict()[name], rtol=0, atol=1e-20, msg=name)


def test_another_picture_size_than_the_vqgans_is_refused(words):
    with pytest.raises(ValueError, match=r"model\.network\.size is 64, the VQ-GAN in .* 32 pixels"):
        train(words("refiner", **{"trainer.max_steps": 1, "model.network.size": 64}))


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_none_is_refused(words, share):
    with pytest.raises(ValueError, match=rf"model\.exchanged is {share}, use 0 to 1"):
        train(words("refiner", **{"trainer.max_steps": 1, "model.exchanged": share}))


def test_a_missing_vqgan_is_named(words, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        train(words("refiner", **{"trainer.max_steps": 1, "model.vqgan": tmp_path / "nowhere"}))
