"""The reader as a network: shapes, sizes, storage."""

import pytest
import torch

from mas.reader import Reader, ReaderConfig, class_shares
from mas.scene import CLASSES, VOID

CONFIG = ReaderConfig(
    size=32, width=8, multipliers=(1, 2, 2), groups=4, features=8, times=("day", "night")
)


@pytest.fixture
def reader():
    torch.manual_seed(0)
    return Reader(CONFIG).eval()


def test_the_default_reader_has_less_than_a_million_parameters():
    with torch.device("meta"):
        network = Reader(ReaderConfig(times=("a", "b", "c", "d"), places=("a",) * 6))
    assert sum(p.numel() for p in network.parameters()) < 1e6


def test_a_picture_gets_a_label_a_pixel(reader):
    image_BCHW = torch.rand(3, 3, 32, 32)
    reading = reader.read(image_BCHW)
    assert reading.labels_BHW.shape == (3, 32, 32) and reading.labels_BHW.dtype == torch.uint8
    assert reading.labels_BHW.max() < CLASSES
    assert reading.times_B.shape == (3,) and reading.times_B.max() < 2
    alone = reader.read(image_BCHW[1:2])
    assert torch.equal(alone.labels_BHW[0], reading.labels_BHW[1])
    assert torch.allclose(alone.features_BD[0], reading.features_BD[1], atol=1e-5)


def test_training_sees_the_logits_that_reading_decides_by(reader):
    image_BCHW = torch.rand(2, 3, 32, 32)
    pixels_BP = torch.arange(32 * 32).repeat(2, 1)
    logits_BPK, times_BK = reader.logits(image_BCHW, pixels_BP)
    reading = reader.read(image_BCHW)
    assert torch.equal(logits_BPK.argmax(-1).view(2, 32, 32), reading.labels_BHW.long())
    assert torch.equal(times_BK.argmax(1), reading.times_B)
    some_BP = torch.tensor([[5], [77]])
    assert torch.allclose(
        reader.logits(image_BCHW, some_BP)[0][:, 0], logits_BPK[[0, 1], [5, 77]], atol=1e-5
    )


def test_looking_shows_what_reading_decides_by_and_lets_gradients_through(reader):
    image_BCHW = torch.rand(2, 3, 32, 32, requires_grad=True)
    pixels_BDHW, *levels = reader.look(image_BCHW)
    assert [tuple(x.shape) for x in levels] == [(2, 8, 16, 16), (2, 16, 8, 8), (2, 16, 4, 4)]
    reading = reader.read(image_BCHW)
    labels_BHW = reader.classifier(pixels_BDHW.movedim(1, -1)).argmax(-1)
    assert torch.equal(labels_BHW, reading.labels_BHW.long())
    means = [torch.nn.functional.silu(x).mean(dim=(2, 3)) for x in levels]
    assert torch.allclose(torch.cat(means, 1), reading.features_BD, atol=1e-6)
    for layer in (pixels_BDHW, *levels):
        (gradient,) = torch.autograd.grad(layer.sum(), image_BCHW, retain_graph=True)
        assert gradient.any()


def test_a_reader_survives_storage(reader, tmp_path):
    reader.save_pretrained(tmp_path)
    image_BCHW = torch.rand(1, 3, 32, 32)
    again = Reader.from_pretrained(tmp_path)
    assert again.config == CONFIG
    assert torch.equal(again.read(image_BCHW).labels_BHW, reader.read(image_BCHW).labels_BHW)


def test_places_are_read_from_shares_whatever_the_size(reader):
    labels_BHW = torch.tensor([[[3, 3], [VOID, 7]]], dtype=torch.uint8)
    large_BHW = labels_BHW.repeat_interleave(8, 1).repeat_interleave(8, 2)
    shares_BK = class_shares(labels_BHW)
    assert torch.equal(shares_BK, class_shares(large_BHW))
    assert shares_BK[0, 3].expm1() == pytest.approx(50) and shares_BK[0, 7].expm1() == (
        pytest.approx(25)
    )
    assert shares_BK.count_nonzero() == 2  # void is no class
    assert torch.equal(reader.read_places(labels_BHW), reader.read_places(large_BHW))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 36}, "size 36 must be a multiple of 8"),
        ({"width": 6}, "width 6 must be a multiple of groups 4"),
        ({"multipliers": ()}, "multipliers must be positive"),
        ({"patch": 0}, "patch must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    values = {"size": 32, "width": 8, "multipliers": (1, 2, 2), "groups": 4, **options}
    with pytest.raises(ValueError, match=message):
        ReaderConfig(**values)


def test_pictures_of_another_size_are_refused(reader):
    with pytest.raises(ValueError, match="takes pictures of B x 3 x 32 x 32, got 1 x 3 x 16 x 16"):
        reader.read(torch.rand(1, 3, 16, 16))
