"""The VQ-GAN's training: its terms, its two players, and what its validation reports."""

import csv
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import finish, start
from pytorch_lightning.strategies import DDPStrategy
from test_ddp import free_port, torchrun_environment

from mas.metrics import CodeMetrics, PictureMetrics
from mas.reader import Reader, ReaderConfig
from mas.scene import CLASS_NAMES, FACE_IDS, PALETTE, SceneMap
from mas.shards import Sample, ShardIndex, ShardWriter
from mas.vqgan import VQGAN, VQGANConfig
from train.adversary import AdversaryConfig
from train.cli import train
from train.crops import CropsConfig
from train.perceptual import VGG16, PerceptualConfig, load_perceptual
from train.stage import Optimiser
from train.vqgan import VQGANTraining

SIZE = 32
SKIN = CLASS_NAMES.index("face")
SHEEP = CLASS_NAMES.index("sheep")


def encoded(save, **options):
    buffer = io.BytesIO()
    save(buffer, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Scene shards of pictures with a face and, in every second one, a sheep."""
    folder = tmp_path_factory.mktemp("people")
    rng = np.random.default_rng(0)
    with ShardWriter(str(folder / "00000.tar")) as writer:
        for picture in range(12):
            labels = np.full((SIZE, SIZE), 125, np.uint8)
            x, y = rng.integers(2, 18, 2)
            labels[y : y + 12, x : x + 10] = SKIN
            labels[y + 4 : y + 6, x + 2 : x + 8] = FACE_IDS[1]
            if picture % 2:
                labels[:8, :12] = SHEEP
            scene = SceneMap.from_labels(labels)
            photo = Image.fromarray(PALETTE[scene.labels])
            files = {
                "jpg": encoded(photo.save, format="JPEG", quality=95),
                "scene.png": encoded(scene.to_png),
                "txt": b"a face",
                "json": json.dumps({"captions": ["a face"]}).encode(),
            }
            writer.write(Sample(f"{picture:05}", files))
    return folder


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(VGG16().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "reader"
    Reader(ReaderConfig(size=SIZE, width=8, multipliers=(1, 2))).save_pretrained(folder)
    return folder


def read(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


TERMS = {
    "model__perceptual__weight": 0.5,
    "model__crops__face_weight": 1.0,
    "model__crops__object_weight": 0.5,
    "model__crops__count": 2,
    "model__crops__size": 16,
}


def test_all_terms_are_trained_with_and_logged(words, people, vgg_file, tmp_path):
    settings = dict(
        TERMS,
        model__perceptual__vgg=vgg_file,
        data__input=people,
        trainer__max_steps=4,
        model__adversary__start=2,
    )
    assert train(words("vqgan", **settings)) == 0
    rows = read(tmp_path / "run")
    steps = [row for row in rows if row["train/loss"]]
    for name in ("perceptual", "faces", "things", "reconstruction", "codebook"):
        assert all(float(row[f"train/{name}"]) > 0 for row in steps), name
    weights = {"perceptual": 0.5, "faces": 1.0, "things": 0.5, "reconstruction": 1, "codebook": 1}
    for row in steps[:2]:  # before the discriminator
        total = sum(weight * float(row[f"train/{name}"]) for name, weight in weights.items())
        assert float(row["train/loss"]) == pytest.approx(total, rel=1e-4)
    assert [bool(row["train/adversarial"]) for row in steps] == [False, False, True, True]
    (validation,) = [row for row in rows if row["validation/loss"]]
    assert float(validation["validation/perceptual"]) > 0
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert not [name for name in checkpoint["state_dict"] if "judges" in name or "vgg" in name]


@pytest.mark.parametrize("end, last", [(0.0625, 0.0625 + 0.9375 * 0.146447), (1.0, 1.0)])
def test_samples_of_a_gumbel_codebook_cool_down_over_the_run(words, people, tmp_path, end, last):
    settings = {
        "model__network__quantizer": "gumbel",
        "model__gumbel_temperature": end,
        "data__input": people,
        "trainer__max_steps": 4,
    }
    assert train(words("vqgan", **settings)) == 0
    quantizer = VQGAN.from_pretrained(tmp_path / "run").quantizer
    assert float(quantizer.temperature) == pytest.approx(last, abs=1e-5)  # three of four steps


def test_a_gumbel_temperature_that_cannot_be_is_named():
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="gumbel_temperature"):
            VQGANTraining(
                network=VQGANConfig(size=SIZE, codes=4, features=8, width=8, groups=4),
                optimiser=Optimiser(),
                adversary=AdversaryConfig(),
                perceptual=PerceptualConfig(),
                crops=CropsConfig(),
                gumbel_temperature=wrong,
            )


def test_a_step_goes_down_the_gradient_of_the_whole_loss(vgg_file, monkeypatch):
    torch.manual_seed(0)
    crops = CropsConfig(face_weight=1.0, object_weight=0.5, count=1, size=16)
    module = VQGANTraining(
        network=VQGANConfig(
            size=SIZE, codes=16, features=16, width=16, multipliers=(1, 2), attention=(), groups=4
        ),
        optimiser=Optimiser(),
        adversary=AdversaryConfig(start=0, warmup_steps=1, width=8, levels=1),
        perceptual=PerceptualConfig(weight=0.5, vgg=str(vgg_file)),
        crops=crops,
        codebook_weight=0.7,
    ).eval()  # the codebook counts nothing
    boxes_BN4 = torch.tensor([[[4, 4, 20, 20]], [[0, 0, 12, 16]]])
    image_BCHW = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    logged = {}

    def log_losses(part, values, *, count):
        logged.update(values)

    monkeypatch.setattr(VQGANTraining, "global_step", 5)
    monkeypatch.setattr(module, "log_losses", log_losses)
    monkeypatch.setattr(module, "manual_backward", lambda loss: loss.backward())
    monkeypatch.setattr(module, "watch", lambda drawn: {})
    for name in ("check", "log", "step"):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    module.training_step({"image": image_BCHW, "faces": boxes_BN4, "things": boxes_BN4}, 0)
    network = dict(module.network.named_parameters())
    found = {name: parameter.grad.clone() for name, parameter in network.items()}

    real_BCHW = image_BCHW.float() / 255
    fake_BCHW, codebook_loss, _ = module.network(real_BCHW)
    pictures = (fake_BCHW - real_BCHW).abs().mean()
    pictures = pictures + 0.5 * module.judges.perceptual(fake_BCHW, real_BCHW)
    adversarial = -module.discriminator(fake_BCHW * 2 - 1).mean()
    norms = [
        torch.autograd.grad(loss, module.network.last_layer, retain_graph=True)[0].norm()
        for loss in (pictures, adversarial)
    ]
    whole = (
        pictures
        + 0.7 * codebook_loss
        + module.judges.faces(fake_BCHW, real_BCHW, boxes_BN4)
        + 0.5 * module.judges.things(fake_BCHW, real_BCHW, boxes_BN4)
        + 0.8 * norms[0] / (norms[1] + 1e-4) * adversarial
    )
    assert logged["loss"] == pytest.approx(whole.item(), rel=1e-5)
    expected = torch.autograd.grad(whole, list(network.values()), allow_unused=True)
    for name, gradient in zip(network, expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_a_resumed_run_with_all_terms_repeats_an_uninterrupted_one(
    words, people, vgg_file, tmp_path
):
    settings = dict(TERMS, model__perceptual__vgg=vgg_file, data__input=people, pictures__count=0)
    # `constant`, so that the shorter first half has the same learning rates.
    settings |= dict(model__optimiser__schedule="constant", model__adversary__start=1)
    assert train(words("vqgan", "whole", trainer__max_steps=4, **settings)) == 0
    assert train(words("vqgan", "half", trainer__max_steps=2, **settings)) == 0
    assert (
        train([*words("vqgan", "half", trainer__max_steps=4, **settings), "--ckpt_path=last"]) == 0
    )
    whole, half = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "half")
    )
    assert whole.keys() == half.keys()
    assert all(torch.equal(whole[name], half[name]) for name in whole)


def test_a_run_with_focus_and_reader_is_resumed_exactly_and_leaves_the_reader_alone(
    words, people, reader_folder, monkeypatch, tmp_path
):
    judges = []

    def load(config):
        judges.append(load_perceptual(config))
        return judges[-1]

    monkeypatch.setattr("train.crops.load_perceptual", load)
    settings = dict(
        data__input=people,
        model__perceptual__weight=0.5,
        model__perceptual__reader=reader_folder,
        model__focus__things=2.0,
        model__focus__faces=8.0,
        model__gradient_weight=0.5,
        model__adversary__start=1,
        model__optimiser__schedule="constant",
        pictures__count=0,
    )
    assert train(words("vqgan", "whole", trainer__max_steps=4, **settings)) == 0
    assert train(words("vqgan", "half", trainer__max_steps=2, **settings)) == 0
    assert (
        train([*words("vqgan", "half", trainer__max_steps=4, **settings), "--ckpt_path=last"]) == 0
    )
    whole, half = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "half")
    )
    assert whole.keys() == half.keys()
    assert all(torch.equal(whole[name], half[name]) for name in whole)
    assert {name.split(".")[0] for name in whole} == {"network", "discriminator"}
    rows = [row for row in read(tmp_path / "whole") if row["train/loss"]]
    assert len(rows) == 4 and all(float(row["train/perceptual"]) > 0 for row in rows)
    first = Reader.from_pretrained(reader_folder).state_dict()
    assert len(judges) == 3
    for judge in judges:
        weights = judge.reader.state_dict()
        assert not judge.training and all(torch.equal(weights[name], first[name]) for name in first)


def test_the_focus_reaches_the_training(words, people, tmp_path):
    settings = dict(data__input=people, trainer__max_steps=1, pictures__count=0)
    for name, faces in (("even", 1.0), ("focused", 8.0)):
        assert train(words("vqgan", name, model__focus__faces=faces, **settings)) == 0
    even, focused = (read(tmp_path / name)[0] for name in ("even", "focused"))
    assert even["train/codebook"] == focused["train/codebook"]  # the same pictures and weights
    assert even["train/reconstruction"] != focused["train/reconstruction"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_one_of_the_network_whatever_the_discriminator_does(accumulate, words, tmp_path):
    settings = dict(trainer__max_steps=6, model__adversary__start=3, model__accumulate=accumulate)
    assert train(words("vqgan", **settings)) == 0
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
    network, discriminator = checkpoint["optimizer_states"]
    assert {int(state["step"]) for state in network["state"].values()} == {6}
    assert {int(state["step"]) for state in discriminator["state"].values()} == {3}
    rows = [row for row in read(tmp_path / "run") if row["train/loss"]]
    assert [int(row["step"]) for row in rows][-1] == 5


def test_gradients_are_clipped_for_both_players(words, monkeypatch):
    norms = []
    original = torch.optim.AdamW.step

    def step(self, closure=None):
        gradients = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return original(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    settings = dict(trainer__max_steps=4, model__optimiser__clip=0.01, ema_decay=0)
    assert train(words("vqgan", **settings)) == 0
    assert len(norms) == 4 + 2  # the discriminator starts at step 2
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)


def test_validation_measures_the_whole_held_out_set(words, scene_shards, tmp_path):
    # Four pictures in batches of three: means of batches would weigh the last one threefold.
    settings = dict(trainer__max_steps=4, data__batch_size=3, ema_decay=0, pictures__count=0)
    assert train(words("vqgan", **settings)) == 0
    (row,) = [row for row in read(tmp_path / "run") if row["validation/loss"]]
    network = VQGAN.from_pretrained(tmp_path / "run")
    index = ShardIndex(
        [str(path) for path in sorted(scene_shards.glob("*.tar"))], extensions=("jpg",)
    )
    pictures, codes = PictureMetrics(), CodeMetrics(network.config.codes)
    for held_out in (5, 11, 17, 23):
        photo = Image.open(io.BytesIO(index.read(held_out).files["jpg"]))
        real = torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)[None] / 255
        fake, _, tokens = network(real)
        pictures.update(fake, true_image_BCHW=real)
        codes.update(tokens)
    for name, value in {**pictures.compute(), **codes.compute()}.items():
        assert float(row[f"validation/{name}"]) == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize(
    ("settings", "words_of_error"),
    [
        ({"model__perceptual__weight": 1.0}, "set model.perceptual.vgg to a file from https"),
        ({"model__crops__face_weight": 1.0}, "set model.perceptual.vgg to a file from https"),
        (
            {"model__perceptual__weight": 1.0, "model__perceptual__vgg": "no/vgg.pth"},
            "no/vgg.pth: no such file; get it from https",
        ),
        (
            {"model__crops__face_weight": 1.0, "model__crops__face_network": "no/face.pt"},
            "no/face.pt: no such file",
        ),
        (
            {"model__perceptual__weight": 1.0, "model__perceptual__reader": "no/reader"},
            "no/reader.*: no such file",
        ),
        ({"model__focus__faces": 0}, "weights of model.focus must be numbers above 0"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(settings, words_of_error, words):
    with pytest.raises(ValueError, match=words_of_error) as caught:
        train(words("vqgan", **{"trainer__max_steps": 2, **settings}))
    assert "\n" not in str(caught.value)


def test_a_reader_of_another_size_is_named(words, tmp_path):
    Reader(ReaderConfig(size=64, width=8, multipliers=(1,))).save_pretrained(tmp_path / "reader")
    settings = dict(model__perceptual__weight=1.0, model__perceptual__reader=tmp_path / "reader")
    with pytest.raises(ValueError, match="the reader takes pictures of B x 3 x 64 x 64, got 4 x"):
        train(words("vqgan", trainer__max_steps=1, **settings))


@pytest.fixture
def module(network_sizes):
    network = VQGANConfig(**network_sizes["vqgan"] | {"multipliers": (1, 1), "attention": ()})
    settings = (Optimiser(), AdversaryConfig(), PerceptualConfig(), CropsConfig())
    names = ("optimiser", "adversary", "perceptual", "crops")
    module = VQGANTraining(network=network, **dict(zip(names, settings, strict=True)))
    module._trainer = SimpleNamespace(strategy=None)
    module.setup("fit")
    return module


def test_ddp_that_waits_for_all_gradients_is_refused(module):
    module._trainer.strategy = DDPStrategy()
    with pytest.raises(ValueError, match=r"set trainer\.strategy ddp_find_unused_parameters_true"):
        module.setup("fit")
    module._trainer.strategy = DDPStrategy(find_unused_parameters=True)
    module.setup("fit")
    module._trainer.strategy, module.discriminator = DDPStrategy(), None
    module.setup("fit")


def test_two_ranks_keep_equal_players(words, tmp_path):
    keeper = {"class_path": "recorder.WeightsKeeper", "init_args": {"folder": str(tmp_path)}}
    arguments = words(
        "vqgan",
        trainer__max_steps=5,
        trainer__devices=2,
        trainer__strategy="ddp_find_unused_parameters_true",
        trainer__callbacks=json.dumps([keeper]),
        model__adversary__start=2,
        pictures__count=0,
    )
    port = free_port()
    processes = [
        start(arguments, log=tmp_path / f"{rank}.log", environment=torchrun_environment(rank, port))
        for rank in (0, 1)
    ]
    assert finish(*processes) == [0, 0]
    first, second = (
        torch.load(tmp_path / f"weights{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    (row,) = [row for row in read(tmp_path / "run") if row["validation/loss"]]
    assert float(row["validation/psnr"]) > 0 and float(row["validation/usage"]) > 0
