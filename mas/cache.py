"""Keys and values of what the GPT has read, preallocated for a whole sequence.

In: queries, keys and values of new tokens. Out: what they attend to.
Axes: L layers, R rows, N heads, T tokens, H width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class Cache:
    """Keys and values L R N T H in the number format of the network."""

    def __init__(
        self, *, layers: int, rows: int, heads: int, length: int, head_width: int, like: Tensor
    ) -> None:
        self.keys = like.new_empty(layers, rows, heads, length, head_width)
        self.values = torch.empty_like(self.keys)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, start: int) -> Tensor:
        """Stores keys and values of the tokens from `start` on, and attends; all R N T H."""
        stop = start + q.shape[2]
        self.keys[layer, :, :, start:stop] = k
        self.values[layer, :, :, start:stop] = v
        keys, values = self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]
        return causal_attention(q, keys, values)

    def copy_rows(self, source: Cache, rows: list[int], *, length: int) -> None:
        """Fills the first `length` positions: row i becomes row `rows[i]` of `source`."""
        self.keys[:, :, :, :length] = source.keys[:, rows, :, :length]
        self.values[:, :, :, :length] = source.values[:, rows, :, :length]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0) -> Tensor:
    """The last queries of a sequence against all of its keys; none sees a later token."""
    queries, tokens = q.shape[2], k.shape[2]
    # A single query sees everything; several after a prefix see a triangle shifted by it.
    mask = None
    if 1 < queries < tokens:
        ones = torch.ones(queries, tokens, dtype=torch.bool, device=q.device)
        mask = ones.tril(tokens - queries)
    is_causal = 1 < queries == tokens
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout
    )
