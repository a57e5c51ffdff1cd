"""What `mas bench train` measures itself against: a transformer built as minDALL-E's is.

In: text, scene and image tokens. Out: a loss. Built from the description of the published model
(kakaobrain/minDALL-E, stage 2): two streams, text and one vocabulary of everything else; learned
positions; pre-LayerNorm blocks with separate layers for queries, keys and values, attention spelt
out as product, mask, softmax, product; GELU with four times the width; logits in float32. Only for
measuring speed; nothing is trained with it.
Axes: B batch, T tokens, D width, N heads, H width of a head.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mas.gpt import GPTConfig


class SpeltOutAttention(nn.Module):
    """Causal self-attention that holds all T x T weights."""

    mask: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(config.width, config.width) for _ in range(4)
        )
        self.weight_dropout, self.dropout = (nn.Dropout(config.dropout) for _ in range(2))
        length = config.layout.length
        mask = torch.ones(length, length).tril()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (
            rearrange(layer(x_BTD), "b t (n h) -> b n t h", n=self.heads)
            for layer in (self.query, self.key, self.value)
        )
        tokens = x_BTD.shape[1]
        weights_BNTT = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights_BNTT = weights_BNTT.masked_fill(self.mask[:tokens, :tokens] == 0, float("-inf"))
        weights_BNTT = self.weight_dropout(weights_BNTT.softmax(-1))
        return self.dropout(self.out(rearrange(weights_BNTT @ v, "b n t h -> b t (n h)")))


class ReferenceBlock(nn.Module):
    """Attention and feedforward behind LayerNorms."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = SpeltOutAttention(config)
        self.feedforward_norm = nn.LayerNorm(config.width)
        self.feedforward = nn.Sequential(
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width),
            nn.Dropout(config.dropout),
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.feedforward(self.feedforward_norm(x_BTD))


class ReferenceGPT(nn.Module):
    """The published architecture in the sizes of a `GPTConfig`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, layout = config.width, config.layout
        self.layout = layout
        self.vocabularies = (
            layout.text.vocabulary,
            layout.scene.vocabulary + layout.image.vocabulary,
        )
        self.lengths = (layout.text.length, layout.scene.length + layout.image.length)
        self.embeddings = nn.ModuleList([nn.Embedding(count, width) for count in self.vocabularies])
        self.positions = nn.ModuleList([nn.Embedding(count, width) for count in self.lengths])
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.Sequential(*(ReferenceBlock(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(
            [nn.Linear(width, count, bias=False) for count in self.vocabularies]
        )
        self.apply(_initialise)

    def loss(self, text_BT: Tensor, scene_BT: Tensor, image_BT: Tensor) -> Tensor:
        """Sum of the two streams' mean cross-entropies."""
        streams = (text_BT, torch.cat([scene_BT, image_BT + self.layout.scene.vocabulary], dim=1))
        x_BTD = torch.cat(
            [
                embed(tokens_BT) + place(torch.arange(tokens_BT.shape[1], device=text_BT.device))
                for embed, place, tokens_BT in zip(
                    self.embeddings, self.positions, streams, strict=True
                )
            ],
            dim=1,
        )
        x_BTD = self.norm(self.blocks(self.dropout(x_BTD)[:, :-1]))
        first = self.lengths[0] - 1
        states = (x_BTD[:, :first], x_BTD[:, first:])
        targets = (text_BT[:, 1:], streams[1])
        losses = [
            F.cross_entropy(rearrange(head(x).float(), "b t v -> (b t) v"), wanted.flatten())
            for head, x, wanted in zip(self.heads, states, targets, strict=True)
        ]
        return losses[0] + losses[1]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
