"""Batches from shards: content, validation split, flips, captions, and clear refusals."""

import numpy as np
import pytest
import torch

from mas.scene import CLASS_NAMES, SceneMap, find_edges
from mas.shards import ShardIndex, TokenShards, expand_shards
from train.data import Part, PhotoData, SceneData, TokenData, TokenItems, mirror

HELD_OUT = [5, 11, 17, 23]


def everything(part):
    return [part[place] for place in range(len(part))]


def test_parts_cover_all_pictures_without_overlap():
    for count in (11, 24, 25):
        kept, held = (
            everything(Part(count, holdout=6, part=part)) for part in ("train", "validation")
        )
        assert sorted(kept + held) == list(range(count))
    assert everything(Part(24, holdout=6, part="validation")) == HELD_OUT


def test_scene_and_token_data_hold_out_the_same_pictures(scene_shards, token_shards):
    scenes = SceneData(input=str(scene_shards), batch_size=4, holdout=6, size=32)
    tokens = TokenData(input=str(token_shards), batch_size=4, holdout=6)
    scenes.setup("fit")
    tokens.setup("fit")
    keys = [scenes.validation.item(place, None)["key"] for place in range(4)]
    index = ShardIndex(expand_shards(str(scene_shards)))
    assert keys == [index.read(i).key for i in HELD_OUT]
    images = [tokens.validation.item(place, None)["image"] for place in range(4)]
    shards = TokenShards(str(token_shards))
    for image, i in zip(images, HELD_OUT, strict=True):
        assert np.array_equal(image, shards[i][2])


def test_batches_carry_the_shards_content(scene_shards):
    data = PhotoData(input=str(scene_shards), batch_size=4, size=32, flip=False, holdout=6)
    data.scenes = True
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32) and batch["image"].dtype == torch.uint8
    assert batch["labels"].shape == (4, 32, 32) and batch["labels"].dtype == torch.uint8
    assert batch["edges"].dtype == torch.bool
    sample = ShardIndex(expand_shards(str(scene_shards))).read(HELD_OUT[0])
    assert batch["key"][0] == sample.key
    assert len(batch["labels"][0].unique()) == 3


def test_a_flip_exchanges_left_and_right_parts():
    rng = np.random.default_rng(0)
    labels = rng.choice([CLASS_NAMES.index(n) for n in ("left-arm", "right-arm", "dog")], (8, 8))
    scene = SceneMap.from_labels(labels.astype(np.uint8))
    flipped = mirror(scene)
    assert np.array_equal(flipped.edges, find_edges(flipped.labels))
    names = np.array(CLASS_NAMES)
    expected = {"left-arm": "right-arm", "right-arm": "left-arm", "dog": "dog"}
    assert [expected[n] for n in names[labels[:, ::-1]].ravel()] == list(
        names[flipped.labels].ravel()
    )
    assert mirror(flipped) == scene


def test_a_caption_of_the_picture_is_drawn_at_random(token_shards):
    shards = TokenShards(str(token_shards))
    items = TokenItems(shards, Part(len(shards), holdout=6, part="train"))
    rng = np.random.default_rng(0)
    drawn = {tuple(items.item(0, rng)["text"].tolist()) for _ in range(20)}
    assert drawn == {tuple(caption.tolist()) for caption in shards[0][0]}
    assert tuple(items.item(0, None)["text"].tolist()) == tuple(shards[0][0][0].tolist())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 25}, "24 pictures .* fewer than one batch of 25"),
        ({"size": 64}, "32 x 32 pixels, the network takes 64 x 64"),
        ({"holdout": 1}, "data.holdout is 1"),
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"input": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_unusable_data_is_refused_in_one_line(scene_shards, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        SceneData(**{"input": str(scene_shards), "batch_size": 4, "size": 32, **settings}).setup(
            "fit"
        )
    assert "\n" not in str(caught.value)
