"""Training learns what it should: the documented losses, and to do what captions say."""

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from documented import ROOT, commands, section, table

from mas.__main__ import main
from mas.filter import Sampling
from mas.generate import generate
from mas.gpt import GPT
from mas.shards import TokenShards, write_token_shard
from mas.text import Tokenizer
from train.cli import train

TOLERANCE = 0.1  # of a documented loss; bfloat16 differs a little from processor to processor
THINGS = ("dog", "horse", "car", "boat", "clock", "tree")
SIDES = ("left", "right")
GROUNDS = ("sand", "snow", "grass")
GRID = 4  # tokens a side of a scene; the image has half as many
SKY = 0
TOKENS = {name: 1 + i for i, name in enumerate((*THINGS, *GROUNDS))}
PICTURES = 1800
HOLDOUT = 10
LENGTH = 12  # text tokens


def draw_scene(thing, side, ground, rng):
    """Tokens GRID GRID: the thing stands somewhere on its side of the lower half, on the ground."""
    tokens = np.full((GRID, GRID), SKY, np.uint16)
    tokens[rng.integers(1, 3) :] = TOKENS[ground]
    half = slice(0, 2) if side == "left" else slice(2, 4)
    row = rng.integers(1, 4)
    tokens[row, half][rng.integers(0, 2)] = TOKENS[thing]
    return tokens


def obeys(tokens, thing, side, ground):
    """Shares of a caption that a scene obeys: the thing is there, on its side, on its ground."""
    places = tokens == TOKENS[thing]
    half = slice(0, 2) if side == "left" else slice(2, 4)
    return bool(places.any()), bool(places[:, half].any()), bool((tokens == TOKENS[ground]).any())


def write_tokens(folder, *, shuffled):
    """Token shards of PICTURES scenes; `shuffled`: each with the caption of another."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    facts = [
        tuple(rng.choice(names) for names in (THINGS, SIDES, GROUNDS)) for _ in range(PICTURES)
    ]
    scenes = np.stack([draw_scene(*fact, rng) for fact in facts])
    captions = [caption(*fact) for fact in facts]
    tokenizer = Tokenizer.fit(captions, vocab_size=300, length=LENGTH)
    order = rng.permutation(PICTURES) if shuffled else np.arange(PICTURES)
    write_token_shard(
        str(folder),
        "00000",
        scene=scenes.reshape(PICTURES, -1),
        image=scenes[:, ::2, ::2].reshape(PICTURES, -1),
        text=tokenizer.encode([captions[i] for i in order]).numpy().astype(np.uint16),
        row=np.arange(PICTURES, dtype=np.int32),
    )
    sizes = {"vocabulary": 1 + len(TOKENS), "sha256": "-"}
    manifest = {
        "format": 1,
        "text": {"vocabulary": tokenizer.vocab_size, "length": LENGTH, "sha256": "-"},
        "scene": {**sizes, "grid": GRID},
        "image": {**sizes, "grid": GRID // 2},
        "shards": [{"name": "00000", "pictures": PICTURES, "captions": PICTURES}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return tokenizer


def caption(thing, side, ground):
    return f"a {thing} on the {side} of the {ground}"


def train_gpt(tokens, folder, vocabulary):
    settings = {
        "data.input": tokens,
        "data.batch_size": 32,
        "data.holdout": HOLDOUT,
        "trainer.default_root_dir": folder,
        "trainer.max_steps": 200,
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "model.network.layers": 2,
        "model.network.width": 64,
        "model.network.heads": 4,
        "model.network.text_vocabulary": vocabulary,
        "model.network.scene_vocabulary": 1 + len(TOKENS),
        "model.network.image_vocabulary": 1 + len(TOKENS),
        "model.network.text_length": LENGTH,
        "model.network.scene_grid": GRID,
        "model.network.image_grid": GRID // 2,
        "model.optimiser.learning_rate": 0.004,
        "model.optimiser.warmup_steps": 20,
        "model.caption_dropout.share": 0.1,
        "model.caption_dropout.start": 0,
    }
    assert train(["gpt", *(f"--{key}={value}" for key, value in settings.items())]) == 0
    return GPT.from_pretrained(folder)


def obedience(gpt, tokenizer):
    """Shares of all captions whose scene has the thing, has it on its side, has the ground."""
    facts = list(itertools.product(THINGS, SIDES, GROUNDS))
    text_BT = tokenizer.encode([caption(*fact) for fact in facts])
    sampling = Sampling(guidance=3.0)
    made = generate(gpt, text_BT, seeds=range(len(facts)), scene=sampling, image=sampling)
    scenes = made.scene.reshape(-1, GRID, GRID).numpy()
    return np.mean([obeys(s, *fact) for s, fact in zip(scenes, facts, strict=True)], axis=0)


@torch.no_grad()
def caption_gap(gpt, folder):
    """How much the scene loss of held-out pictures rises, in nats, with other pictures' captions.

    The captions are those of the shards of true captions.
    """
    shards = TokenShards(folder)
    held = range(HOLDOUT - 1, PICTURES, HOLDOUT)
    text, scene, image = zip(*((t[0], s, i) for t, s, i in (shards[n] for n in held)), strict=True)
    text_BT, scene_BT, image_BT = (torch.from_numpy(np.int64(x)) for x in (text, scene, image))
    own = gpt.losses(text_BT, scene_BT, image_BT).scene
    others = gpt.losses(text_BT.roll(1, 0), scene_BT, image_BT).scene
    return float(others - own)


@pytest.mark.slow
def test_a_gpt_of_true_captions_obeys_them_and_one_of_shuffled_captions_does_not(tmp_path):
    obeyed, gap = {}, {}
    for name in ("true", "shuffled"):
        tokenizer = write_tokens(tmp_path / name, shuffled=name == "shuffled")
        gpt = train_gpt(tmp_path / name, tmp_path / f"run of {name}", tokenizer.vocab_size)
        obeyed[name] = obedience(gpt, tokenizer)
        gap[name] = caption_gap(gpt, tmp_path / "true")
    thing, side, ground = obeyed["true"]
    assert min(thing, side) > 0.8 and ground > 0.65, obeyed
    thing, side, ground = obeyed["shuffled"]  # by chance 1 of 6, 1 of 12, 1 of 3 and a little more
    assert thing < 0.5 and side < 0.3 and ground < 0.5, obeyed
    assert gap["true"] > 0.4 and abs(gap["shuffled"]) < 0.05, gap


@pytest.mark.slow
def test_the_first_steps_reach_the_documented_losses(tmp_path, monkeypatch):
    page = section("training.md", "### Check an installation")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for words in commands(page):
        assert main(words) == 0, words
    for row in table(page):
        with open(Path("check") / row["stage"] / "metrics.csv", newline="") as file:
            values = [line[f"validation/{row['validation']}"] for line in csv.DictReader(file)]
        assert float(values[-1]) == pytest.approx(float(row["reaches"]), rel=TOLERANCE), row
