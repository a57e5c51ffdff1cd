"""The decode loop: fills the free tokens of `[text | scene | image]` one after the other.

In: text tokens, and any scene and image tokens somebody has given. Out: complete sequences. One
mechanism serves every condition: a given token is forced, a `FREE` one is sampled. The prefix is
read once for all candidates that share it, guidance runs as a second stream in the same batch and
gets every token the first one gets. Paper: Make-A-Scene (arXiv 2203.13131) section 3.4.
Axes: B pictures, R rows of the batch (pictures x guidance streams), T tokens, D width, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from mas.cache import Cache
from mas.filter import Sampling, draw_guided, uniforms
from mas.heap import trim_heap
from mas.rounding import has_float64
from mas.sequence import FREE, Layout, Stream, Streams
from mas.text import PAD

Draw = Callable[[Tensor, Tensor | None, Tensor, Sampling], Tensor]  # as `draw_guided`
Report = Callable[[Tensor, Tensor], None]  # sequences B T as they were given, and so far


class Decoder(Protocol):
    """What the loop needs of a network; `mas.gpt.GPT` is one."""

    layout: Layout

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def new_cache(self, rows: int, *, length: int | None = None) -> Cache: ...

    def extend(self, tokens_BT: Tensor, *, cache: Cache, start: int) -> Tensor: ...

    def head(self, x_BD: Tensor, stream: Stream) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How the tokens at one position are chosen."""

    stream: Stream
    sampling: Sampling
    branches: tuple[str, ...]  # guidance streams of the rows: conditional, unconditional or both

    def tokens(
        self,
        logits_RV: Tensor,
        *,
        uniform_B: Tensor,
        given_B: Tensor,
        draw: Draw = draw_guided,
    ) -> Tensor:
        """Given tokens stay, `FREE` ones are drawn on the device of the numbers; long B."""
        branches = logits_RV.float().chunk(len(self.branches))
        own_BV = branches[1 if self.taken == "second" else 0]
        others_BV = branches[1] if self.taken == "both" else None
        drawn_B = draw(own_BV, others_BV, uniform_B, self.sampling)
        return torch.where(given_B == FREE, drawn_B.to(given_B.device), given_B)

    @property
    def taken(self) -> Literal["first", "second", "both"]:
        """The branch of the rows that tokens are drawn from, or both of them, guided."""
        if len(self.branches) == 1 or self.sampling.guidance == 1:
            return "first"
        return "both" if self.sampling.guidance else "second"


class Steps(Protocol):
    """One batch in a decoder that chooses a token and reads it in one go."""

    cache: Cache
    tokens_BT: Tensor  # at first a copy of what it was started with; the loop writes to it, too

    def step(self, choice: Choice, position: int, state_RD: Tensor) -> Tensor:
        """Fills `position` of `tokens_BT`, reads it, and returns the state that predicts the next.

        The state is overwritten by the next step.
        """

    def close(self) -> None:
        """Hands the memory back to the decoder."""


@runtime_checkable
class SteppingDecoder(Protocol):
    """What a decoder may offer besides; `mas.cuda_decoder.CUDADecoder` does."""

    def start_steps(self, tokens_BT: Tensor, uniforms_BT: Tensor, *, rows: int) -> Steps: ...


@runtime_checkable
class DrawingDecoder(Protocol):
    """Likewise; `mas.fast_decoder.FastDecoder` does."""

    def draw(
        self, logits_BV: Tensor, others_BV: Tensor | None, uniform_B: Tensor, sampling: Sampling
    ) -> Tensor: ...


@torch.inference_mode()
def generate(
    decoder: Decoder,
    text_BT: Tensor,
    *,
    seeds: Sequence[int],
    scene_BT: Tensor | None = None,
    image_BT: Tensor | None = None,
    scene: Sampling | None = None,
    image: Sampling | None = None,
    negative_1T: Tensor | None = None,
    scene_only: bool = False,
    on_progress: Report | None = None,
) -> Streams:
    """Samples every free scene and image token, long B T per stream on the decoder's device.

    Picture i depends on row i and seed i alone, not on the batch around it: position t of it always
    uses the t-th random number of its seed.

    Args:
        decoder: the GPT, in evaluation mode.
        text_BT: text tokens; a caption of nothing but padding is unconditional.
        seeds: one a picture.
        scene_BT: given scene tokens, `FREE` where the GPT shall choose (None: everywhere).
        image_BT: likewise for the image.
        scene: how scene tokens are drawn.
        image: how image tokens are drawn.
        negative_1T: text tokens of the negative prompt, which guidance moves away from in all
            pictures; None: those of the empty caption.
        scene_only: stop after the scene; free image tokens stay `FREE`.
        on_progress: called after every step.

    Raises:
        SequenceError: tokens that do not fit the layout.
        ValueError: as many seeds as captions are needed; or the network gives no finite logits.
    """
    layout = decoder.layout
    count = len(text_BT)
    if len(seeds) != count or count == 0:
        raise ValueError(f"{count} captions and {len(seeds)} seeds: give one seed a picture")
    given_BT = layout.pack(
        text_BT,
        layout.free(layout.scene, count) if scene_BT is None else scene_BT,
        layout.free(layout.image, count) if image_BT is None else image_BT,
    )
    if negative_1T is not None:
        free = (layout.free(stream, 1) for stream in (layout.scene, layout.image))
        negative_1T = layout.pack(negative_1T, *free)[:, layout.text.span].to(decoder.device)
    samplings = {"scene": scene or Sampling(), "image": image or Sampling()}
    stop = layout.scene.stop if scene_only else layout.length
    loop = _Loop(
        decoder, given_BT, seeds=seeds, samplings=samplings, negative_1T=negative_1T, stop=stop
    )
    try:
        while not loop.finished:
            loop.step()
            if on_progress is not None:
                on_progress(given_BT, loop.tokens_BT.clone())
    finally:
        loop.close()
    return layout.unpack(loop.tokens_BT)


