"""The judge learns to tell true scenes from spoilt ones, and how they are spoilt."""

import csv
import io
import json

import numpy as np
import pytest
import torch

from mas.judge import ENTRIES, NOTHING, NUMBERS, SceneJudge, describe_scenes
from mas.scene import THINGS, SceneMap
from mas.shards import Sample, ShardIndex, ShardWriter
from mas.text import Tokenizer
from tests.train.conftest import COMMON, DOG, GRASS, SKY, encoded, write_scenes
from train.cli import train
from train.judge import JudgeData, JudgeItems
from train.spoil import APART, WAYS, spoil

CAT = DOG - 1
COUNTS = ("one", "two", "three")
PICTURES = 144


def draw_pets(rng):
    """Up to three dogs or cats in one half of a meadow, and the caption that says so."""
    labels = np.full((64, 64), SKY, np.uint8)
    labels[int(rng.integers(8, 20)) :] = GRASS
    count, pet, side = rng.integers(1, 4), rng.integers(2), rng.integers(2)
    for i in range(count):
        x, y = 32 * side + rng.integers(1, 20), 22 + 14 * i
        labels[y : y + 10, x : x + 10] = (DOG, CAT)[pet]
    words = (COUNTS[count - 1], ("dog", "cat")[pet], ("left", "right")[side])
    return SceneMap.from_labels(labels), " ".join(words)


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """Scene shards and their tokenizer."""
    folder = tmp_path_factory.mktemp("pets")
    rng = np.random.default_rng(0)
    write_scenes(folder, [draw_pets(rng) for _ in range(PICTURES)], length=12)
    return folder


def words(pets, folder, **settings):
    sizes = {"text_vocabulary": 270, "text_length": 12, "width": 32, "heads": 2, "hidden": 32}
    values = {
        **COMMON,
        "data.input": pets,
        "data.tokenizer": pets / "tokenizer.json",
        "trainer.default_root_dir": folder,
        **{f"model.network.{name}": value for name, value in sizes.items()},
        **settings,
    }
    return ["judge", *(f"--{key}={value}" for key, value in values.items())]


def build_items(pets, **options):
    index = ShardIndex([str(pets / "00000.tar")], extensions=("scene.png", "txt", "json"))
    tokenizer = Tokenizer.from_file(pets / "tokenizer.json")
    return JudgeItems(index, range(len(index)), tokenizer=tokenizer, candidates=5, **options)


def entries(*things, stuff=()):
    """Float32 N F: things (class, x0, y0, x1, y1) as full boxes, then kinds of stuff."""
    entries_NF = np.zeros((ENTRIES, NUMBERS), np.float32)
    entries_NF[:, 0] = NOTHING
    for entry, (class_id, x0, y0, x1, y1) in zip(entries_NF, (*things, *stuff), strict=False):
        entry[:] = class_id, x0, y0, x1, y1, (x1 - x0) * (y1 - y0)
    return entries_NF


MEADOW = [(GRASS, 0, 0.3, 1, 1), (SKY, 0, 0, 1, 0.3)]
ONE = entries((DOG, 0.1, 0.5, 0.4, 0.8), stuff=MEADOW)
TWO = entries((DOG, 0.1, 0.4, 0.4, 0.8), (CAT, 0.55, 0.5, 0.8, 0.7), stuff=MEADOW)
OTHER = entries((17, 0.3, 0.3, 0.7, 0.8), stuff=MEADOW)
CROWD = entries(*((DOG, 0.04 * i, 0.4, 0.04 * i + 0.03, 0.8) for i in range(ENTRIES)))
FULL = entries((DOG, 0, 0, 1, 1))  # cannot be moved, is its own mirror image
EMPTY = entries(stuff=MEADOW)
WORLDS = {"one": ONE, "two": TWO, "crowd": CROWD, "full": FULL, "empty": EMPTY, "void": entries()}


def count_things(entries_NF):
    return int((entries_NF[:, 0] < THINGS).sum())


def check(spoilt_NF):
    """It is of the form that `describe_scenes` writes, with every box inside the picture."""
    assert spoilt_NF.dtype == np.float32 and spoilt_NF.shape == (ENTRIES, NUMBERS)
    present = spoilt_NF[:, 0] != NOTHING
    assert (np.diff(present.astype(int)) <= 0).all() and not spoilt_NF[~present, 1:].any()
    thing = spoilt_NF[:, 0] < THINGS
    assert (np.diff(thing.astype(int)) <= 0).all()  # things come first
    boxes = spoilt_NF[present, 1:5]
    assert (boxes >= 0).all() and (boxes <= 1).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


