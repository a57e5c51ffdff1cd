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
from dataclasses import asdict, dataclass
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
    measure_clip,
    measure_distance,
    measure_diversity,
    measure_reader,
    measure_tokenizers,
    obey,
    plain,
    share_claims,
)
from mas.filter import Sampling
from mas.kept_tokens import check_writable, describe_machine, keeping
from mas.model import MakeAScene
from mas.model_folder import SHIPPED, find_folder
from mas.obedience import CLAIMS, Obedience
from mas.precision import Precision
from mas.reader import Reader
from mas.report import Row, doubt_reader, name_guidance, write_report
from mas.request import check_candidates, check_memory, check_seed
from mas.rerank import Clip, Judge
from mas.storage import CONFIG_FILE

logger = logging.getLogger(__name__)

ROWS = 8  # of the sheet of samples
DIVERSE = 8  # captions that are painted with several seeds


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is asked of a model."""

    guidances: Sequence[float] = ()  # the best is used; none: the model's own of each stream
    sweep_count: int = 50  # captions each of several guidances is tried on, 2 and up
    seeds: int = 4  # pictures of one caption for diversity, 2 and up

    def __post_init__(self) -> None:
        for name, value in (("sweep-count", self.sweep_count), ("seeds", self.seeds)):
            _check_least(name, value, 2)
        if len(set(self.guidances)) != len(self.guidances):
            raise ValueError(f"--guidance names one twice: {[*self.guidances]}")
        for guidance in self.guidances:
            Sampling(guidance=guidance)  # refuses one that cannot be

    @property
    def sweeps(self) -> bool:
        """Whether there is a guidance to choose."""
        return len(self.guidances) > 1


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What was painted for the captions of some cases."""

    guidance: float | None  # of both streams; None: the model's own
    real: Made
    made: Made  # of the captions alone
    followed: Made  # of captions and their true scenes
    contradicted: Made  # of captions and the scenes of others


