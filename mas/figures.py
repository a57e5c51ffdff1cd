"""The figures of an evaluation: each compares what was made, or is real, with what was asked.

In: cases and what was generated for them. Out: plain numbers. Split off mas/evaluate.py.
Axes: B pictures, C colours, H W pixels, N pictures, D features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mas.cases import Case, Cases, resize
from mas.distances import disagreement, frechet_distance, kernel_distance, spread
from mas.examiner import Examiner, Made
from mas.features import DistanceMetrics, Extractor
from mas.metrics import CodeMetrics, PictureMetrics, SceneMetrics
from mas.obedience import Obedience, Seen
from mas.rerank import Judge
from mas.scene import CLASS_NAMES, FACE_IDS, HUMAN_IDS, THINGS

GROUPS = {
    "things": range(THINGS),
    "stuff": range(THINGS, HUMAN_IDS.start),
    "human": HUMAN_IDS,
    "face": FACE_IDS,
}


def obey(cases: Cases, asked: Sequence[Case], made: Made) -> Obedience | None:
    """Judges what captions claim; None where captions come without facts."""
    if not cases.has_facts:
        return None
    judge = Obedience(cases.lights)
    for i, case in enumerate(asked):
        scene = made.scenes[i]
        assert case.facts is not None
        judge.update(
            case.facts,
            Seen(
                scene=scene,
                pixels_HWC=resize(made.pictures[i], scene.size[0]),
                place=made.places[i],
                time=made.times[i],
            ),
        )
    return judge


def share_claims(judged: Mapping[str, Obedience | None]) -> dict[str, Any]:
    """Shares of claims that hold under each name, and under `claims` what they were counted from.

    Empty where nothing was judged.
    """
    judges = {name: judge for name, judge in judged.items() if judge}
    if not judges:
        return {}
    shares = {
        name: {**judge.compute(), "captions": len(judge.captions)} for name, judge in judges.items()
    }
    return {**shares, "claims": {name: judge.count() for name, judge in judges.items()}}


def compare_scenes(sets: Mapping[str, Made]) -> dict[str, Any]:
    """Mean IoU of what the reader sees in pictures with the scenes that were asked for.

    Args:
        sets: by suffix of the figures' names; "" is the model's own, "_real" the ceiling.
    """
    figures: dict[str, Any] = {}
    for suffix, made in sets.items():
        if not made.readings:
            return {}
        metrics = SceneMetrics()
        for scene, labels in zip(made.scenes, made.readings, strict=True):
            scene = scene.resized(len(labels))
            edges_1HW = torch.from_numpy(scene.edges)[None]  # are not read, so not compared
            metrics.update(
                torch.from_numpy(labels)[None],
                edges_1HW,
                true_labels_BHW=torch.from_numpy(scene.labels)[None],
                true_edges_BHW=edges_1HW,
            )
        figures[f"miou{suffix}"] = metrics.compute()["miou"]
        figures[f"pixel_accuracy{suffix}"] = metrics.compute()["pixel_accuracy"]
        figures |= {f"{name}{suffix}": miou for name, miou in group_mious(metrics).items()}
    real = figures["miou_real"]
    return {**figures, "share_of_real": figures["miou"] / real if real else float("nan")}


def group_mious(metrics: SceneMetrics) -> dict[str, float]:
    """Mean IoU of things, stuff, human and face parts, of those groups that occur in the truth."""
    by_class = metrics.class_iou()
    figures = {}
    for group, ids in GROUPS.items():
        found = [by_class[CLASS_NAMES[i]] for i in ids if CLASS_NAMES[i] in by_class]
        if found:
            figures[f"{group}_miou"] = sum(found) / len(found)
    return figures


def measure_reader(asked: Sequence[Case], real: Made) -> dict[str, float]:
    """How often the reader is right about real pictures' hours and real scenes' places."""
    figures = {}
    for name, read in (("time", real.times), ("place", real.places)):
        truth = [getattr(case, name) for case in asked]
        right = [a == b for a, b in zip(truth, read, strict=True) if a is not None and b]
        if right:
            figures[f"{name}_accuracy"] = sum(right) / len(right)
    return figures


def compare_sets(made: Made, real: Made) -> dict[str, float]:
    """Distances of generated from real pictures on the reader's features.

    `fid_real` and `kid_real` are those of one half of the real pictures from the other: what
    chance and the number of pictures alone make; left out where a half would be one picture.
    """
    if len(made.features) < 2 or len(real.features) < 2:
        return {}
    made_ND, real_ND = torch.stack(made.features), torch.stack(real.features)
    figures = _distances(made_ND, real_ND)
    if len(real_ND) >= 4:
        halves = _distances(real_ND[::2], real_ND[1::2])
        figures |= {f"{name}_real": distance for name, distance in halves.items()}
    return figures


def _distances(made_ND: Tensor, real_ND: Tensor) -> dict[str, float]:
    return {
        "fid": frechet_distance(made_ND, real_ND),
        "kid": kernel_distance(made_ND, real_ND),
    }


def measure_distance(
    extractor: Extractor, examiner: Examiner, made: Made, real: Made
) -> dict[str, Any]:
    """Distances of generated from real pictures on the features of a network from a file."""
    metrics = DistanceMetrics(extractor)
    for pictures, is_real in ((made.pictures, False), (real.pictures, True)):
        for start in range(0, len(pictures), examiner.batch):
            image_BCHW = examiner.to_image(pictures[start : start + examiner.batch])
            metrics.update(image_BCHW, real=is_real)
    return asdict(metrics.compute(seed=examiner.seed))


def measure_clip(
    clip: Judge, examiner: Examiner, asked: Sequence[Case], pictures: Mapping[str, Made]
) -> dict[str, float]:
    """CLIP score of pictures with their captions: the mean of 100 max(cosine, 0) over the pairs.

    Hessel et al. 2021 (https://arxiv.org/abs/2104.08718) with the weight 100 of torchmetrics
    instead of the paper's 2.5. `clip_score_shuffled` is that of real pictures with the captions
    of others: what a picture reaches that has nothing to do with its caption but the world.

    Args:
        clip: gives the cosines.
        examiner: says how many pictures at a time, and has the bar.
        asked: the captions.
        pictures: by suffix of the figures' names, one picture a caption; "_real" are the real ones.
    """
    captions = [case.caption for case in asked]
    middle = len(captions) // 2
    pairs = {suffix: (captions, made.pictures) for suffix, made in pictures.items()}
    pairs["_shuffled"] = ([*captions[middle:], *captions[:middle]], pictures["_real"].pictures)
    figures = {}
    for suffix, (texts, painted) in pairs.items():
        cosines: list[float] = []
        for part in examiner.batches(asked):
            now = slice(len(cosines), len(cosines) + len(part))
            images = [Image.fromarray(picture) for picture in painted[now]]
            cosines += clip.scores(texts[now], images)
        figures[f"clip_score{suffix}"] = 100 * float(np.mean(np.maximum(cosines, 0)))
    return figures


def measure_diversity(
    examiner: Examiner, asked: Sequence[Case], guidance: float | None, seeds: int, real: Made
) -> dict[str, float]:
    """How far the pictures of one caption lie apart, beside real pictures of different captions."""
    scenes, pictures = [], []
    for case in asked:
        first = examiner.seed
        made = examiner.paint([case] * seeds, guidance, seeds=range(first, first + seeds))
        scenes.append(disagreement([scene.labels for scene in made.scenes]))
        if made.features:
            pictures.append(spread(torch.stack(made.features)))
    some = [scene.labels for scene in real.scenes[:32]]
    figures = {"scene": float(np.mean(scenes)), "scene_real": disagreement(some)}
    if pictures:
        figures["picture"] = float(np.mean(pictures))
        figures["picture_real"] = spread(torch.stack(real.features))
    return figures


def measure_tokenizers(examiner: Examiner, asked: Sequence[Case]) -> dict[str, dict[str, float]]:
    """What is left of real scenes and pictures after a round trip through their tokens."""
    vqseg, vqgan = examiner.model.vqseg, examiner.model.vqgan
    scenes, scene_codes = SceneMetrics(), CodeMetrics(vqseg.config.codes)
    pictures, image_codes = PictureMetrics(), CodeMetrics(vqgan.config.codes)
    for part in examiner.batches(asked):
        scene_maps = [case.scene(vqseg.config.size) for case in part]
        labels_BHW = torch.from_numpy(np.stack([s.labels for s in scene_maps]))
        edges_BHW = torch.from_numpy(np.stack([s.edges for s in scene_maps]))
        image_BCHW = examiner.to_image([case.pixels(vqgan.config.size) for case in part])
        device = examiner.model.device
        with torch.inference_mode():
            tokens_BT = vqseg.encode(labels_BHW.to(device), edges_BHW.to(device))
            decoded_BHW, decoded_edges_BHW = vqseg.decode(tokens_BT)
            image_tokens_BT = vqgan.encode(image_BCHW)
            decoded_BCHW = vqgan.decode(image_tokens_BT)
        scenes.update(
            decoded_BHW.cpu(),
            decoded_edges_BHW.cpu(),
            true_labels_BHW=labels_BHW,
            true_edges_BHW=edges_BHW,
        )
        scene_codes.update(tokens_BT)
        pictures.update(decoded_BCHW, true_image_BCHW=image_BCHW)
        image_codes.update(image_tokens_BT)
    return {
        "vqseg": {**scenes.compute(), **group_mious(scenes), **scene_codes.compute()},
        "vqgan": {**pictures.compute(), **image_codes.compute()},
    }


def count_codes(examiner: Examiner, made: Made) -> dict[str, dict[str, float]]:
    """How much of each codebook the generated pictures use."""
    figures = {}
    for stream, codes in (
        ("scene", examiner.model.vqseg.config.codes),
        ("image", examiner.model.vqgan.config.codes),
    ):
        metrics = CodeMetrics(codes)
        for tokens in made.tokens:
            metrics.update(getattr(tokens, stream))
        figures[stream] = metrics.compute()
    return figures


def plain(value: Any) -> Any:
    """The same figures as JSON has them: NaN is null."""
    if isinstance(value, Mapping):
        return {name: plain(content) for name, content in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(content) for content in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