@pytest.mark.parametrize(
    ("name", "things"),
    [(name, n) for name, (least, _) in WAYS.items() for n in (1, 2) if n >= least],
)
def test_every_way_changes_the_scene_as_its_name_says(name, things):
    true_NF = (ONE, TWO)[things - 1]
    more = {"add": 1, "add again": 1, "remove": -1, "exchange": 1 - things}
    for seed in range(40):
        spoilt_NF = WAYS[name][1](true_NF.copy(), OTHER, np.random.default_rng(seed))
        check(spoilt_NF)
        assert not np.array_equal(spoilt_NF, true_NF)
        assert count_things(spoilt_NF) == things + more.get(name, 0)


def test_what_is_moved_or_added_ends_up_elsewhere():
    edge = entries((DOG, 0, 0.5, 0.3, 0.8))  # has no room on its left
    for seed in range(40):
        for name in ("add", "move"):
            spoilt_NF = WAYS[name][1](edge.copy(), OTHER, np.random.default_rng(seed))
            assert spoilt_NF[0, 1] >= APART - 1e-6, name


def test_swapped_things_keep_class_and_size_and_feet_change_places():
    spoilt_NF = WAYS["swap"][1](TWO.copy(), OTHER, np.random.default_rng(0))
    np.testing.assert_array_equal(spoilt_NF[:, [0, 5]], TWO[:, [0, 5]])
    middles, feet = spoilt_NF[:2, [1, 3]].mean(1), spoilt_NF[:2, 4]
    np.testing.assert_allclose(middles, TWO[[1, 0]][:, [1, 3]].mean(1), atol=1e-6)
    np.testing.assert_allclose(feet, TWO[[1, 0], 4], atol=1e-6)


@pytest.mark.parametrize("world", WORLDS)
def test_a_spoilt_scene_is_never_the_true_one(world):
    true_NF = WORLDS[world]
    before = true_NF.copy()
    for seed in range(60):
        for other_NF in (OTHER, true_NF):  # the other picture may be the same one
            spoilt_NF = spoil(true_NF, other_NF, np.random.default_rng(seed))
            check(spoilt_NF)
            assert not np.array_equal(spoilt_NF, true_NF)
            again_NF = spoil(true_NF, other_NF, np.random.default_rng(seed))
            np.testing.assert_array_equal(again_NF, spoilt_NF)
    np.testing.assert_array_equal(true_NF, before)


