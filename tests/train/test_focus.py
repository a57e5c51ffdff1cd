"""Pixel weights by scene: what they are, and whose pull on the picture they change."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from mas.scene import CLASS_NAMES, FACE_IDS, HUMAN_IDS, PALETTE, THINGS, VOID, SceneMap
from mas.shards import Sample, ShardError, ShardWriter
from mas.vqgan import VQGANConfig
from train.adversary import AdversaryConfig
from train.crops import CropsConfig
from train.data import PhotoData
from train.focus import EVEN, FocusConfig
from train.perceptual import PerceptualConfig
from train.stage import Optimiser
from train.vqgan import VQGANTraining

GRASS, SHEEP = 125, CLASS_NAMES.index("sheep")


def build(network_sizes, **settings):
    network = VQGANConfig(**network_sizes["vqgan"] | {"multipliers": (1, 1), "attention": ()})
    return VQGANTraining(
        network=network,
        optimiser=Optimiser(),
        adversary=AdversaryConfig(weight=0),
        perceptual=PerceptualConfig(),
        crops=CropsConfig(),
        **settings,
    )


@pytest.fixture
def pictures():
    """Photos, reconstructions and labels: sheep on the left half, grass on the right."""
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.rand(2, 2, 3, 32, 32, generator=generator)
    labels_BHW = torch.full((2, 32, 32), GRASS, dtype=torch.uint8)
    labels_BHW[:, :, :16] = SHEEP
    return real, fake, labels_BHW


def pull(module, real_BCHW, fake_BCHW, labels_BHW):
    """Gradient of the reconstruction's terms at every pixel."""
    leaf = fake_BCHW.clone().requires_grad_()
    loss = module.reconstruction(real_BCHW, leaf, {"labels": labels_BHW})["sum"]
    return torch.autograd.grad(loss, leaf)[0]


def test_every_kind_of_pixel_has_its_weight_and_their_mean_is_1():
    kinds = [0, THINGS - 1, THINGS, HUMAN_IDS[0] - 1, VOID]
    kinds += [HUMAN_IDS[0], HUMAN_IDS[-1], FACE_IDS[0], FACE_IDS[-1]]
    labels_BHW = torch.tensor(kinds, dtype=torch.uint8).view(1, 3, 3)
    weights_P = FocusConfig(things=2, people=4, faces=8).weigh(labels_BHW).flatten()
    torch.testing.assert_close(
        weights_P / weights_P[2], torch.tensor([2, 2, 1, 1, 1, 4, 4, 8, 8.0])
    )
    assert float(weights_P.mean()) == pytest.approx(1)


def test_an_even_focus_is_none_to_the_bit_and_needs_no_labels(network_sizes, pictures):
    module = build(network_sizes, gradient_weight=0.5)
    real, fake, labels_BHW = pictures
    assert not module.labels and build(network_sizes, focus=FocusConfig(faces=1.1)).labels
    with_labels, without = (
        module.reconstruction(real, fake, batch)["sum"] for batch in ({"labels": labels_BHW}, {})
    )
    plain = fake - real
    differences = plain.diff(dim=3).abs().mean() + plain.diff(dim=2).abs().mean()
    assert torch.equal(with_labels, without)
    assert torch.equal(without, plain.abs().mean() + 0.5 * differences)
    assert torch.equal(*(pull(module, real, fake, x) for x in (labels_BHW, None)))


def test_a_focus_multiplies_the_pull_of_its_pixels_alone(network_sizes, pictures):
    even, focused = (build(network_sizes, focus=focus) for focus in (EVEN, FocusConfig(things=4.0)))
    ratio_BCHW = pull(focused, *pictures) / pull(even, *pictures)
    # Half of the pixels count 4, the others 1: 2.5 in the mean.
    torch.testing.assert_close(ratio_BCHW[..., :16], torch.full((2, 3, 32, 16), 4 / 2.5))
    torch.testing.assert_close(ratio_BCHW[..., 16:], torch.full((2, 3, 32, 16), 1 / 2.5))


def test_differences_are_weighted_like_their_pixels(network_sizes, pictures):
    settings = [dict(gradient_weight=weight, focus=FocusConfig(things=4.0)) for weight in (0, 1)]
    only_pixels, both = (pull(build(network_sizes, **s), *pictures) for s in settings)
    even = [pull(build(network_sizes, gradient_weight=weight), *pictures) for weight in (0, 1)]
    ratio_BCHW = (both - only_pixels) / (even[1] - even[0])
    inside = ratio_BCHW[..., :15][even[1][..., :15] != even[0][..., :15]]
    torch.testing.assert_close(inside, torch.full_like(inside, 4 / 2.5), rtol=1e-3, atol=0)
    outside = ratio_BCHW[..., 17:][even[1][..., 17:] != even[0][..., 17:]]
    torch.testing.assert_close(outside, torch.full_like(outside, 1 / 2.5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("axis", [1, 2])
def test_all_sides_of_a_thing_count_alike(axis, network_sizes, pictures):
    module = build(network_sizes, gradient_weight=1.0, focus=FocusConfig(things=4.0))
    real, fake, labels_BHW = pictures
    labels_BHW[:, :9] = GRASS
    mirrored = [x.flip(axis - 3) for x in (real, fake, labels_BHW)]
    torch.testing.assert_close(
        pull(module, *mirrored).flip(axis - 3), pull(module, real, fake, labels_BHW)
    )


@pytest.mark.parametrize("name", ["things", "people", "faces"])
@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_weights_that_are_no_numbers_above_0_are_refused(name, weight):
    with pytest.raises(ValueError, match=rf"model\.focus must be .*{name}={weight}"):
        FocusConfig(**{name: weight})


@pytest.mark.parametrize("labels", [False, True])
def test_scene_maps_are_read_only_where_labels_are_wanted(labels, tmp_path):
    photo = io.BytesIO()
    Image.new("RGB", (32, 32)).save(photo, format="PNG")
    with ShardWriter(str(tmp_path / "00000.tar")) as writer:
        for number in range(4):
            writer.write(Sample(f"{number}", {"jpg": photo.getvalue()}))
    data = PhotoData(input=str(tmp_path), batch_size=1, size=32, holdout=2, labels=labels)
    if labels:
        with pytest.raises(ShardError, match=r"sample 0 has no scene\.png; .* mas preprocess"):
            data.setup("fit")
    else:
        data.setup("fit")
        assert "labels" not in data.training.item(0, None)


def test_labels_follow_the_photo_through_a_flip(tmp_path):
    labels = np.full((32, 32), GRASS, np.uint8)
    labels[:, :10] = SHEEP
    scene, photo, png = SceneMap.from_labels(labels), io.BytesIO(), io.BytesIO()
    Image.fromarray(PALETTE[labels]).save(photo, format="PNG")
    scene.to_png(png)
    with ShardWriter(str(tmp_path / "00000.tar")) as writer:
        for number in range(4):
            files = {"jpg": photo.getvalue(), "scene.png": png.getvalue()}
            writer.write(Sample(f"{number}", files))
    data = PhotoData(input=str(tmp_path), batch_size=1, size=32, holdout=2, labels=True)
    data.setup("fit")
    sides = set()
    for seed in range(8):
        item = data.training.item(0, np.random.default_rng(seed))
        assert np.array_equal(item["image"].permute(1, 2, 0), PALETTE[item["labels"]])
        sides.add(int(item["labels"][0, 0]))
    assert sides == {SHEEP, GRASS}
