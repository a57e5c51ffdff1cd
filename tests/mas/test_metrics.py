"""Metrics agree with their definitions on maps and pictures worked out by hand."""

import math

import pytest
import torch

from mas.metrics import CodeMetrics, PictureMetrics, SceneMetrics, psnr, ssim
from mas.scene import FACE_IDS, VOID

NO_EDGES = torch.zeros(1, 2, 2, dtype=torch.bool)


def measure(guess, truth, guess_edges=NO_EDGES, true_edges=NO_EDGES):
    metrics = SceneMetrics()
    metrics.update(
        torch.tensor(guess, dtype=torch.uint8),
        guess_edges,
        true_labels_BHW=torch.tensor(truth, dtype=torch.uint8),
        true_edges_BHW=true_edges,
    )
    return metrics


def test_iou_by_hand():
    metrics = measure([[[3, 3], [4, 4]]], [[[3, 3], [3, 4]]])
    assert metrics.class_iou() == pytest.approx({"motorcycle": 2 / 3, "airplane": 1 / 2})
    assert metrics.compute()["miou"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics.compute()["pixel_accuracy"] == pytest.approx(3 / 4)


def test_true_void_counts_for_nothing_and_guessed_void_is_a_miss():
    assert measure([[[3, 9], [3, 3]]], [[[3, VOID], [3, 3]]]).compute()["miou"] == 1
    assert measure([[[3, VOID], [3, 3]]], [[[3, 3], [3, 3]]]).compute()["miou"] == 0.75


def test_batches_add_up_to_the_whole():
    torch.manual_seed(0)
    guess, truth = torch.randint(0, 5, (2, 6, 8, 8), dtype=torch.uint8)
    edges, true_edges = torch.rand(2, 6, 8, 8) < 0.2
    whole, parts = SceneMetrics(), SceneMetrics()
    whole.update(guess, edges, true_labels_BHW=truth, true_edges_BHW=true_edges)
    for i in range(0, 6, 2):
        parts.update(
            guess[i : i + 2],
            edges[i : i + 2],
            true_labels_BHW=truth[i : i + 2],
            true_edges_BHW=true_edges[i : i + 2],
        )
    a, b = whole.compute(), parts.compute()
    assert a["miou"] == b["miou"] and a["edge_f1"] == b["edge_f1"]


def test_face_iou_looks_at_face_parts_only():
    eyes = FACE_IDS[1]
    result = measure([[[eyes, 3], [3, 3]]], [[[eyes, eyes], [3, 4]]]).compute()
    assert result["face_iou"] == pytest.approx(1 / 2)
    assert math.isnan(measure([[[3, 3], [3, 3]]], [[[3, 3], [3, 3]]]).compute()["face_iou"])


@pytest.mark.parametrize(("shift", "f1"), [(0, 1.0), (1, 1.0), (2, 0.0)])
def test_edges_may_be_off_by_one_pixel(shift, f1):
    truth = torch.zeros(1, 8, 8, dtype=torch.bool)
    truth[:, :, 3] = True
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    metrics = SceneMetrics()
    metrics.update(labels, truth.roll(shift, 2), true_labels_BHW=labels, true_edges_BHW=truth)
    assert metrics.compute()["edge_f1"] == f1


def test_edge_f1_is_the_harmonic_mean_and_undefined_without_any_edge():
    truth = torch.zeros(1, 8, 8, dtype=torch.bool)
    truth[0, 0, 0] = truth[0, 7, 7] = True
    guess = torch.zeros_like(truth)
    guess[0, 0, 0] = True
    labels = [[[0] * 8] * 8]
    found_half = measure(labels, labels, guess, truth).compute()["edge_f1"]
    assert found_half == pytest.approx(2 * 1 * 0.5 / 1.5)
    none = torch.zeros_like(truth)
    assert math.isnan(measure(labels, labels, none, none).compute()["edge_f1"])


def test_code_usage_and_perplexity():
    codes = CodeMetrics(8)
    codes.update(torch.tensor([[0, 1], [2, 3]]))
    assert codes.compute() == pytest.approx({"usage": 0.5, "perplexity": 4.0})
    codes.update(torch.tensor([[0, 0]]))
    assert codes.compute()["perplexity"] < 4


def test_psnr_by_hand_and_at_its_ceiling():
    black = torch.zeros(1, 3, 16, 16)
    assert float(psnr(black, black + 0.1)) == pytest.approx(20, abs=1e-4)
    assert float(psnr(black, black)) == pytest.approx(100)


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise():
    torch.manual_seed(0)
    truth = torch.rand(2, 3, 24, 20)
    noise = torch.randn_like(truth)
    steps = [ssim((truth + level * noise).clamp(0, 1), truth) for level in (0, 0.1, 0.3)]
    assert steps[0] == pytest.approx(torch.ones(2).numpy())
    assert (steps[0] > steps[1]).all() and (steps[1] > steps[2]).all()


def test_small_pictures_are_refused_by_name():
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_picture_metrics_average_over_pictures():
    truth = torch.full((2, 3, 16, 16), 0.5)
    image = truth.clone()
    image[1] += 0.1
    metrics = PictureMetrics()
    metrics.update(image, true_image_BCHW=truth)
    assert metrics.compute()["psnr"] == pytest.approx((100 + 20) / 2, abs=1e-3)


def random_scenes(seed=0):
    """Guess and truth of six maps of eight classes, with void in both."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 8, (6, 24, 24), dtype=torch.uint8, generator=generator)
    guess = torch.randint(0, 8, truth.shape, dtype=torch.uint8, generator=generator)
    kept = torch.rand(truth.shape, generator=generator) < 0.7
    guess = torch.where(kept, truth, guess)
    truth[:, :3] = guess[:, -3:] = VOID
    return guess, truth


def test_iou_agrees_with_torchmetrics():
    from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

    guess, truth = random_scenes()
    edges = torch.zeros_like(truth, dtype=torch.bool)
    metrics = SceneMetrics()
    metrics.update(guess, edges, true_labels_BHW=truth, true_edges_BHW=edges)
    index = MulticlassJaccardIndex(8, average="none", ignore_index=VOID)
    settled = (guess != VOID).logical_or(truth == VOID)  # torchmetrics knows no guessed void
    index.update(guess.where(settled, 0)[settled], truth[settled])
    expected = index.compute().double()
    missed = (guess == VOID) & (truth != VOID)  # ours: in the union, never in the intersection
    matrix = MulticlassConfusionMatrix(8, ignore_index=VOID)
    matrix.update(guess.where(settled, 0)[settled], truth[settled])
    right = matrix.compute().diagonal().double()
    union = right / expected + torch.bincount(truth[missed].long(), minlength=8)
    found = torch.tensor(list(metrics.class_iou().values()), dtype=torch.double)
    assert missed.sum() > 100
    torch.testing.assert_close(found, right / union, rtol=1e-6, atol=0)


def test_edge_f1_agrees_with_distances_to_the_nearest_edge():
    from scipy.ndimage import distance_transform_cdt

    generator = torch.Generator().manual_seed(0)
    guess, truth = torch.rand(2, 4, 20, 20, generator=generator) < 0.06
    labels = torch.zeros_like(truth, dtype=torch.uint8)
    metrics = SceneMetrics()
    metrics.update(labels, guess, true_labels_BHW=labels, true_edges_BHW=truth)

    def near(edges, others):  # of `edges`, those with one of `others` within one pixel
        distances = [distance_transform_cdt(~other, "chessboard") for other in others.numpy()]
        return sum(int((d[e] <= 1).sum()) for d, e in zip(distances, edges.numpy(), strict=True))

    precision = near(guess, truth) / int(guess.sum())
    recall = near(truth, guess) / int(truth.sum())
    assert 0.2 < precision < 0.8 and precision != recall
    expected = 2 * precision * recall / (precision + recall)
    assert metrics.compute()["edge_f1"] == pytest.approx(expected)


def test_perplexity_agrees_with_scipy():
    from scipy.stats import entropy

    tokens = torch.randint(0, 40, (50, 16), generator=torch.Generator().manual_seed(0)) ** 2 // 40
    codes = CodeMetrics(64)
    for part in tokens.split(10):
        codes.update(part)
    expected = math.exp(entropy(tokens.flatten().bincount().numpy()))
    assert codes.compute()["perplexity"] == pytest.approx(expected)


def test_psnr_and_ssim_agree_with_scikit_image():
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(3, 3, 40, 32, generator=generator)
    image = (truth + 0.1 * torch.randn(truth.shape, generator=generator)).clamp(0, 1)
    metrics = PictureMetrics()
    metrics.update(image[:2], true_image_BCHW=truth[:2])
    metrics.update(image[2:], true_image_BCHW=truth[2:])
    pairs = list(zip(truth.double().numpy(), image.double().numpy(), strict=True))
    settings = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=0)
    psnrs = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs]
    ssims = [structural_similarity(a, b, data_range=1, **settings) for a, b in pairs]
    assert metrics.compute()["psnr"] == pytest.approx(sum(psnrs) / 3, abs=1e-4)
    assert metrics.compute()["ssim"] == pytest.approx(sum(ssims) / 3, abs=1e-5)


def test_totals_of_two_halves_merge_into_the_whole():
    guess, truth = random_scenes()
    edges = truth > 4
    whole, first, second = SceneMetrics(), SceneMetrics(), SceneMetrics()
    for metrics, part in ((whole, slice(None)), (first, slice(4)), (second, slice(4, None))):
        metrics.update(
            guess[part], edges[part], true_labels_BHW=truth[part], true_edges_BHW=edges[part]
        )
    for mine, theirs in zip(first.totals, second.totals, strict=True):
        mine += theirs
    assert first.compute() == pytest.approx(whole.compute(), nan_ok=True, rel=0)
    halves = [PictureMetrics(), PictureMetrics(), PictureMetrics()]
    image = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for metrics, part in zip(halves, (slice(None), slice(1), slice(1, None)), strict=True):
        metrics.update(image[part].roll(1, 3), true_image_BCHW=image[part])
    halves[1].totals[0].add_(halves[2].totals[0])
    assert halves[1].compute() == pytest.approx(halves[0].compute())
