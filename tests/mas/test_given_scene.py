"""Scenes of which a part is drawn: what their tokens are made of, and what comes back of them."""

import numpy as np
import pytest

from mas import MakeAScene
from mas.request import GivenScene
from mas.scene import CLASS_NAMES, VOID, SceneMap

SKY, SEA, SAND, ROAD, DOG = map(
    CLASS_NAMES.index, ("sky-other-merged", "sea", "sand", "road", "dog")
)


@pytest.fixture(scope="module")
def park():
    return MakeAScene.from_pretrained("park")


def give(labels, free_hw):
    return GivenScene(scene=SceneMap.from_labels(labels.astype(np.uint8)), free_hw=free_hw)


@pytest.fixture
def half():
    """A dog before the sea in the lower half of 32 pixels; the upper half is free."""
    labels = np.full((32, 32), VOID)
    labels[16:] = SEA
    labels[20:28, 8:16] = DOG
    return give(labels, np.arange(8)[:, None].repeat(8, 1) < 4)


def test_only_void_that_the_model_chooses_is_filled(half):
    for filled in half.fillings():
        assert np.array_equal(filled.labels[16:], half.scene.labels[16:])
    nearest, *near = (filled.labels[:16] for filled in half.fillings())
    assert (nearest == SEA).all()
    assert len(near) > 2 and {labels[0, 0] for labels in near} >= {VOID, SKY}
    kept = give(half.scene.labels, np.zeros((4, 4), np.bool_))
    assert kept.fillings() == [half.scene]
    full = np.where(half.scene.labels == VOID, SKY, half.scene.labels)
    assert give(full, half.free_hw).fillings() == [SceneMap.from_labels(full.astype(np.uint8))]


def test_what_is_kept_is_a_mean_over_the_classes_that_are_drawn(half):
    shown = half.scene.labels.copy()
    shown[:16] = SKY
    assert half.share_kept(SceneMap.from_labels(shown)) == 1
    shown[20:28, 8:12] = SEA
    assert half.share_kept(SceneMap.from_labels(shown)) == 0.75
    nothing = give(np.full((32, 32), VOID), np.ones((4, 4), np.bool_))
    assert nothing.share_kept(half.scene) == 1


def test_what_was_drawn_is_put_back_and_the_rest_is_what_the_model_made_of_it(half):
    between = half.scene.edges.copy()
    between[24, 8:16] = True  # two dogs, one above the other
    half = GivenScene(scene=SceneMap(half.scene.labels, between), free_hw=half.free_hw)
    labels = np.full((32, 32), SKY, np.uint8)
    labels[:, 30:] = ROAD
    back = half.put_back(SceneMap.from_labels(labels))
    assert np.array_equal(back.labels[:16], labels[:16])
    assert np.array_equal(back.labels[16:], half.scene.labels[16:])
    assert back.edges[24, 8:16].all() and back.edges[15].all() and not back.edges[16, :8].any()


def test_a_shore_stays_where_it_was_drawn(park):
    """Its sea must not go on up to the top: tokens far below would tell of something else."""
    labels = np.full((128, 128), VOID)
    labels[64:102], labels[102:] = SEA, SAND
    given = give(labels, np.arange(16)[:, None].repeat(16, 1) < 8)
    nearest, *_ = park.decode_scenes(park.encode_scene(given.fillings()[0]))
    (best,) = park.decode_scenes(park.encode_given(given))
    assert given.share_kept(nearest) < 0.5 and given.share_kept(best) > 0.85


def test_a_scene_that_is_lost_in_its_tokens_is_told_of(park, caplog):
    labels = np.full((128, 128), SKY)
    labels[56:] = ROAD
    park.encode_given(give(labels, np.zeros((16, 16), np.bool_)))
    (told,) = caplog.messages
    assert "of the scene are lost" in told and "road is read as" in told
    caplog.clear()
    labels[56:] = CLASS_NAMES.index("grass-merged")
    park.encode_given(give(labels, np.zeros((16, 16), np.bool_)))
    assert not caplog.messages
