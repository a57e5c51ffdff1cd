"""Photos are fitted to a size and grouped into batches that waste little."""

import numpy as np
import pytest

from preprocess.batching import fitted_size, pick_device, plan_batches, resize


def test_batches_hold_every_photo_once_and_waste_little():
    rng = np.random.default_rng(0)
    sizes = [
        fitted_size(*rng.integers(50, 3000, 2), short_side=512, max_side=1024) for _ in range(200)
    ]
    batches = plan_batches(sizes, batch=8)
    assert sorted(i for members in batches for i in members) == list(range(200))
    assert max(len(members) for members in batches) == 8
    for members in batches:
        padded = max(sizes[i][0] for i in members) * max(sizes[i][1] for i in members)
        assert sum(sizes[i][0] * sizes[i][1] for i in members) >= 0.75 * padded * len(members)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (512, 683)),
        ((640, 480), (683, 512)),
        ((10, 20000), (1, 1024)),
        ((1, 1), (512, 512)),
    ],
)
def test_photos_are_fitted_by_their_short_side_and_capped_by_the_long_one(size, expected):
    assert fitted_size(*size, short_side=512, max_side=1024) == expected


def test_resizing_keeps_colours_and_order():
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, :30] = (255, 0, 10)
    small = resize(image, height=20, width=30)
    assert small.shape == (20, 30, 3)
    assert (small[:, :14] == (255, 0, 10)).all() and (small[:, 16:] == 0).all()
    assert resize(image, height=40, width=60) is image


def test_unknown_and_absent_devices_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert str(pick_device("auto")) == "cpu"
    with pytest.raises(ValueError, match="use auto, cpu, cuda"):
        pick_device("graphics card")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match="has no CUDA GPU"):
        pick_device("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match="--gpus-per-worker"):
        pick_device("cuda")
