"""Crop terms: crops show their boxes, and the loss comes from them alone."""

import copy

import pytest
import torch
from torch import Tensor, nn

from mas.reader import Reader, ReaderConfig
from mas.weights_file import WeightsError
from train.crops import CropsConfig, FaceFeatures, Judges, crop
from train.perceptual import VGG16, PerceptualConfig, ReaderPerceptual


class Edges(nn.Module):
    """A made-up face network of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.relu(self.layer(x))
        return [hidden, hidden.mean(dim=[2, 3])]


class Words(nn.Module):
    """Returns no tensor."""

    def forward(self, x: Tensor) -> str:
        return "face"


@pytest.fixture
def face_file(tmp_path):
    torch.manual_seed(0)
    torch.jit.script(Edges()).save(tmp_path / "face.pt")
    return str(tmp_path / "face.pt")


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(VGG16().state_dict(), path)
    return str(path)


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.long)


def test_a_crop_of_its_own_size_is_the_box():
    image_BCHW = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    crops = crop(image_BCHW, boxes([[4, 2, 12, 10], [0] * 4], [[0] * 4, [16, 12, 24, 20]]), size=8)
    torch.testing.assert_close(crops[0], image_BCHW[0, :, 2:10, 4:12], atol=1e-5, rtol=0)
    torch.testing.assert_close(crops[1], image_BCHW[1, :, 12:20, 16:24], atol=1e-5, rtol=0)
    assert len(crops) == 2  # boxes of zeros have none


def test_a_flat_box_is_not_distorted():
    image_BCHW = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    crops = crop(image_BCHW, boxes([[4, 8, 12, 12]]), size=8)
    torch.testing.assert_close(crops[0], image_BCHW[0, :, 6:14, 4:12], atol=1e-5, rtol=0)


def test_what_lies_outside_the_boxes_counts_for_nothing(face_file):
    judges = Judges(
        PerceptualConfig(), CropsConfig(face_weight=1.0, size=16, face_network=face_file)
    )
    assert judges.network is None  # no weights of VGG-16 are asked for
    real = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fake = real.clone()
    fake[:, :, :16] = 0
    below, above = [[0, 16, 16, 32]], [[0, 0, 16, 16]]
    assert float(judges.faces(fake, real, boxes(below, below))) == pytest.approx(0, abs=1e-6)
    one, both = (judges.faces(fake, real, boxes(a, above)) for a in (below, above))
    assert 0 < float(one) < float(both)


def test_without_boxes_the_term_is_zero_and_trains_nothing(face_file):
    judges = Judges(PerceptualConfig(), CropsConfig(face_weight=1.0, face_network=face_file))
    fake = torch.rand(1, 3, 32, 32, requires_grad=True)
    loss = judges.faces(fake, torch.rand(1, 3, 32, 32), torch.zeros(1, 4, 4, dtype=torch.long))
    loss.backward()
    assert float(loss.detach()) == 0 and not fake.grad.any()


def test_face_features_are_compared_layer_by_layer_relative_to_the_photo(face_file):
    network, (fake, real) = FaceFeatures(face_file), torch.rand(2, 3, 3, 12, 12)
    expected = [
        (a - b).abs().flatten(1).mean(1) / b.abs().mean()
        for a, b in zip(network.network(fake), network.network(real), strict=True)
    ]
    torch.testing.assert_close(network(fake, real), expected[0] + expected[1])
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_without_a_face_network_faces_are_compared_by_vgg_like_things(vgg_file):
    settings = (
        PerceptualConfig(vgg=vgg_file),
        CropsConfig(face_weight=1.0, object_weight=1.0, size=16),
    )
    judges = Judges(*settings)
    fake, real = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    where = boxes([[4, 4, 20, 20]])
    faces, things = judges.faces(fake, real, where), judges.things(fake, real, where)
    assert float(faces) == float(things) > 0


def test_the_judges_are_in_no_checkpoint_and_not_copied(face_file):
    judges = Judges(PerceptualConfig(), CropsConfig(face_weight=1.0, face_network=face_file))
    module = nn.Module()
    module.judges = judges
    assert not module.state_dict() and copy.deepcopy(module).judges is judges


def test_bad_face_networks_are_named(tmp_path, vgg_file):
    with pytest.raises(WeightsError, match=r"none\.pt: no such file"):
        FaceFeatures(str(tmp_path / "none.pt"))
    with pytest.raises(WeightsError, match=r"vgg16\.pth: neither TorchScript nor"):
        FaceFeatures(vgg_file)
    torch.jit.script(Words()).save(tmp_path / "words.pt")
    with pytest.raises(WeightsError, match=r"words\.pt: returns a str, but must return a tensor"):
        FaceFeatures(str(tmp_path / "words.pt"))(*torch.rand(2, 1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"set model\.perceptual\.vgg"):
        Judges(PerceptualConfig(), CropsConfig(object_weight=1.0))


def test_crops_are_not_compared_by_a_reader(face_file, tmp_path):
    Reader(ReaderConfig(size=32, width=8, multipliers=(1,))).save_pretrained(tmp_path / "reader")
    perceptual = PerceptualConfig(weight=1.0, reader=str(tmp_path / "reader"))
    for crops in (
        CropsConfig(object_weight=1.0),
        CropsConfig(face_weight=1.0),
        CropsConfig(face_weight=1.0, object_weight=1.0, face_network=face_file),
    ):
        with pytest.raises(ValueError, match=r"set model\.perceptual\.vgg instead of reader"):
            Judges(perceptual, crops)
    judges = Judges(perceptual, CropsConfig(face_weight=1.0, face_network=face_file))
    assert isinstance(judges.network, ReaderPerceptual) and isinstance(judges.face, FaceFeatures)
