"""Token shards: what `mas tokenize` writes comes back, plain and mirrored; damage is named."""

import json
import os
import pickle

import numpy as np
import pytest

from mas.shards import ShardError, TokenShards, write_token_shard


def write_tokens(folder, *, mirrored=False):
    """Three shards, one empty; every token of a mirrored picture is larger by 7."""
    scene = np.arange(12, dtype=np.uint16).reshape(3, 4)
    text = np.arange(20, dtype=np.uint16).reshape(4, 5)
    row = np.array([0, 1, 1, 2], np.int32)

    def write(name, *, row, **streams):
        others = {stream: tokens + np.uint16(7) for stream, tokens in streams.items()}
        others = {"mirrored": others} if mirrored else {}
        write_token_shard(str(folder), name, **streams, row=row, **others)

    write("00000", scene=scene, image=scene + 100, text=text, row=row)
    empty = np.zeros((0, 4), np.uint16)
    write("00001", scene=empty, image=empty, text=text[:0], row=row[:0])
    write("00002", scene=scene[:1], image=scene[1:2], text=text[3:], row=row[:1])
    manifest = {
        "format": 1,
        **({"mirrored": True} if mirrored else {}),
        "text": {"vocabulary": 50, "length": 5},
        "scene": {"vocabulary": 50, "grid": 2},
        "image": {"vocabulary": 500, "grid": 2},
        "shards": [
            {"name": "00000", "pictures": 3, "captions": 4},
            {"name": "00001", "pictures": 0, "captions": 0},
            {"name": "00002", "pictures": 1, "captions": 1},
        ],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return scene, text


def test_token_shards_give_every_picture_with_all_its_captions(tmp_path):
    scene, text = write_tokens(tmp_path)
    shards = pickle.loads(pickle.dumps(TokenShards(tmp_path)))
    assert len(shards) == 4 and [len(shards[i][0]) for i in range(4)] == [1, 2, 1, 1]
    captions, scene_tokens, image_tokens = shards[1]
    assert np.array_equal(captions, text[1:3])
    assert np.array_equal(scene_tokens, scene[1]) and np.array_equal(image_tokens, scene[1] + 100)
    assert np.array_equal(shards[3][2], scene[1])
    with pytest.raises(IndexError):
        shards[4]


def test_mirrored_pictures_have_the_places_of_the_pictures(tmp_path):
    write_tokens(tmp_path, mirrored=True)
    shards = pickle.loads(pickle.dumps(TokenShards(tmp_path)))
    assert shards.has_mirrored and len(shards) == 4
    for i in range(4):
        for plain, mirrored in zip(shards[i], shards.mirrored(i), strict=True):
            assert np.array_equal(plain + 7, mirrored)
    with pytest.raises(IndexError):
        shards.mirrored(4)


def test_without_mirrored_pictures_the_files_are_those_of_before(tmp_path):
    write_tokens(tmp_path)
    assert not list(tmp_path.glob("*mirrored*"))
    shards = TokenShards(tmp_path)
    assert not shards.has_mirrored
    with pytest.raises(ShardError, match="no mirrored pictures; tokenize with --mirror"):
        shards.mirrored(0)


def test_mapped_token_shards_hold_no_file_open_and_cannot_be_written(tmp_path):
    write_tokens(tmp_path, mirrored=True)
    before = len(os.listdir("/proc/self/fd"))
    shards = TokenShards(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="read-only"):
        shards[0][1][0] = 1


@pytest.mark.parametrize("stream", ["image", "mirrored-image", "mirrored-text"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"x" * 300),
        lambda path: os.truncate(path, 140),
        lambda path: os.truncate(path, 60),
        lambda path: np.save(path, np.zeros((3, 6), np.uint16)),
        lambda path: np.save(path, np.zeros((3, 4), np.int64)),
        lambda path: np.save(path, np.zeros((4, 3), np.uint16).T),
        lambda path: np.save(path, np.array([{}] * 3), allow_pickle=True),
    ],
)
def test_a_broken_token_array_is_named(tmp_path, damage, stream):
    write_tokens(tmp_path, mirrored=True)
    damage(tmp_path / f"00000.{stream}.npy")
    with pytest.raises(ShardError, match=rf"00000\.{stream}\.npy: .*tokenize again"):
        TokenShards(tmp_path)


def test_a_mirrored_token_that_no_vocabulary_has_is_named_with_its_file(tmp_path):
    write_tokens(tmp_path, mirrored=True)
    text = np.load(tmp_path / "00000.mirrored-text.npy")
    text[2, 0] = 50
    np.save(tmp_path / "00000.mirrored-text.npy", text)
    shards = TokenShards(tmp_path)
    assert len(shards[1][0]) == 2
    with pytest.raises(ShardError, match=r"00000\.mirrored-text\.npy: picture 1 has token 50"):
        shards.mirrored(1)


def test_captions_of_pictures_that_do_not_exist_are_refused(tmp_path):
    write_tokens(tmp_path)
    np.save(tmp_path / "00000.row.npy", np.array([0, 1, 1, 3], np.int32))
    with pytest.raises(ShardError, match=r"00000\.row\.npy"):
        TokenShards(tmp_path)


SIZES = (
    '"text": {"vocabulary": 9, "length": 4}, "image": {"vocabulary": 9, "grid": 2}, '
    '"scene": {"vocabulary": 9, "grid": 2}'
)
MANIFESTS = [
    None,
    "{",
    "[]",
    "[" * 100_000,
    '{"format": 2}',
    '{"format": 1}',
    '{"format": 1, "text": 3, "scene": 3, "image": 3, "shards": []}',
    f'{{"format": 1, {SIZES}}}',
    f'{{"format": 1, {SIZES}, "shards": [{{"name": "00000", "pictures": 2}}]}}',
    f'{{"format": 1, {SIZES}, "shards": [{{"name": "00000", "pictures": -1, "captions": 0}}]}}',
    f'{{"format": 1, {SIZES}, "mirrored": "yes", "shards": []}}',
    f'{{"format": 1, {SIZES}, "shards": [{{"name": 0, "pictures": 1, "captions": 1}}]}}',
]


@pytest.mark.parametrize("content", MANIFESTS)
def test_an_unfinished_token_folder_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ShardError, match="tokenize"):
        TokenShards(tmp_path)
