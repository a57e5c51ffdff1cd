import json
import logging

import pytest
import torch

from mas.text import PAD, Tokenizer, TokenizerError, contradict_caption, mirror_caption

CAPTIONS = [
    "two brown dogs and a woman with a red umbrella on the beach at sunset",
    "A giraffe in the park",
    "three sheep behind a red bus",
    "the elephant is walking around in the park",
]
VOCABULARY = 320


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.fit(CAPTIONS * 3, vocab_size=VOCABULARY, length=24)


def test_fit_reads_an_iterator_once_and_gives_the_wanted_size(tokenizer):
    streamed = Tokenizer.fit(iter(CAPTIONS * 3), vocab_size=VOCABULARY, length=24)
    assert streamed.vocab_size == tokenizer.vocab_size == VOCABULARY
    assert torch.equal(streamed.encode(CAPTIONS), tokenizer.encode(CAPTIONS))


def test_encoding_has_one_length_and_padding_on_the_right(tokenizer):
    tokens_BT = tokenizer.encode([*CAPTIONS, ""])
    assert tokens_BT.shape == (5, 24) and tokens_BT.dtype == torch.long
    assert (tokens_BT[-1] == PAD).all()
    for row in tokens_BT.tolist():
        used = sum(token != PAD for token in row)
        assert PAD not in row[:used]


def test_no_caption_gives_no_rows(tokenizer):
    assert tokenizer.encode([]).shape == (0, 24)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A  Dog's\tball.\n", "a dog's ball."),
        ("象 在公园", "象 在公园"),
        ("слон 🐘", "слон 🐘"),
        ("cafe\u0301", "caf\u00e9"),
    ],
)
def test_decoding_gives_back_the_normalised_caption_in_any_script(tokenizer, caption, expected):
    assert tokenizer.decode(tokenizer.encode([caption])) == [expected]


def test_case_is_kept_on_request():
    tokenizer = Tokenizer.fit(CAPTIONS, vocab_size=VOCABULARY, length=24, lowercase=False)
    assert tokenizer.decode(tokenizer.encode(["A Dog"])) == ["A Dog"]


def test_a_word_has_the_same_tokens_at_the_start_and_in_the_middle(tokenizer):
    start, middle = tokenizer.encode(["giraffe", "a giraffe"]).tolist()
    word = [token for token in start if token != PAD]
    assert middle[1 : 1 + len(word)] == word


def test_padding_typed_by_a_person_is_plain_text(tokenizer):
    tokens_BT = tokenizer.encode(["a [PAD] b"])
    assert tokenizer.decode(tokens_BT) == ["a [pad] b"]
    used = int((tokens_BT != PAD).sum())
    assert (tokens_BT[0, :used] != PAD).all()


