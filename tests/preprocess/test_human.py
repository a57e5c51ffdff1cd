"""Human parts: the network equals the published one, people are cropped and pasted back alone."""

import errno
import importlib.util
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mas.scene import PERSON, VOID, Segments
from mas.shards import Sample
from preprocess import human, schp
from preprocess.human import HumanConfig, HumanParser, HumanSegmenter, Person
from preprocess.schp import SCHP, load_schp
from preprocess.segment import Photo
from preprocess.weights import WeightsError

ROOT = Path(__file__).parent.parent.parent
VECTORS = Path(os.environ.get("MAS_VECTORS", ROOT.parent / "shared/vectors"))
FOLDER = VECTORS / "schp-lip-resnet101"
RED = np.full((40, 30, 3), (255, 0, 0), np.uint8)


def photo(image, key="a"):
    return Photo(key, image, Sample(key, {}))


def unpack(bits, shape):
    return np.unpackbits(bits)[: shape[0] * shape[1]].reshape(shape).astype(bool)


@pytest.fixture(scope="module")
def vectors():
    if not FOLDER.is_dir():
        pytest.skip(f"no golden vectors at {FOLDER}: set MAS_VECTORS")
    return np.load(FOLDER / "input.npz"), np.load(FOLDER / "output.npz")


@pytest.fixture(scope="module")
def parser(vectors, tmp_path_factory):
    """The real loader on a checkpoint in the published layout, with the rule's weights."""
    spec = importlib.util.spec_from_file_location("rule", VECTORS / "rule.py")
    rule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
    state = {f"module.{k}": torch.from_numpy(v) for k, v in rule.state_dict(str(FOLDER)).items()}
    path = tmp_path_factory.mktemp("schp") / "checkpoint.pth"
    torch.save({"epoch": 149, "state_dict": state}, path)
    yield HumanParser(path, device="cpu")
    path.unlink()


@pytest.fixture(scope="module")
def heads(parser, vectors):
    warped_BCHW = torch.from_numpy(vectors[0]["warped_bgr"].transpose(2, 0, 1)[None].copy())
    with torch.inference_mode():
        return parser.network.heads(human.normalise(warped_BCHW)), parser.logits(warped_BCHW)


@pytest.mark.vectors
def test_the_network_reproduces_the_published_one(heads, vectors):
    tolerance = json.loads((FOLDER / "meta.json").read_text())["tolerance_abs"]
    output, (found, logits) = vectors[1], heads
    for name, tensor in {**found._asdict(), "logits": logits}.items():
        values = tensor.numpy().reshape(-1)[output[f"{name}_idx"]]
        assert np.abs(values - output[name]).max() <= tolerance[name], name
    labels = logits[0].argmax(0).numpy()
    sure = unpack(output["sure"], labels.shape)
    assert sure.mean() > 0.99
    assert (labels == output["argmax"])[sure].all()


@pytest.mark.vectors
def test_the_inverse_warp_reproduces_the_published_labels(heads, vectors):
    labels = human.unwarp(heads[1][0], 150, 116)
    sure = unpack(vectors[1]["image_sure"], (150, 116))
    assert (labels == vectors[1]["image_argmax"])[sure].all()


@pytest.mark.vectors
def test_the_warp_is_the_published_one_up_to_opencvs_rounding(vectors):
    warped_CHW = human.warp(vectors[0]["person_bgr"][..., ::-1])
    off = np.abs(warped_CHW.numpy().transpose(1, 2, 0) - vectors[0]["warped_bgr"].astype(float))
    assert off.max() <= 4 and off.mean() <= 0.15


@pytest.mark.vectors
def test_parsing_a_crop_end_to_end_gives_the_published_labels(parser, vectors):
    (labels,) = parser.parse([vectors[0]["person_bgr"][..., ::-1]])
    sure = unpack(vectors[1]["image_sure"], labels.shape)
    assert (labels == vectors[1]["image_argmax"])[sure].all()


def abn(x, weight, bias, mean, var):
    """The published normalisation, spelled out."""
    shape = (1, -1, 1, 1)
    scaled = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + 1e-5)
    return scaled * (np.abs(weight.reshape(shape)) + 1e-5) + bias.reshape(shape)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of a narrow copy of the network, with negative, tiny and zero gains."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schp, "SCHP", NarrowSCHP)
        torch.manual_seed(0)
        state = dict(NarrowSCHP().state_dict())
        for name, tensor in state.items():
            noise = torch.randn(
                tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))
            )
            if tensor.ndim == 1 and name.endswith("weight"):
                state[name] = noise
                state[name][:2] = torch.tensor([0.0, -1e-4])
            elif name.endswith("running_var"):
                state[name] = 1 + noise.abs()
        path = tmp_path_factory.mktemp("schp") / "small.pth"
        published = {
            f"module.{k}": v for k, v in state.items() if not k.endswith("num_batches_tracked")
        }
        torch.save({"state_dict": published, "epoch": 1}, path)
        yield path, state


