"""How far apart two sets of pictures are, and how different the pictures of one caption.

In: features of pictures (of `mas/reader.py`, unless a caller has better). Out: Fréchet and kernel
distance, as torchmetrics computes them. Distances on other features than Inception's are not
comparable with published figures; reports name the features.
Axes: N pictures, D features, H W pixels.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

# The kernel distance is the mean of so many estimates from so many pictures of each side (as
# published); of one from all pictures where these are fewer.
SUBSETS, SUBSET = 100, 1000


class _AsTheyAre(nn.Module):
    """Features in, the same features out: torchmetrics wants a network."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, features_ND: Tensor) -> Tensor:
        return features_ND


def frechet_distance(features_ND: Tensor, true_features_ND: Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to the features (Heusel et al. 2017); FID."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_AsTheyAre(features_ND.shape[1]))
    metric.set_dtype(torch.float64)
    metric.update(features_ND.double(), real=False)
    metric.update(true_features_ND.double(), real=True)
    return max(0.0, float(metric.compute()))  # of equal sets a rounding error may be left


def kernel_distance(features_ND: Tensor, true_features_ND: Tensor, *, seed: int = 0) -> float:
    """Squared maximum mean discrepancy, cubic kernel (Bińkowski et al. 2018), unbiased; KID.

    Args:
        features_ND: of one set, two pictures or more.
        true_features_ND: of the other.
        seed: of the subsets, where there are more pictures than one takes.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    counts = len(features_ND), len(true_features_ND)
    subset = min(SUBSET, *counts)
    subsets = 1 if counts == (subset, subset) else SUBSETS
    network = _AsTheyAre(features_ND.shape[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        metric = KernelInceptionDistance(feature=network, subsets=subsets, subset_size=subset)
    metric.update(features_ND.double(), real=False)
    metric.update(true_features_ND.double(), real=True)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # subsets are drawn at random
        return float(metric.compute()[0])


def spread(features_ND: Tensor) -> float:
    """Mean Euclidean distance between two of the pictures; NaN for fewer than two."""
    distances = torch.pdist(features_ND.float())
    return float(distances.mean()) if len(distances) else float("nan")


def disagreement(labels: Sequence[np.ndarray]) -> float:
    """Mean share of the pixels in which two of the scene maps differ; NaN for fewer than two."""
    pairs = [float((a != b).mean()) for a, b in itertools.combinations(labels, 2)]
    return sum(pairs) / len(pairs) if pairs else float("nan")
