"""The judge of scenes: what it is told of a scene, and that nothing else moves its score."""

import dataclasses

import numpy as np
import pytest
import torch

from mas.judge import (
    ENTRIES,
    LEAST_STUFF,
    NOTHING,
    NUMBERS,
    JudgeConfig,
    SceneJudge,
    describe_scenes,
)
from mas.scene import CLASS_NAMES, PERSON, SceneMap, find_edges
from mas.storage import StorageError
from mas.text import PAD

CONFIG = JudgeConfig(text_vocabulary=50, text_length=8, width=16, heads=2, hidden=16)
GRASS, SKY, DOG, CAT, HAIR = (
    CLASS_NAMES.index(name) for name in ("grass-merged", "sky-other-merged", "dog", "cat", "hair")
)


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return SceneJudge(CONFIG).eval().requires_grad_(False)


def draw_scene(*things, size=64):
    """Sky above grass, and boxes (class, x0, y0, x1, y1) with edges around them."""
    labels = np.full((size, size), SKY, np.uint8)
    labels[size // 4 :] = GRASS
    instances = np.zeros((size, size), np.int32)
    for number, (class_id, x0, y0, x1, y1) in enumerate(things, 1):
        labels[y0:y1, x0:x1] = class_id
        instances[y0:y1, x0:x1] = number
    return SceneMap(labels, find_edges(labels, instances))


def captions(*words):
    """Text tokens, long B T, of captions of so many words."""
    generator = torch.Generator().manual_seed(1)
    text_BT = torch.randint(1, 50, (len(words), 8), generator=generator)
    for text_T, count in zip(text_BT, words, strict=True):
        text_T[count:] = PAD
    return text_BT


def entries(*counts):
    """Random entries, float32 K N F, of scenes with so many of them, in classes that repeat."""
    rng = np.random.default_rng(2)
    described_KNF = np.zeros((len(counts), ENTRIES, NUMBERS), np.float32)
    described_KNF[..., 0] = NOTHING
    for entries_NF, count in zip(described_KNF, counts, strict=True):
        entries_NF[:count, 0] = rng.integers(0, 3, count)
        entries_NF[:count, 1:] = rng.random((count, NUMBERS - 1))
    return torch.from_numpy(described_KNF)


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-5)


def present(entries_NF):
    return [tuple(entry) for entry in entries_NF if entry[0] != NOTHING]


def test_a_score_depends_on_its_caption_and_its_scene_alone(judge):
    text_BT, scenes_KNF = captions(8, 3, 0), entries(20, 1, 4, 0)
    scenes_BKNF = scenes_KNF.repeat(3, 1, 1, 1)
    together_BK = judge(text_BT, scenes_BKNF)
    assert together_BK.shape == (3, 4) and len(together_BK.unique()) == 12
    for b in range(3):
        for k in range(4):
            alone = judge(text_BT[b : b + 1], scenes_BKNF[b : b + 1, k : k + 1])
            assert close(alone[0, 0], together_BK[b, k]), (b, k)


def test_places_that_are_empty_change_no_score(judge):
    text_BT, scenes_BKNF = captions(3, 2), entries(5, 2)[None].repeat(2, 1, 1, 1)
    assert close(judge(text_BT, scenes_BKNF), judge(text_BT[:, :3], scenes_BKNF[:, :, :5]))


def test_the_order_of_entries_does_not_matter_but_their_number_does(judge):
    text_BT, scenes_BKNF = captions(4), entries(6)[None]
    score = judge(text_BT, scenes_BKNF)
    order = [3, 0, 5, 1, 4, 2]
    assert close(judge(text_BT, scenes_BKNF[:, :, order]), score)
    twice = torch.cat([scenes_BKNF[:, :, :6]] * 2, dim=2)
    assert not torch.allclose(judge(text_BT, twice), score, atol=1e-4)


def test_nothing_at_all_has_a_score_too(judge):
    scores_BK = judge(captions(0, 5), entries(0, 0)[None].repeat(2, 1, 1, 1))
    assert scores_BK.isfinite().all() and scores_BK[0, 0] != scores_BK[1, 0]
    (empty_NF,) = describe_scenes([SceneMap.from_labels(np.full((64, 64), 255, np.uint8))])
    assert present(empty_NF) == []


