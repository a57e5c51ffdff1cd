"""Keys and values of what the GPT has read, preallocated for a whole sequence.

In: queries, keys and values of new tokens. Out: what they attend to.
Axes: L layers, R rows, N heads, T tokens, H width of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mas.heap import large_zeros

PIECE = 64  # tokens that room is made for at a time


class Cache:
    """Keys and values of each layer, R N T H in one number format; queries may have another.

    Keys and values of a layer share one tensor, `pairs`, 2 R N T H. On a CPU a cache grows: only
    the start of each half is in use, as R N T H with T a whole number of `PIECE` tokens, so that
    what is read lies in one piece of memory. Pages behind it were never touched and cost nothing,
    and growing frees no block that is too small for what comes next. A cache that does not grow
    keeps its shape from the beginning; on a CPU it lies in large pages.
    """

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
        grows: bool | None = None,
    ) -> None:
        self.length = length
        on_cpu = device is None or device.type == "cpu"
        self.grows = on_cpu if grows is None else grows
        shape = (2, rows, heads, length, head_width)
        if on_cpu and not self.grows:
            self.pairs = list(large_zeros((layers, *shape), dtype))
        else:
            allocate = torch.empty if self.grows else torch.zeros
            self.pairs = [allocate(shape, dtype=dtype, device=device) for _ in range(layers)]
        used = 0 if self.grows else length
        self.keys = [pair[0, :, :, :used] for pair in self.pairs]
        self.values = [pair[1, :, :, :used] for pair in self.pairs]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, start: int) -> Tensor:
        """Stores keys and values of the tokens from `start` on, and attends; all R N T H."""
        stop = start + q.shape[2]
        self._make_room(layer, stop)
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, start:stop] = k
        values[:, :, start:stop] = v
        if start == 0:
            return causal_attention(q, k, v)
        if self.grows and stop - start == 1:
            return attend_one(q, keys, values, length=stop)
        keys, values = keys[:, :, :stop].to(q.dtype), values[:, :, :stop].to(q.dtype)
        return causal_attention(q, keys, values)

    def copy_rows(self, source: Cache, rows: list[int], *, length: int) -> None:
        """Fills the first `length` positions: row i becomes row `rows[i]` of `source`."""
        for layer in range(len(self.keys)):
            self._make_room(layer, length)
            self.keys[layer][:, :, :length] = source.keys[layer][rows, :, :length]
            self.values[layer][:, :, :length] = source.values[layer][rows, :, :length]

    def _make_room(self, layer: int, tokens: int) -> None:
        if tokens <= self.keys[layer].shape[2]:
            return
        room = min(-(-tokens // PIECE) * PIECE, self.length)
        for half, tensors in enumerate((self.keys, self.values)):
            before = tensors[layer]
            rows, heads, used, head_width = before.shape
            shape = (rows, heads, room, head_width)
            after = self.pairs[layer][half].flatten()[: math.prod(shape)].view(shape)
            # Both begin at the same place, so no row moves onto one before it.
            for row in reversed(range(rows)):
                after[row, :, :used] = before[row].clone()
                after[row, :, used:] = 0
            tensors[layer] = after


def attend_one(q: Tensor, keys: Tensor, values: Tensor, *, length: int) -> Tensor:
    """One query a row against the first `length` keys, R N 1 H; faster than fused attention.

    In bfloat16 the whole room is read, unused places with weight 0: oneDNN prepares its bfloat16
    products for every length anew, which takes longer than they do, and copies what is cut out.
    """
    if keys.dtype != torch.bfloat16:
        keys, values = keys[:, :, :length], values[:, :, :length]
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    query = (q * q.shape[-1] ** -0.5).to(keys.dtype).reshape(-1, q.shape[-1], 1)
    scores = query.transpose(1, 2).bmm(keys.transpose(1, 2))
    scores[:, :, length:] = -torch.inf
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
