"""The GPT: one decoder-only transformer over `[text | scene | image]`.

In: tokens in the layout of mas/sequence.py. Out: training losses per stream, or, through a static
key-value cache, the state that predicts the next token. Each stream has its own embedding,
positions (text one-dimensional, scene and image rows + columns) and head.
Paper: Make-A-Scene (arXiv 2203.13131) section 3; pre-LayerNorm blocks as in GPT-2.
Axes: B batch, T tokens, D width, N heads, H width of a head, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mas.cache import Cache, causal_attention
from mas.rounding import has_float64
from mas.sequence import Layout, Stream, Streams
from mas.storage import build_unfilled, load_network, save_network
from mas.text import PAD

SWITCHES = ("qk_norm", "gated", "rotary", "text_head")  # of the config
LOGITS_AT_ONCE = 2**26  # elements; the loss works through more in pieces


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes of the GPT; the defaults are the 270M model of configs/base."""

    layers: int = 16  # blocks
    width: int = 1024  # channels of a token
    heads: int = 16  # divides width
    text_vocabulary: int = 16384  # BPE entries, padding included
    scene_vocabulary: int = 1024  # VQ-SEG codes
    image_vocabulary: int = 16384  # VQ-GAN codes
    text_length: int = 64  # tokens
    scene_grid: int = 16  # tokens per side
    image_grid: int = 16  # tokens per side
    dropout: float = 0.0  # on embeddings, attention and residual branches, 0 ≤ p < 1
    qk_norm: bool = False  # normalise queries and keys per head
    gated: bool = False  # RMSNorm and SwiGLU instead of LayerNorm and GELU
    rotary: bool = False  # rotate queries and keys by row and column (needs head width % 4 = 0)
    # predict captions, too; sampling does not need it, and models stored for sampling lack it
    text_head: bool = field(default=True, metadata={"later": True})

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("dropout", *SWITCHES) and value < 1:
                raise ValueError(f"{name} is {value}, use 1 or more")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.rotary and self.width // self.heads % 4:
            raise ValueError(f"rotary needs a head width of 4 k, not {self.width // self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, use 0 ≤ dropout < 1")

    @property
    def layout(self) -> Layout:
        """The sequence these sizes make."""
        return Layout(
            text_vocabulary=self.text_vocabulary,
            scene_vocabulary=self.scene_vocabulary,
            image_vocabulary=self.image_vocabulary,
            text_length=self.text_length,
            scene_grid=self.scene_grid,
            image_grid=self.image_grid,
        )


class StreamLosses(NamedTuple):
    """Mean cross-entropy in nats and share of right argmax predictions, per stream."""

    text: Tensor
    scene: Tensor
    image: Tensor
    text_accuracy: Tensor
    scene_accuracy: Tensor
    image_accuracy: Tensor


class Rotation(NamedTuple):
    """Cosine and sine of the angles by which the tokens at some positions turn, T H/2."""

    cosine: Tensor
    sine: Tensor


