"""Kernels of a one-token step on a GPU, in Triton: what surrounds a matrix is done with it.

In: the state of few rows and the matrices of a block. Out: the next state. A product of a few rows
with a matrix takes as long as reading the matrix, so norm, activation and residual cost nothing
where they happen in the same kernel; attention reads the keys up to the position and no more; a
token is drawn in one kernel instead of twenty. Everything is computed in float32, probabilities in
float64, and rounded once, where it is stored.
Axes: B pictures, R rows, K and N numbers in and out of a matrix, D width, T tokens, H width of a
head, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mas.sequence import FREE

TILE = 8192  # weights that one program reads
PROGRAMS = 256  # at least so many a matrix: twice the multiprocessors of a large GPU
KEYS = 128  # read at a time by one program


@triton.jit
def _normed_row(
    x_ptr, weight_ptr, bias_ptr, k, inside, epsilon, WIDTH: tl.constexpr, NORM: tl.constexpr
):
    x = tl.load(x_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if NORM == "layer":
        x = tl.where(inside, x - tl.sum(x, axis=0) / WIDTH, 0.0)
    if NORM != "none":
        x = x * (1 / tl.sqrt(tl.sum(x * x, axis=0) / WIDTH + epsilon))
        x = x * tl.load(weight_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if NORM == "layer":
        x = x + tl.load(bias_ptr + k, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _linear_kernel(
    x_ptr,
    matrix_ptr,
    y_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    N,
    epsilon,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    both = (n < N)[:, None] & inside[None, :]
    places = n.to(tl.int64)[:, None] * K + k[None, :]
    matrix = tl.load(matrix_ptr + places, mask=both, other=0.0)
    if ACTIVATION == "swiglu":
        second = (n.to(tl.int64) + N)[:, None] * K + k[None, :]
        values = tl.load(matrix_ptr + second, mask=both, other=0.0)
    for row in tl.static_range(ROWS):
        x = _normed_row(x_ptr + row * K, weight_ptr, bias_ptr, k, inside, epsilon, K, NORM)
        y = tl.sum(matrix.to(tl.float32) * x[None, :], axis=1)
        if ACTIVATION == "gelu":
            y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
        if ACTIVATION == "swiglu":
            y = y / (1 + tl.exp(-y)) * tl.sum(values.to(tl.float32) * x[None, :], axis=1)
        if RESIDUAL:
            y += tl.load(residual_ptr + row * N + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def linear(
    x_RK: Tensor,
    matrix_NK: Tensor,
    *,
    norm: tuple[Tensor, ...] = (),
    epsilon: float = 0.0,
    activation: str = "none",
    residual_RN: Tensor | None = None,
) -> Tensor:
    """`residual + activation(norm(x) @ matrix.T)` for a few rows, R N.

    Args:
        x_RK: contiguous.
        matrix_NK: contiguous; 2N rows for swiglu, gates before values.
        norm: the weight of an RMSNorm, weight and bias of a LayerNorm, or nothing.
        epsilon: of the norm.
        activation: none, gelu or swiglu.
        residual_RN: added, where given.
    """
    rows, width = x_RK.shape
    wide = len(matrix_NK) // (2 if activation == "swiglu" else 1)
    y_RN = x_RK.new_empty(rows, wide)
    block_k = triton.next_power_of_2(width)
    per_program = triton.next_power_of_2(max(1, wide // PROGRAMS))
    block_n = max(1, min(per_program, TILE // block_k))
    _linear_kernel[(triton.cdiv(wide, block_n),)](
        x_RK,
        matrix_NK,
        y_RN,
        x_RK if residual_RN is None else residual_RN,
        norm[0] if norm else x_RK,
        norm[-1] if norm else x_RK,
        wide,
        epsilon,
        ROWS=rows,
        K=width,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        NORM=("none", "rms", "layer")[len(norm)],
        ACTIVATION=activation,
        RESIDUAL=residual_RN is not None,
        num_warps=4,
    )
    return y_RN


@triton.jit
def _half_heads(x_ptr, weight_ptr, i, epsilon, HALF: tl.constexpr, NORMED: tl.constexpr):
    a = tl.load(x_ptr + i).to(tl.float32)
    b = tl.load(x_ptr + HALF + i).to(tl.float32)
    if NORMED:
        squares = tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)
        scale = 1 / tl.sqrt(squares / (2 * HALF) + epsilon)
        a = a * scale * tl.load(weight_ptr + i).to(tl.float32)
        b = b * scale * tl.load(weight_ptr + HALF + i).to(tl.float32)
    return a, b


@triton.jit
def _attend_kernel(
    qkv_ptr,
    pair_ptr,
    y_ptr,
    position_ptr,
    cosine_ptr,
    sine_ptr,
    q_norm_ptr,
    k_norm_ptr,
    values_offset,
    length,
    scale,
    epsilon,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    NORMED: tl.constexpr,
    ROTARY: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(position_ptr).to(tl.int32)
    i = tl.arange(0, HALF)
    width = 2 * HALF
    q_ptr = qkv_ptr + row * 3 * HEADS * width + head * width
    qa, qb = _half_heads(q_ptr, q_norm_ptr, i, epsilon, HALF, NORMED)
    ka, kb = _half_heads(q_ptr + HEADS * width, k_norm_ptr, i, epsilon, HALF, NORMED)
    va, vb = _half_heads(q_ptr + 2 * HEADS * width, q_norm_ptr, i, epsilon, HALF, False)
    if ROTARY:
        cosine = tl.load(cosine_ptr + position * HALF + i).to(tl.float32)
        sine = tl.load(sine_ptr + position * HALF + i).to(tl.float32)
        qa, qb = qa * cosine - qb * sine, qa * sine + qb * cosine
        ka, kb = ka * cosine - kb * sine, ka * sine + kb * cosine
    keys_ptr = pair_ptr + (row * HEADS + head) * length * width
    values_ptr = keys_ptr + values_offset
    stored = pair_ptr.dtype.element_ty
    tl.store(keys_ptr + position * width + i, ka.to(stored))
    tl.store(keys_ptr + position * width + HALF + i, kb.to(stored))
    tl.store(values_ptr + position * width + i, va.to(stored))
    tl.store(values_ptr + position * width + HALF + i, vb.to(stored))
    # The softmax of the token itself, then of those before it, block by block.
    qa, qb = qa * scale, qb * scale
    highest = tl.sum(qa * ka, axis=0) + tl.sum(qb * kb, axis=0)
    total = 1.0
    ya, yb = va, vb
    for first in range(0, position, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        before = (t < position)[:, None]
        places = t[:, None] * width + i[None, :]
        keys_a = tl.load(keys_ptr + places, mask=before, other=0.0)
        keys_b = tl.load(keys_ptr + HALF + places, mask=before, other=0.0)
        values_a = tl.load(values_ptr + places, mask=before, other=0.0)
        values_b = tl.load(values_ptr + HALF + places, mask=before, other=0.0)
        products = keys_a.to(tl.float32) * qa[None, :] + keys_b.to(tl.float32) * qb[None, :]
        scores = tl.where(t < position, tl.sum(products, axis=1), float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=0))
        weights, shrink = tl.exp(scores - higher), tl.exp(highest - higher)
        total = total * shrink + tl.sum(weights, axis=0)
        ya = ya * shrink + tl.sum(weights[:, None] * values_a.to(tl.float32), axis=0)
        yb = yb * shrink + tl.sum(weights[:, None] * values_b.to(tl.float32), axis=0)
        highest = higher
    y_ptr += row * HEADS * width + head * width
    tl.store(y_ptr + i, (ya / total).to(y_ptr.dtype.element_ty))
    tl.store(y_ptr + HALF + i, (yb / total).to(y_ptr.dtype.element_ty))


def attend(
    qkv_RD: Tensor,
    pair: Tensor,
    position_1: Tensor,
    *,
    qk_norm: tuple[Tensor, ...],
    epsilon: float,
    rotation: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Norms and rotates a token, stores its keys and values, lets it see all up to it; R D.

    Args:
        qkv_RD: what the matrix gave, queries, keys and values side by side, R 3D; contiguous.
        pair: keys and values of all positions, 2 R N T H; H a power of 2.
        position_1: where those of the token go.
        qk_norm: weights of the RMSNorms of queries and keys, or nothing.
        epsilon: of these.
        rotation: cosine and sine for all positions, T H/2, or None.
    """
    _, rows, heads, length, head_width = pair.shape
    y_RD = qkv_RD.new_empty(rows, heads * head_width)
    cosine, sine = rotation or (qkv_RD, qkv_RD)
    q_norm, k_norm = qk_norm or (qkv_RD, qkv_RD)
    _attend_kernel[(rows, heads)](
        qkv_RD,
        pair,
        y_RD,
        position_1,
        cosine,
        sine,
        q_norm,
        k_norm,
        pair.stride(0),
        length,
        head_width**-0.5,
        epsilon,
        HEADS=heads,
        HALF=head_width // 2,
        BLOCK_T=KEYS,
        NORMED=bool(qk_norm),
        ROTARY=rotation is not None,
        num_warps=4 if rows * heads > PROGRAMS else 8,
    )
    return y_RD


