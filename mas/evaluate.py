"""`mas evaluate`: whether a model does what captions and scenes say, and how well it paints.

In: a model folder and scene shards it has not seen. Out: a report as JSON, Markdown and pictures
(docs/evaluation.md says what each figure means). Whatever reads a generated scene or picture is
also put before the real ones, and that figure stands beside the model's. What needs facts of the
park world is left out for other shards, what needs a reader where none is given.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torchmetrics  # noqa: F401 - used far below; where it is missing, nothing is painted first
from tqdm import tqdm

from mas.cases import Case, Cases, read_cases
from mas.examiner import Examiner, Made
from mas.features import Extractor
from mas.figures import (
    compare_scenes,
    compare_sets,
    count_codes,
    measure_distance,
    measure_diversity,
    measure_reader,
    measure_tokenizers,
    obey,
    plain,
)
from mas.model import MakeAScene
from mas.model_folder import SHIPPED, find_folder
from mas.obedience import CLAIMS
from mas.precision import Precision
from mas.reader import Reader
from mas.report import Row, name_guidance, write_report
from mas.request import check_candidates
from mas.storage import CONFIG_FILE

logger = logging.getLogger(__name__)

ROWS = 8  # of the sheet of samples
DIVERSE = 8  # captions that are painted with several seeds


def evaluate(
    *,
    input: str,
    output: Path,
    model: str = "park",
    unseen: str | None = None,
    reader: Path | None = None,
    extractor: Path | None = None,
    count: int = 200,
    guidance: list[float] | None = None,
    scene_candidates: int | None = None,
    sweep_count: int = 50,
    seeds: int = 4,
    seed: int = 0,
    batch: int = 16,
    device: str = "auto",
    precision: Precision = "auto",
    as_json: bool = False,
) -> None:
    """Measures a model on scene shards it was not trained on, and writes a report.

    Args:
        input: scene shards: folder, 'DIR/{00000..00009}.tar' or one tar; never of the training.
        output: report to write, NAME.json; NAME.md, NAME.samples.png and, for a sweep,
            NAME.sweep.png lie beside it.
        model: park, a model folder, or a model of the Hugging Face hub.
        unseen: more scene shards whose combinations the training never showed, reported apart.
        reader: folder of the network that reads pictures (mas train reader); by default the one
            that ships with the model.
        extractor: file of a feature extractor, such as Inception's weights, for FID and KID as they
            are published.
        count: pictures, spread evenly over the shards.
        guidance: of scene and picture, one or more; more are a sweep, whose best is used for
            everything else (default: the model's, which may differ for the two).
        scene_candidates: scenes drawn for a picture, of which the model's judge keeps one (default:
            the model's).
        sweep_count: captions each guidance of a sweep is tried on.
        seeds: pictures of one caption that diversity is measured on.
        seed: of the first picture.
        batch: pictures sampled at a time; changes no figure.
        device: auto, cpu, cuda, …
        precision: of the GPT; auto takes what is best on the device.
        as_json: print the figures as one JSON object.
    """
    for name, value, least in (
        ("count", count, 2),
        ("sweep-count", sweep_count, 2),
        ("seeds", seeds, 2),
        ("batch", batch, 1),
    ):
        if value < least:
            raise ValueError(f"--{name} is {value}, use {least} or more")
    if output.suffix != ".json":
        raise ValueError(f"--output must end in .json, got {output}")
    if guidance is not None and len(set(guidance)) != len(guidance):
        raise ValueError(f"--guidance names one twice: {guidance}")
    cases = read_cases(input, count)
    others = read_cases(unseen, count) if unseen else None
    folder = find_folder(model)
    eye = find_reader(reader, folder)
    features = Extractor(extractor) if extractor else None
    network = MakeAScene.from_pretrained(model, device=device, precision=precision)
    if scene_candidates is not None:
        check_candidates(scene_candidates, network.judge)
        network.scene_candidates = scene_candidates
    start = time.perf_counter()
    examiner = Examiner(network, eye, seed=seed, batch=batch)
    with tqdm(desc="evaluate", unit=" pictures", disable=None) as examiner.bar:
        figures, rows = examine(
            examiner,
            cases,
            others,
            guidances=guidance or [],
            sweep_count=sweep_count,
            seeds=seeds,
            extractor=features,
        )
    figures = {
        "model": {"name": model, "sha256": network.sha256, "precision": network.precision},
        "input": {"shards": input, "pictures": len(cases.cases), "unseen": unseen},
        "seed": seed,
        **figures,
        "seconds": round(time.perf_counter() - start, 1),
    }
    figures = plain(figures)
    write_report(output, figures, rows)
    print(json.dumps(figures) if as_json else f"{output}: {summary(figures)}")


def find_reader(folder: Path | None, model: Path) -> Reader | None:
    """The reader that was asked for, or the one beside a shipped model; None where there is none.

    Raises:
        StorageError: the folder holds no reader.
    """
    beside = SHIPPED / f"{model.name}-reader"
    if folder is None and model.parent == SHIPPED and (beside / CONFIG_FILE).is_file():
        folder = beside
    if folder is None:
        logger.warning(
            "no reader: what the pictures show is not measured; train one with mas train reader "
            "and give it with --reader"
        )
        return None
    return Reader.from_pretrained(folder)


def examine(
    examiner: Examiner,
    cases: Cases,
    others: Cases | None,
    *,
    guidances: Sequence[float],
    sweep_count: int,
    seeds: int,
    extractor: Extractor | None = None,
) -> tuple[dict[str, Any], list[Row]]:
    """All figures and the rows of the sample sheet.

    Args:
        examiner: model and reader.
        cases: what the training has not seen.
        others: what it has seen no combination of; None: not asked.
        guidances: to try; the best is used; none: the model's own of each stream is.
        sweep_count: captions each of several guidances is tried on.
        seeds: pictures of one caption for diversity.
        extractor: of features for published distances; None: not asked.
    """
    asked = cases.cases
    check_cases(examiner, cases, others, sweep=len(guidances) > 1)
    tried = spread_out(asked, sweep_count) if len(guidances) > 1 else []
    examiner.bar.total = (
        5 * len(asked)
        + len(guidances) * len(tried)
        + seeds * min(DIVERSE, len(asked))
        + 2 * len(others.cases if others else ())
    )
    real = examiner.look(asked)
    sweep = [try_guidance(examiner, cases, tried, g, real) for g in guidances if tried]
    guidance = choose_guidance(sweep) if sweep else next(iter(guidances), None)
    made = examiner.paint(asked, guidance)
    followed = examiner.paint(asked, guidance, follow=asked)
    middle = len(asked) // 2
    strangers = [*asked[middle:], *asked[:middle]]
    contradicted = examiner.paint(asked, guidance, follow=strangers)
    figures: dict[str, Any] = {
        "caption": obey(cases, asked, made),
        "caption_real": obey(cases, asked, real),
    }
    if others:
        painted = examiner.paint(others.cases, guidance)
        figures["caption_unseen"] = obey(others, others.cases, painted)
        figures["caption_unseen_real"] = obey(others, others.cases, examiner.look(others.cases))
    figures |= {
        "scene": compare_scenes(
            {"": followed, "_real": real, "_predicted": made, "_contradicted": contradicted}
        ),
        "reader": measure_reader(asked, real),
        "distribution": compare_sets(made, real),
        "published_distance": extractor and measure_distance(extractor, examiner, made, real),
        "diversity": measure_diversity(examiner, asked[:DIVERSE], guidance, seeds, real),
        **measure_tokenizers(examiner, asked),
        "codes": count_codes(examiner, made),
        "sweep": sweep,
    }
    sampling = examiner.sampling(guidance)
    used = asdict(sampling)
    if examiner.model.scene_candidates > 1:
        used["scene"]["candidates"] = examiner.model.scene_candidates
    if examiner.model.refiner is not None:
        used["image"]["refined"] = True
    figures = {
        # one number, null where scene and picture differ
        "guidance": sampling.scene.guidance
        if sampling.scene.guidance == sampling.image.guidance
        else None,
        "sampling": used,
        **{name: value for name, value in figures.items() if value},
    }
    return figures, show(asked, made=made, followed=followed, real=real)


def check_cases(examiner: Examiner, cases: Cases, others: Cases | None, *, sweep: bool) -> None:
    """Refuses what would show after hours only, or flatter.

    Raises:
        ValueError: there is nothing to choose a guidance by, or a scene is smaller than the
            model's.
    """
    if sweep and not cases.has_facts and examiner.reader is None:
        raise ValueError(
            "a sweep over --guidance needs shards with the park's facts, or a --reader"
        )
    for case in (*cases.cases, *(others.cases if others else ())):
        if case.side < examiner.size:
            raise ValueError(
                f"scene {case.key} has {case.side} pixels a side, the model's have "
                f"{examiner.size}: preprocess with --photo.size {examiner.size}"
            )


def spread_out(cases: Sequence[Case], count: int) -> list[Case]:
    """`count` of the cases at even distances, all of them where there are fewer."""
    count = min(count, len(cases))
    return [cases[i * len(cases) // count] for i in range(count)]


def try_guidance(
    examiner: Examiner, cases: Cases, tried: Sequence[Case], guidance: float, real: Made
) -> dict[str, Any]:
    """One entry of the sweep."""
    made = examiner.paint(tried, guidance)
    distances = compare_sets(made, real)
    return {"guidance": guidance, "caption": obey(cases, tried, made), "distribution": distances}


def choose_guidance(sweep: Sequence[Mapping[str, Any]]) -> float:
    """The guidance that obeys captions best, on the average of the kinds of claims.

    Without facts the one whose pictures lie nearest to the real ones.
    """

    def score(entry: Mapping[str, Any]) -> float:
        shares = [x for k, x in entry["caption"].items() if k in CLAIMS and not math.isnan(x)]
        if shares:
            return sum(shares) / len(shares)
        return -entry["distribution"]["fid"]

    return max(sweep, key=score)["guidance"]


def show(asked: Sequence[Case], *, made: Made, followed: Made, real: Made) -> list[Row]:
    """Rows of the sample sheet: captions alone, and captions with scenes."""
    return [
        Row(
            caption=asked[i].caption,
            predicted=made.scenes[i],
            picture=made.pictures[i],
            given=followed.scenes[i],
            painted=followed.pictures[i],
            read=followed.readings[i] if followed.readings else None,
            real=real.pictures[i],
        )
        for i in range(0, len(asked), max(1, len(asked) // ROWS))
    ][:ROWS]


def summary(figures: Mapping[str, Any]) -> str:
    """One line for the shell."""
    caption = figures.get("caption", {})
    parts = [f"{name} {caption[name]:.0%}" for name in CLAIMS if caption.get(name) is not None]
    if "scene" in figures:
        parts.append(f"scene mIoU {figures['scene']['miou']:.2f}")
    parts.append(f"VQ-SEG mIoU {figures['vqseg']['miou']:.2f}")
    return f"{', '.join(parts)} ({name_guidance(figures['sampling'])})"
