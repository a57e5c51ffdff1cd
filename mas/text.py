"""Captions to text tokens and back: a byte-level BPE of fixed length.

In: captions. Out: text tokens for the first stream of the sequence, padded with `PAD`. Byte-level,
so no script and no emoji is ever unknown. The file is Hugging Face's tokenizer.json; length,
padding and lowercasing are stored in it. Also reads minDALL-E's char-level BPE (`from_mindalle`).
`mirror_caption` turns a caption into that of the mirrored picture, `contradict_caption` into one
that says the opposite of where things stand.
Axes: B captions, T tokens.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from mas.storage import write_json

logger = logging.getLogger(__name__)

PAD = 0
PAD_TOKEN = "[PAD]"
QUOTED = 80  # characters of a caption that a warning shows
SMALLEST_VOCABULARY = 257  # every byte, and the padding

_OTHER_SIDE = {"left": "right", "right": "left"}
_SIDE = re.compile(r"\b(?:left|right)(?=(?:most|hand(?:ed)?|wards?)?\b)", re.IGNORECASE)
# Before these words it is no side: "right behind a car", "a bag left on a bench" …
_PLACES = (
    "above|across|against|along|at|behind|below|beneath|beside|between|by|for|in|inside|into|near|"
    "on|out|outside|over|under|underneath|with"
)
_NO_SIDE = {
    word: re.compile(rf"\s+(?:{_PLACES}|{more})\b", re.IGNORECASE)
    for word, more in {
        "left": "abandoned|alone|open|unattended|an?|the|his|her|its|their|him|them|it",
        "right": "next|up|down|through|past|onto|now|away|here|there|back|as|when|where|after",
    }.items()
}
# … unless one of these stands before it: "on the right behind a car", "facing left by the sea".
_SURELY_SIDE = re.compile(
    r"\b(?:the|an?|his|her|its|their|my|your|our|to|on|at|from|far|top|upper|bottom|lower|front|"
    r"back|rear|cent(?:er|re)|middle|turn(?:s|ed|ing)?|fac(?:es?|ed|ing)|"
    r"(?:left|right)\s+(?:and|or|to))[\s-]+\Z",
    re.IGNORECASE,
)

_OPPOSITE = {"behind": "in front of", "in front of": "behind", "in front": "behind"} | {
    a: b
    for pair in (("above", "below"), ("in the foreground", "in the background"))
    for a, b in (pair, pair[::-1])
}
_OPPOSABLE = "|".join(sorted(_OPPOSITE, key=len)[::-1])  # longer ones first
_OPPOSED = re.compile(rf"\b(?<!left )(?:{_OPPOSABLE})\b", re.IGNORECASE)


class TokenizerError(ValueError):
    """A tokenizer file or a caption that cannot be used; the message names the mend."""


class Tokenizer:
    """A fixed-length BPE tokenizer around a Hugging Face one."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        if tokenizer.token_to_id(PAD_TOKEN) != PAD:
            raise TokenizerError(f"the vocabulary must hold {PAD_TOKEN} with id {PAD}")
        truncation, padding = tokenizer.truncation, tokenizer.padding
        if not truncation or not padding or padding["length"] != truncation["max_length"]:
            raise TokenizerError("the tokenizer must cut and pad to one stored length")
        if padding["pad_id"] != PAD or padding["direction"] != "right":
            raise TokenizerError(f"the tokenizer must pad on the right with id {PAD}")
        # "[PAD]" typed by a person is plain text, never the padding token.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.length: int = padding["length"]
        self.vocab_size: int = tokenizer.get_vocab_size()

    @classmethod
    def fit(
        cls,
        captions: Iterable[str],
        *,
        vocab_size: int = 16384,
        length: int = 64,
        lowercase: bool = True,
    ) -> Tokenizer:
        """Fits a byte-level BPE; the iterable is read once and never held in memory.

        Args:
            captions: the training captions.
            vocab_size: entries wanted, at least 257; few captions give fewer (`vocab_size` of the
                result tells).
            length: tokens a caption is cut or padded to.
            lowercase: upper and lower case become one.

        Raises:
            TokenizerError: no caption at all, or sizes that cannot be.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise TokenizerError(f"vocab_size is {vocab_size}, use {SMALLEST_VOCABULARY} or more")
        if length < 1:
            raise TokenizerError(f"length is {length}, use 1 or more")
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.NFC(),
                *([normalizers.Lowercase()] if lowercase else []),
                normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
                normalizers.Strip(),
            ]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD_TOKEN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        counted = _Counted(captions)
        tokenizer.train_from_iterator(counted, trainer=trainer)
        if not counted.seen:
            raise TokenizerError("there are no captions to fit the vocabulary on")
        return cls(_fix_length(tokenizer, length))

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.json.

        Raises:
            TokenizerError: no such file, no tokenizer.json, `[PAD]` is not id 0, no stored length.
        """
        try:
            content = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path}: cannot be read as a tokenizer.json ({error})") from error
        try:
            tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(
                f"{path}: not a tokenizer.json ({error}); write one with mas fit-bpe"
            ) from error
        try:
            return cls(tokenizer)
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}; write one with mas fit-bpe") from None

    @classmethod
    def from_mindalle(
        cls, vocab: str | Path | bytes, merges: str | Path | bytes, *, length: int = 64
    ) -> Tokenizer:
        """Imports minDALL-E's char-level BPE (bpe-16k-vocab.json, bpe-16k-merges.txt).

        Args:
            vocab: path of the vocabulary, or its content.
            merges: path of the merges, or their content.
            length: tokens a caption is cut or padded to; minDALL-E was trained with 64.

        Raises:
            TokenizerError: a file is missing or is none of these, or `[PAD]` is not id 0.
        """
        names = ["the vocabulary" if isinstance(vocab, bytes) else str(vocab)]
        names.append("the merges" if isinstance(merges, bytes) else str(merges))
        vocab_text, merges_text = _read_text(vocab, names[0]), _read_text(merges, names[1])
        lines = [line for line in merges_text.split("\n") if not line.startswith("#version")]
        try:
            charwise = tokenizers.implementations.CharBPETokenizer(
                json.loads(vocab_text),
                [tuple(line.split(" ")) for line in lines if line],
                unk_token="[UNK]",
                lowercase=True,
            )
            content = charwise.to_str()
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{', '.join(names)}: not a char-level BPE ({error})") from error
        try:
            return cls(_fix_length(tokenizers.Tokenizer.from_str(content), length))
        except TokenizerError as error:
            raise TokenizerError(f"{names[0]}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json atomically; the same tokenizer gives the same bytes."""
        write_json(path, self.content)

    @property
    def content(self) -> dict[str, Any]:
        """What tokenizer.json says; two tokenizers that say the same are the same."""
        return json.loads(self._tokenizer.to_str())

    def encode(
        self,
        texts: Sequence[str],
        *,
        dropout: float = 0.0,
        seed: int | None = None,
        warn: bool = True,
    ) -> Tensor:
        """Text tokens, long B T; an empty caption is all padding.

        Args:
            texts: captions; those longer than `length` tokens are cut, with one warning a call.
            dropout: probability with which each merge is skipped (BPE dropout, arXiv 1910.13267),
                for training; needs `seed`.
            seed: of the dropout; the same seed gives the same tokens.
            warn: of captions that are cut.

        Raises:
            TokenizerError: a caption is no valid Unicode.
        """
        for text in texts:
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise TokenizerError(f"caption {text!a} is not valid UTF-8")
        if dropout:
            assert seed is not None and 0 < dropout <= 1
            return self._encode_with_dropout(texts, dropout, random.Random(seed))
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        cut = [
            text for text, encoding in zip(texts, encodings, strict=True) if encoding.overflowing
        ]
        if cut and warn:
            logger.warning(
                "%d of %d captions are longer than %d tokens and were cut, for example %r",
                len(cut),
                len(texts),
                self.length,
                cut[0] if len(cut[0]) <= QUOTED else f"{cut[0][:QUOTED]} …",
            )
        ids = [encoding.ids for encoding in encodings]
        return torch.tensor(ids, dtype=torch.long).reshape(len(texts), self.length)

    def decode(self, tokens_BT: Tensor) -> list[str]:
        """Captions without their padding (normalised: lower case, single spaces)."""
        rows = [[token for token in row if token != PAD] for row in tokens_BT.tolist()]
        return [text.strip() for text in self._tokenizer.decode_batch(rows)]

    @cached_property
    def _pieces(self) -> _Pieces:
        model = json.loads(self._tokenizer.to_str())["model"]
        vocabulary: dict[str, int] = model["vocab"]
        return _Pieces(
            vocabulary,
            {tuple(pair): rank for rank, pair in enumerate(model["merges"])},
            model["end_of_word_suffix"] or "",
            vocabulary.get(model["unk_token"] or "", PAD),
        )

    def _encode_with_dropout(
        self, texts: Sequence[str], dropout: float, rng: random.Random
    ) -> Tensor:
        vocabulary, ranks, suffix, unknown = self._pieces
        tokens_BT = torch.full((len(texts), self.length), PAD)
        for row, text in enumerate(texts):
            normalized = self._tokenizer.normalizer.normalize_str(text)
            words = self._tokenizer.pre_tokenizer.pre_tokenize_str(normalized)
            ids = [
                vocabulary.get(symbol, unknown)
                for word, _ in words
                for symbol in _merge([*word[:-1], word[-1] + suffix], ranks, dropout, rng)
            ][: self.length]
            tokens_BT[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        return tokens_BT


def mirror_caption(caption: str) -> str:
    """The caption of the mirrored picture: left and right change places.

    Whole words, also in leftmost, left-hand and leftward; in lower, upper or title case. Where they
    are plainly no side they stay ("right next to", "a bag left on a bench"). English does not
    always tell; what is in doubt counts as a side.
    """
    return _SIDE.sub(_change_side, caption)


def names_side(caption: str) -> bool:
    """Whether left and right matter to a caption, as `mirror_caption` understands it."""
    return mirror_caption(caption) != caption


def contradict_caption(caption: str) -> str:
    """The caption with all it says of where things stand turned into the opposite.

    Left for right as in `mirror_caption`, behind for in front of, above for below, foreground for
    background. A caption that says nothing of the kind stays as it is. Some are as true as their
    opposite ("one behind the other"); these are not told.
    """
    return _OPPOSED.sub(_change_place, mirror_caption(caption))


def _change_place(match: re.Match[str]) -> str:
    words = match[0]
    other = _OPPOSITE[words.lower()]
    if words.isupper():
        return other.upper()
    return other[0].upper() + other[1:] if words[0].isupper() else other


def _change_side(match: re.Match[str]) -> str:
    word, side = match[0], match[0].lower()
    before = match.string[max(match.start() - 20, 0) : match.start()]
    if _NO_SIDE[side].match(match.string, match.end()) and not _SURELY_SIDE.search(before):
        return word
    other = _OTHER_SIDE[side]
    return other.upper() if word.isupper() else other.title() if word.istitle() else other


class _Pieces(NamedTuple):
    """What splitting a word by hand needs of the library's model."""

    vocabulary: dict[str, int]
    ranks: dict[tuple[str, ...], int]  # a pair of pieces -> when it was learnt to be one
    suffix: str  # of a word's last character
    unknown: int  # id of what the vocabulary lacks


class _Counted:
    """Passes the captions on and remembers whether there were any."""

    def __init__(self, captions: Iterable[str]) -> None:
        self._captions = captions
        self.seen = 0

    def __iter__(self) -> Iterator[str]:
        for caption in self._captions:
            self.seen += 1
            yield caption


def _read_text(source: str | Path | bytes, name: str) -> str:
    try:
        return (source if isinstance(source, bytes) else Path(source).read_bytes()).decode()
    except FileNotFoundError:
        raise TokenizerError(f"{name}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{name}: cannot be read as text ({error})") from error


def _fix_length(tokenizer: tokenizers.Tokenizer, length: int) -> tokenizers.Tokenizer:
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=PAD, pad_token=PAD_TOKEN)
    return tokenizer


def _merge(
    symbols: list[str],
    ranks: dict[tuple[str, ...], int],
    dropout: float,
    rng: random.Random,
) -> list[str]:
    """Merges the symbols of one word; each step skips every possible merge with p = `dropout`."""
    while True:
        possible = [
            (ranks[pair], position)
            for position, pair in enumerate(itertools.pairwise(symbols))
            if pair in ranks and rng.random() >= dropout
        ]
        if not possible:
            return symbols
        _, position = min(possible)
        symbols[position : position + 2] = [symbols[position] + symbols[position + 1]]