def test_the_same_seed_gives_the_same_item_and_validation_has_no_chance(pets):
    items = build_items(pets, flip=True)

    def same(a, b):
        return torch.equal(a["text"], b["text"]) and torch.equal(a["scenes"], b["scenes"])

    drawn = [items.item(5, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert same(drawn[0], drawn[1]) and not same(drawn[0], drawn[2])
    fresh = build_items(pets, flip=True)
    for index in (9, 5):  # whatever was read before
        assert same(fresh.item(index, None), items.item(index, None))


def test_the_true_scene_comes_first_and_is_mirrored_with_its_caption(pets):
    items = build_items(pets, flip=True)
    png = io.BytesIO(items.index.read(3).files["scene.png"])
    (true_NF,) = describe_scenes([SceneMap.from_png(png)])
    fixed = items.item(3, None)
    assert fixed["scenes"].shape == (5, ENTRIES, NUMBERS)
    np.testing.assert_array_equal(fixed["scenes"][0], true_NF)
    seen = set()
    for seed in range(12):
        item = items.item(3, np.random.default_rng(seed))
        first_NF = item["scenes"][0].numpy()
        mirrored = not np.array_equal(first_NF, true_NF)
        assert mirrored != torch.equal(item["text"], fixed["text"])
        if mirrored:
            np.testing.assert_allclose(first_NF[:2, [1, 3]], 1 - true_NF[:2, [3, 1]], atol=1e-6)
        seen.add(mirrored)
    assert seen == {True, False}


def test_the_judge_learns_to_prefer_the_true_scene(pets, tmp_path):
    settings = {
        "trainer.max_steps": 110,
        "trainer.val_check_interval": 110,
        "data.batch_size": 32,
        "data.candidates": 5,
        "model.optimiser.learning_rate": 0.01,
        "model.optimiser.warmup_steps": 20,
        "ema_decay": 0.95,
    }
    assert train(words(pets, tmp_path / "run", **settings)) == 0
    with open(tmp_path / "run/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    (last,) = [row for row in rows if row["validation/loss"]]
    assert float(last["validation/pairs"]) > 0.7  # of 0.5; a dog moved a little is hard to see
    assert float(last["validation/accuracy"]) > 0.4  # of 0.2
    judge = SceneJudge.from_pretrained(tmp_path / "run")
    tokenizer = Tokenizer.from_file(pets / "tokenizer.json")
    rng = np.random.default_rng(99)
    right = []
    while len(right) < 40:  # scenes of two captions
        (scene, caption), (other, said) = draw_pets(rng), draw_pets(rng)
        if said != caption:
            right += [c == 1 for c in judge.choose(tokenizer.encode([caption]), [[other, scene]])]
    assert sum(right) >= 34


@pytest.mark.parametrize(("name", "size"), [("text_vocabulary", 271), ("text_length", 7)])
def test_a_tokenizer_of_other_sizes_is_refused_by_name(pets, tmp_path, name, size):
    settings = {"trainer.max_steps": 1, f"model.network.{name}": size}
    with pytest.raises(ValueError, match=f"the network {size}: set model.network.{name} to"):
        train(words(pets, tmp_path / "run", **settings))


def test_a_choice_of_one_teaches_nothing_and_is_refused(pets, tmp_path):
    with pytest.raises(ValueError, match=r"data\.candidates is 1, use 2 or more"):
        train(words(pets, tmp_path / "run", **{"trainer.max_steps": 1, "data.candidates": 1}))


def test_a_judge_starts_from_another(pets, tmp_path):
    settings = {"trainer.max_steps": 1, "ema_decay": 0}
    assert train(words(pets, tmp_path / "first", **settings)) == 0
    settings |= {"model.init_from": tmp_path / "first", "model.optimiser.learning_rate": 1e-30}
    assert train(words(pets, tmp_path / "second", **settings)) == 0
    first, second = (SceneJudge.from_pretrained(tmp_path / name) for name in ("first", "second"))
    for name, tensor in second.state_dict().items():
        torch.testing.assert_close(tensor, first.state_dict()[name], rtol=0, atol=1e-20, msg=name)


@pytest.mark.parametrize(("every", "kept"), [(1, range(60)), (3, range(2, 60, 3))])
def test_words_leave_only_captions_that_have_one(pets, tmp_path, every, kept):
    data = sided_data(pets, tmp_path, every=every)
    data.setup("fit")
    held_out = 49  # the fiftieth
    items = [data.training.item(place, None) for place in range(len(data.training))]
    assert [item["key"] for item in items] == [f"{n:05}" for n in kept if n != held_out]
    rng = np.random.default_rng(0)
    drawn = [data.training.item(0, rng)["text"] for _ in range(20)]
    said = {data.tokenizer.decode(text_T[None])[0].split()[-1].lower() for text_T in drawn}
    assert said <= {"left", "right"}  # and never the other caption


def test_words_that_no_caption_has_are_named(pets, tmp_path):
    with pytest.raises(ValueError, match=r"no caption has one of data\.words \(left, Right\)"):
        sided_data(pets, tmp_path, every=61).setup("fit")


def test_a_word_is_a_whole_word(pets, tmp_path):
    with pytest.raises(ValueError, match=r"no caption has one of data\.words \(do\)"):
        sided_data(pets, tmp_path, every=61, words=["do"]).setup("fit")  # there are dogs


def test_one_spoilt_scene_is_of_the_same_things_where_there_is_one(pets):
    items = build_items(pets, flip=False)
    every = [items.item(index, None) for index in range(PICTURES)]
    trues = [item["scenes"][0].numpy() for item in every]
    said = [item["text"].tolist() for item in every]
    there, found = 0, 0
    for index, item in enumerate(every):
        alike = [
            other_NF
            for other_NF, words in zip(trues, said, strict=True)
            if find_classes(other_NF) == find_classes(trues[index]) and words != said[index]
        ]
        last_NF = item["scenes"][-1].numpy()
        there += bool(alike)
        found += any(np.array_equal(last_NF, other_NF) for other_NF in alike)
    assert there > PICTURES / 2  # those of the other side
    assert found > 0.9 * there  # it gives up after some looks


def find_classes(entries_NF):
    return sorted(entries_NF[entries_NF[:, 0] < THINGS, 0].tolist())


def sided_data(pets, folder, *, every, words=("left", "Right")):
    """Data of 60 pictures of which every so manieth has a caption that names a side."""
    rng = np.random.default_rng(0)
    with ShardWriter(str(folder / "00000.tar")) as writer:
        for number in range(60):
            scene, caption = draw_pets(rng)
            caption = caption if (number + 1) % every == 0 else "a dog"
            content = json.dumps({"captions": ["a dog", caption]}).encode()
            files = {"scene.png": encoded(scene.to_png), "txt": b"", "json": content}
            writer.write(Sample(f"{number:05}", files))
    tokenizer = str(pets / "tokenizer.json")
    return JudgeData(
        input=str(folder), tokenizer=tokenizer, workers=0, batch_size=2, words=list(words)
    )
