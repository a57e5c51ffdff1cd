"""The GPT laid out for one-token steps on a GPU: fixed shapes, recorded once as CUDA graphs.

In: a `mas.gpt.GPT` on its device. Out: what the loop in mas/generate.py needs, and steps that
choose a token and read it without a word from the CPU: launching the hundreds of small kernels of a
step takes longer than running them. Position and tokens are therefore tensors at fixed addresses,
and attention reads a fixed number of keys, a whole number of `BUCKET`, with those to come masked.
What lies between the matrices is computed by PyTorch, by what torch.compile makes of it, in the
kernels of mas/cuda_kernels.py, or all of it in the one of mas/step.cu. Everything but
recording and the last two also runs on a CPU.
Axes: B pictures, R rows, T tokens, D width, N heads, H width of a head, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from mas.cache import Cache
from mas.cuda_blocks import (
    RMS_EPSILON,
    attend,
    cross,
    enter,
    epsilon_of,
    leave,
    normalise,
    plain_linear,
    read_layer,
    read_norm,
)
from mas.cuda_step import Step, make_step
from mas.decoder import read_positions
from mas.errors import first_line
from mas.filter import Sampling, count_kept
from mas.generate import Choice
from mas.gpt import GPT, Rotation, make_cache, rotation_table
from mas.sequence import Stream

BUCKET = 128  # keys by which the part of the cache that is read grows
MOST_GRAPHS = 32  # kept at a time: one per bucket and way of choosing
FEW_ROWS = 4  # up to which a product with a matrix takes as long as reading it
MOST_CODES = 2**15  # that one program draws from
COLDEST = 1e-6  # temperature that it knows, as float32

# What computes a step: PyTorch's kernels; those and what torch.compile makes of the rest, in half a
# minute for every number of rows; own kernels, for head widths that are powers of 2; or, for few
# rows of a network that fits, one own kernel for all blocks.
Kernels = Literal["torch", "compiled", "triton", "persistent"]

logger = logging.getLogger(__name__)


class CUDADecoder:
    """Computes like `GPT.extend` and `GPT.head`, and offers recorded steps beside."""

    def __init__(self, gpt: GPT, *, graphs: bool = True, kernels: Kernels = "torch") -> None:
        """Takes the tensors of `gpt` as they are.

        Args:
            gpt: in evaluation mode, on the device and in the number format to compute in.
            graphs: record steps; without a CUDA device they always run kernel by kernel.
            kernels: what computes a step; where it cannot, simpler ones do.
        """
        self.gpt, self.config, self.layout = gpt, gpt.config, gpt.layout
        self.device, self.dtype = gpt.device, gpt.dtype
        self.graphs = graphs and self.device.type == "cuda"
        tensors = gpt.state_dict()
        self.layers = [
            read_layer(tensors, f"blocks.{i}.", normed=self.config.qk_norm)
            for i in range(self.config.layers)
        ]
        self.norm = read_norm(tensors, "norm")
        self.embeddings = {
            stream.name: tensors[f"embeddings.{stream.name}.weight"]
            for stream in self.layout.streams
        }
        self.heads = {
            stream.name: tensors[f"heads.{stream.name}.weight"]
            for stream in self.layout.streams
            if f"heads.{stream.name}.weight" in tensors
        }
        self.positions_TD = torch.cat([read_positions(tensors, s) for s in self.layout.streams])
        self.rotation = rotation_table(self.config, self.positions_TD)
        self.kernels = kernels
        if self.own_kernels and (self.config.width // self.config.heads).bit_count() != 1:
            self.kernels = "torch"
        self.own_steps: WeakKeyDictionary[Cache, Step | None] = WeakKeyDictionary()
        self.cross: Callable[..., tuple[Tensor, Tensor]] = cross
        if kernels == "compiled":
            self.cross = torch.compile(cross, dynamic=False, fullgraph=True)
        self.idle: CUDASteps | None = None

    def new_cache(self, rows: int, *, length: int | None = None) -> Cache:
        """An empty cache for `rows` sequences of `length` tokens (default: whole ones)."""
        return make_cache(
            self.config, rows, length=length, dtype=self.dtype, device=self.device, grows=False
        )

    def extend(self, tokens_BT: Tensor, *, cache: Cache, start: int) -> Tensor:
        """Reads tokens at positions `start` …, fills the cache, returns the last state, B D."""
        return self.gpt.extend(tokens_BT, cache=cache, start=start)

    def head(self, x_BD: Tensor, stream: Stream) -> Tensor:
        """Logits of one stream, B V."""
        return self.gpt.head(x_BD, stream)

    @property
    def own_kernels(self) -> bool:
        """Whether a step is computed in kernels of this project."""
        return self.kernels in ("triton", "persistent")

    @property
    def mode(self) -> str:
        """How steps really run: by which kernels, with or without graphs.

        Where one kernel cannot compute all blocks, it is those in Triton.
        """
        if self.kernels == "persistent" and not any(self.own_steps.values()):
            return "triton graph" if self.graphs else "triton"
        return f"{self.kernels} graph" if self.graphs else self.kernels

    @property
    def idle_bytes(self) -> int:
        """Memory that is kept for the next batch and given up when it has another size."""
        return 0 if self.idle is None else sum(pair.nbytes for pair in self.idle.cache.pairs)

    def start_steps(self, tokens_BT: Tensor, uniforms_BT: Tensor, *, rows: int) -> CUDASteps:
        """Steps of a batch, with an empty cache: those of the last batch where its size fits."""
        steps, self.idle = self.idle, None
        if steps is None or (len(steps.tokens_BT), steps.rows) != (len(tokens_BT), rows):
            steps = None  # frees its memory before as much is asked for again
            steps = CUDASteps(self, count=len(tokens_BT), rows=rows)
        steps.reset(tokens_BT, uniforms_BT)
        return steps

    def read(
        self,
        tokens_R: Tensor,
        position_1: Tensor,
        stream: Stream,
        *,
        cache: Cache,
        keys: int,
        out_RD: Tensor | None = None,
    ) -> Tensor:
        """`extend` by one token of `stream` at a position that only the device knows, R D.

        Args:
            tokens_R: one a row.
            position_1: index in the sequence; it goes on by one.
            stream: to which the position belongs.
            cache: of whole sequences; filled up to the position.
            keys: how many places of the cache attention reads, more than the position.
            out_RD: contiguous; where the state goes.
        """
        step = self._find_step(cache) if self.kernels == "persistent" else None
        if step is not None:
            embedding_VD = self.embeddings[stream.name]
            return step.read(tokens_R, position_1, embedding_VD, out_RD=out_RD)
        x_RD = F.embedding(tokens_R, self.embeddings[stream.name])
        x_RD = x_RD + self.positions_TD.index_select(0, position_1)
        if self.own_kernels:
            x_RD = self._read_fused(x_RD, position_1, cache)
        else:
            x_RD = self._read_masked(x_RD, position_1, cache, keys)
        state_RD = normalise(x_RD, self.norm)
        position_1.add_(1)
        return state_RD if out_RD is None else out_RD.copy_(state_RD)

    def _read_masked(self, x_RD: Tensor, position_1: Tensor, cache: Cache, keys: int) -> Tensor:
        """All blocks, in PyTorch's kernels, R D."""
        places_T = torch.arange(keys, device=self.device)
        mask_T = torch.zeros(keys, dtype=self.dtype, device=self.device)
        mask_T = mask_T.masked_fill(places_T > position_1, -torch.inf)
        rotation = None
        if self.config.rotary:
            rotation = Rotation(*(table.index_select(0, position_1) for table in self.rotation))
        heads = self.config.heads
        between = self.cross if self.kernels == "compiled" else cross
        qkv = enter(x_RD, self.layers[0], rotation, heads)
        for i, pair in enumerate(cache.pairs):
            attended_RD = attend(qkv, pair, position_1, mask_T)
            if i + 1 < len(self.layers):
                layers = self.layers[i], self.layers[i + 1]
                x_RD, qkv = between(x_RD, attended_RD, *layers, rotation, heads)
            else:
                x_RD = leave(x_RD, attended_RD, self.layers[i])
        return x_RD

    def _read_fused(self, x_RD: Tensor, position_1: Tensor, cache: Cache) -> Tensor:
        """All blocks, in own kernels, R D; many rows leave the matrices to PyTorch."""
        from mas import cuda_kernels  # here, because Triton is not on every machine

        linear = cuda_kernels.linear if len(x_RD) <= FEW_ROWS else plain_linear
        rotation = self.rotation if self.config.rotary else None
        for layer, pair in zip(self.layers, cache.pairs, strict=True):
            qkv_RD = linear(
                x_RD,
                layer.to_qkv,
                norm=layer.attention_norm,
                epsilon=epsilon_of(layer.attention_norm),
            )
            attended_RD = cuda_kernels.attend(
                qkv_RD,
                pair,
                position_1,
                qk_norm=layer.qk_norm,
                epsilon=RMS_EPSILON,
                rotation=rotation,
            )
            x_RD = leave(x_RD, attended_RD, layer, linear)
        return x_RD

    def _find_step(self, cache: Cache) -> Step | None:
        """What reads tokens into a cache in one kernel; None where that is not possible."""
        if cache not in self.own_steps:
            self.own_steps[cache] = make_step(
                self.config,
                self.layers,
                cache,
                norm=self.norm,
                positions_TD=self.positions_TD,
                rotation=self.rotation,
                epsilons=(epsilon_of(self.norm), RMS_EPSILON),
            )
        return self.own_steps[cache]


