"""Fine-tuning starts from the weights of another run, and says where that cannot be."""

import csv
import dataclasses

import pytest
import torch

from mas.storage import StorageError
from mas.vqgan import VQGAN, VQGANConfig
from mas.vqseg import VQSEG, VQSEGConfig
from train.cli import train
from train.start import start_from

SEG = VQSEGConfig(
    size=16, grid=4, codes=16, code_width=4, width=8, groups=4, patch=2, features=8, embedding=4
)
GAN = VQGANConfig(
    size=16, codes=32, code_width=4, features=8, width=8, groups=4, multipliers=(1, 1), attention=()
)


def build(network_class, config, seed=0):
    torch.manual_seed(seed)
    network = network_class(config).eval()
    for parameter in network.parameters():
        parameter.detach().add_(0.1 * torch.randn_like(parameter))  # no layer is zero
    return network


def scenes(side, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 157, (3, side, side), dtype=torch.uint8, generator=generator)
    return labels, torch.rand(labels.shape, generator=generator) < 0.3


def enlarge(x_BHW, times=2):
    return x_BHW.repeat_interleave(times, 1).repeat_interleave(times, 2)


@pytest.mark.parametrize(("network_class", "config"), [(VQSEG, SEG), (VQGAN, GAN)])
def test_a_network_of_another_picture_size_gets_the_same_weights(network_class, config, tmp_path):
    trained = build(network_class, config)
    trained.save_pretrained(tmp_path)
    sizes = {"size": 32, "restart": 0.0} | ({"grid": 8} if network_class is VQSEG else {})
    network = build(network_class, dataclasses.replace(config, **sizes), seed=1)
    start_from(network, tmp_path)
    assert network.config.size == 32
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name
    assert any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("hidden", [0, 12])
def test_larger_patches_see_enlarged_scenes_as_the_trained_network_sees_them(hidden, tmp_path):
    config = dataclasses.replace(SEG, hidden=hidden)
    trained = build(VQSEG, config)
    trained.save_pretrained(tmp_path)
    network = build(VQSEG, dataclasses.replace(config, size=32, patch=4), seed=1)
    start_from(network, tmp_path)
    labels, edges = scenes(16)
    tokens = trained.encode(labels, edges)
    assert tokens.unique().numel() > 3
    assert torch.equal(network.encode(enlarge(labels), enlarge(edges)), tokens)
    logits = trained.decode_logits(tokens)
    torch.testing.assert_close(
        network.decode_logits(tokens), logits.repeat_interleave(2, 2).repeat_interleave(2, 3)
    )


@pytest.mark.parametrize("changes", [{"blocks": 2}, {"hidden": 24}, {"blocks": 3, "hidden": 8}])
def test_a_grown_network_starts_as_the_trained_one_and_learns_with_all_of_itself(changes, tmp_path):
    trained = build(VQSEG, SEG)
    trained.save_pretrained(tmp_path)
    torch.manual_seed(1)
    network = VQSEG(dataclasses.replace(SEG, **changes))
    start_from(network, tmp_path)
    labels, edges = scenes(16)
    tokens = trained.encode(labels, edges)
    assert torch.equal(network.eval().encode(labels, edges), tokens)
    torch.testing.assert_close(network.decode_logits(tokens), trained.decode_logits(tokens))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimiser = torch.optim.SGD(network.train().parameters(), lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        network.loss(labels, edges).total.backward()
        optimiser.step()
    new = before.keys() - trained.state_dict().keys()
    weights = [name for name in new if name.endswith("weight") and "norm" not in name]
    assert weights and all(not torch.equal(network.state_dict()[n], before[n]) for n in weights)


@pytest.mark.parametrize(
    ("network_class", "config", "changes", "words"),
    [
        (VQSEG, SEG, {"size": 8, "patch": 1}, "patch is 2, not 1; set model.network"),
        (VQSEG, SEG, {"codes": 8, "code_width": 8}, "code_width is 4, not 8, codes is 16, not 8"),
        (VQSEG, SEG, {"quantizer": "cosine"}, "quantizer is nearest, not cosine"),
        (VQSEG, dataclasses.replace(SEG, blocks=2), {"blocks": 1}, "blocks is 2, not 1"),
        (VQSEG, dataclasses.replace(SEG, hidden=8), {"hidden": 9}, "hidden is 8, not 9"),
        (VQGAN, GAN, {"quantizer": "cosine"}, "quantizer is nearest, not cosine"),
        (VQGAN, GAN, {"patch": 2}, "patch is 1, not 2"),
        (VQGAN, GAN, {"width": 16}, "width is 8, not 16"),
    ],
)
def test_another_network_is_refused_by_its_keys(network_class, config, changes, words, tmp_path):
    build(network_class, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"holds another network: {words}"):
        start_from(build(network_class, dataclasses.replace(config, **changes)), tmp_path)


def test_a_folder_without_a_network_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"config\.json: no such file"):
        start_from(build(VQSEG, SEG), tmp_path)
    build(VQSEG, SEG).save_pretrained(tmp_path)
    with pytest.raises(StorageError, match=r"config\.json: unknown config keys"):
        start_from(build(VQGAN, GAN), tmp_path)


@pytest.mark.parametrize("stage", ["vqseg", "vqgan"])
def test_a_run_from_a_run_goes_on_where_that_one_was(stage, words, tmp_path):
    settings = dict(pictures__count=0, trainer__val_check_interval=30, ema_decay=0)
    assert train(words(stage, "first", trainer__max_steps=30, **settings)) == 0
    second = words(
        stage,
        "second",
        trainer__max_steps=2,
        model__init_from=tmp_path / "first",
        **settings | {"trainer__val_check_interval": 1},
    )
    assert train(second) == 0

    def losses(folder, column):
        with open(tmp_path / folder / "metrics.csv", newline="") as file:
            return [float(row[column]) for row in csv.DictReader(file) if row[column]]

    first = losses("first", "train/loss")[0]
    start = losses("second", "train/loss")[0]
    assert start < 0.95 * first
    assert losses("second", "validation/loss")[0] == pytest.approx(
        losses("first", "validation/loss")[-1], rel=0.1
    )