def evaluate(
    *,
    input: str,
    output: Path,
    model: str = "park",
    unseen: str | None = None,
    reader: Path | None = None,
    extractor: Path | None = None,
    trust_program: bool = False,
    clip: str | None = None,
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

    Stopped and begun again, it goes on: what was sampled lies in .NAME.tokens until the report is
    written. `seconds` are those of the last run then.

    Args:
        input: scene shards: folder, 'DIR/{00000..00009}.tar' or one tar; never of the training.
        output: report to write, NAME.json; NAME.md, NAME.samples.png and, for a sweep,
            NAME.sweep.png lie beside it.
        model: park, a model folder, or a model of the Hugging Face hub.
        unseen: more scene shards, with combinations that the training never showed; reported apart.
        reader: folder of the network that reads pictures (mas train reader); by default the one
            that ships with the model.
        extractor: file of a feature extractor, such as Inception's weights, for FID and KID as they
            are published.
        trust_program: also load an extractor that was saved with its graph (TorchScript, .pt2),
            which runs code from the file.
        clip: which CLIP gives the CLIP score: a folder, or a hub id that was downloaded before
            (default: not measured).
        count: pictures, spread evenly over the shards.
        guidance: of scene and picture, one or more; more are a sweep, whose best is used for
            everything else (default: the model's, which may differ for the two).
        scene_candidates: scenes drawn for a picture, of which the model's judge keeps one (default:
            the model's).
        sweep_count: captions each guidance of a sweep is tried on.
        seeds: pictures of one caption among which diversity is measured.
        seed: of the first picture.
        batch: pictures sampled at a time; changes no figure.
        device: auto, cpu, cuda, …
        precision: of the GPT; auto takes what is best on the device.
        as_json: print the figures as one JSON object.
    """
    for name, value, least in (("count", count, 2), ("batch", batch, 1)):
        _check_least(name, value, least)
    check_seed(seed, pictures=max(count, seeds))
    plan = Plan(guidances=guidance or (), sweep_count=sweep_count, seeds=seeds)
    check_place(output)
    cases = read_cases(input, count)
    others = read_cases(unseen, count) if unseen else None
    eye = find_reader(reader, find_folder(model))
    features = Extractor(extractor, trust_program=trust_program) if extractor else None
    matcher = None if clip is None else Clip.from_pretrained(clip, device=device)
    network = MakeAScene.from_pretrained(model, device=device, precision=precision)
    if scene_candidates is not None:
        check_candidates(scene_candidates, network.judge)
        network.scene_candidates = scene_candidates
    start = time.perf_counter()
    about = {
        "model": {"name": model, "sha256": network.sha256, "precision": network.precision},
        "input": {"shards": input, "pictures": len(cases.cases), "unseen": unseen},
        "seed": seed,
    }
    decisive = {"model": about["model"], "machine": describe_machine(network.device)}
    with keeping(output.with_name(f".{output.stem}.tokens"), decisive) as kept:
        examiner = Examiner(network, eye, seed=seed, batch=batch, kept=kept)
        figures, rows = examine(examiner, cases, others, plan, features, matcher)
        if matcher:
            figures["clip"]["model"] = clip
        if kept.found:
            figures["pictures_of_earlier_runs"] = kept.found
        figures = plain({**about, **figures, "seconds": round(time.perf_counter() - start, 1)})
        write_report(output, figures, rows)
    if "scene" in figures and (doubt := doubt_reader(figures["scene"])):
        logger.warning(doubt)
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
    plan: Plan,
    extractor: Extractor | None = None,
    clip: Judge | None = None,
) -> tuple[dict[str, Any], list[Row]]:
    """All figures and the rows of the sample sheet.

    Args:
        examiner: model and reader.
        cases: what the training has not seen.
        others: what it has seen no combination of; None: not asked.
        plan: how much is asked.
        extractor: of features for published distances; None: not asked.
        clip: of the CLIP score; None: not asked.
    """
    check_cases(examiner, cases, others, sweep=plan.sweeps)
    if extractor:
        extractor(examiner.to_image([cases.cases[0].pixels(examiner.model.vqgan.config.size)]))
    with tqdm(desc="evaluate", unit=" pictures", disable=None) as examiner.bar:
        examiner.bar.total = count_pictures(cases, others, plan, scored=clip is not None)
        real = examiner.look(cases.cases)
        sweep = try_guidances(examiner, cases, real, plan)
        guidance = choose_guidance(sweep) if sweep else next(iter(plan.guidances), None)
        answers = answer(examiner, cases.cases, guidance, real)
        judged = {
            "caption": obey(cases, cases.cases, answers.made),
            "caption_real": obey(cases, cases.cases, real),
            **judge_unseen(examiner, others, guidance),
        }
        scored = {"": answers.made, "_scene": answers.followed, "_real": real}
        figures = {
            **share_claims(judged),
            **measure(examiner, cases.cases, answers, seeds=plan.seeds),
            "published_distance": extractor
            and measure_distance(extractor, examiner, answers.made, real),
            "clip": clip and measure_clip(clip, examiner, cases.cases, scored),
            "sweep": sweep,
        }
    asked_for = {name: value for name, value in figures.items() if value}
    figures = {**describe_sampling(examiner, guidance), **asked_for}
    return figures, show(cases.cases, answers)


def count_pictures(cases: Cases, others: Cases | None, plan: Plan, *, scored: bool) -> int:
    """How many are painted, read, or `scored` by CLIP, for the bar."""
    asked = len(cases.cases)
    tried = min(plan.sweep_count, asked) if plan.sweeps else 0
    unseen = len(others.cases) if others else 0
    seen = (9 if scored else 5) * asked + 2 * unseen
    return seen + len(plan.guidances) * tried + plan.seeds * min(DIVERSE, asked)


def answer(
    examiner: Examiner, asked: Sequence[Case], guidance: float | None, real: Made
) -> Answers:
    """Paints captions alone, with their own scenes, and with those of other captions."""
    middle = len(asked) // 2
    strangers = [*asked[middle:], *asked[:middle]]
    return Answers(
        guidance=guidance,
        real=real,
        made=examiner.paint(asked, guidance),
        followed=examiner.paint(asked, guidance, follow=asked),
        contradicted=examiner.paint(asked, guidance, follow=strangers),
    )


def measure(
    examiner: Examiner, asked: Sequence[Case], answers: Answers, *, seeds: int
) -> dict[str, Any]:
    """What needs no facts: scenes read again, distances, diversity, tokenizers, codes."""
    made, real = answers.made, answers.real
    scenes = {
        "": answers.followed,
        "_real": real,
        "_predicted": made,
        "_contradicted": answers.contradicted,
    }
    return {
        "scene": compare_scenes(scenes),
        "reader": measure_reader(asked, real),
        "distribution": compare_sets(made, real),
        "diversity": measure_diversity(examiner, asked[:DIVERSE], answers.guidance, seeds, real),
        **measure_tokenizers(examiner, asked),
        "codes": count_codes(examiner, made),
    }


def judge_unseen(
    examiner: Examiner, others: Cases | None, guidance: float | None
) -> dict[str, Obedience | None]:
    """Claims kept in combinations that the training never showed; none where none are asked."""
    if others is None:
        return {}
    painted = examiner.paint(others.cases, guidance)
    return {
        "caption_unseen": obey(others, others.cases, painted),
        "caption_unseen_real": obey(others, others.cases, examiner.look(others.cases)),
    }


def describe_sampling(examiner: Examiner, guidance: float | None) -> dict[str, Any]:
    """What was sampled with; `guidance` is one number, None where scene and picture differ."""
    sampling = examiner.sampling(guidance)
    used = asdict(sampling)
    if examiner.model.scene_candidates > 1:
        used["scene"]["candidates"] = examiner.model.scene_candidates
    if examiner.model.refiner is not None:
        used["image"]["refined"] = True
    same = sampling.scene.guidance == sampling.image.guidance
    return {"guidance": sampling.scene.guidance if same else None, "sampling": used}


def check_place(output: Path) -> None:
    """Refuses what could not be written when all is done.

    Raises:
        ValueError: not called .json, or a folder.
        OSError: its folder cannot be made, or takes no files.
    """
    if output.suffix != ".json":
        raise ValueError(f"--output must end in .json, got {output}")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; name a file in it")
    output.parent.mkdir(parents=True, exist_ok=True)
    check_writable(output.parent, wanted=output)


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"--{name} is {value}, use {least} or more")


def check_cases(examiner: Examiner, cases: Cases, others: Cases | None, *, sweep: bool) -> None:
    """Refuses what would show after hours only, or flatter.

    Raises:
        ValueError: there are too few pictures to compare, there is nothing to choose a guidance
            by, a photo is smaller than the model's, or a batch larger than the memory.
    """
    if len(cases.cases) < 2:
        raise ValueError("--input holds one picture; an evaluation needs two or more")
    if sweep and not cases.has_facts and examiner.reader is None:
        raise ValueError(
            "a sweep over --guidance needs shards with the park's facts, or a --reader"
        )
    size = max(examiner.size, examiner.model.vqgan.config.size)
    for case in (*cases.cases, *(others.cases if others else ())):
        if case.side < size:
            raise ValueError(
                f"scene {case.key} has {case.side} pixels a side, the model's scenes or pictures "
                f"have {size}: preprocess with --photo.size {size}"
            )
    if examiner.reader is not None:
        _warn_of_size(examiner.reader.config.size, examiner.model.vqgan.config.size)
    most = max(len(cases.cases), len(others.cases) if others else 0)
    at_a_time = examiner.at_a_time(most)
    check_memory(at_a_time, fitting=examiner.model.pictures_that_fit())


def _warn_of_size(reader: int, pictures: int) -> None:
    """Says so where a reader gets pictures of another size than it was trained on, in pixels."""
    if reader != pictures:
        logger.warning(
            "the reader was trained on pictures of %d px, the model's have %d: they are resized "
            "for it, and one of mas train reader --model.network.size %d would see more in them",
            *(reader, pictures, pictures),
        )


def spread_out(cases: Sequence[Case], count: int) -> list[Case]:
    """`count` of the cases at even distances, all of them where there are fewer."""
    count = min(count, len(cases))
    return [cases[i * len(cases) // count] for i in range(count)]


def try_guidances(examiner: Examiner, cases: Cases, real: Made, plan: Plan) -> list[dict[str, Any]]:
    """The entries of the sweep, none where there is no guidance to choose."""
    if not plan.sweeps:
        return []
    tried = spread_out(cases.cases, plan.sweep_count)
    entries = []
    for guidance in plan.guidances:
        made = examiner.paint(tried, guidance)
        obeyed = share_claims({"caption": obey(cases, tried, made)}) or {"caption": {}}
        distances = compare_sets(made, real)
        entries.append({"guidance": guidance, **obeyed, "distribution": distances})
    return entries


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


def show(asked: Sequence[Case], answers: Answers) -> list[Row]:
    """Rows of the sample sheet: captions alone, and captions with scenes."""
    made, followed = answers.made, answers.followed
    return [
        Row(
            caption=asked[i].caption,
            predicted=made.scenes[i],
            picture=made.pictures[i],
            given=followed.scenes[i],
            painted=followed.pictures[i],
            read=followed.readings[i] if followed.readings else None,
            real=answers.real.pictures[i],
        )
        for i in range(0, len(asked), max(1, len(asked) // ROWS))
    ][:ROWS]


def summary(figures: Mapping[str, Any]) -> str:
    """One line for the shell."""
    caption = figures.get("caption", {})
    parts = [f"{name} {caption[name]:.0%}" for name in CLAIMS if caption.get(name) is not None]
    for title, part, name, form in (
        ("scene mIoU", "scene", "miou", ".2f"),
        ("CLIP score", "clip", "clip_score", ".1f"),
        ("VQ-SEG mIoU", "vqseg", "miou", ".2f"),
    ):
        if part in figures:
            value = figures[part][name]
            parts.append(f"{title} {'-' if value is None else format(value, form)}")
    return f"{', '.join(parts)} ({name_guidance(figures['sampling'])})"
