"""The loss of VQ-SEG, computed from the label map itself.

In: a feature vector a pixel, the linear layer that turns it into 158 logits, labels, edges. Out:
the binary cross-entropy over all channels, in which neither the one-hot target (158 numbers a
pixel) nor the logits of all pixels ever exist at once.
Paper: Make-A-Scene (arXiv 2203.13131) section 3.2 and 3.3: face parts weigh 20.
Axes: P pixels in any order, D features, C channels (157 classes + edge).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mas.scene import CHANNELS, CLASSES, EDGE_CHANNEL, FACE_IDS, VOID

CPU_PIXELS = 2**12  # × 158 floats: 2.6 MB, which stays in a CPU's cache
GPU_PIXELS = 2**18  # × 158 floats: 166 MB; launching kernels costs more than memory


def scene_loss(
    features_PD: Tensor,
    weight_CD: Tensor,
    bias_C: Tensor,
    *,
    labels_P: Tensor,
    edges_P: Tensor,
    face_weight: float,
    pixels_at_once: int | None = None,
) -> Tensor:
    """Binary cross-entropy with logits, summed over channels, averaged over pixels.

    Equals `F.binary_cross_entropy_with_logits(features @ weight.T + bias, target, pos_weight=…,
    reduction="sum") / P` with the one-hot target of labels and edges; positive targets of face
    parts weigh `face_weight`, all others 1. A void pixel has no positive class but all its
    negatives count: "nothing is labelled here" is a statement that survives the round trip.

    Args:
        features_PD: floating; its dtype is that of the computation.
        weight_CD: 158 rows.
        bias_C: 158.
        labels_P: uint8, 0-156 or void (255).
        edges_P: bool.
        face_weight: weight of the positive targets of ids 152-156.
        pixels_at_once: how many pixels have logits at any one time; default `choose_pixels`.
    """
    with_gradient = torch.is_grad_enabled() and any(
        x.requires_grad for x in (features_PD, weight_CD, bias_C)
    )
    return _SceneLoss.apply(
        features_PD,
        weight_CD,
        bias_C,
        labels_P,
        edges_P,
        positive_weights(face_weight).to(features_PD),
        pixels_at_once or choose_pixels(features_PD.device),
        with_gradient,
    )


def choose_pixels(device: torch.device) -> int:
    """How many pixels should have logits at a time."""
    return CPU_PIXELS if device.type == "cpu" else GPU_PIXELS


def positive_weights(face_weight: float) -> Tensor:
    """Weight of a positive target by channel, C."""
    weights_C = torch.ones(CHANNELS)
    weights_C[list(FACE_IDS)] = face_weight
    return weights_C


class _SceneLoss(torch.autograd.Function):
    """Value and gradients in one pass over the pixels; backward only scales them.

    With s = softplus and σ = sigmoid of the logits x: a negative target costs s(x), with gradient
    σ(x); a positive one of weight w costs w (s(x) - x), with gradient w (σ(x) - 1). So the dense
    part is s and σ alone, and the targets are a correction at one or two channels a pixel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features_PD: Tensor,
        weight_CD: Tensor,
        bias_C: Tensor,
        labels_P: Tensor,
        edges_P: Tensor,
        weights_C: Tensor,
        pixels_at_once: int,
        with_gradient: bool,
    ) -> Tensor:
        total = features_PD.new_zeros(())
        d_features_PD = torch.empty_like(features_PD) if with_gradient else None
        d_weight_CD, d_bias_C = torch.zeros_like(weight_CD), torch.zeros_like(bias_C)
        for start in range(0, len(features_PD), pixels_at_once):
            part = slice(start, start + pixels_at_once)
            logits_PC = torch.addmm(bias_C, features_PD[part], weight_CD.T)
            void_P1 = labels_P[part, None] == VOID
            targets_P1 = labels_P[part, None].long().masked_fill_(void_P1, 0)
            w_P1, edge_P = weights_C[targets_P1], edges_P[part].to(logits_PC)
            at_target_P1 = logits_PC.gather(1, targets_P1)
            corrections_P1 = (w_P1 - 1) * F.softplus(at_target_P1) - w_P1 * at_target_P1
            total += F.softplus(logits_PC).sum() + corrections_P1.masked_fill_(void_P1, 0).sum()
            total -= edge_P @ logits_PC[:, EDGE_CHANNEL]
            if d_features_PD is None:
                continue
            d_logits_PC = logits_PC.sigmoid_()
            corrections_P1 = (w_P1 - 1) * d_logits_PC.gather(1, targets_P1) - w_P1
            d_logits_PC.scatter_add_(1, targets_P1, corrections_P1.masked_fill_(void_P1, 0))
            d_logits_PC[:, EDGE_CHANNEL] -= edge_P
            torch.mm(d_logits_PC, weight_CD, out=d_features_PD[part])
            d_weight_CD.addmm_(d_logits_PC.T, features_PD[part])
            d_bias_C += d_logits_PC.sum(0)
        count = len(features_PD)
        if d_features_PD is not None:
            ctx.save_for_backward(d_features_PD, d_weight_CD / count, d_bias_C / count)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_features_PD, d_weight_CD, d_bias_C = ctx.saved_tensors
        scale = d_loss / len(d_features_PD)
        return d_features_PD * scale, d_weight_CD * d_loss, d_bias_C * d_loss, *[None] * 5


def decide(logits_PC: Tensor) -> tuple[Tensor, Tensor]:
    """The label of each pixel, uint8 P, and whether it is an edge, bool P.

    A pixel holds at most one class, so Σ p is the probability that it holds any: below one half it
    is void, else it is the most probable class.
    """
    shares_PC = logits_PC[:, :CLASSES].sigmoid()
    void_P = shares_PC.sum(dim=1) < 0.5
    labels_P = shares_PC.argmax(dim=1).to(torch.uint8)
    return labels_P.masked_fill_(void_P, VOID), logits_PC[:, EDGE_CHANNEL] > 0