class NarrowSCHP(nn.Module):
    """Two of the network's own modules, enough for everything that the loader does."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.head = nn.Sequential(*schp._conv_norm(12, 8))


def test_loading_folds_the_published_gain_into_plain_batch_norm(small):
    path, state = small
    network = load_schp(path)
    x = np.random.default_rng(0).normal(size=(2, 12, 4, 5)).astype(np.float32)
    values = [state[f"bn1.{n}"].numpy() for n in ("weight", "bias", "running_mean", "running_var")]
    np.testing.assert_allclose(
        network.bn1(torch.from_numpy(x)).numpy(), abn(x, *values), rtol=1e-5, atol=1e-6
    )
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_heads_normalise_the_same_and_leak(small):
    path, state = small
    norm = load_schp(path).head[1]
    x = np.random.default_rng(1).normal(size=(2, 8, 4, 5)).astype(np.float32)
    names = ("weight", "bias", "running_mean", "running_var")
    expected = abn(x, *(state[f"head.1.{n}"].numpy() for n in names))
    expected = np.where(expected < 0, 0.01 * expected, expected)
    np.testing.assert_allclose(norm(torch.from_numpy(x)).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_checkpoints_with_other_tensors_are_refused_by_name(small, tmp_path):
    path, _ = small
    whole = torch.load(path, weights_only=True)["state_dict"]

    def refused(state, message):
        torch.save({"state_dict": state}, tmp_path / "other.pth")
        with pytest.raises(WeightsError, match=message):
            load_schp(tmp_path / "other.pth")

    refused({k: v for k, v in whole.items() if "bn1.bias" not in k}, "it lacks bn1.bias")
    refused({**whole, "module.extra": torch.zeros(1)}, "it has unknown extra")
    refused({**whole, "module.bn1.bias": torch.zeros(5)}, r"misshapes bn1.bias \(5,\) instead of")


def test_a_wrong_checksum_is_refused_before_anything_is_read(small):
    with pytest.raises(WeightsError, match="sha256 is"):
        load_schp(small[0], sha256="0" * 64)


def test_broken_and_hostile_files_are_refused_in_one_line(tmp_path):
    (tmp_path / "page.pth").write_text("<html>Quota exceeded</html>")
    torch.save({"state_dict": os.getcwd}, tmp_path / "code.pth")
    torch.save([1], tmp_path / "list.pth")
    for name in ("page", "code", "list"):
        with pytest.raises(WeightsError) as caught:
            load_schp(tmp_path / f"{name}.pth")
        assert f"{name}.pth" in str(caught.value) and "\n" not in str(caught.value)


def test_a_disk_that_cannot_be_read_is_not_taken_for_a_damaged_file(small, monkeypatch):
    broken = OSError(errno.EIO, "Input/output error")

    def fail(*_, **__):
        raise broken

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        load_schp(small[0])
    assert caught.value is broken


def test_the_published_name_demands_the_published_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MAS_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError, match="mas fetch-weights human"):
        HumanParser()
    (tmp_path / "exp-schp-201908261155-lip.pth").write_bytes(b"half a download")
    with pytest.raises(WeightsError, match="24fa3254"):
        HumanParser()


class Recorder(nn.Module):
    """Stands for the network: keeps its input, says class 5 left of the middle and 9 right."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x_BCHW):
        self.seen.append(x_BCHW)
        logits = torch.zeros(len(x_BCHW), schp.PARTS, 119, 119)
        logits[:, 5, :, :60] = 1  # column 59 is the middle
        logits[:, 9, :, 59:] = 1
        return logits


