"""Tuning of VQ-SEG's decisions after training: one offset a class, for the mean IoU.

In: a trained VQ-SEG and labelled scenes that it may see. Out: the same network, its classifier's
biases moved. Cross-entropy wants probabilities, mean IoU wants every class drawn as large as it is;
and a training that draws rare classes more often (`balance`) or weighs them (`face_weight`) leaves
them too likely. Tokens, codes and the edge channel stay as they are.
Axes: B batch, H W pixels, P pixels in any order, K classes and void, N candidates of a pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mas.scene import CLASSES, VOID
from mas.vqseg import VQSEG

CANDIDATES = 4  # most probable classes of a pixel, among which an offset may choose
STEPS = (1.0, 0.5, 0.25)  # of the search, in logits
SURE = 5.0  # a class this many logits ahead, and this high itself, is never turned
KINDS = CLASSES + 1  # void is one more thing to be right about
MAPS_AT_ONCE = 8


class Tuned(NamedTuple):
    """What the search found."""

    offsets_K: Tensor  # added to the biases of the classes
    before: float  # mean IoU on the given scenes, void counted as a class where it occurs
    after: float


@torch.no_grad()
def tune_decisions(network: VQSEG, labels_BHW: Tensor, edges_BHW: Tensor) -> Tuned:
    """Moves the classifier's biases to where the mean IoU on the given scenes is highest.

    One class after the other is tried a step up and a step down, with smaller steps each round.

    Args:
        network: trained; is changed in place.
        labels_BHW: uint8; scenes of the training set, not those that quality is reported on. A few
            hundred, so that rare classes occur often enough.
        edges_BHW: bool.
    """
    network.eval()
    search = _Search(network, labels_BHW, edges_BHW)
    before = best = search.score(search.confusion_KK)
    occurring = search.confusion_KK[:CLASSES].sum(1).nonzero()[:, 0].tolist()
    for step in STEPS:
        for index in occurring:
            for change in (step, -step):
                while (found := search.attempt(index, change, best)) > best:
                    best = found
    classifier = network.decoder.head if network.head is None else network.head.classifier
    assert classifier.bias is not None
    classifier.bias[:CLASSES] += search.offsets_K.to(classifier.bias)
    return Tuned(search.offsets_K, before, best)


class _Search:
    """The candidates of all pixels that an offset could turn, and what is decided of them now."""

    def __init__(self, network: VQSEG, labels_BHW: Tensor, edges_BHW: Tensor) -> None:
        self.offsets_K = torch.zeros(CLASSES)
        self.confusion_KK = torch.zeros(KINDS, KINDS, dtype=torch.long)  # truth, guess
        kept: list[tuple[Tensor, ...]] = []
        scenes = (x.split(MAPS_AT_ONCE) for x in (labels_BHW, edges_BHW))
        for labels, edges in zip(*scenes, strict=True):
            logits_BCHW = network.decode_logits(network.encode(labels, edges))
            logits_PN, classes_PN = (
                x.permute(0, 2, 3, 1).flatten(0, 2)
                for x in logits_BCHW[:, :CLASSES].topk(CANDIDATES, dim=1)
            )
            all_P = logits_BCHW[:, :CLASSES].sigmoid().sum(1).flatten()
            rest_P = all_P - logits_PN.sigmoid().sum(1)
            truth_P = labels.flatten().long().masked_fill(labels.flatten() == VOID, CLASSES)
            lead_P = logits_PN[:, 0] - logits_PN[:, 1].clamp(min=0)
            sure_P = lead_P >= SURE
            self.confusion_KK += _count(truth_P[sure_P], classes_PN[sure_P, 0])
            kept.append(tuple(x[~sure_P] for x in (logits_PN, classes_PN, rest_P, truth_P)))
        parts = map(torch.cat, zip(*kept, strict=True))
        self.logits_PN, self.classes_PN, self.rest_P, self.truth_P = parts
        self.guess_P = self._decide(slice(None), self.offsets_K)
        self.confusion_KK += _count(self.truth_P, self.guess_P)

    def attempt(self, index: int, change: float, best: float) -> float:
        """Mean IoU with one offset changed; where it exceeds `best` the change is kept."""
        tried_K = self.offsets_K.clone()
        tried_K[index] += change
        touched_P = (self.classes_PN == index).any(1).nonzero()[:, 0]
        guess_P, truth_P = self._decide(touched_P, tried_K), self.truth_P[touched_P]
        moved_KK = _count(truth_P, guess_P) - _count(truth_P, self.guess_P[touched_P])
        found = self.score(self.confusion_KK + moved_KK)
        if found > best:
            self.offsets_K = tried_K
            self.confusion_KK += moved_KK
            self.guess_P[touched_P] = guess_P
        return found

    def score(self, confusion_KK: Tensor) -> float:
        """Mean IoU over what occurs."""
        right_K = confusion_KK.diagonal()
        union_K = confusion_KK.sum(0) + confusion_KK.sum(1) - right_K
        return (right_K / union_K)[confusion_KK.sum(1) > 0].mean().item()

    def _decide(self, pixels_P: Tensor | slice, offsets_K: Tensor) -> Tensor:
        """As `vqseg_loss.decide`, the classes that are no candidates unmoved; void is `CLASSES`."""
        classes_PN = self.classes_PN[pixels_P]
        logits_PN = self.logits_PN[pixels_P] + offsets_K[classes_PN]
        guess_P = classes_PN.gather(1, logits_PN.argmax(1, keepdim=True))[:, 0]
        any_P = logits_PN.sigmoid().sum(1) + self.rest_P[pixels_P]
        return guess_P.masked_fill(any_P < 0.5, CLASSES)


def _count(truth_P: Tensor, guess_P: Tensor) -> Tensor:
    pairs_P = truth_P * KINDS + guess_P
    return torch.bincount(pairs_P, minlength=KINDS**2).view(KINDS, KINDS)