@triton.jit
def _choose_kernel(
    logits_ptr,
    uniforms_ptr,
    tokens_ptr,
    position_ptr,
    chosen_ptr,
    length,
    vocabulary,
    guidance,
    temperature,
    COUNT: tl.constexpr,
    BRANCHES: tl.constexpr,
    TAKEN: tl.constexpr,
    GREEDY: tl.constexpr,
    FREE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    picture = tl.program_id(0)
    position = tl.load(position_ptr)
    v = tl.arange(0, BLOCK)
    inside = v < vocabulary
    first_ptr = logits_ptr + picture.to(tl.int64) * vocabulary
    second_ptr = first_ptr + tl.full((), COUNT, tl.int64) * vocabulary
    if TAKEN == "second":
        first_ptr = second_ptr
    x = tl.load(first_ptr + v, mask=inside, other=0.0).to(tl.float32)
    if TAKEN == "both":
        away = tl.load(second_ptr + v, mask=inside, other=0.0).to(tl.float32)
        x = away + guidance * (x - away)
    x = tl.where(inside, x, float("-inf"))
    if GREEDY:
        drawn = tl.argmax(x, axis=0, tie_break_left=True)
    else:
        exact = x.to(tl.float64)
        shares = tl.exp((exact - tl.max(exact, axis=0)) / temperature)
        cumulative = tl.cumsum(shares, axis=0)
        place = picture.to(tl.int64) * length + position
        target = tl.load(uniforms_ptr + place) * tl.sum(shares, axis=0)
        drawn = tl.sum((cumulative <= target).to(tl.int32), axis=0)
    here_ptr = tokens_ptr + picture.to(tl.int64) * length + position
    given = tl.load(here_ptr)
    token = tl.where(given == FREE, tl.minimum(drawn, vocabulary - 1).to(tl.int64), given)
    tl.store(here_ptr, token)
    for branch in tl.static_range(BRANCHES):
        tl.store(chosen_ptr + branch * COUNT + picture, token)


def choose(
    logits_RV: Tensor,
    uniforms_BT: Tensor,
    tokens_BT: Tensor,
    position_1: Tensor,
    *,
    taken: str,
    guidance: float,
    temperature: float,
) -> Tensor:
    """Draws a token a picture where none is given, writes it to `tokens_BT`; one a row, long R.

    The same as `mas.generate.Choice.tokens` without top-k and top-p.

    Args:
        logits_RV: contiguous; the rows of the first branch of all pictures, then the second's.
        uniforms_BT: float64, of which that at the position is used.
        tokens_BT: long; `FREE` (-1) where none is given.
        position_1: long.
        taken: which branch is drawn from: first, second, or both, guided.
        guidance: of both.
        temperature: 0 takes the likeliest; rounded to float32.
    """
    rows, vocabulary = logits_RV.shape
    count, length = tokens_BT.shape
    chosen_R = tokens_BT.new_empty(rows)
    _choose_kernel[(count,)](
        logits_RV,
        uniforms_BT,
        tokens_BT,
        position_1,
        chosen_R,
        length,
        vocabulary,
        guidance,
        temperature or 1.0,
        COUNT=count,
        BRANCHES=rows // count,
        TAKEN=taken,
        GREEDY=temperature == 0,
        FREE=FREE,
        BLOCK=triton.next_power_of_2(vocabulary),
        num_warps=16,
    )
    return chosen_R