class _Loop:
    """The state of one batch: sequences so far, cache, and the state that predicts the next."""

    def __init__(
        self,
        decoder: Decoder,
        given_BT: Tensor,
        *,
        seeds: Sequence[int],
        samplings: dict[str, Sampling],
        negative_1T: Tensor | None,
        stop: int,
    ) -> None:
        self.decoder = decoder
        self.draw = decoder.draw if isinstance(decoder, DrawingDecoder) else draw_guided
        self.negative_1T = negative_1T
        self.stop = stop  # position at which nothing more is wanted
        self.layout = decoder.layout
        self.samplings = samplings
        self.given_T = (given_BT != FREE).all(0).tolist()
        uniforms_BT = torch.stack([uniforms(seed, self.layout.length) for seed in seeds])
        exact = has_float64(decoder.device)  # else tokens are drawn on the CPU
        self.uniforms_BT = uniforms_BT.to(decoder.device) if exact else uniforms_BT
        self.tokens_BT = given_BT.to(decoder.device, copy=True)
        self.branches = self._choose_branches()
        self.steps: Steps | None = None
        self.state_RD: Tensor
        self.position = self._given_until(0)
        if not self.finished:
            self._read_prefix()

    @property
    def finished(self) -> bool:
        return self.position >= self.stop

    def step(self) -> None:
        """Fills the next position, then reads all that is given from there on."""
        first = self.position
        stream = self.layout.stream_at(first)
        choice = Choice(
            stream=stream, sampling=self.samplings[stream.name], branches=tuple(self.branches)
        )
        self.position = self._given_until(first + 1)
        if self.steps is not None and self.position == first + 1 and not self.finished:
            self.state_RD = self.steps.step(choice, first, self.state_RD)
            return
        self.tokens_BT[:, first] = choice.tokens(
            self.decoder.head(self.state_RD, stream),
            uniform_B=self.uniforms_BT[:, first],
            given_B=self.tokens_BT[:, first],
            draw=self.draw,
        )
        if not self.finished:
            piece_BT = self.tokens_BT[:, first : self.position]
            piece_RT = piece_BT.repeat(len(self.branches), 1)
            self.state_RD = self.decoder.extend(piece_RT, cache=self.cache, start=first)

    def close(self) -> None:
        """Lets go of what the decoder has lent."""
        if self.steps is not None:
            try:
                self.tokens_BT = self.tokens_BT.clone()
            finally:
                self.steps.close()

    def _choose_branches(self) -> list[str]:
        """Which streams run. A stream that has no weight in any guidance is left out."""
        guidances = {sampling.guidance for sampling in self.samplings.values()}
        captions_BT = self.tokens_BT[:, self.layout.text.span]
        alike = self.negative_1T is None and (captions_BT == PAD).all()
        if guidances == {1} or alike:
            return ["conditional"]
        return ["unconditional"] if guidances == {0} else ["conditional", "unconditional"]

    def _given_until(self, position: int) -> int:
        """The first position from `position` on that is free in some picture."""
        while position < self.layout.length and self.given_T[position]:
            position += 1
        return position

    def _read_prefix(self) -> None:
        """Reads each distinct prefix once and hands its keys and values to all that share it."""
        prefix_BT = self.tokens_BT[:, : self.position]
        by_branch = {
            "conditional": prefix_BT,
            "unconditional": self.layout.unconditional(prefix_BT, self.negative_1T),
        }
        prefix_RT = torch.cat([by_branch[branch] for branch in self.branches])
        distinct: dict[tuple[int, ...], int] = {}
        sources = [distinct.setdefault(tuple(row), len(distinct)) for row in prefix_RT.tolist()]
        read_RT = torch.tensor(list(distinct), device=self.decoder.device)
        shared = self.decoder.new_cache(len(distinct), length=self.position)
        state_RD = self.decoder.extend(read_RT, cache=shared, start=0)
        if not state_RD.isfinite().all():
            raise ValueError("the GPT computes NaN: its weights are broken, train or copy it again")
        if self.decoder.device.type == "cpu":
            trim_heap()  # what reading many tokens at once took, before the cache takes its room
        if isinstance(self.decoder, SteppingDecoder):
            rows = len(sources)
            self.steps = self.decoder.start_steps(self.tokens_BT, self.uniforms_BT, rows=rows)
            self.cache, self.tokens_BT = self.steps.cache, self.steps.tokens_BT
        else:
            self.cache = self.decoder.new_cache(len(sources), length=self.stop)
        self.cache.copy_rows(shared, sources, length=self.position)
        self.state_RD = state_RD[sources]
