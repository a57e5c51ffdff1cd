"""Batches from shards: content, validation split, flips, captions, and clear refusals."""

import json
import shutil
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mas.scene import SceneMap
from mas.shards import ShardIndex, TokenShards, expand_shards, write_token_shard
from mas.storage import file_hash
from mas.text import Tokenizer
from train.data import Part, PhotoData, SceneData, StreamData, TokenData, TokenItems

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


def test_flips_mirror_photo_and_scene_together_and_never_in_validation(scene_shards):
    data = PhotoData(input=str(scene_shards), batch_size=4, size=32, holdout=6)
    data.scenes = True
    data.setup("fit")
    plain, rng = data.training.item(0, None), np.random.default_rng(0)
    drawn = [data.training.item(0, rng) for _ in range(20)]
    mirrored = SceneMap(plain["labels"].numpy(), plain["edges"].numpy()).mirrored()
    flips = [not torch.equal(item["image"], plain["image"]) for item in drawn]
    assert 4 < sum(flips) < 16
    for item, flipped in zip(drawn, flips, strict=True):
        wanted = mirrored.labels if flipped else plain["labels"].numpy()
        assert np.array_equal(item["labels"], wanted)
        assert torch.equal(item["image"], plain["image"].flip(2) if flipped else plain["image"])


def test_a_caption_of_the_picture_is_drawn_at_random(token_shards):
    shards = TokenShards(str(token_shards))
    items = TokenItems(shards, Part(len(shards), holdout=6, part="train"))
    rng = np.random.default_rng(0)
    drawn = {tuple(items.item(0, rng)["text"].tolist()) for _ in range(20)}
    assert drawn == {tuple(caption.tolist()) for caption in shards[0][0]}
    assert tuple(items.item(0, None)["text"].tolist()) == tuple(shards[0][0][0].tolist())


@pytest.fixture(scope="module")
def both_ways(token_shards, tmp_path_factory):
    """The token shards with mirrored pictures: all tokens of a stream turned round."""
    folder = tmp_path_factory.mktemp("both") / "tokens"
    shutil.copytree(token_shards, folder)
    for stream, vocabulary in (("text", 300), ("scene", 16), ("image", 32)):
        tokens = vocabulary - 1 - np.load(folder / f"00000.{stream}.npy")
        np.save(folder / f"00000.mirrored-{stream}.npy", tokens.astype(np.uint16))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"mirrored": True}))
    return folder


def test_half_of_the_training_pictures_are_mirrored_whole(both_ways):
    shards = TokenShards(both_ways)
    items = TokenItems(shards, Part(len(shards), holdout=6, part="train"))
    rng, flips = np.random.default_rng(0), 0
    for _ in range(400):
        item = items.item(7, rng)
        picture = items.part[7]
        flipped = not np.array_equal(item["scene"], shards[picture][1])
        text_CT, scene, image = shards.mirrored(picture) if flipped else shards[picture]
        assert np.array_equal(item["scene"], scene) and np.array_equal(item["image"], image)
        assert (item["text"].numpy() == text_CT).all(1).any()
        flips += flipped
    assert 160 < flips < 240
    assert np.array_equal(items.item(7, None)["scene"], shards[items.part[7]][1])


def batches(folder, count=10, *, consumed=0, **settings):
    data = TokenData(input=str(folder), batch_size=4, holdout=6, **settings)
    data.setup("fit")
    loader = data.train_dataloader()
    loader.load_state_dict({"consumed": consumed})
    return list(islice(loader, count)), list(data.val_dataloader())


def same(ours, theirs):
    return all(
        torch.equal(a[stream], b[stream])
        for a, b in zip(ours, theirs, strict=True)
        for stream in ("text", "scene", "image")
    )


