"""Pictures with rare classes come more often: how often, in which order, and what is refused."""

import json
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
import torch

from mas.scene import CLASS_NAMES, SceneMap
from mas.shards import Sample, ShardWriter
from tests.train.conftest import DOG, GRASS, SIZE, encoded
from train.data import SceneData
from train.repeat import Repeated, Repeats
from train.stream import permute

PICTURES, DOGS = 48, 5  # held out: every sixth
DOG_NAME = CLASS_NAMES[DOG]


@pytest.fixture(scope="module")
def lawns(tmp_path_factory):
    """Lawns of which few hold a dog; KEY.json says which."""
    folder = tmp_path_factory.mktemp("lawns")
    with ShardWriter(str(folder / "00000.tar")) as writer:
        for picture in range(PICTURES):
            labels = np.full((SIZE, SIZE), GRASS, np.uint8)
            if picture < DOGS:
                labels[8:20, 4:12] = DOG
            scene = SceneMap.from_labels(labels)
            described = {"scene": {"classes": scene.histogram()}}
            files = {"scene.png": encoded(scene.to_png), "json": json.dumps(described).encode()}
            writer.write(Sample(f"{picture:09}", files))
    return folder


def open_data(folder, **settings):
    data = SceneData(input=str(folder), batch_size=8, holdout=6, size=SIZE, flip=False, **settings)
    data.setup("fit")
    return data


def keys(data, count, *, consumed=0):
    loader = data.train_dataloader()
    loader.load_state_dict({"consumed": consumed})
    return [batch["key"] for batch in islice(loader, count)]


def test_the_factor_is_the_root_of_how_much_rarer_the_rarest_class_is():
    present_NK = np.zeros((100, len(CLASS_NAMES)), np.bool_)
    present_NK[:, GRASS] = True
    present_NK[:4, DOG] = True
    present_NK[3:10, 0] = True  # 7 %
    factors_N = Repeats(below=0.16).factors(present_NK)
    assert np.allclose(factors_N[:4], 2)  # √(0.16 / 0.04), also where a less rare one is with it
    assert np.allclose(factors_N[4:10], (0.16 / 0.07) ** 0.5)
    assert np.allclose(factors_N[10:], 1)
    assert np.allclose(Repeats(below=0.04).factors(present_NK), 1)


def test_a_named_class_has_its_own_factor_where_it_is_larger():
    present_NK = np.zeros((100, len(CLASS_NAMES)), np.bool_)
    present_NK[:50, DOG] = True
    present_NK[:4, 0] = True
    assert np.allclose(Repeats(named={DOG_NAME: 3.0}).factors(present_NK), [3] * 50 + [1] * 50)
    both = Repeats(below=0.64, named={DOG_NAME: 3.0}).factors(present_NK)
    assert np.allclose(both, [4] * 4 + [3] * 46 + [1] * 50)


def test_copies_are_rounded_at_random_and_no_picture_is_lost():
    factors_N = np.full(1000, 2.3)
    places = Repeated([0] * 1000, factors_N, seed=0).places
    assert set(Counter(places.tolist()).values()) == {2, 3} and 2250 < len(places) < 2350
    assert np.array_equal(places, Repeated([0] * 1000, factors_N, seed=0).places)
    assert not np.array_equal(places, Repeated([0] * 1000, factors_N, seed=1).places)
    assert np.array_equal(Repeated([0] * 9, np.ones(9), seed=0).places, np.arange(9))


def test_an_epoch_holds_a_rare_picture_several_times_and_all_others_once(lawns):
    data = open_data(lawns, repeat={DOG_NAME: 4.0})
    samples = len(data.training)
    assert samples == 40 + 3 * DOGS  # no dog is held out
    order = [permute(place, count=samples, seed=7) for place in range(samples)]
    seen = Counter(data.training.item(index, None)["key"] for index in order)
    assert seen == {f"{i:09}": 4 if i < DOGS else 1 for i in range(PICTURES) if i % 6 != 5}
    assert len(data.validation) == 8
    assert len(open_data(lawns, repeat_below=0.5).training) > 40
    assert len(open_data(lawns).training) == 40


def test_copies_do_not_follow_each_other(lawns):
    order = [key for batch in keys(open_data(lawns, repeat={DOG_NAME: 4.0}), 6) for key in batch]
    adjacent = sum(a == b for a, b in pairwise(order))
    assert adjacent < 4  # of 47; unshuffled 15
    assert max(Counter(order).values()) <= 4


def test_the_order_follows_the_seed_and_resumes_with_any_number_of_workers(lawns):
    settings = {"repeat": {DOG_NAME: 2.5}, "repeat_below": 0.3}
    batches = keys(open_data(lawns, **settings), 20)
    assert batches == keys(open_data(lawns, workers=2, **settings), 20)
    assert batches[9:] == keys(open_data(lawns, workers=1, **settings), 11, consumed=72)
    assert batches != keys(open_data(lawns, seed=1, **settings), 20)


def test_copies_are_mirrored_one_by_one(lawns):
    data = open_data(lawns, repeat={DOG_NAME: 40.0})
    data.flip = True
    data.setup("fit")
    loader = data.train_dataloader()
    dogs = torch.cat([batch["labels"] for batch in islice(loader, 10)])
    sides = (dogs[:, :, 6] == DOG).any(1)[(dogs == DOG).flatten(1).any(1)]
    assert 0.2 < sides.float().mean() < 0.8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeat_below": -0.1}, "data.repeat_below is -0.1, use a share from 0 to 1"),
        ({"repeat_below": 1.5}, "data.repeat_below is 1.5"),
        ({"repeat_below": float("nan")}, "data.repeat_below is nan"),
        ({"repeat": {"dgo": 2.0}}, "data.repeat names 'dgo', which is not one of the classes"),
        ({"repeat": {DOG_NAME: 0.5}}, "data.repeat of 'dog' is 0.5, use 1 or more"),
        ({"repeat": {DOG_NAME: float("inf")}}, "data.repeat of 'dog' is inf"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SceneData(input="anywhere", **settings)


def test_shards_that_do_not_list_their_classes_are_refused_by_name(scene_shards):
    with pytest.raises(ValueError, match=r"0000\.json does not list the classes of its scene"):
        SceneData(
            input=str(scene_shards), batch_size=4, holdout=6, size=SIZE, repeat_below=0.1
        ).setup("fit")