def test_a_long_caption_is_cut_with_a_warning_that_counts_and_shows_one(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        tokens_BT = tokenizer.encode(["a dog", "dog " * 40])
    assert tokens_BT.shape == (2, 24) and (tokens_BT[1] != PAD).all()
    assert "1 of 2 captions" in caplog.text and "dog dog" in caplog.text
    assert caplog.text.count("dog") == 20 and caplog.text.endswith("dog  …'\n")
    caplog.clear()
    tokenizer.encode(["zxqv" * 20])
    assert caplog.text.endswith("zxqv'\n")
    caplog.clear()
    tokenizer.encode(["a dog"])
    assert not caplog.text


def test_saved_and_loaded_tokenizers_agree(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert (loaded.length, loaded.vocab_size) == (tokenizer.length, tokenizer.vocab_size)
    captions = [*CAPTIONS, "a [PAD] b", ""]
    assert torch.equal(loaded.encode(captions), tokenizer.encode(captions))
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_dropout_splits_words_differently_and_decodes_to_the_same_caption(tokenizer):
    tokenizer = Tokenizer.fit(CAPTIONS * 3, vocab_size=VOCABULARY, length=80)
    plain = tokenizer.encode(CAPTIONS)
    dropped = tokenizer.encode(CAPTIONS, dropout=0.5, seed=0)
    assert (dropped != PAD).sum() > (plain != PAD).sum()
    assert tokenizer.decode(dropped) == tokenizer.decode(plain)
    assert torch.equal(dropped, tokenizer.encode(CAPTIONS, dropout=0.5, seed=0))
    assert not torch.equal(dropped, tokenizer.encode(CAPTIONS, dropout=0.5, seed=1))


def test_dropout_of_nearly_nothing_is_the_plain_encoding(tokenizer):
    dropped = tokenizer.encode(CAPTIONS, dropout=1e-12, seed=0)
    assert torch.equal(dropped, tokenizer.encode(CAPTIONS))


def test_dropout_of_everything_leaves_single_bytes(tokenizer):
    tokens_BT = tokenizer.encode(["a dog"], dropout=1.0, seed=0)
    assert int((tokens_BT != PAD).sum()) == len(" a dog")


def write_mindalle(folder, *, pad=0):
    """Files in the form of minDALL-E's bpe-16k-vocab.json and bpe-16k-merges.txt."""
    pieces = ["[UNK]", *"adogt", *(c + "</w>" for c in "adogt"), "do", "dog</w>"]
    pieces.insert(pad, "[PAD]")
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    merges.write_text("#version: 0.2\nd o\ndo g</w>\n")
    return vocab, merges


def test_mindalle_files_become_a_tokenizer(tmp_path):
    tokenizer = Tokenizer.from_mindalle(*write_mindalle(tmp_path))
    assert (tokenizer.length, tokenizer.vocab_size) == (64, 14)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    expected = [vocab[piece] for piece in ("a</w>", "dog</w>", "t", "a</w>", "[UNK]")]
    assert tokenizer.encode(["A dog ta z"]).tolist() == [expected + [PAD] * 59]
    assert tokenizer.decode(tokenizer.encode(["A dog"])) == ["a dog"]
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert torch.equal(loaded.encode(["A dog ta"]), tokenizer.encode(["A dog ta"]))
    dropped = loaded.encode(["a dog"], dropout=1.0, seed=0)[0, :4].tolist()
    assert dropped == [vocab[piece] for piece in ("a</w>", "d", "o", "g</w>")]


def test_bad_input_is_named(tokenizer, tmp_path):
    with pytest.raises(TokenizerError, match=r"missing\.json"):
        Tokenizer.from_file(tmp_path / "missing.json")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(TokenizerError, match=r"other\.json: not a tokenizer"):
        Tokenizer.from_file(tmp_path / "other.json")
    with pytest.raises(TokenizerError, match="no captions"):
        Tokenizer.fit([], vocab_size=300)
    with pytest.raises(TokenizerError, match="257"):
        Tokenizer.fit(CAPTIONS, vocab_size=100)
    with pytest.raises(TokenizerError, match="UTF-8"):
        tokenizer.encode(["a \udc80 dog"])
    with pytest.raises(TokenizerError, match=r"\[PAD\] with id 0"):
        Tokenizer.from_mindalle(*write_mindalle(tmp_path, pad=1))
    with pytest.raises(TokenizerError, match="no such file"):
        Tokenizer.from_mindalle(tmp_path / "none", tmp_path / "none")


def test_a_tokenizer_without_length_or_padding_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "bare.json").write_text(json.dumps(content | {"truncation": None}))
    with pytest.raises(TokenizerError, match=r"bare\.json.*one stored length"):
        Tokenizer.from_file(tmp_path / "bare.json")


@pytest.mark.parametrize(
    ("caption", "mirrored"),
    [
        ("a cat to the left of two red cars", "a cat to the right of two red cars"),
        ("A dog is right of a bench.", "A dog is left of a bench."),
        ("Left: a dog. RIGHT: a cat.", "Right: a dog. LEFT: a cat."),
        ("the leftmost dog, a left-hand glove", "the rightmost dog, a right-hand glove"),
        ("lefthand, bottom-right, rightwards", "righthand, bottom-left, leftwards"),
        ("a ball in her left hand", "a ball in her right hand"),
        ("dogs on the left and right in the snow", "dogs on the right and left in the snow"),
        ("a man facing left in a park", "a man facing right in a park"),
        ("a dog on the right behind a car", "a dog on the left behind a car"),
        ("Right behind the dog on the right", "Right behind the dog on the left"),
        ("right next to a bus, right in front of it", "right next to a bus, right in front of it"),
        ("a bag left on a bench", "a bag left on a bench"),
        ("the train left the station", "the train left the station"),
        ("an upright, bright leftover", "an upright, bright leftover"),
        ("слон слева", "слон слева"),
        ("", ""),
    ],
)
def test_a_mirrored_caption_exchanges_the_sides_and_nothing_else(caption, mirrored):
    assert mirror_caption(caption) == mirrored
    assert mirror_caption(mirrored) == caption


@pytest.mark.parametrize(
    ("caption", "opposite"),
    [
        ("a zebra behind a tiny cow at noon", "a zebra in front of a tiny cow at noon"),
        ("Behind the bus is a dog", "In front of the bus is a dog"),
        ("IN FRONT OF a farm", "BEHIND a farm"),
        ("a man with a dog in front", "a man with a dog behind"),
        ("a kite above a cat, a ball below", "a kite below a cat, a ball above"),
        ("a cow in the foreground on the left", "a cow in the background on the right"),
        ("a dog left of a cat behind a car", "a dog right of a cat in front of a car"),
    ],
)
def test_an_opposite_caption_turns_every_place_round(caption, opposite):
    assert contradict_caption(caption) == opposite


@pytest.mark.parametrize("caption", ["", "two dogs next to a car", "a bag left behind", "слон"])
def test_what_says_nothing_of_places_has_no_opposite(caption):
    assert contradict_caption(caption) == caption