def test_flips_follow_the_seed_and_leave_validation_alone(both_ways, token_shards):
    training, validation = batches(both_ways)
    again, _ = batches(both_ways, workers=1)
    other, _ = batches(both_ways, seed=1)
    assert same(training, again) and not same(training, other)
    assert same(training[3:], batches(both_ways, 7, consumed=12)[0])
    plain, plain_validation = batches(token_shards)
    assert same(validation, plain_validation) and not same(training, plain)
    assert same(batches(both_ways, flip=False)[0], plain)


def test_without_mirrored_pictures_flip_changes_no_draw(token_shards):
    assert same(batches(token_shards)[0], batches(token_shards, flip=False)[0])
    shards = TokenShards(token_shards)
    items = TokenItems(shards, Part(len(shards), holdout=6, part="train"))
    rng, twin = np.random.default_rng(3), np.random.default_rng(3)
    for place in range(20):
        caption = int(twin.integers(2))
        assert np.array_equal(items.item(place, rng)["text"], shards[items.part[place]][0][caption])


@pytest.fixture(scope="module")
def captioned(token_shards, tmp_path_factory):
    """Token shards whose captions were encoded by the tokenizer beside them."""
    folder = tmp_path_factory.mktemp("captioned")
    captions = ["a dog on the grass", "two dogs and a red ball in the park"]
    tokenizer = Tokenizer.fit(captions * 3, vocab_size=300, length=32)
    tokenizer.save(folder / "tokenizer.json")
    shards = TokenShards(str(token_shards))
    count = 20
    write_token_shard(
        str(folder),
        "00000",
        scene=np.stack([shards[i][1] for i in range(count)]),
        image=np.stack([shards[i][2] for i in range(count)]),
        text=np.tile(tokenizer.encode(captions).numpy().astype(np.uint16), (count, 1)),
        row=np.repeat(np.arange(count, dtype=np.int32), 2),
    )
    manifest = shards.manifest | {
        "text": {
            "vocabulary": tokenizer.vocab_size,
            "length": 32,
            "sha256": file_hash(folder / "tokenizer.json"),
        },
        "shards": [{"name": "00000", "pictures": count, "captions": 2 * count}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder, tokenizer, captions


@pytest.mark.parametrize("workers", [0, 1])
def test_bpe_dropout_spells_captions_in_new_ways_and_never_in_validation(workers, captioned):
    folder, tokenizer, captions = captioned
    data = TokenData(
        input=str(folder),
        batch_size=10,
        workers=workers,
        holdout=5,
        bpe_dropout=0.3,
        tokenizer=str(folder / "tokenizer.json"),
    )
    data.setup("fit")
    loader = data.train_dataloader()
    first = [batch["text"] for batch in islice(loader, 3)]
    assert {c for batch in first for c in tokenizer.decode(batch)} == set(captions)
    assert len({tuple(row) for batch in first for row in batch.tolist()}) > 4
    again = data.train_dataloader()
    again.load_state_dict({"consumed": 10})
    assert all(torch.equal(a, b["text"]) for a, b in zip(first[1:], islice(again, 2), strict=True))
    (validation,) = data.val_dataloader()
    assert torch.equal(validation["text"], tokenizer.encode([captions[0]]).expand(4, -1))


def test_bpe_dropout_spells_mirrored_captions_too(captioned, tmp_path):
    folder, tokenizer, captions = captioned
    shutil.copytree(folder, tmp_path / "tokens")
    folder = tmp_path / "tokens"
    for stream in ("scene", "image"):
        shutil.copy(folder / f"00000.{stream}.npy", folder / f"00000.mirrored-{stream}.npy")
    turned = ["the mirrored dog", "a mirrored ball"]
    text = np.tile(tokenizer.encode(turned).numpy().astype(np.uint16), (20, 1))
    np.save(folder / "00000.mirrored-text.npy", text)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"mirrored": True}))
    training, validation = batches(
        folder, count=6, bpe_dropout=0.3, tokenizer=str(folder / "tokenizer.json")
    )
    seen = {caption for batch in training for caption in tokenizer.decode(batch["text"])}
    assert seen == {*captions, *turned}
    assert {c for batch in validation for c in tokenizer.decode(batch["text"])} == {captions[0]}
    assert len({tuple(row) for batch in training for row in batch["text"].tolist()}) > 4


