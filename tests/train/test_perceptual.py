"""LPIPS by VGG-16 with weights from files: the published distance, and what is refused.

And the same by a reader.
"""

import pathlib
from collections import namedtuple

import pytest
import torch
import torchmetrics
from safetensors.torch import save_file

from mas.reader import Reader, ReaderConfig
from mas.storage import StorageError
from mas.weights_file import WeightsError
from train.perceptual import VGG16, PerceptualConfig, ReaderPerceptual, load_perceptual

LINEAR = pathlib.Path(torchmetrics.__file__).parent / "functional/image/lpips_models/vgg.pth"


@pytest.fixture(scope="module")
def weights():
    """VGG-16 with random weights, as torchvision saves it: with a classifier."""
    torch.manual_seed(0)
    state = VGG16().state_dict()
    assert len(state) == 26 and sum(x.numel() for x in state.values()) == 14_714_688
    return {**state, "classifier.0.bias": torch.zeros(4096)}


@pytest.fixture(scope="module")
def vgg_file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(weights, path)
    return path


def pictures(seed=0, side=32):
    return torch.rand(2, 2, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_lpips_with_the_published_linear_layers_agrees_with_torchmetrics(vgg_file, monkeypatch):
    from torchmetrics.functional.image import lpips

    ours = load_perceptual(PerceptualConfig(vgg=str(vgg_file), linear=str(LINEAR)))
    outputs = namedtuple("outputs", ["a", "b", "c", "d", "e"])

    class Theirs(torch.nn.Module):
        def __init__(self, **settings):
            super().__init__()

        def forward(self, x):
            return outputs(*ours.vgg(x))

    monkeypatch.setattr(lpips, "Vgg16", Theirs)
    expected = lpips._LPIPS(net="vgg")
    image, truth = pictures()
    distances = ours(image, truth)
    assert distances.shape == (2,) and (distances > 0.01).all()
    torch.testing.assert_close(
        distances, expected(image, truth, normalize=True).flatten(), rtol=1e-3, atol=1e-6
    )


def test_equal_pictures_have_no_distance_and_a_finite_gradient(vgg_file):
    network = load_perceptual(PerceptualConfig(vgg=str(vgg_file)))
    image = torch.zeros(1, 3, 16, 16, requires_grad=True)
    distance = network(image, torch.zeros(1, 3, 16, 16))
    distance.sum().backward()
    assert float(distance.detach()) == 0 and image.grad.isfinite().all()


def test_the_gradient_makes_pictures_alike(vgg_file):
    network = load_perceptual(PerceptualConfig(vgg=str(vgg_file), linear=str(LINEAR)))
    image, truth = pictures()
    image.requires_grad_(True)
    first = network(image, truth).sum()
    (gradient,) = torch.autograd.grad(first, image)
    nearer = image - 0.05 * gradient / gradient.abs().mean()
    assert network(nearer, truth).sum() < first
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_safetensors_hold_the_same_weights(vgg_file, weights, tmp_path):
    save_file(weights, tmp_path / "vgg16.safetensors")
    networks = [
        load_perceptual(PerceptualConfig(vgg=str(path)))
        for path in (vgg_file, tmp_path / "vgg16.safetensors")
    ]
    assert torch.equal(*[network(*pictures()) for network in networks])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: s.pop("features.28.bias"),
            r"1 missing tensors: features\.28\.bias.*vgg16-397923af",
        ),
        (
            lambda s: s.update({"features.0.weight": torch.zeros(64, 1, 3, 3)}),
            r"features\.0\.weight \(64, 1, 3, 3\) instead of \(64, 3, 3, 3\)",
        ),
        (
            lambda s: s.update({"features.0.bias": torch.full((64,), torch.nan)}),
            "NaN.*features.0.b",
        ),
    ],
)
def test_wrong_tensors_are_named(change, words, weights, tmp_path):
    damaged = dict(weights)
    change(damaged)
    torch.save(damaged, tmp_path / "vgg.pth")
    with pytest.raises(WeightsError, match=words) as caught:
        load_perceptual(PerceptualConfig(vgg=str(tmp_path / "vgg.pth")))
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_files_are_named_with_where_to_get_them(vgg_file, tmp_path):
    with pytest.raises(ValueError, match=r"set model\.perceptual\.vgg to a file from https"):
        load_perceptual(PerceptualConfig(weight=1.0))
    with pytest.raises(WeightsError, match=r"none\.pth: no such file; get it from https"):
        load_perceptual(PerceptualConfig(vgg=str(tmp_path / "none.pth")))
    (tmp_path / "cut.pth").write_bytes(vgg_file.read_bytes()[:5000])
    with pytest.raises(WeightsError, match=r"cut\.pth: not a readable file of tensors"):
        load_perceptual(PerceptualConfig(vgg=str(tmp_path / "cut.pth")))
    with pytest.raises(
        WeightsError, match=r"vgg16\.pth: 5 missing tensors: lin0\.model\.1\.weight"
    ):
        load_perceptual(PerceptualConfig(vgg=str(vgg_file), linear=str(vgg_file)))


