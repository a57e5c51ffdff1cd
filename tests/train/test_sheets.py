"""Sheets of samples while the GPT trains: what they show, and that they change nothing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mas.shards import TokenShards, write_token_shard
from mas.storage import file_hash
from mas.text import Tokenizer
from mas.vqgan import VQGAN, VQGANConfig
from mas.vqseg import VQSEG, VQSEGConfig
from train.callbacks import Pictures
from train.cli import train

PICTURES, GRID, CELL = 24, 4, 64
COLUMNS = 6  # caption, scene, picture for it, own scene, own picture, original


@pytest.fixture(scope="module")
def tokenizers(network_sizes, tmp_path_factory):
    """A folder of a tokenizer, a VQ-SEG, a VQ-GAN and tokens that they could have made."""
    folder = tmp_path_factory.mktemp("tokenizers")
    torch.manual_seed(0)
    captions = [f"a dog on the grass, picture {number}" for number in range(PICTURES)]
    tokenizer = Tokenizer.fit(captions, vocab_size=300, length=8)
    tokenizer.save(folder / "tokenizer.json")
    for name, network, config in (("vqseg", VQSEG, VQSEGConfig), ("vqgan", VQGAN, VQGANConfig)):
        sizes = network_sizes[name].items()
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes}
        network(config(**values)).save_pretrained(folder / name)
    rng = np.random.default_rng(0)
    (folder / "tokens").mkdir()
    write_token_shard(
        str(folder / "tokens"),
        "00000",
        scene=rng.integers(0, 16, (PICTURES, GRID**2)).astype(np.uint16),
        image=rng.integers(0, 32, (PICTURES, GRID**2)).astype(np.uint16),
        text=tokenizer.encode(captions).numpy().astype(np.uint16),
        row=np.arange(PICTURES, dtype=np.int32),
    )
    manifest = {
        "format": 1,
        "text": {
            "vocabulary": tokenizer.vocab_size,
            "length": 8,
            "sha256": file_hash(folder / "tokenizer.json"),
        },
        "shards": [{"name": "00000", "pictures": PICTURES, "captions": PICTURES}],
    }
    for stream, name, codes in (("scene", "vqseg", 16), ("image", "vqgan", 32)):
        sha256 = file_hash(folder / name / "model.safetensors")
        manifest[stream] = {"vocabulary": codes, "grid": GRID, "sha256": sha256}
    (folder / "tokens/manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def run(words, tokenizers, tmp_path):
    """run(folder, drawn, **settings): trains eight steps, with sheets or without."""

    def run(folder, *, drawn=True, arguments=(), **settings):
        manifest = TokenShards(str(tokenizers / "tokens")).manifest
        names = {"tokenizer": "tokenizer.json", "vqseg": "vqseg", "vqgan": "vqgan"}
        preview = {f"model__preview__{k}": tokenizers / v for k, v in names.items()}
        values = {
            "data__input": tokenizers / "tokens",
            "model__network__text_vocabulary": manifest["text"]["vocabulary"],
            "model__network__scene_grid": GRID,
            "trainer__max_steps": 8,
            "pictures__count": 2,
            "pictures__cell": CELL,
            **(preview if drawn else {}),
            **settings,
        }
        assert train([*words("gpt", folder, **values), *arguments]) == 0
        return tmp_path / folder

    return run


def sheets(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("pictures/*.png"))}


def state(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["current_model_state"]


def test_sheets_show_fixed_captions_and_scenes_and_change_no_weight(run):
    drawn, again, plain = run("drawn"), run("again"), run("plain", drawn=False)
    assert list(sheets(drawn)) == ["00000004.png", "00000008.png"]
    assert sheets(drawn) == sheets(again)
    assert not sheets(plain)
    for name, weight in state(plain).items():
        assert torch.equal(weight, state(drawn)[name])
    with Image.open(drawn / "pictures/00000004.png") as sheet:
        assert sheet.width >= COLUMNS * CELL and sheet.height >= 2 * CELL
        first = np.asarray(sheet)
    with Image.open(drawn / "pictures/00000008.png") as sheet:
        second = np.asarray(sheet)
    differs = (first != second).any(-1).any(0)  # columns of pixels
    cells = differs[: COLUMNS * (first.shape[1] // COLUMNS)].reshape(COLUMNS, -1).any(1)
    assert not cells[[0, 1, 5]].any()  # captions, scenes and originals are always the same
    assert cells[[2, 3, 4]].any()


def test_a_resumed_run_draws_what_an_uninterrupted_one_draws(run):
    settings = {"model__optimiser__schedule": "constant", "checkpoints__every_n_steps": 1}
    straight = run("straight", **settings)
    resumed = run("resumed", **settings, trainer__max_steps=5)
    run("resumed", **settings, arguments=["--ckpt_path=last"])
    assert sheets(straight) == sheets(resumed)
    for name, weight in state(straight).items():
        assert torch.equal(weight, state(resumed)[name])


def test_sheets_come_every_so_many_steps(run):
    assert list(sheets(run("rare", pictures__every_n_steps=8))) == ["00000008.png"]
    assert not sheets(run("none", pictures__count=0))


@pytest.mark.parametrize("settings", [{"count": -1}, {"cell": 0}, {"every_n_steps": -1}])
def test_impossible_sheets_are_refused(settings):
    with pytest.raises(ValueError, match="count ≥ 0, cell ≥ 1 and every_n_steps ≥ 0"):
        Pictures(**settings)