def test_without_bpe_dropout_the_stored_tokens_are_taken(captioned):
    folder, tokenizer, captions = captioned
    data = TokenData(input=str(folder), batch_size=10, holdout=5)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    known = {tuple(row) for row in tokenizer.encode(captions).tolist()}
    assert {tuple(row) for row in batch["text"].tolist()} == known


def test_bpe_dropout_needs_the_tokenizer_of_the_tokens(captioned, tmp_path):
    folder, _, _ = captioned
    with pytest.raises(ValueError, match=r"data\.bpe_dropout needs data\.tokenizer"):
        TokenData(input=str(folder), bpe_dropout=0.1)
    Tokenizer.fit(["something else"], vocab_size=300, length=32).save(tmp_path / "other.json")
    data = TokenData(
        input=str(folder), batch_size=4, bpe_dropout=0.1, tokenizer=str(tmp_path / "other.json")
    )
    with pytest.raises(ValueError, match=r"other\.json is not the tokenizer of"):
        data.setup("fit")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_token_that_no_vocabulary_has_is_named_with_its_file(workers, token_shards, tmp_path):
    folder = tmp_path / "tokens"
    shutil.copytree(token_shards, folder)
    image = np.load(folder / "00000.image.npy")
    image[7, 3] = 40000
    np.save(folder / "00000.image.npy", image)
    data = TokenData(input=str(folder), batch_size=4, holdout=6, workers=workers)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"00000\.image\.npy: .*token 40000") as caught:
        list(islice(data.train_dataloader(), 5))
    assert "\n" not in str(caught.value)


class Few(StreamData):
    """So many pictures that nobody looks at."""

    class Blank(Part):
        def item(self, index, rng):
            return {}

    def __init__(self, count):
        super().__init__(batch_size=1, workers=0, holdout=50, seed=0)
        self.count = count

    def open(self):
        return self.count

    def items(self, part):
        return self.Blank(self.count, holdout=self.holdout, part=part.part)


@pytest.mark.parametrize(("count", "advice"), [(1, "give more data\n"), (3, "holdout to 3 or")])
def test_a_run_of_few_pictures_is_told_what_would_validate_it(count, advice, caplog):
    Few(count).setup("fit")
    assert f"of {count} pictures every 50-th would be held out" in caplog.text
    assert advice in caplog.text


def test_keys_say_where_a_picture_lies(token_shards):
    shards = TokenShards(str(token_shards))
    items = TokenItems(shards, Part(len(shards), holdout=6, part="train"))
    assert [items.item(place, None)["key"] for place in (0, 4, 5)] == [
        "00000/0",
        "00000/4",
        "00000/6",
    ]


def test_ranks_validate_equally_many_pictures_and_none_goes_without(token_shards):
    data = TokenData(input=str(token_shards), batch_size=2, holdout=6)
    data.trainer = SimpleNamespace(global_rank=1, world_size=3)
    data.setup("fit")
    assert sum(len(batch["key"]) for batch in data.val_dataloader()) == 1  # of four
    data.trainer = SimpleNamespace(global_rank=0, world_size=5)
    wanted = "4 pictures are held out for 5 processes.*set data.holdout to 4 or less"
    with pytest.raises(ValueError, match=wanted):
        data.setup("fit")
    data = TokenData(input=str(token_shards), batch_size=9, holdout=6)
    data.trainer = SimpleNamespace(global_rank=0, world_size=3)
    with pytest.raises(ValueError, match=r"one batch of 27: .*batch_size to 6 or less"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"batch_size": 25},
            "24 pictures .* than one batch of 25.*batch_size to 24 or less",
        ),
        (
            {"batch_size": 21, "holdout": 4},
            r"\(18 without .* set data.batch_size to 18 or less",
        ),
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
