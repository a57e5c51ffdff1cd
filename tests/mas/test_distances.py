"""Distances between sets of features are those of the published formulas."""

import numpy as np
import pytest
import torch

from mas.distances import disagreement, frechet_distance, kernel_distance, spread


def test_distances_of_known_sets():
    generator = torch.Generator().manual_seed(0)
    one_ND = torch.randn(200, 4, generator=generator)
    assert frechet_distance(one_ND, one_ND) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one_ND, one_ND + 2) == pytest.approx(16)  # 4 dimensions moved by 2
    assert kernel_distance(one_ND, one_ND + 2) > 10 * abs(kernel_distance(one_ND, one_ND.flip(0)))
    assert kernel_distance(one_ND, one_ND + 1) == kernel_distance(one_ND, one_ND + 1)
    assert spread(torch.tensor([[0.0, 0.0], [3.0, 4.0]])) == 5
    zeros, half = np.zeros((2, 2), np.uint8), np.array([[0, 1], [0, 1]], np.uint8)
    assert disagreement([zeros, half, zeros]) == pytest.approx(1 / 3)
    assert np.isnan(disagreement([zeros]))


def features(count, dimensions, *, seed, shift=0.0):
    """Positive and of uneven scale, as Inception's are."""
    generator = torch.Generator().manual_seed(seed)
    scale_D = torch.linspace(0.05, 1, dimensions)
    return (torch.randn(count, dimensions, generator=generator) + shift).abs() * scale_D


def fid_by_hand(one_ND, other_ND):
    """The trace of the root of two covariances' product by singular values, without a root."""
    one_ND, other_ND = one_ND.double().numpy(), other_ND.double().numpy()
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (one_ND, other_ND)]
    shared = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    means = np.square(one_ND.mean(0) - other_ND.mean(0)).sum()
    return means + sum(np.square(x).sum() for x in centred) - 2 * shared


def kid_by_hand(one_ND, other_ND):
    """No picture is compared with itself."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def inside(x):
        values = kernel(x, x)
        return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))

    one_ND, other_ND = one_ND.double().numpy(), other_ND.double().numpy()
    return inside(one_ND) + inside(other_ND) - 2 * kernel(one_ND, other_ND).mean()


@pytest.mark.parametrize(
    ("count", "others", "dimensions"), [(300, 300, 16), (150, 150, 40), (12, 12, 60), (2, 2, 8)]
)
def test_distances_are_those_of_the_published_formulas(count, others, dimensions):
    one_ND = features(count, dimensions, seed=0)
    other_ND = features(others, dimensions, seed=1, shift=0.3)
    fid, kid = fid_by_hand(one_ND, other_ND), kid_by_hand(one_ND, other_ND)
    assert frechet_distance(one_ND, other_ND) == pytest.approx(fid, rel=1e-5)
    assert kernel_distance(one_ND, other_ND) == pytest.approx(kid, rel=1e-6)


def test_more_pictures_than_a_subset_are_estimated_by_many_subsets(monkeypatch):
    monkeypatch.setattr("mas.distances.SUBSET", 60)
    one_ND, other_ND = features(240, 16, seed=0), features(200, 16, seed=1, shift=1)
    estimate = kernel_distance(one_ND, other_ND, seed=3)
    assert estimate == pytest.approx(kid_by_hand(one_ND, other_ND), rel=0.05)
    assert estimate == kernel_distance(one_ND, other_ND, seed=3)
    assert estimate != kernel_distance(one_ND, other_ND, seed=4)


def test_no_frechet_distance_is_below_zero():
    for seed in range(4):
        few_ND = features(10, 80, seed=seed)
        assert 0 <= frechet_distance(few_ND, few_ND) < 1e-3
