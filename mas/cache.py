"""Keys and values of what the GPT has read, preallocated for a whole sequence.

In: queries, keys and values of new tokens. Out: what they attend to.
Axes: L layers, R rows, N heads, T tokens, H width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class Cache:
    """Keys and values L R N T H in one number format; queries may have another."""

    def __init__(
        self,
        *,
        layers: int,
        rows: int,
        heads: int,
        length: int,
        head_width: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        shape = (layers, rows, heads, length, head_width)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, start: int) -> Tensor:
        """Stores keys and values of the tokens from `start` on, and attends; all R N T H."""
        stop = start + q.shape[2]
        keys, values = self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]
        keys[:, :, start:] = k
        values[:, :, start:] = v
        if start == 0:
            return causal_attention(q, k, v)
        if stop - start == 1 and q.device.type == "cpu":
            return attend_one(q, keys, values)
        return causal_attention(q, keys.to(q.dtype), values.to(q.dtype))

    def copy_rows(self, source: Cache, rows: list[int], *, length: int) -> None:
        """Fills the first `length` positions: row i becomes row `rows[i]` of `source`."""
        self.keys[:, :, :, :length] = source.keys[:, rows, :, :length]
        self.values[:, :, :, :length] = source.values[:, rows, :, :length]


def attend_one(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query a row against all keys, R N 1 H; on CPUs faster than the fused attention."""
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    query = (q * q.shape[-1] ** -0.5).to(keys.dtype).reshape(-1, q.shape[-1], 1)
    scores = query.transpose(1, 2).bmm(keys.transpose(1, 2))
    weights = scores.softmax(-1, dtype=q.dtype).to(values.dtype)
    return weights.bmm(values).to(q.dtype).view(q.shape)


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