def test_a_scene_is_described_by_its_things_then_by_its_stuff_large_ones_first():
    scene = draw_scene((DOG, 4, 40, 12, 48), (CAT, 20, 20, 40, 40), (DOG, 48, 40, 60, 50))
    (entries_NF,) = describe_scenes([scene])
    assert entries_NF.dtype == np.float32 and entries_NF.shape == (ENTRIES, NUMBERS)
    areas = [20 * 20, 12 * 10, 8 * 8, 64 * 48 - 400 - 120 - 64, 64 * 16]
    boxes = [(20, 20, 40, 40), (48, 40, 60, 50), (4, 40, 12, 48), (0, 16, 64, 64), (0, 0, 64, 16)]
    expected = [
        (class_id, *(x / 64 for x in box), area / 64**2)
        for class_id, box, area in zip((CAT, DOG, DOG, GRASS, SKY), boxes, areas, strict=True)
    ]
    np.testing.assert_allclose(present(entries_NF), expected, atol=0.01)
    assert [entry[:5] for entry in present(entries_NF)] == [entry[:5] for entry in expected]


def test_two_of_a_class_that_an_edge_divides_are_two_entries():
    scene = draw_scene((DOG, 10, 20, 30, 40), (DOG, 30, 22, 50, 42))
    one = SceneMap(scene.labels, np.zeros_like(scene.edges))
    counts = [[e[0] for e in present(entries_NF)] for entries_NF in describe_scenes([scene, one])]
    assert counts == [[DOG, DOG, GRASS, SKY], [DOG, GRASS, SKY]]


def test_a_person_is_one_entry_with_all_parts():
    scene = draw_scene((PERSON, 20, 10, 40, 60), (HAIR, 24, 10, 36, 16))
    (entries_NF,) = describe_scenes([scene])
    assert [entry[0] for entry in present(entries_NF)] == [PERSON, GRASS, SKY]
    assert present(entries_NF)[0][1:5] == (20 / 64, 10 / 64, 40 / 64, 60 / 64)


def test_a_crowd_is_cut_at_the_largest_and_specks_of_stuff_are_left_out():
    boxes = [
        (DOG, 10 * (i % 6), 10 * (i // 6) + 2, 10 * (i % 6) + 6 + i % 2, 10 * (i // 6) + 10)
        for i in range(36)
    ]
    (crowd_NF,) = describe_scenes([draw_scene(*boxes)])
    classes, areas = crowd_NF[:, 0], crowd_NF[:, -1]
    assert (classes == DOG).all() and (np.diff(areas) <= 0).all()
    assert (areas > 48 / 64**2 - 1e-6).sum() >= 18  # the 18 wide ones come before narrow ones
    speck = np.full((64, 64), GRASS, np.uint8)
    speck[0, : int(LEAST_STUFF * 64**2)] = SKY
    (speck_NF,) = describe_scenes([SceneMap.from_labels(speck)])
    assert [entry[0] for entry in present(speck_NF)] == [GRASS]


def test_choosing_takes_the_highest_score_and_the_first_of_equals(judge):
    dog, two, cat = (
        draw_scene((DOG, 10, 20, 30, 40)),
        draw_scene((DOG, 4, 20, 24, 40), (DOG, 34, 20, 54, 40)),
        draw_scene((CAT, 10, 20, 30, 40)),
    )
    text_BT = captions(8, 5, 2)
    groups = [[dog, two, cat], [two, cat, dog], [cat, dog, two]]
    chosen = judge.choose(text_BT, groups)
    described_1KNF = torch.from_numpy(describe_scenes(groups[0]))[None]
    for text_T, group, choice in zip(text_BT, groups, chosen, strict=True):
        best = judge(text_T[None], described_1KNF).argmax()
        assert group[choice] is groups[0][best]
    assert judge.choose(text_BT[:1], [[cat] * 3]) == [0]


def test_saving_and_loading_agree(judge, tmp_path):
    judge.save_pretrained(tmp_path)
    loaded = SceneJudge.from_pretrained(tmp_path)
    assert loaded.config == CONFIG and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    text_BT, scenes_BKNF = captions(8, 3), entries(7, 2)[None].repeat(2, 1, 1, 1)
    assert torch.equal(loaded(text_BT, scenes_BKNF), judge(text_BT, scenes_BKNF))


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    broken = SceneJudge(CONFIG)
    with torch.no_grad():
        broken.head.weight[0, 3] = float("nan")
    broken.save_pretrained(tmp_path)
    with pytest.raises(StorageError, match=r"NaN or infinity in 1 tensors, first in head\.weight"):
        SceneJudge.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(JudgeConfig)])
def test_impossible_sizes_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        dataclasses.replace(CONFIG, **{name: 0})
    with pytest.raises(ValueError, match="width 16 must be a multiple of heads 3"):
        dataclasses.replace(CONFIG, heads=3)


def test_the_default_judge_is_small():
    with torch.device("meta"):
        network = SceneJudge(JudgeConfig(text_vocabulary=1024, text_length=64))
    assert sum(p.numel() for p in network.parameters()) < 0.25e6
