import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from mas.bench_sample import bench_sample, compare, count_parameters, find_gpt, predict
from mas.fast_decoder import can_step
from mas.gpt import GPT, GPTConfig
from mas.model_folder import find_folder
from mas.precision import make_decoder
from mas.token_shards import TOKEN_FORMAT, write_token_shard

CONFIG = GPTConfig(
    layers=2,
    width=64,
    heads=4,
    text_vocabulary=40,
    scene_vocabulary=24,
    image_vocabulary=32,
    text_length=6,
    scene_grid=4,
    image_grid=4,
)


def draw(count, seed=0):
    """Captions whose scene and image follow from them by a rule, so that there is much to learn."""
    generator = torch.Generator().manual_seed(seed)
    text_BT = torch.randint(1, 40, (count, 6), generator=generator)
    places = torch.arange(16)
    scene_BT = (text_BT[:, places % 6] + places) % 24
    return text_BT, scene_BT, (scene_BT * 5 + text_BT[:, :1]) % 32


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    gpt = GPT(CONFIG)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=4e-3)
    for step in range(150):
        losses = gpt.losses(*draw(32, seed=step))
        optimizer.zero_grad()
        (losses.scene + losses.image).backward()
        optimizer.step()
    return gpt.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "gpt"
    trained.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def token_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    text, scene, image = (x.numpy().astype(np.uint16) for x in draw(20, seed=10_000))
    row = np.arange(20, dtype=np.int32)
    write_token_shard(str(folder), "00000", scene=scene, image=image, text=text, row=row)
    manifest = {
        "format": TOKEN_FORMAT,
        "text": {"vocabulary": 40, "length": 6, "sha256": ""},
        "scene": {"vocabulary": 24, "grid": 4, "sha256": ""},
        "image": {"vocabulary": 32, "grid": 4, "sha256": ""},
        "shards": [{"name": "00000", "pictures": 20, "captions": 20}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_trained_network_predicts_the_same_tokens_in_fewer_bits(trained, precision):
    tokens = draw(64, seed=10_000)
    assert trained.losses(*tokens).scene_accuracy > 0.5  # it has learnt the rule
    for figures in compare(trained, make_decoder(trained, precision), *tokens).values():
        assert figures["argmax"] >= 0.97
        assert 0 < figures["logits"] < 0.2
        assert abs(figures["perplexity"]) <= 0.01


def test_the_comparison_sees_nothing_in_float32_and_another_network_at_once(trained):
    tokens = draw(20, seed=10_000)
    for figures in compare(trained, trained, *tokens).values():
        assert figures["argmax"] == 1 and abs(figures["perplexity"]) < 1e-5
        assert figures["logits"] < 1e-4
    torch.manual_seed(1)
    other = GPT(CONFIG).eval().requires_grad_(False)
    for figures in compare(trained, other, *tokens).values():
        assert figures["argmax"] < 0.6 and figures["perplexity"] > 0.5


def test_predictions_one_by_one_are_those_at_once(trained):
    tokens = draw(3)
    expected, found = (
        trained(*tokens),
        predict(trained, trained.layout.unpack(trained.layout.pack(*tokens))),
    )
    for name in ("scene", "image"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-4)


def test_parameters_of_a_step_are_the_blocks_and_the_head_of_its_stream():
    counts = count_parameters(CONFIG)
    with torch.device("meta"):
        gpt = GPT(CONFIG)
    assert counts["all"] == sum(p.numel() for p in gpt.parameters())
    blocks = sum(p.numel() for p in gpt.blocks.parameters())
    assert counts["step"] == blocks + 64 * (24 + 32) // 2  # as many scene as image tokens
    assert counts["matrices"] == blocks + 64 * (24 + 32)


def test_the_figures_have_the_agreed_names_and_fit_together(folder, token_folder):
    figures = bench_sample(
        model=folder.parent, tokens=token_folder, counts=[1, 3], precisions=["int8"], repeats=1
    )
    assert figures["parameters"] == count_parameters(CONFIG)["all"]
    assert figures["bandwidth_gb_per_second"] > 0.1
    assert [r["count"] for r in figures["results"]] == [1, 3]
    for result in figures["results"]:
        assert result["precision"] == "int8" and result["guidance"] == 3.0
        assert result["steps"] == ("fast" if can_step(CONFIG) else "torch")
        steps_per_second = result["tokens_per_second"] / result["count"]
        bytes_per_step = count_parameters(CONFIG)["step"]
        assert result["bytes_per_token"] == bytes_per_step // result["count"]
        share = bytes_per_step * steps_per_second / figures["bandwidth_gb_per_second"] / 1e9
        assert abs(result["bandwidth_share"] - share) < 0.002
        assert 0 < result["first_token_seconds"] < 32 / steps_per_second + 1
        assert 50 < result["peak_mb"] < 2000
    assert figures["agreement"].keys() == {"int8"}
    assert figures["agreement"]["int8"]["image"]["argmax"] >= 0.97


def test_models_are_named_as_everywhere_else(folder):
    assert find_gpt("park") == find_folder("park") / "gpt"
    assert find_gpt(folder.parent) == find_gpt(str(folder)) == folder
    with pytest.raises(ValueError, match="no such model folder"):
        find_gpt("no/such/model")


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_int8_of_a_large_network_never_needs_the_memory_of_float32(tmp_path):
    config = GPTConfig(layers=12, width=768, heads=12, text_vocabulary=500, image_vocabulary=500)
    torch.manual_seed(0)
    GPT(config).save_pretrained(tmp_path)
    script = (
        "import sys, torch; from pathlib import Path\n"
        "from mas.bench_vqseg import peak_mb\n"
        "from mas.precision import StoredGPT, make_decoder\n"
        "from mas.quantize import make_int8\n"
        "make_int8(torch.ones(64, 64))(torch.ones(1, 64))  # loads the libraries\n"
        "cpu = torch.device('cpu'); before = peak_mb(cpu)\n"
        "decoder = make_decoder(StoredGPT(Path(sys.argv[1]), cpu), 'int8')\n"
        "print(peak_mb(cpu) - before)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, check=True, text=True)
    grown = float(result.stdout)
    weights = count_parameters(config)["matrices"] / 2**20  # of 8 bits; float32 takes four times
    assert weights > 80
    assert grown < 1.2 * weights + 110  # mapped files and the largest matrix come to it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "--repeats"),
        ({"counts": [1, 0]}, "--counts"),
        ({"tokens": "somewhere"}, "give --model"),
        ({"guidance": -1.0}, "guidance is -1"),
        ({"device": "gpu9"}, "device 'gpu9'"),
    ],
)
def test_impossible_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bench_sample(**options)
