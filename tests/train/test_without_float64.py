"""Apple's GPUs have no float64: what runs where a network lies must do without it."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mas.rounding
from mas.gpt import GPT, GPTConfig
from mas.metrics import PictureMetrics
from mas.vqseg import draw_pixels
from train.totals import log_totals


class Without64(TorchDispatchMode):
    """A device of this kind has no float64."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.device.type == self.kind:
                assert x.dtype != torch.float64, function
        return result


@pytest.mark.parametrize("rotary", [False, True])
def test_a_gpt_learns(rotary, monkeypatch):
    monkeypatch.setattr(mas.rounding, "NO_FLOAT64", ("meta",))
    config = GPTConfig(
        layers=2,
        width=16,
        heads=2,
        text_vocabulary=40,
        scene_vocabulary=20,
        image_vocabulary=30,
        text_length=6,
        scene_grid=2,
        image_grid=4,
        rotary=rotary,
    )
    with torch.device("meta"):
        network = GPT(config)
        tokens = [torch.zeros(2, s.length, dtype=torch.long) for s in config.layout.streams]
    with Without64("meta"):
        losses = network.losses(*tokens)
        (losses.text + losses.scene + losses.image).backward()


def test_pixels_are_drawn():
    labels_P = torch.randint(0, 157, (4096,), generator=torch.Generator().manual_seed(0))
    with Without64("cpu"):
        drawn_P = draw_pixels(labels_P.to(torch.uint8), 0.25, balance=0.5)
    assert 0 < len(drawn_P) < 2048


def test_sums_of_one_process_stay_where_they_are():
    metric = PictureMetrics()
    metric.update(torch.zeros(1, 3, 16, 16), true_image_BCHW=torch.ones(1, 3, 16, 16))
    logged = {}
    module = SimpleNamespace(
        device=torch.device("meta"),
        global_step=3,
        trainer=SimpleNamespace(world_size=1),
        log_dict=lambda values, sync_dist: logged.update(values),
    )
    log_totals(module, [metric])
    assert logged["validation/psnr"] == 0
