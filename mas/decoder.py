"""The GPT laid out for one-token steps on a CPU: a list of functions instead of modules.

In: the config and tensors of a `mas.gpt.GPT`, read one by one. Out: what the loop in
mas/generate.py needs. It computes what the GPT computes; what differs is the number format of the
matrices (mas/quantize.py), and what a step would compute anew each time (positions, rotations) is
a table. Tensors are read only when they are converted, so that float32 weights never exist at once;
the text head, which sampling does not use, is never read.
Axes: R rows, T tokens, M rows x tokens, D width, N heads, H width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from mas.cache import Cache
from mas.gpt import GPTConfig, Rotation, cell_table, make_cache, rotate, rotation_table
from mas.heap import trim_heap
from mas.quantize import Linear
from mas.sequence import Stream

EPSILON = 1e-5  # of LayerNorm


@dataclass(frozen=True)
class Norm:
    """LayerNorm, or RMSNorm where there is no bias."""

    weight_D: Tensor
    bias_D: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Over the last axis."""
        if self.bias_D is None:
            return F.rms_norm(x, self.weight_D.shape, self.weight_D)
        return torch.layer_norm(x, self.weight_D.shape, self.weight_D, self.bias_D, EPSILON)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One block: norms, matrices, and the norms of queries and keys where there are any."""

    attention_norm: Norm
    to_qkv: Linear
    to_out: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    feedforward_norm: Norm
    expand: Linear
    contract: Linear


class CPUDecoder:
    """Computes like `GPT.extend` and `GPT.head`, float32 between the matrices."""

    device = torch.device("cpu")
    mode = "torch"  # what computes a step
    dtype: torch.dtype  # of the cache

    def __init__(
        self,
        config: GPTConfig,
        tensors: Mapping[str, Tensor],
        *,
        make_linear: Callable[[Tensor], Linear],
        stored: torch.dtype,
    ) -> None:
        """Converts all tensors.

        Args:
            config: of the GPT.
            tensors: its state by name; each is asked for once and not kept.
            make_linear: turns a matrix V K into the function that multiplies by it.
            stored: number format of embeddings and cache.
        """
        self.config, self.layout = config, config.layout
        # The largest first: what their conversion takes beside them is least missed now.
        self.embeddings = {
            stream.name: tensors[f"embeddings.{stream.name}.weight"].to(stored)
            for stream in self.layout.streams
        }
        self.heads = {
            stream.name: make_linear(tensors[f"heads.{stream.name}.weight"])
            for stream in self.layout.streams[1:]
        }
        trim_heap()
        self.layers = [
            self._read_layer(tensors, f"blocks.{i}.", make_linear) for i in range(config.layers)
        ]
        self.norm = _read_norm(tensors, "norm")
        self.positions_TD = torch.cat(
            [read_positions(tensors, stream) for stream in self.layout.streams]
        )
        self.dtype = stored
        self.rotation = rotation_table(config, self.positions_TD) if config.rotary else None

    def new_cache(self, rows: int, *, length: int | None = None) -> Cache:
        """An empty cache for `rows` sequences of `length` tokens (default: whole ones)."""
        return make_cache(self.config, rows, length=length, dtype=self.dtype, device=self.device)

    def extend(self, tokens_RT: Tensor, *, cache: Cache, start: int) -> Tensor:
        """Reads tokens at positions `start` …, fills the cache, returns the last state, R D."""
        rows, tokens = tokens_RT.shape
        rotation = None
        if self.rotation is not None:
            rotation = Rotation(*(table[start : start + tokens] for table in self.rotation))
        x_MD = rearrange(self._embed(tokens_RT, start), "r t d -> (r t) d")
        for i, layer in enumerate(self.layers):
            qkv_MD = layer.to_qkv(layer.attention_norm(x_MD))
            # Not einops: it takes longer than all else of a step that is no arithmetic.
            q, k, v = qkv_MD.view(rows, tokens, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = layer.q_norm(q), layer.k_norm(k)
            if rotation is not None:
                q, k = rotate(q, rotation), rotate(k, rotation)
            attended_RNTH = cache.attend(i, q, k, v, start=start)
            attended_MD = attended_RNTH.transpose(1, 2).reshape(x_MD.shape)
            x_MD = x_MD + layer.to_out(attended_MD)
            hidden = layer.expand(layer.feedforward_norm(x_MD))
            x_MD = x_MD + layer.contract(self._activate(hidden))
        return self.norm(x_MD[tokens - 1 :: tokens])

    def head(self, x_RD: Tensor, stream: Stream) -> Tensor:
        """Logits of the scene or the image stream, R V."""
        return self.heads[stream.name](x_RD)

    def _activate(self, hidden: Tensor) -> Tensor:
        if not self.config.gated:
            return F.gelu(hidden)
        gate, value = hidden.chunk(2, dim=-1)
        return F.silu(gate) * value

    def _embed(self, tokens_RT: Tensor, start: int) -> Tensor:
        stop = start + tokens_RT.shape[1]
        pieces = [
            F.embedding(
                tokens_RT[:, max(start, stream.start) - start : stream.stop - start],
                self.embeddings[stream.name],
            )
            for stream in self.layout.streams
            if start < stream.stop and stream.start < stop
        ]
        x_RTD = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        return x_RTD.to(self.positions_TD.dtype) + self.positions_TD[start:stop]

    def _read_layer(
        self, tensors: Mapping[str, Tensor], name: str, make_linear: Callable[[Tensor], Linear]
    ) -> Layer:
        attention, feedforward = name + "attention", name + "feedforward"
        normed = self.config.qk_norm
        layer = Layer(
            attention_norm=_read_norm(tensors, attention + "_norm"),
            to_qkv=make_linear(tensors[attention + ".to_qkv.weight"]),
            to_out=make_linear(tensors[attention + ".to_out.weight"]),
            q_norm=_read_norm(tensors, attention + ".q_norm") if normed else None,
            k_norm=_read_norm(tensors, attention + ".k_norm") if normed else None,
            feedforward_norm=_read_norm(tensors, feedforward + "_norm"),
            expand=make_linear(tensors[feedforward + ".expand.weight"]),
            contract=make_linear(tensors[feedforward + ".contract.weight"]),
        )
        trim_heap()  # float32 matrices that were converted
        return layer


def read_positions(tensors: Mapping[str, Tensor], stream: Stream) -> Tensor:
    """The vectors of all positions of a stream, T D, of the tensors of a GPT."""
    name = f"positions.{stream.name}."
    if stream.grid is None:
        return tensors[name + "sequence"]
    return cell_table(tensors[name + "rows"], tensors[name + "columns"])


def _read_norm(tensors: Mapping[str, Tensor], name: str) -> Norm:
    return Norm(tensors[name + ".weight"], tensors.get(name + ".bias"))
