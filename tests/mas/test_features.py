"""Features from files and the distances on them: the published Inception, FID by its formula."""

import math
import os
import zipfile

import numpy as np
import pytest
import torch
from published import rule_tensor
from torch import Tensor, nn

from mas.features import DistanceMetrics, Extractor, _to_inception
from mas.inception import Inception
from mas.storage import file_hash
from mas.weights_file import WeightsError

# Features 0, 300, … of two pictures, mean and standard deviation of all: pytorch-fid 0.3.0 with
# torchvision 0.29.2, in float64, with weights by the rule below; resized from 128 pixels.
FIRST = [0.0, 0.00025, 0.034413, 0.13374, 0.166029, 0.509991, 0.344627]
SECOND = [0.0, 0.000759, 0.039699, 0.112612, 0.189765, 0.52387, 0.356995]
MEAN, DEVIATION = 0.206176, 0.277355


def rule_weights():
    state = {}
    for name, tensor in Inception().state_dict().items():
        shape = tuple(tensor.shape)
        if name.endswith("running_var"):
            value = 1 + np.abs(rule_tensor(f"{name}.bias", shape))
        elif name.endswith("running_mean"):
            value = rule_tensor(name, shape) - 1
        elif name.endswith("num_batches_tracked"):
            continue  # the published file may or may not have it
        else:
            scale = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else None
            value = rule_tensor(name, shape, scale)
        state[name] = torch.from_numpy(np.asarray(value, np.float32))
    return state


@pytest.fixture(scope="module")
def weights():
    return rule_weights()


@pytest.fixture(scope="module")
def inception_file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    torch.save(weights, path)
    return path


def two_pictures():
    side = torch.linspace(0, 1, 128)
    waves = 0.5 + 0.5 * torch.sin(20 * side[None, :] * side[:, None])
    smooth = torch.stack([side.expand(128, 128), side[:, None].expand(128, 128), waves])
    noise = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))
    return torch.stack([smooth, (smooth + noise) / 2])


def test_inception_reproduces_the_published_network(inception_file, weights):
    assert len(weights) == 566 - 94 and sum(x.numel() for x in weights.values()) == 23_885_392
    features = Extractor(inception_file)(two_pictures())
    assert features.shape == (2, 2048)
    for row, expected in zip(features, (FIRST, SECOND), strict=True):
        torch.testing.assert_close(row[::300], torch.tensor(expected), atol=5e-6, rtol=0)
    assert float(features.mean()) == pytest.approx(MEAN, abs=1e-5)
    assert float(features.std()) == pytest.approx(DEVIATION, abs=1e-5)


def test_the_filter_is_stated_and_matters(inception_file):
    image = torch.rand(1, 3, 400, 400, generator=torch.Generator().manual_seed(0))
    plain, smooth = (Extractor(inception_file, resize=f) for f in ("bilinear", "bicubic"))
    assert (plain.resize, smooth.resize) == ("bilinear", "bicubic")
    assert not torch.allclose(plain(image), smooth(image), atol=1e-3)


