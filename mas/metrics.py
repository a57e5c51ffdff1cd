"""How good tokenizers are: scenes, pictures and codes compared with what went in.

In: predictions and truth, batch by batch. Out: plain numbers, defined once, so that everybody who
reports them means the same.
Axes: B batch, C channels, H W pixels, K classes or codebook size, T tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mas.scene import CLASS_NAMES, CLASSES, FACE_IDS, VOID

EDGE_TOLERANCE = 1  # pixels an edge may be off and still count
SSIM_WINDOW = 11  # pixels a side of the Gaussian window (Wang et al. 2004)


class SceneMetrics:
    """Agreement of predicted with true scene maps over a whole set.

    Intersections and unions are summed over all maps before they are divided, as COCO and
    PASCAL do. Pixels whose truth is void count for nothing.
    """

    def __init__(self) -> None:
        self.confusion_KK = torch.zeros(CLASSES, CLASSES + 1, dtype=torch.long)  # truth, guess
        self.edge_counts = torch.zeros(4, dtype=torch.long)  # right guesses, guesses, found, truth

    def update(
        self,
        labels_BHW: Tensor,
        edges_BHW: Tensor,
        *,
        true_labels_BHW: Tensor,
        true_edges_BHW: Tensor,
    ) -> None:
        """Adds a batch: integer labels (255 = void) and bool edges, of equal shapes."""
        known = true_labels_BHW != VOID
        truth = true_labels_BHW[known].long()
        guess = labels_BHW[known].long().clamp(max=CLASSES)  # a guessed void is a miss
        pairs = torch.bincount(truth * (CLASSES + 1) + guess, minlength=self.confusion_KK.numel())
        self.confusion_KK += pairs.view_as(self.confusion_KK).cpu()
        near_truth = _dilate(true_edges_BHW)
        near_guess = _dilate(edges_BHW)
        counts = (
            (edges_BHW & near_truth).sum(),
            edges_BHW.sum(),
            (true_edges_BHW & near_guess).sum(),
            true_edges_BHW.sum(),
        )
        self.edge_counts += torch.stack(counts).cpu()

    @property
    def totals(self) -> tuple[Tensor, ...]:
        """What is summed up; adding those of several processes in place merges their metrics."""
        return self.confusion_KK, self.edge_counts

    def class_iou(self) -> dict[str, float]:
        """Intersection over union of every class that occurs in the truth, by name."""
        right = self.confusion_KK.diagonal()
        union = self.confusion_KK.sum(1) + self.confusion_KK[:, :CLASSES].sum(0) - right
        present = self.confusion_KK.sum(1) > 0
        return {
            name: float(r / u)
            for name, r, u, p in zip(CLASS_NAMES, right, union, present, strict=True)
            if p
        }

    def compute(self) -> dict[str, float]:
        """`miou`, `face_iou`, `pixel_accuracy`, `edge_f1`, each 0–1; NaN where nothing was seen.

        `miou` is the mean over the classes that occur in the truth; `face_iou` the same over the
        five face parts.
        """
        by_class = self.class_iou()
        faces = [by_class[CLASS_NAMES[i]] for i in FACE_IDS if CLASS_NAMES[i] in by_class]
        right_guesses, guesses, found, truth = self.edge_counts.tolist()
        # Harmonic mean of precision (right guesses / guesses) and recall (found / truth).
        hits = right_guesses and found
        f1 = 2 / (guesses / right_guesses + truth / found) if hits else _ratio(0, guesses + truth)
        return {
            "miou": _ratio(sum(by_class.values()), len(by_class)),
            "face_iou": _ratio(sum(faces), len(faces)),
            "pixel_accuracy": _ratio(
                int(self.confusion_KK.diagonal().sum()), int(self.confusion_KK.sum())
            ),
            "edge_f1": f1,
        }


class CodeMetrics:
    """Which codes of a codebook are used, and how evenly."""

    def __init__(self, codes: int) -> None:
        self.counts_K = torch.zeros(codes, dtype=torch.long)

    def update(self, tokens_BT: Tensor) -> None:
        self.counts_K += torch.bincount(tokens_BT.flatten(), minlength=len(self.counts_K)).cpu()

    @property
    def totals(self) -> tuple[Tensor, ...]:
        """As of SceneMetrics."""
        return (self.counts_K,)

    def compute(self) -> dict[str, float]:
        """`usage`: share of the codes that occur; `perplexity`: exp of the entropy, 1 to K."""
        share = self.counts_K.double() / self.counts_K.sum().clamp(min=1)
        entropy = -torch.special.xlogy(share, share).sum()
        return {
            "usage": float((self.counts_K > 0).double().mean()),
            "perplexity": float(entropy.exp()),
        }


class PictureMetrics:
    """Mean PSNR and SSIM of pictures against their originals, picture by picture."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.double)  # psnr, ssim, pictures

    def update(self, image_BCHW: Tensor, *, true_image_BCHW: Tensor) -> None:
        """Adds a batch in [0, 1]; values outside are clamped as a PNG would."""
        image, truth = image_BCHW.float().clamp(0, 1), true_image_BCHW.float().clamp(0, 1)
        values_3B = torch.stack(
            [psnr(image, truth), ssim(image, truth), image.new_ones(len(image))]
        )
        self.sums += values_3B.cpu().double().sum(1)

    @property
    def totals(self) -> tuple[Tensor, ...]:
        """As of SceneMetrics."""
        return (self.sums,)

    def compute(self) -> dict[str, float]:
        """`psnr` in dB, `ssim` up to 1; NaN where nothing was seen."""
        psnr_sum, ssim_sum, pictures = self.sums.tolist()
        return {"psnr": _ratio(psnr_sum, pictures), "ssim": _ratio(ssim_sum, pictures)}


def psnr(image_BCHW: Tensor, true_image_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per picture, B, of values in [0, 1]; 100 when equal."""
    error = (image_BCHW - true_image_BCHW).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def ssim(image_BCHW: Tensor, true_image_BCHW: Tensor) -> Tensor:
    """Structural similarity per picture, B, of values in [0, 1] (Wang et al. 2004).

    torchmetrics computes it: Gaussian window of 11 pixels, sigma 1.5, averaged over channels and,
    as in the paper and in scikit-image, over the places where the window lies in the picture.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    side = min(image_BCHW.shape[-2:])
    if side < SSIM_WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {SSIM_WINDOW} pixels, got {side}")
    _, places_BCHW = structural_similarity_index_measure(
        image_BCHW, true_image_BCHW, data_range=1.0, reduction="none", return_full_image=True
    )
    border = SSIM_WINDOW // 2  # filled by reflection: left out
    return places_BCHW[..., border:-border, border:-border].mean(dim=(1, 2, 3))


def _dilate(edges_BHW: Tensor) -> Tensor:
    side = 2 * EDGE_TOLERANCE + 1
    grown = F.max_pool2d(edges_BHW[:, None].float(), side, stride=1, padding=EDGE_TOLERANCE)
    return grown[:, 0] > 0


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")
