"""`mas bench vqseg` on layouts and pictures of 16 pixels."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from mas import bench_vqseg as bench
from mas.__main__ import main
from mas.scene import CLASSES, VOID
from mas.vqgan import VQGAN, VQGANConfig
from mas.vqseg import VQSEG, VQSEGConfig

TINY = dict(size=16, grid=4, codes=16, code_width=4, patch=2, width=16, groups=4)
PUBLISHED = dict(layout="published", patch=1, multipliers=(1, 1, 2), middle=True)


def test_both_layouts_and_both_ways_to_decode_come_as_one_object(tmp_path, monkeypatch, capsys):
    tiny = {
        "default": VQSEGConfig(**TINY),
        "published": VQSEGConfig(**{**TINY, **PUBLISHED}),
    }
    monkeypatch.setattr(bench, "LAYOUTS", tiny)
    config = VQGANConfig(size=16, codes=20, code_width=8, features=12, width=8, groups=4)
    VQGAN(config).save_pretrained(tmp_path)
    options = ["--seconds", "0.01", "--device", "cpu", "--batch-size", "2"]
    assert main(["bench", "vqseg", "--vqgan", str(tmp_path), *options, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    for name, layout in figures["layouts"].items():
        assert layout["parameters"] == sum(p.numel() for p in VQSEG(tiny[name]).parameters())
        assert layout["train_maps_per_second"] > 0 and layout["encode_maps_per_second"] > 0
        assert layout["peak_mb"] >= layout["idle_mb"] > 0
    ours, published = (figures["layouts"][name] for name in ("default", "published"))
    ratio = ours["train_maps_per_second"] / published["train_maps_per_second"]
    assert figures["ratios"]["train"] == pytest.approx(ratio, abs=0.02)
    assert figures["ratios"]["peak"] == pytest.approx(
        published["peak_mb"] / ours["peak_mb"], abs=0.02
    )
    decoding = figures["vqgan_decode"]
    assert decoding["size"] == 16 and decoding["float32"]["seconds"] > 0
    assert decoding["mixed"]["largest_error_of_255"] < 0.01  # no grid here is fine enough to round
    assert figures["size"] == 16 and figures["batch_size"] == 2


def test_layouts_differ_in_nothing_but_the_network():
    ours, published = (bench.LAYOUTS[name] for name in ("default", "published"))
    for name in ("size", "grid", "codes"):
        assert getattr(ours, name) == getattr(published, name)
    assert (ours.layout, published.layout) == ("default", "published")
    assert ours.pixels == 1  # the loss of all pixels on both sides


def peak_after(megabytes):
    kept = torch.ones(megabytes, 2**18)
    return {"peak": bench.peak_mb(torch.device("cpu")), "kept": len(kept)}


def test_the_peak_is_that_of_the_measurement_alone():
    held = torch.ones(200, 2**18)  # 200 MB here are none of the fresh process's business
    small, large = (bench.run_apart(peak_after, size)["peak"] for size in (1, 100))
    del held
    assert 80 < large - small < 120


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_measurement_ends_with_the_process_that_is_ended(number):
    """Both write to the same pipe, which ends when the last of them has closed it."""
    measures = "import time; print('measures', flush=True); time.sleep(600)"
    words = f"from mas.bench_vqseg import run_apart; run_apart(exec, {measures!r})"
    command = [sys.executable, "-c", words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout.readline() == "measures\n"
        process.send_signal(number)
        assert process.communicate(timeout=60)[0] == ""
        process = None
    finally:
        if process:
            os.killpg(process.pid, signal.SIGKILL)


def test_flops_are_those_of_the_products():
    layer, x = nn.Linear(30, 20), torch.rand(10, 30, requires_grad=True)
    assert bench.count_flops(lambda: layer(x)) == 2 * 10 * 30 * 20
    assert bench.count_flops(lambda: layer(x).sum().backward()) == 3 * 2 * 10 * 30 * 20


def test_drawn_scenes_hold_what_scenes_hold():
    labels, edges = bench.draw_scenes(3, 64)
    assert labels.shape == edges.shape == (3, 64, 64)
    assert labels.dtype == torch.uint8 and edges.dtype == torch.bool
    assert ((labels < CLASSES) | (labels == VOID)).all()
    assert all(len(scene.unique()) > 3 and e.any() for scene, e in zip(labels, edges, strict=True))


def test_random_weights_draw_pictures():
    network = VQGAN(VQGANConfig(size=32, codes=20, code_width=8, features=16, width=32)).eval()
    bench.randomise(network)
    tokens = torch.arange(4).reshape(1, 4)
    assert network.decode(tokens).std() > 0.1
    assert all(block.abs().sum() > 0 for block in network.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--seconds", "0"], "--seconds above 0"),
        (["--vqgan", "nowhere", "--device", "cpu"], "nowhere"),
    ],
)
def test_impossible_measurements_are_refused_in_one_line(options, words, monkeypatch, capsys):
    monkeypatch.setattr(bench, "LAYOUTS", {})
    assert main(["bench", "vqseg", *options]) == 1
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said