@pytest.fixture
def network(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(human, "load_schp", lambda path, sha256: recorder)
    monkeypatch.setattr(human, "find_weights", lambda name: Path(name))
    return recorder


def two_people():
    """A small person over a tall one, void above, something else to the right."""
    labels = np.full((60, 80), 123, np.uint8)
    labels[:5] = VOID
    labels[10:50, 10:30] = PERSON
    instances = np.zeros((60, 80), np.int32)
    instances[10:50, 10:30] = 7
    instances[20:28, 24:30] = 9
    return Segments(labels, instances)


def test_the_network_receives_blue_green_red(network):
    HumanParser(device="cpu").parse([RED])
    pixel = network.seen[0][0, :, 236, 236]
    expected = [(0 - 0.406) / 0.225, (0 - 0.456) / 0.224, (1 - 0.485) / 0.229]
    torch.testing.assert_close(pixel, torch.tensor(expected))


def test_crops_keep_their_aspect_between_normalised_black(network):
    HumanParser(device="cpu").parse([RED])
    (x_BCHW,) = network.seen
    assert x_BCHW.shape == (1, 3, 473, 473)
    black = torch.tensor([-0.406 / 0.225, -0.456 / 0.224, -0.485 / 0.229])
    torch.testing.assert_close(x_BCHW[0, :, 236, 2], black)
    red_columns = (x_BCHW[0, 2, 236] > 0).sum() / 473
    assert abs(red_columns - 30 / 40) < 0.02
    assert (x_BCHW[0, 2, :, 236] > 0).all()


def test_labels_come_back_at_the_size_of_each_crop(network):
    crops = [RED, RED.transpose(1, 0, 2), RED[:1, :1], np.zeros((1200, 7, 3), np.uint8)]
    for crop, labels in zip(crops, HumanParser(device="cpu").parse(crops), strict=True):
        assert labels.shape == crop.shape[:2] and labels.dtype == np.uint8
        half = crop.shape[1] // 2
        assert (labels[:, :half] == 5).all() and (labels[:, half + 1 :] == 9).all()


def test_all_people_of_all_photos_share_one_forward_pass(network):
    segmenter = HumanSegmenter(device="cpu", batch=8)
    image = np.zeros((60, 80, 3), np.uint8)
    maps = segmenter([photo(image), photo(image)], [two_people(), two_people()])
    assert [len(x) for x in network.seen] == [4]
    assert [m.shape for m in maps] == [(60, 80)] * 2


def test_parts_stay_inside_their_persons_mask(network):
    segments = two_people()
    (parts,) = HumanSegmenter(device="cpu")([photo(np.zeros((60, 80, 3), np.uint8))], [segments])
    person = segments.labels == PERSON
    assert (parts[~person] == 0).all()
    assert set(np.unique(parts[person])) == {5, 9}
    small = segments.instances == 9  # parsed by itself: both halves within its own few columns
    assert set(np.unique(parts[small])) == {5, 9}


def test_photos_without_people_are_not_run(network):
    segments = Segments(np.full((6, 8), 123, np.uint8), np.zeros((6, 8), np.int32))
    (parts,) = HumanSegmenter(device="cpu")([photo(np.zeros((6, 8, 3), np.uint8))], [segments])
    assert parts.shape == (6, 8) and not parts.any() and network.seen == []


def test_larger_people_are_pasted_last():
    big = Person((0, 0, 10, 10), np.ones((10, 10), bool), 100)
    small = Person((5, 5, 15, 15), np.ones((10, 10), bool), 50)
    for order in ([0, 1], [1, 0]):
        pairs = [(big, np.full((10, 10), 3, np.uint8)), (small, np.full((10, 10), 4, np.uint8))]
        parts = human.paste((20, 20), [pairs[i] for i in order])
        assert (parts[:10, :10] == 3).all() and (parts[10:15, 5:15] == 4).all()


def test_the_crop_is_the_person_with_its_margin_at_the_photos_own_resolution(network):
    """A photo of twice the segments' size, blue but for the box with its margin."""
    segments = two_people()
    image = np.zeros((120, 160, 3), np.uint8)
    image[..., 2] = 255
    image[2 * 6 : 2 * 54, 2 * 6 : 2 * 34] = (255, 0, 0)  # 40 high: margin 4
    HumanSegmenter(device="cpu", margin=0.1)([photo(image)], [segments])
    big = network.seen[0][1]  # smaller people first
    blue = big[0] > 0
    assert not blue.any()
    HumanSegmenter(device="cpu", margin=0.2)([photo(image)], [segments])
    assert (network.seen[1][1][0] > 0).any()


def test_small_and_surplus_people_keep_the_plain_label():
    segments = two_people()
    areas = [p.area for p in human.find_people(segments, HumanConfig())]
    assert areas == [48, 752]
    assert [p.area for p in human.find_people(segments, HumanConfig(min_side=0.2))] == [752]
    assert [p.area for p in human.find_people(segments, HumanConfig(max_people=1))] == [752]


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="margins"):
        HumanSegmenter(margins=1)


def test_the_network_has_the_published_number_of_parameters():
    with torch.device("meta"):
        network = SCHP()
    assert sum(p.numel() for p in network.parameters()) == 66_723_928