class Positions(nn.Module):
    """A learned vector per position: one-dimensional, or the sum of its row and its column."""

    def __init__(self, stream: Stream, width: int) -> None:
        super().__init__()
        self.grid = stream.grid
        if stream.grid is None:
            self.sequence = nn.Parameter(torch.empty(stream.length, width))
        else:
            self.rows = nn.Parameter(torch.empty(stream.grid, width))
            self.columns = nn.Parameter(torch.empty(stream.grid, width))

    def forward(self, first: int, last: int) -> Tensor:
        """Vectors of positions `first` … `last` - 1 of the stream, T D."""
        if self.grid is None:
            return self.sequence[first:last]
        if last - first == 1:  # one token while decoding: not worth the whole table
            return (self.rows[first // self.grid] + self.columns[first % self.grid])[None]
        return cell_table(self.rows, self.columns)[first:last]


class Attention(nn.Module):
    """Causal multi-head self-attention, with or without a cache."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        head_width = config.width // config.heads
        self.heads = config.heads
        self.dropout = config.dropout
        self.to_qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.to_out = nn.Linear(config.width, config.width, bias=False)
        self.q_norm = nn.RMSNorm(head_width) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_width) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x_BTD: Tensor,
        *,
        rotation: Rotation | None,
        cache: Cache | None = None,
        layer: int = 0,
        start: int = 0,
    ) -> Tensor:
        q, k, v = rearrange(
            self.to_qkv(x_BTD), "b t (three n h) -> three b n t h", three=3, n=self.heads
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            attended = cache.attend(layer, q, k, v, start=start)
        else:
            attended = causal_attention(q, k, v, dropout=self.dropout if self.training else 0.0)
        return self.to_out(rearrange(attended, "b n t h -> b t (n h)"))


class Feedforward(nn.Module):
    """GELU with four times the width; `gated`: SwiGLU with as many parameters."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gated = config.gated
        hidden = hidden_width(config)
        self.expand = nn.Linear(config.width, hidden * (2 if config.gated else 1), bias=False)
        self.contract = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden = self.expand(x_BTD)
        if not self.gated:
            return self.contract(F.gelu(hidden))
        gate, value = hidden.chunk(2, dim=-1)
        return self.contract(F.silu(gate) * value)


class Block(nn.Module):
    """Attention and feedforward, each behind a norm and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.feedforward_norm = make_norm(config)
        self.feedforward = Feedforward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BTD: Tensor,
        *,
        rotation: Rotation | None,
        cache: Cache | None = None,
        layer: int = 0,
        start: int = 0,
    ) -> Tensor:
        attended = self.attention(
            self.attention_norm(x_BTD), rotation=rotation, cache=cache, layer=layer, start=start
        )
        x_BTD = x_BTD + self.dropout(attended)
        return x_BTD + self.dropout(self.feedforward(self.feedforward_norm(x_BTD)))


class GPT(nn.Module):
    """Predicts scene tokens from text, and image tokens from text and scene."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = config.layout
        self.checkpoint_blocks = False  # training: recompute blocks backwards, for less memory
        streams = self.layout.streams
        self.embeddings = nn.ModuleDict(
            {s.name: nn.Embedding(s.vocabulary, config.width) for s in streams}
        )
        self.positions = nn.ModuleDict({s.name: Positions(s, config.width) for s in streams})
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = make_norm(config)
        self.heads = nn.ModuleDict(
            {
                s.name: nn.Linear(config.width, s.vocabulary, bias=False)
                for s in streams
                if config.text_head or s is not self.layout.text
            }
        )
        self._initialise()

    def forward(self, text_BT: Tensor, scene_BT: Tensor, image_BT: Tensor) -> Streams:
        """Logits of every predicted token, B T V per stream; text has none for its first token, and
        V = 0 without a text head.
        """
        states = self._predicting_states(text_BT, scene_BT, image_BT)
        logits = (
            self.head(x_BTD, stream) if stream.name in self.heads else x_BTD[..., :0]
            for stream, x_BTD in zip(self.layout.streams, states, strict=True)
        )
        return Streams(*logits)

    def losses(self, text_BT: Tensor, scene_BT: Tensor, image_BT: Tensor) -> StreamLosses:
        """Mean cross-entropy and accuracy per stream, of long B T tokens local to their streams.

        Text padding is not counted; without a text head the loss of text is 0. The logits of one
        piece of one stream exist at a time, also in the backward pass.
        """
        states = self._predicting_states(text_BT, scene_BT, image_BT)
        tokens = (text_BT[:, 1:], scene_BT, image_BT)
        results = [
            self._stream_loss(stream, x_BTD, targets_BT)
            for stream, x_BTD, targets_BT in zip(self.layout.streams, states, tokens, strict=True)
        ]
        return StreamLosses(*(r[0] for r in results), *(r[1] for r in results))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def new_cache(self, rows: int, *, length: int | None = None) -> Cache:
        """An empty cache for `rows` sequences of `length` tokens (default: whole ones)."""
        return make_cache(self.config, rows, length=length, dtype=self.dtype, device=self.device)

    def extend(self, tokens_BT: Tensor, *, cache: Cache, start: int) -> Tensor:
        """Reads tokens at positions `start` …, fills the cache, returns the last state, B D.

        `head` turns the state into the logits of the token at position `start + T`.
        """
        x_BTD = self._trunk(self.embed(tokens_BT, start=start), cache=cache, start=start)
        return x_BTD[:, -1]

    def head(self, x_BD: Tensor, stream: Stream) -> Tensor:
        """Logits of one stream, … V."""
        return self.heads[stream.name](x_BD)

    def embed(self, tokens_BT: Tensor, *, start: int) -> Tensor:
        """Embeds a piece of the sequence that begins at position `start`, B T D."""
        stop = start + tokens_BT.shape[1]
        pieces = []
        for stream in self.layout.streams:
            first, last = max(start, stream.start), min(stop, stream.stop)
            if first < last:
                positions = self.positions[stream.name]
                x_BTD = self.embeddings[stream.name](tokens_BT[:, first - start : last - start])
                pieces.append(x_BTD + positions(first - stream.start, last - stream.start))
        return torch.cat(pieces, dim=1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors."""
        save_network(self, folder)

    def without_text_head(self) -> GPT:
        """The same network, its tensors shared, that predicts no captions."""
        other = build_unfilled(GPT, dataclasses.replace(self.config, text_head=False))
        state = self.state_dict()
        other.load_state_dict({name: state[name] for name in other.state_dict()}, assign=True)
        return other.train(self.training).requires_grad_(False)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> GPT:
        """Reads what `save_pretrained` wrote; StorageError names what does not fit."""
        return load_network(cls, GPTConfig, folder)

    def _trunk(self, x_BTD: Tensor, *, cache: Cache | None = None, start: int = 0) -> Tensor:
        x_BTD = self.dropout(x_BTD)
        rotation = None
        if self.config.rotary:
            stop = start + x_BTD.shape[1]
            rotation = Rotation(*(t[start:stop] for t in rotation_table(self.config, x_BTD)))
        for layer, block in enumerate(self.blocks):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, rotation=rotation, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rotation=rotation, cache=cache, layer=layer, start=start)
        return self.norm(x_BTD)

    def _predicting_states(
        self, text_BT: Tensor, scene_BT: Tensor, image_BT: Tensor
    ) -> Iterator[Tensor]:
        """Per stream, the states B T D that predict its tokens; one position to their left."""
        tokens_BT = torch.cat([text_BT, scene_BT, image_BT], dim=1)
        assert tokens_BT.shape[1] == self.layout.length, tokens_BT.shape
        x_BTD = self._trunk(self.embed(tokens_BT[:, :-1], start=0))
        for stream in self.layout.streams:
            yield x_BTD[:, max(stream.start - 1, 0) : stream.stop - 1]

    def _stream_loss(
        self, stream: Stream, x_BTD: Tensor, targets_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = rearrange(x_BTD, "b t d -> (b t) d")
        if stream.name not in self.heads:
            return x.new_zeros(()), x.new_zeros(())
        targets = rearrange(targets_BT, "b t -> (b t)")
        counted = targets != PAD if stream is self.layout.text else torch.ones_like(targets) > 0
        targets = targets.masked_fill(~counted, -100)
        rows = max(1, LOGITS_AT_ONCE // stream.vocabulary)
        losses, hits = zip(
            *(
                checkpoint(
                    _cross_entropy,
                    self.heads[stream.name],
                    x[i : i + rows],
                    targets[i : i + rows],
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                for i in range(0, max(len(x), 1), rows)
            ),
            strict=True,
        )
        count = counted.sum().clamp(min=1)
        return sum(losses) / count, sum(hits) / count

    @torch.no_grad()
    def _initialise(self) -> None:
        """Normal with 0.02 at width 1024; the last layer of each branch shrinks with the depth."""
        deviation = 0.02 * math.sqrt(1024 / self.config.width)
        for name, parameter in self.named_parameters():
            if name.endswith(("to_out.weight", "contract.weight")):
                nn.init.normal_(parameter, std=deviation / math.sqrt(2 * self.config.layers))
            elif "norm" not in name:
                nn.init.normal_(parameter, std=deviation)


def make_cache(
    config: GPTConfig,
    rows: int,
    *,
    length: int | None,
    dtype: torch.dtype,
    device: torch.device,
    grows: bool | None = None,
) -> Cache:
    """An empty cache for `rows` sequences of `length` tokens (None: whole ones)."""
    return Cache(
        layers=config.layers,
        rows=rows,
        heads=config.heads,
        length=length or config.layout.length,
        head_width=config.width // config.heads,
        dtype=dtype,
        device=device,
        grows=grows,
    )


def hidden_width(config: GPTConfig) -> int:
    """Numbers between the two halves of a feedforward."""
    hidden = 4 * config.width
    return math.ceil(hidden * 2 / 3 / 64) * 64 if config.gated else hidden


def make_norm(config: GPTConfig) -> nn.Module:
    return nn.RMSNorm(config.width) if config.gated else nn.LayerNorm(config.width)


def cell_table(rows_HD: Tensor, columns_WD: Tensor) -> Tensor:
    """The sum of row and column for every cell of a grid, line by line, T D."""
    return rearrange(rows_HD[:, None] + columns_WD[None], "h w d -> (h w) d")


def rotation_table(config: GPTConfig, like: Tensor) -> Rotation:
    """The angles of all positions: half of each head turns with the row of a token, half with its
    column.

    Places are centres of cells, counted in cells of the finest grid, so that scene and image tokens
    of the same place are not rotated against each other, also where their grids differ; text lies
    on the diagonal before the first row.
    """
    finest = max(stream.grid or 0 for stream in config.layout.streams)
    places = []
    for stream in config.layout.streams:
        index = torch.arange(stream.length, device=like.device)
        if stream.grid is None:
            places.append(torch.stack([index - stream.length, index - stream.length], -1).float())
        else:
            cells = torch.stack([index // stream.grid, index % stream.grid], -1).float()
            places.append((cells + 0.5) * (finest / stream.grid))
    exact = torch.float64 if has_float64(like.device) else torch.float32
    place_T2 = torch.cat(places).to(exact)
    quarter = config.width // config.heads // 4
    steps = torch.arange(quarter, dtype=torch.float32, device=like.device)  # whatever the default
    frequencies = 100.0 ** -(steps / quarter).to(exact)
    angles = rearrange(place_T2[:, :, None] * frequencies, "t two f -> t (two f)")
    return Rotation(angles.cos().to(like.dtype), angles.sin().to(like.dtype))


def rotate(x_BNTH: Tensor, by: Rotation) -> Tensor:
    """Turns pairs (i, i + H/2) of each head by their angle (arXiv 2104.09864)."""
    a, b = x_BNTH.chunk(2, dim=-1)
    return torch.cat([a * by.cosine - b * by.sine, a * by.sine + b * by.cosine], dim=-1)


def _cross_entropy(head: nn.Module, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the losses, number of right predictions; targets of -100 count for neither."""
    logits = head(x).float()  # the argmax of bfloat16 is slow, too
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return loss, (logits.detach().argmax(-1) == targets).sum()
