"""The one token layout: `[text | scene | image]`, in this order, everywhere.

In: text, scene and image tokens, each stream with its own vocabulary. Out: one sequence for the
GPT, and back. Lengths, boundaries and what "unconditional" and "free" mean are written here and
nowhere else. Paper: Make-A-Scene (arXiv 2203.13131) section 3.
Axes: B batch, T tokens. Tokens are local to their stream: each counts from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mas.text import PAD

FREE = -1  # a token that nobody has given: sampling fills it


class SequenceError(ValueError):
    """Tokens that do not fit the layout; the message names the stream."""


class Streams(NamedTuple):
    """One tensor per stream, in the order of the sequence."""

    text: Tensor
    scene: Tensor
    image: Tensor


def count_free(tokens_BT: Tensor) -> int:
    """Tokens that nobody has given."""
    return int((tokens_BT == FREE).sum())


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Where one stream lies in the sequence and which tokens it may hold."""

    name: str  # text, scene or image
    vocabulary: int  # tokens 0 … vocabulary - 1
    start: int  # first position in the sequence
    length: int  # tokens
    grid: int | None = None  # rows = columns of scene and image; None: one-dimensional

    @property
    def stop(self) -> int:
        """The position after the last."""
        return self.start + self.length

    @property
    def span(self) -> slice:
        """The stream's positions in a sequence."""
        return slice(self.start, self.stop)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sequence `[text | scene | image]` for one choice of sizes."""

    text_vocabulary: int  # BPE entries, padding included
    scene_vocabulary: int  # VQ-SEG codes
    image_vocabulary: int  # VQ-GAN codes
    text_length: int  # tokens
    scene_grid: int  # tokens per side
    image_grid: int  # tokens per side

    @cached_property
    def text(self) -> Stream:
        return Stream(
            name="text", vocabulary=self.text_vocabulary, start=0, length=self.text_length
        )

    @cached_property
    def scene(self) -> Stream:
        return Stream(
            name="scene",
            vocabulary=self.scene_vocabulary,
            start=self.text.stop,
            length=self.scene_grid**2,
            grid=self.scene_grid,
        )

    @cached_property
    def image(self) -> Stream:
        return Stream(
            name="image",
            vocabulary=self.image_vocabulary,
            start=self.scene.stop,
            length=self.image_grid**2,
            grid=self.image_grid,
        )

    @property
    def streams(self) -> tuple[Stream, Stream, Stream]:
        return self.text, self.scene, self.image

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.image.stop

    def stream_at(self, position: int) -> Stream:
        """The stream that holds `position`."""
        assert 0 <= position < self.length, position
        return next(stream for stream in self.streams if position < stream.stop)

    def pack(self, text_BT: Tensor, scene_BT: Tensor, image_BT: Tensor) -> Tensor:
        """One sequence, long B T; scene and image may hold `FREE`.

        Raises:
            SequenceError: a stream of wrong length, batch or with a token out of its vocabulary.
        """
        for stream, tokens_BT in zip(self.streams, (text_BT, scene_BT, image_BT), strict=True):
            if tokens_BT.shape != (len(text_BT), stream.length):
                raise SequenceError(
                    f"{stream.name} tokens must be {len(text_BT)} x {stream.length}, "
                    f"got {tuple(tokens_BT.shape)}"
                )
            lowest = 0 if stream is self.text else FREE
            wrong = tokens_BT[(tokens_BT < lowest) | (tokens_BT >= stream.vocabulary)]
            if wrong.numel():
                raise SequenceError(
                    f"{stream.name} token {int(wrong[0])} is not of 0-{stream.vocabulary - 1}"
                )
        return torch.cat([text_BT.long(), scene_BT.long(), image_BT.long()], dim=1)

    def unpack(self, tokens_BT: Tensor) -> Streams:
        """The three streams of a sequence; the inverse of `pack`."""
        assert tokens_BT.shape[1] == self.length, tokens_BT.shape
        return Streams(*(tokens_BT[:, stream.span] for stream in self.streams))

    def unconditional(self, tokens_BT: Tensor, text_1T: Tensor | None = None) -> Tensor:
        """The same sequences with another caption, scene and image kept; None: nothing but padding.

        It is what guidance compares with: no caption at all, or a negative prompt.
        """
        tokens_BT = tokens_BT.clone()
        tokens_BT[:, self.text.span] = PAD if text_1T is None else text_1T
        return tokens_BT

    def free(self, stream: Stream, count: int) -> Tensor:
        """`count` rows of `stream` in which nothing is given, long B T."""
        return torch.full((count, stream.length), FREE)
