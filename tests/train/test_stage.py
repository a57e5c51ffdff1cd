"""The optimiser's settings and the losses of the trainings."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mas.gpt import GPT, GPTConfig, StreamLosses
from mas.text import PAD
from train.adversary import AdversaryConfig, adaptive_weight, discriminator_loss, generator_loss
from train.averaging import Averaging
from train.flops import peak_flops, training_flops
from train.gpt import CaptionDropout, StreamWeights, check_manifest
from train.stage import Optimiser, split_parameters


def test_the_rate_warms_up_and_decays_to_its_final_share():
    optimiser = Optimiser(learning_rate=1.0, warmup_steps=10, final_share=0.1)
    rates = [optimiser.rate(step, steps=110) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert (
        rates[10] == 1.0 and rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    )
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    constant = Optimiser(learning_rate=1.0, warmup_steps=0, schedule="constant")
    assert {constant.rate(step, steps=5) for step in range(9)} == {1.0}


def test_the_paper_s_rate_drops_once():
    optimiser = Optimiser(
        learning_rate=4.5e-4,
        warmup_steps=0,
        schedule="step",
        drop_at=40_000,
        final_share=1 / 3,
    )
    rates = [optimiser.rate(step, steps=170_000) for step in (0, 39_999, 40_000, 169_999)]
    assert rates == pytest.approx([4.5e-4, 4.5e-4, 1.5e-4, 1.5e-4])
    share = Optimiser(learning_rate=1.0, warmup_steps=2, schedule="step", drop_at=0.25)
    rates = [share.rate(step, steps=40) for step in (0, 1, 9, 10)]
    assert rates == pytest.approx([0.5, 1, 1, 0.05])


@pytest.mark.parametrize(
    "settings", [{"learning_rate": 0}, {"drop_at": -1}, {"final_share": 2}, {"clip": -1}]
)
def test_impossible_optimisers_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Optimiser(**settings)


def test_only_weights_of_linear_and_convolution_layers_decay():
    layers = nn.ModuleList([nn.Linear(2, 3), nn.Conv2d(1, 2, 3), nn.Embedding(4, 2)])
    layers += [nn.LayerNorm(2), nn.GroupNorm(1, 2)]
    module = nn.Sequential(*layers)
    module.register_parameter("positions", nn.Parameter(torch.zeros(4, 2)))
    decayed, kept = split_parameters(module)
    assert {id(p) for p in decayed} == {id(layers[0].weight), id(layers[1].weight)}
    assert len(decayed) + len(kept) == len(list(module.parameters()))


def test_decay_shrinks_a_linear_weight_and_no_bias():
    layer = nn.Linear(2, 2)
    before = layer.weight.clone(), layer.bias.clone()
    optimizer = Optimiser(learning_rate=0.1, weight_decay=0.5).build(layer)
    layer(torch.zeros(1, 2)).sum().mul(0).backward()
    optimizer.step()
    assert torch.allclose(layer.weight, before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias, before[1])


def test_stream_weights_make_a_weighted_mean():
    losses = StreamLosses(*torch.tensor([1.0, 2.0, 4.0, 0.0, 0.0, 0.0]))
    assert StreamWeights(text=1, scene=1, image=2).mean(losses) == pytest.approx(11 / 4)
    with pytest.raises(ValueError, match="not be negative, nor all zero"):
        StreamWeights(text=0, scene=0, image=0)


def test_captions_are_dropped_whole_and_as_often_as_asked():
    torch.manual_seed(0)
    text_BT = torch.ones(2000, 4, dtype=torch.long)
    dropped = CaptionDropout(share=0.25, start=10)(text_BT, step=10, steps=20)
    rows = (dropped == PAD).sum(1)
    assert set(rows.tolist()) == {0, 4}
    assert (rows == 4).float().mean() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(CaptionDropout(share=0.25, start=10)(text_BT, step=9, steps=20), text_BT)


def test_by_default_captions_are_dropped_in_the_last_18_percent_of_the_run():
    text_BT = torch.ones(200, 4, dtype=torch.long)
    dropped = [
        (CaptionDropout()(text_BT, step=step, steps=1000) == PAD).any() for step in (0, 819, 820)
    ]
    assert dropped == [False, False, True]


def test_the_adversary_starts_on_time_and_warms_up():
    adversary = AdversaryConfig(weight=0.8, start=100, warmup_steps=4)
    assert [adversary.say(step) for step in (0, 99, 100, 101, 103, 500)] == pytest.approx(
        [0, 0, 0.2, 0.4, 0.8, 0.8]
    )


def test_hinge_losses_follow_their_definition():
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 0.0])
    assert discriminator_loss(real, fake) == pytest.approx(0.5 * (0.25 + 0.5))
    assert generator_loss(fake) == pytest.approx(1.5)


def test_the_adaptive_weight_balances_the_gradients():
    layer = nn.Parameter(torch.tensor([1.0, 2.0]))
    fake = 2 * layer
    weight = adaptive_weight(
        fake, layer, pull_BCHW=torch.tensor([3.0, 3.0]), push_BCHW=torch.tensor([0.5, 0.5])
    )
    assert weight == pytest.approx(6, rel=1e-3)
    assert not weight.requires_grad


def test_averaging_warms_up_and_then_keeps_its_decay():
    averaging = Averaging(0.9)
    one, zero = torch.ones(()), torch.zeros(())
    assert averaging.average(one, zero, 0) == pytest.approx(0.1)
    assert averaging.average(one, zero, 1000) == pytest.approx(0.9)


def test_all_weights_are_averaged_as_one_is_to_the_bit_and_buffers_are_copied():
    torch.manual_seed(0)
    module, averaging = LightningModule(), Averaging(0.99)
    module.layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")), global_step=0
    )
    averaging.setup(trainer, module, "fit")
    averaging.on_train_start(trainer, module)
    model = averaging._average_model
    for step in range(1, 30):
        average = [parameter.detach().clone() for parameter in model.module.parameters()]
        with torch.no_grad():
            for tensor in (*module.parameters(), module.layers[1].running_mean):
                tensor.add_(torch.randn_like(tensor))
        current = [parameter.detach().clone() for parameter in module.parameters()]
        pairs = zip(average, current, strict=True)
        expected = [averaging.average(*pair, step - 1) for pair in pairs] if step > 1 else current
        trainer.global_step = step
        for _ in range(2):  # the second is a batch whose gradients are still being added up
            averaging.on_train_batch_end(trainer, module, None, None, 0)
        pairs = zip(model.module.parameters(), expected, strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
        assert model.n_averaged.item() == step
    assert torch.equal(model.module.layers[1].running_mean, module.layers[1].running_mean)
    assert all(torch.equal(*pair) for pair in zip(module.parameters(), current, strict=True))


def test_what_is_not_trained_by_gradients_is_copied_into_the_average():
    """A codebook of running means is an average already; what is held stays as it is."""
    module, averaging = LightningModule(), Averaging(0.99)
    module.codebook = nn.Parameter(torch.zeros(3), requires_grad=False)
    module.layer = nn.Linear(2, 2)
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")), global_step=0
    )
    averaging.setup(trainer, module, "fit")
    averaging.on_train_start(trainer, module)
    average = averaging._average_model.module
    for trainer.global_step in (1, 2, 3):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1.0)
        averaging.on_train_batch_end(trainer, module, None, None, 0)
    assert average.codebook.tolist() == [3.0, 3.0, 3.0]
    assert (average.layer.weight < module.layer.weight - 0.1).all()


def test_averages_are_made_where_the_training_is_about_to_be():
    module, averaging = LightningModule(), Averaging()
    module.layer = nn.Linear(2, 2)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    averaging.setup(trainer, module, "fit")
    devices = {x.device.type for x in averaging._average_model.parameters()}
    assert devices == {"meta"} and module.layer.weight.device.type == "cpu"


def test_training_flops_are_what_torch_counts():
    config = GPTConfig(
        layers=2,
        width=32,
        heads=2,
        text_vocabulary=50,
        scene_vocabulary=16,
        image_vocabulary=24,
        text_length=8,
        scene_grid=3,
        image_grid=4,
    )
    network = GPT(config)
    streams = [torch.ones(1, s.length, dtype=torch.long) for s in config.layout.streams]
    with FlopCounterMode(display=False) as counter:
        network(*streams)
    tokens, head_width = 8 + 9 + 16 - 1, 16
    products = 2 * 2 * (2 * tokens * tokens * head_width)  # of 2 heads
    causal = config.layers * products / 2
    counts = counter.get_flop_counts()["Global"]  # those of attention since torch 2.15 only
    linear = sum(n for operation, n in counts.items() if "attention" not in str(operation))
    assert linear > causal
    assert training_flops(config) == pytest.approx(3 * (linear + causal))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_of_a_cpu_is_measured_and_unknown_cards_have_none(dtype, monkeypatch):
    assert 1e8 < peak_flops(torch.device("cpu"), dtype) < 1e15
    cards = {
        "NVIDIA H200": 989e12,
        "NVIDIA L40": 181e12,
        "NVIDIA L4": 121e12,
        "NVIDIA Brand New": None,
    }
    for name, peak in cards.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda"), torch.float32) is None


@pytest.mark.parametrize(
    ("stream", "size"),
    [("text", "vocabulary"), ("text", "length"), ("scene", "grid"), ("image", "vocabulary")],
)
def test_tokens_of_other_sizes_are_named(stream, size, words):
    config = GPTConfig(text_vocabulary=300, scene_vocabulary=16, image_vocabulary=32)
    manifest = {
        "text": {"vocabulary": 300, "length": 64},
        "scene": {"vocabulary": 16, "grid": 16},
        "image": {"vocabulary": 32, "grid": 16},
    }
    check_manifest(manifest, config)
    wanted = manifest[stream][size]
    manifest[stream][size] = 7
    named = rf"have {stream} {size} 7 \(the network {wanted}\): set "
    named += f"model.network.{stream}_{size} to 7, or"
    with pytest.raises(ValueError, match=named):
        check_manifest(manifest, config)


def test_all_sizes_that_differ_are_named_at_once():
    config = GPTConfig(text_vocabulary=300, scene_vocabulary=16, image_vocabulary=32)
    manifest = {
        "text": {"vocabulary": 300, "length": 40},
        "scene": {"vocabulary": 8, "grid": 16},
        "image": {"vocabulary": 32, "grid": 32},
    }
    with pytest.raises(ValueError) as raised:
        check_manifest(manifest, config)
    assert str(raised.value) == (
        "the tokens have text length 40 (the network 64), scene vocabulary 8 (the network 16), "
        "image grid 32 (the network 16): set model.network.text_length to 40, "
        "model.network.scene_vocabulary to 8, model.network.image_grid to 32, or tokenize with "
        "other tokenizers"
    )
