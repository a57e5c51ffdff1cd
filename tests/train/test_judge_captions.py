"""The judge learns from captions that say the opposite of where things stand."""

import csv
import math

import numpy as np
import pytest
import torch

from mas.judge import SceneJudge
from mas.scene import SceneMap
from mas.shards import ShardIndex
from mas.text import PAD, Tokenizer
from tests.train.conftest import COMMON, DOG, GRASS, SKY, write_scenes
from train.cli import train
from train.judge import JudgeItems, JudgeTotals, Scores

CAT = DOG - 1
PICTURES = 200
LENGTH = 12


def draw_depth(rng):
    """A dog and a cat over each other, and a caption that says which one stands in front."""
    labels = np.full((64, 64), SKY, np.uint8)
    labels[int(rng.integers(8, 20)) :] = GRASS
    far, near = rng.permutation([DOG, CAT]).tolist()
    x, y = rng.integers(4, 40, 2) // (1, 2)
    labels[y + 12 : y + 28, x : x + 12] = far
    labels[y + 24 : y + 40, x + 3 : x + 17] = near
    relation = "behind" if far == DOG else "in front of"
    return SceneMap.from_labels(labels), f"dog {relation} cat"


@pytest.fixture(scope="module")
def yard(tmp_path_factory):
    """Scene shards of dogs and cats that stand behind each other, and their tokenizer."""
    folder = tmp_path_factory.mktemp("yard")
    rng = np.random.default_rng(0)
    pictures = [draw_depth(rng) for _ in range(PICTURES)]
    pictures[::50] = [(scene, "dog and cat") for scene, _ in pictures[::50]]
    write_scenes(folder, pictures, length=LENGTH)
    return folder


@pytest.fixture(scope="module")
def items(yard):
    index = ShardIndex([str(yard / "00000.tar")], extensions=("scene.png", "txt", "json"))
    tokenizer = Tokenizer.from_file(yard / "tokenizer.json")
    return JudgeItems(index, range(PICTURES), tokenizer=tokenizer, candidates=5, flip=True)


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_a_caption_comes_with_its_opposite(items, seed):
    rng = None if seed is None else np.random.default_rng(seed)
    item = items.item(3, rng)
    said, opposite = items.tokenizer.decode(torch.stack([item["text"], item["opposite"]]))
    assert {said, opposite} == {"dog behind cat", "dog in front of cat"}


def test_a_caption_that_says_nothing_of_places_has_none(items):
    item = items.item(50, None)
    assert items.tokenizer.decode(item["text"][None]) == ["dog and cat"]
    assert (item["opposite"] == PAD).all()


def test_near_and_far_change_places_in_a_spoilt_scene(items):
    """One spoilt scene is always that, as chance alone would seldom have it."""
    for index in range(1, 40):
        scenes_KNF = items.item(index, None)["scenes"].numpy()
        feet_N, traded_N = scenes_KNF[0, :2, 4], scenes_KNF[1, :2, 4]
        np.testing.assert_array_equal(scenes_KNF[1, :, 0], scenes_KNF[0, :, 0])
        assert (feet_N[0] > feet_N[1]) != (traded_N[0] > traded_N[1])


def test_totals_are_those_of_the_set_whatever_its_batches():
    rng = torch.Generator().manual_seed(0)
    scenes_BK, ahead_P = torch.randn(7, 4, generator=rng), torch.randn(3, generator=rng)
    whole, parts = JudgeTotals(), JudgeTotals()
    whole.update(Scores(scenes_BK, ahead_P))
    parts.update(Scores(scenes_BK[:2], ahead_P[:0]))
    parts.update(Scores(scenes_BK[2:], ahead_P))
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-6)
    assert whole.compute()["captions"] == pytest.approx((ahead_P > 0).float().mean())


def test_without_opposites_the_loss_is_that_of_scenes_alone():
    scores = Scores(torch.randn(5, 4), torch.zeros(0))
    totals = JudgeTotals()
    totals.update(scores)
    figures = totals.compute()
    assert figures["loss"] == pytest.approx(float(scores.scene_loss))
    assert math.isnan(figures["captions"]) and scores.caption_loss == 0


def test_the_judge_learns_who_stands_in_front(yard, tmp_path):
    sizes = {"text_vocabulary": 270, "text_length": LENGTH, "width": 32, "heads": 2, "hidden": 32}
    values = {
        **COMMON,
        "data.input": yard,
        "data.tokenizer": yard / "tokenizer.json",
        "trainer.default_root_dir": tmp_path / "run",
        **{f"model.network.{name}": value for name, value in sizes.items()},
        "trainer.max_steps": 120,
        "trainer.val_check_interval": 120,
        "data.batch_size": 32,
        "data.holdout": 5,
        "data.candidates": 3,
        "model.optimiser.learning_rate": 0.01,
        "model.optimiser.warmup_steps": 20,
        "ema_decay": 0.95,
    }
    assert train(["judge", *(f"--{key}={value}" for key, value in values.items())]) == 0
    with open(tmp_path / "run/metrics.csv", newline="") as file:
        (last,) = [row for row in csv.DictReader(file) if row["validation/loss"]]
    assert float(last["validation/captions"]) > 0.9  # of 0.5
    judge = SceneJudge.from_pretrained(tmp_path / "run")
    tokenizer = Tokenizer.from_file(yard / "tokenizer.json")
    rng = np.random.default_rng(99)
    right = []
    while len(right) < 40:
        (scene, caption), (other, said) = draw_depth(rng), draw_depth(rng)
        if said != caption:
            right += [c == 1 for c in judge.choose(tokenizer.encode([caption]), [[other, scene]])]
    assert sum(right) >= 36