class Colours(nn.Module):
    """Eight features: means of the colours, left and right, and two products."""

    def forward(self, x: Tensor) -> Tensor:
        left = x[..., : x.shape[-1] // 2].mean(dim=[2, 3])
        right = x[..., x.shape[-1] // 2 :].mean(dim=[2, 3])
        return torch.cat([left, right, left[:, :2] * right[:, :2]], dim=1)


@pytest.fixture
def colours_file(tmp_path):
    torch.jit.script(Colours()).save(tmp_path / "colours.pt")
    return tmp_path / "colours.pt"


def trusted(path):
    return Extractor(path, trust_program=True)


def sets():
    generator = torch.Generator().manual_seed(0)
    made, real = torch.rand(2, 40, 3, 6, 6, generator=generator)
    return made * 0.8 + 0.1, real


def test_fid_is_the_frechet_distance_of_two_gaussians(colours_file):
    from scipy.linalg import sqrtm

    metrics = DistanceMetrics(trusted(colours_file))
    made, real = sets()
    for batch in made.split(16):
        metrics.update(batch, real=False)
    metrics.update(real, real=True)
    a, b = (Colours()(x).double().numpy() for x in (made, real))
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert metrics.compute().fid == pytest.approx(expected, rel=1e-3)


def test_a_result_says_what_it_was_measured_with(colours_file, inception_file):
    metrics = DistanceMetrics(trusted(colours_file))
    made, real = sets()
    metrics.update(made[:30], real=False)
    metrics.update(real, real=True)
    result = metrics.compute(seed=1)
    assert (result.count, result.true_count) == (30, 40)
    assert (result.extractor, result.sha256) == ("colours.pt", file_hash(colours_file))
    assert result.resize == "by the network"
    assert result == metrics.compute(seed=1)


def test_equal_sets_are_near_and_others_far(colours_file):
    _, real = sets()
    near, far = DistanceMetrics(trusted(colours_file)), DistanceMetrics(trusted(colours_file))
    for metrics, image in ((near, real.flip(0)), (far, 0.5 * real)):
        metrics.update(image, real=False)
        metrics.update(real, real=True)
    assert near.compute().fid == pytest.approx(0, abs=1e-6)
    assert far.compute().fid > 0.1 and far.compute().kid > near.compute().kid


def test_too_few_pictures_are_said(colours_file, caplog):
    metrics = DistanceMetrics(trusted(colours_file))
    metrics.update(sets()[0][:5], real=False)
    with pytest.raises(ValueError, match="5 pictures against 0: a distance needs two of each"):
        metrics.compute()
    metrics.update(sets()[1], real=True)
    metrics.compute()
    assert "FID of 5 against 40 pictures by 8 features is too high" in caplog.text


def test_a_network_of_torch_export_is_read(tmp_path):
    image = torch.rand(2, 3, 6, 6)
    program = torch.export.export(Colours(), (image,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, tmp_path / "colours.pt2")
    image = torch.rand(5, 3, 6, 6)
    network = trusted(tmp_path / "colours.pt2")
    torch.testing.assert_close(network(image), Colours()(image))


def test_a_program_is_run_only_for_those_who_trust_it(tmp_path):
    torch.jit.script(Colours()).save(tmp_path / "weights.pth")  # whatever it is called
    wanted = rf"weights\.pth: is a program .*{file_hash(tmp_path / 'weights.pth')}.*--trust-program"
    with pytest.raises(WeightsError, match=wanted):
        Extractor(tmp_path / "weights.pth")
    (tmp_path / "network.pt2").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"network\.pt2: is a program"):
        Extractor(tmp_path / "network.pt2")


def test_a_broken_program_is_named(tmp_path):
    program = torch.export.export(Colours(), (torch.rand(2, 3, 6, 6),))
    torch.export.save(program, tmp_path / "whole.pt2")
    whole = (tmp_path / "whole.pt2").read_bytes()
    members = zipfile.ZipFile(tmp_path / "whole.pt2")
    for number, left_out in enumerate([None, *members.namelist()]):
        path = tmp_path / f"{number}.pt2"
        path.write_bytes(whole[: len(whole) // 2])  # as a download that was cut
        if left_out is not None:
            with zipfile.ZipFile(path, "w") as archive:
                for name in members.namelist():
                    if name != left_out:
                        archive.writestr(name, members.read(name))
        try:
            trusted(path)
        except WeightsError as error:
            assert str(error).startswith(f"{path}: neither TorchScript nor")
        else:
            assert left_out is not None  # which it can do without


class Detector(nn.Module):
    """As NVIDIA's Inception for StyleGAN: bytes in, probabilities out unless told otherwise."""

    def forward(self, img: Tensor, return_features: bool = False, use_fp16: bool = False) -> Tensor:
        features = (img.float() - 128) / 128
        features = features.mean(dim=[2, 3])
        return features if return_features else features.softmax(dim=1)


def test_a_network_that_takes_bytes_gets_them_and_is_asked_for_features(tmp_path):
    torch.jit.script(Detector()).save(tmp_path / "inception-2015-12-05.pt")
    image_BCHW = sets()[1].mul(255).round() / 255
    extractor = trusted(tmp_path / "inception-2015-12-05.pt")
    features_BD = extractor(image_BCHW)
    torch.testing.assert_close(features_BD, (255 * image_BCHW.mean((2, 3)) - 128) / 128)


@pytest.mark.parametrize("side", [64, 400])  # enlarged and reduced
def test_bicubic_is_the_filter_of_pillow_on_which_clean_fid_stands(side):
    from PIL import Image

    image_BCHW = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    resized_CHW = (_to_inception(image_BCHW, "bicubic")[0] + 1) / 2
    expected = [
        Image.fromarray(255 * plane_HW.numpy()).resize((299, 299), Image.Resampling.BICUBIC)
        for plane_HW in image_BCHW[0]
    ]
    expected_CHW = torch.from_numpy(np.stack([np.asarray(plane) for plane in expected]))
    torch.testing.assert_close(255 * resized_CHW, expected_CHW.clamp(0, 255), atol=0.01, rtol=0)


class Picture(nn.Module):
    """Returns pictures, not features."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_bad_files_are_named(inception_file, weights, tmp_path):
    with pytest.raises(
        WeightsError, match=r"none\.pth: no such file; get it from https.*inception"
    ):
        Extractor(tmp_path / "none.pth")
    torch.save({k: v for k, v in weights.items() if "7b" not in k}, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match=r"part\.pth: \d+ missing tensors: Mixed_7b\.branch1x1"):
        Extractor(tmp_path / "part.pth")
    (tmp_path / "cut.pth").write_bytes(inception_file.read_bytes()[:90_000])
    with pytest.raises(WeightsError, match=r"cut\.pth: not a readable file of tensors"):
        Extractor(tmp_path / "cut.pth")
    forged = bytearray(inception_file.read_bytes())
    forged[forged.rindex(b"PK\x01\x02")] ^= 0xFF  # in the list of its members
    (tmp_path / "forged.pth").write_bytes(forged)
    with pytest.raises(WeightsError, match=r"forged\.pth: not a readable file of tensors"):
        Extractor(tmp_path / "forged.pth")
    torch.save({"a": os.getcwd}, tmp_path / "code.pth")
    with pytest.raises(WeightsError, match=r"code\.pth: .*asks for .*getcwd, which would run code"):
        Extractor(tmp_path / "code.pth")
    torch.jit.script(Picture()).save(tmp_path / "picture.pt")
    with pytest.raises(WeightsError, match=r"picture\.pt: returns \(2, 3, 4, 4\) for 2 pictures"):
        trusted(tmp_path / "picture.pt")(torch.rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match="resize 'lanczos': use one of bilinear, bicubic"):
        Extractor(inception_file, resize="lanczos")
