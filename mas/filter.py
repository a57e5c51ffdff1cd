"""From logits to one token: temperature, top-k, top-p, guidance and the draw itself.

In: logits of the conditional and the unconditional stream, one uniform number a picture. Out: the
next token of each picture.
Axes: B pictures, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

MOST_GUIDANCE = 1000  # far beyond any use; without a limit the logits would overflow
FIRST_SORT = 128  # tokens of a row sorted first by top-p
FILTERS = ("top_k", "top_p")  # settings that may be off


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens of one stream are drawn."""

    guidance: float = 3.0  # 0-1000; 1 = the caption as it is, 0 = no caption, 3-5 = obey it more
    temperature: float = 1.0  # ≥ 0; 0 = always the likeliest token
    top_k: float | None = None  # keep the k likeliest; below 1: this share of the vocabulary
    top_p: float | None = None  # keep the likeliest tokens that together have this probability

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, Real) and (value is not None or name not in FILTERS):
                raise ValueError(f"{name} is {value!r}, use a number")
            if value is not None:  # 3 and 3.0, and NumPy's, shall be written down alike
                object.__setattr__(self, name, _plain(value, whole=name == "top_k"))
        if not 0 <= self.guidance <= MOST_GUIDANCE:
            raise ValueError(f"guidance is {self.guidance}, use a number from 0 to {MOST_GUIDANCE}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}, use a number of 0 or more")
        k = self.top_k
        if k is not None and not (0 < k < 1 or (k >= 1 and math.isfinite(k) and k == int(k))):
            raise ValueError(
                f"top_k is {k}, use a whole number of 1 or more, or a share between 0 and 1"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, use more than 0 and at most 1")


def _plain(number: Real, *, whole: bool) -> float:
    """A float; if `whole` an int of what is one and at least 1. Infinite what is too large."""
    try:
        plain = float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf  # type: ignore[operator]
    return int(plain) if whole and plain >= 1 and plain.is_integer() else plain


@dataclass(frozen=True, kw_only=True)
class StreamSampling:
    """How tokens of both streams are drawn: a scene may want less guidance than a picture."""

    scene: Sampling = Sampling()
    image: Sampling = Sampling()


def for_both_streams(sampling: Sampling | StreamSampling | None) -> StreamSampling:
    """One sampling alone is for both streams; None is the default.

    Raises:
        ValueError: something else.
    """
    if sampling is None:
        return StreamSampling()
    if isinstance(sampling, Sampling):
        return StreamSampling(scene=sampling, image=sampling)
    if not isinstance(sampling, StreamSampling):
        kind = type(sampling).__name__
        raise ValueError(f"sampling is of type {kind}, use a Sampling or StreamSampling")
    return sampling


def by_stream(
    base: StreamSampling,
    common: Mapping[str, float | None],
    *,
    scene: Mapping[str, float],
    image: Mapping[str, float],
) -> StreamSampling:
    """Settings of the scene and the image stream: the more special, the stronger.

    Args:
        base: what holds where nothing else is said.
        common: for both streams, by all names of the settings; None: as in `base`.
        scene: for the scene only, by the same names; a dash counts as an underscore.
        image: for the image only.

    Raises:
        ValueError: an unknown name, or a setting out of its range.
    """
    said = {name: value for name, value in common.items() if value is not None}
    return StreamSampling(
        scene=replace(base.scene, **(said | _own("scene_sampling", scene, known=common))),
        image=replace(base.image, **(said | _own("image_sampling", image, known=common))),
    )


def _own(source: str, settings: Mapping[str, float], *, known: Iterable[str]) -> dict[str, float]:
    """Settings of one stream by their names."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"{source} is {settings!r}, use a mapping such as {{'top_p': 0.9}}")
    own = {str(name).replace("-", "_"): value for name, value in settings.items()}
    unknown = sorted(set(own) - set(known))
    if unknown:
        raise ValueError(f"{source} knows {', '.join(known)}, not {unknown[0]}")
    return own


def guide(conditional_BV: Tensor, unconditional_BV: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance, `uncond + g (cond - uncond)` (Make-A-Scene, section 3.4)."""
    return unconditional_BV + guidance * (conditional_BV - unconditional_BV)


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities after temperature, top-k and top-p, in this order; float64 B V.

    Each row sums to 1, keeps at least one token and depends on its own logits only. Of equal
    logits at the limit some stay and some go, so that top-k keeps exactly k.
    """
    logits_BV = logits_BV.double()
    if sampling.temperature == 0:
        best_B1 = logits_BV.argmax(-1, keepdim=True)
        return torch.zeros_like(logits_BV).scatter_(-1, best_B1, 1.0)
    # Against the largest logit, so that a tiny temperature cannot divide into infinity.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature
    result_BV = logits_BV.softmax(-1)
    kept = count_kept(sampling.top_k, logits_BV.shape[-1])
    if kept < logits_BV.shape[-1]:
        result_BV = keep_k(result_BV, kept)
    if sampling.top_p is not None:
        together = len(result_BV) if result_BV.device.type == "cpu" else 1
        parts = (keep_p(part, sampling.top_p, kept) for part in result_BV.split(together))
        result_BV = torch.cat([*parts])
    return result_BV


def keep_k(probabilities_BV: Tensor, count: int) -> Tensor:
    """Sets all but the `count` largest to zero and makes rows sum to 1 again."""
    # Only k of one is sorted, where a tie must fall as in argmax; sorting thousands takes long.
    if count == 1:
        values_BK, indices_BK = probabilities_BV.max(-1, keepdim=True)
    else:
        values_BK, indices_BK = probabilities_BV.topk(count, dim=-1, sorted=False)
    values_BK = values_BK / values_BK.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities_BV).scatter_(-1, indices_BK, values_BK)


def keep_p(
    probabilities_BV: Tensor, top_p: float, largest: int, *, size: int | None = None
) -> Tensor:
    """Keeps the likeliest tokens of each row until they have `top_p` together; at least one.

    Args:
        probabilities_BV: rows that sum to 1.
        top_p: 0 < p ≤ 1.
        largest: how many tokens of a row have a probability above 0 at most.
        size: how many are sorted first; None: as many as is fast.
    """
    # Mostly few tokens suffice, so a short list is sorted first, and longer ones of the rows where
    # it did not.
    if size is None:
        size = FIRST_SORT if probabilities_BV.device.type == "cpu" else largest
    sorted_BK, indices_BK = probabilities_BV.topk(min(size, largest), dim=-1)
    cumulative_BK = sorted_BK.cumsum(-1)
    # The first token always stays: nothing comes before it.
    kept_BK = sorted_BK.masked_fill(cumulative_BK - sorted_BK >= top_p, 0.0)
    kept_BK = kept_BK / kept_BK.sum(-1, keepdim=True)
    result_BV = torch.zeros_like(probabilities_BV).scatter_(-1, indices_BK, kept_BK)
    if size < largest and (short_B := cumulative_BK[:, -1] < top_p).any():
        result_BV[short_B] = keep_p(probabilities_BV[short_B], top_p, largest, size=8 * size)
    return result_BV


def count_kept(top_k: float | None, vocabulary: int) -> int:
    """How many tokens top-k leaves of a vocabulary."""
    if top_k is None:
        return vocabulary
    return max(1, round(top_k * vocabulary)) if top_k < 1 else min(int(top_k), vocabulary)


def draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Draws one token a row by inverting the cumulative distribution, long B.

    Args:
        probabilities_BV: float64.
        uniform_B: float64, at most 1 - 2^-32: so the product with the total stays below it, and
            the token found always has a probability above 0.
    """
    cumulative_BV = probabilities_BV.cumsum(-1)
    targets_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, targets_B1, right=True)[:, 0]


def draw_guided(
    logits_BV: Tensor, others_BV: Tensor | None, uniform_B: Tensor, sampling: Sampling
) -> Tensor:
    """Tokens of logits, guided away from others where there are any, long B.

    Args:
        logits_BV: float32.
        others_BV: likewise, of the other branch.
        uniform_B: as for `draw`, on the device to draw on.
        sampling: how.
    """
    if others_BV is not None:
        logits_BV = guide(logits_BV, others_BV, sampling.guidance)
    return draw(probabilities(logits_BV.to(uniform_B.device), sampling), uniform_B)


def uniforms(seed: int, count: int) -> Tensor:
    """`count` uniform numbers in [0, 1 - 2^-32], float64, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**32, (count,), generator=generator).double() / 2**32