class Pickled:
    """Stands for code that a file would run."""


def test_a_file_of_more_than_tensors_is_refused(tmp_path):
    torch.save({"features.0.weight": Pickled()}, tmp_path / "vgg.pth")
    with pytest.raises(WeightsError, match=r"vgg\.pth: not a readable file of tensors"):
        load_perceptual(PerceptualConfig(vgg=str(tmp_path / "vgg.pth")))


READER = ReaderConfig(size=32, width=8, multipliers=(1, 2), groups=4)


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "reader"
    Reader(READER).save_pretrained(folder)
    return folder


@pytest.fixture
def by_reader(reader_folder):
    return load_perceptual(PerceptualConfig(reader=str(reader_folder)))


def test_equal_pictures_look_equal_to_a_reader_and_have_a_finite_gradient(by_reader):
    for image in (pictures()[0], torch.zeros(2, 3, 32, 32)):
        fake = image.clone().requires_grad_()
        distance = by_reader(fake, image)
        distance.sum().backward()
        assert distance.tolist() == [0, 0] and fake.grad.isfinite().all()


def test_a_reader_s_distance_is_that_of_unit_features_of_every_layer(by_reader):
    image, truth = pictures()
    expected = torch.zeros(2)
    for a, b in zip(by_reader.reader.look(image), by_reader.reader.look(truth), strict=True):
        expected += (2 - 2 * torch.cosine_similarity(a, b, dim=1)).mean(dim=(1, 2))
    distance = by_reader(image, truth)
    assert (distance > 0.01).all()
    torch.testing.assert_close(distance, expected, rtol=1e-4, atol=1e-6)


def test_a_reader_makes_the_fake_alike_and_leaves_the_original_and_itself(by_reader):
    image, truth = (x.requires_grad_() for x in pictures())
    before = {name: weight.clone() for name, weight in by_reader.state_dict().items()}
    first = by_reader(image, truth).sum()
    first.backward()
    assert truth.grad is None and not any(p.requires_grad for p in by_reader.parameters())
    nearer = (image - 0.01 * image.grad / image.grad.abs().mean()).detach()
    assert by_reader(nearer, truth).sum() < first
    assert all(torch.equal(weight, before[name]) for name, weight in by_reader.state_dict().items())


def test_a_reader_that_compares_is_frozen_whoever_built_it():
    network = ReaderPerceptual(Reader(READER).train())
    assert not any(p.requires_grad for p in network.parameters())
    assert not any(part.training for part in network.modules())


def test_a_reader_and_files_of_vgg_are_not_used_together(reader_folder, tmp_path):
    for name in ("vgg", "linear"):
        with pytest.raises(ValueError, match="leave either of them out"):
            PerceptualConfig(reader=str(reader_folder), **{name: "vgg.pth"})
    with pytest.raises(StorageError, match=r"config\.json: no such file"):
        load_perceptual(PerceptualConfig(reader=str(tmp_path)))


def test_a_missing_reader_is_named_with_the_way_out(tmp_path):
    message = r"model\.perceptual\.reader: .*config\.json: no such file; .*perceptual\.weight 0"
    with pytest.raises(StorageError, match=message):
        load_perceptual(PerceptualConfig(weight=0.1, reader=str(tmp_path / "reader")))