class CUDASteps:
    """Everything a step of one batch reads and writes, at addresses that stay, and its graphs."""

    def __init__(self, decoder: CUDADecoder, *, count: int, rows: int) -> None:
        self.decoder, self.rows = decoder, rows
        layout, device = decoder.layout, decoder.device
        self.tokens_BT = torch.zeros(count, layout.length, dtype=torch.long, device=device)
        self.uniforms_BT = torch.zeros(count, layout.length, dtype=torch.double, device=device)
        self.state_RD = torch.zeros(rows, decoder.config.width, dtype=decoder.dtype, device=device)
        self.position_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.position = 0  # what position_1 holds; -1: unknown
        self.cache = decoder.new_cache(rows)
        self.graphs: dict[tuple[Choice, int], torch.cuda.CUDAGraph] = {}
        if decoder.graphs:
            self.stream = torch.cuda.Stream(device)
            self.pool = torch.cuda.graph_pool_handle()

    def reset(self, tokens_BT: Tensor, uniforms_BT: Tensor) -> None:
        """Begins another batch of the same size."""
        self.position = -1
        self.tokens_BT.copy_(tokens_BT)
        self.uniforms_BT.copy_(uniforms_BT)
        for pair in self.cache.pairs:
            pair.zero_()

    def step(self, choice: Choice, position: int, state_RD: Tensor) -> Tensor:
        """Fills `position` of `tokens_BT`, reads it, and returns the state that predicts the next.

        Of a place where no graph fits yet the step runs kernel by kernel, which also prepares what
        must not be prepared during a recording; the next one is recorded right after it.
        """
        if state_RD is not self.state_RD:
            self.state_RD.copy_(state_RD)
        if self.position != position:
            self.position_1.fill_(position)
        self.position = position + 1
        keys = self.decoder.layout.length
        if not self.decoder.own_kernels:
            keys = min(-(-(position + 1) // BUCKET) * BUCKET, keys)
        graph = self.graphs.get((choice, keys))
        if graph is not None:
            graph.replay()
        elif self.decoder.graphs:
            self._run_and_record(choice, keys)
        else:
            self._run_safely(choice, keys)
        return self.state_RD

    def close(self) -> None:
        """Keeps memory and graphs for the next batch of this size."""
        self.decoder.idle = self

    def _run(self, choice: Choice, keys: int) -> None:
        """One step on tensors alone. Its last act is to go on to the next position.

        Run again before that, it does the same again: what is drawn stays as if it were given.
        """
        tokens_R = self._choose(choice)
        self.decoder.read(
            tokens_R,
            self.position_1,
            choice.stream,
            cache=self.cache,
            keys=keys,
            out_RD=self.state_RD,
        )

    def _choose(self, choice: Choice) -> Tensor:
        """Fills the position, and returns its tokens, one a row."""
        sampling, stream = choice.sampling, choice.stream
        own = self.decoder.own_kernels and self.state_RD.is_cuda
        if own:
            from mas import cuda_kernels  # here, because Triton is not on every machine
        if own and self.rows <= FEW_ROWS:
            logits_RV = cuda_kernels.linear(self.state_RD, self.decoder.heads[stream.name])
        else:
            logits_RV = self.decoder.head(self.state_RD, stream)
        if own and can_choose(sampling, stream.vocabulary):
            return cuda_kernels.choose(
                logits_RV,
                self.uniforms_BT,
                self.tokens_BT,
                self.position_1,
                taken=choice.taken,
                guidance=sampling.guidance,
                temperature=sampling.temperature,
            )
        given_B = self.tokens_BT.index_select(1, self.position_1)[:, 0]
        tokens_B = choice.tokens(
            logits_RV,
            uniform_B=self.uniforms_BT.index_select(1, self.position_1)[:, 0],
            given_B=given_B,
        )
        self.tokens_BT.index_copy_(1, self.position_1, tokens_B[:, None])
        return tokens_B.repeat(len(choice.branches))

    def _run_safely(self, choice: Choice, keys: int) -> None:
        """`_run`, by simpler kernels where those that are wanted do not work."""
        try:
            self._run(choice, keys)
        except Exception as error:
            failed = self.decoder.kernels
            if failed == "torch":
                raise
            instead: Kernels = "triton" if failed == "persistent" else "torch"
            logger.warning("%s kernels failed, %s is used: %s", failed, instead, first_line(error))
            self.decoder.kernels = instead
            self._run_safely(choice, keys)

    def _run_and_record(self, choice: Choice, keys: int) -> None:
        """A step on a stream of its own, and the same recorded there for the steps to come."""
        current = torch.cuda.current_stream(self.decoder.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self._run_safely(choice, keys)
        current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the GPU meanwhile.
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                self._run(choice, keys)
        except RuntimeError as error:
            torch.cuda.set_stream(current)
            logger.warning("CUDA graphs failed, steps run without: %s", first_line(error))
            self.decoder.graphs = False
            return
        if len(self.graphs) == MOST_GRAPHS:
            self.graphs.clear()
        self.graphs[choice, keys] = graph


def can_choose(sampling: Sampling, vocabulary: int) -> bool:
    """Whether the kernel that draws knows these settings."""
    all_kept = count_kept(sampling.top_k, vocabulary) == vocabulary and sampling.top_p is None
    plain = sampling.temperature == 0 or COLDEST <= sampling.temperature <= 1 / COLDEST
    return all_kept and plain and vocabulary <= MOST_CODES
