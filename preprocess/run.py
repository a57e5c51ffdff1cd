"""`mas preprocess`: photos and captions in, photos with scene maps out, on Ray or in this process.

In: tar shards, a folder of images, or COCO. Out: the folder that preprocess/run_folder.py
describes, with one scene shard per input shard.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mas.shards import write_file
from preprocess.executor import ExecutorConfig, Summary, check_numbers, execute
from preprocess.histogram import draw_histogram
from preprocess.inputs import FilesSource, absolute, find_jobs
from preprocess.needs import (
    gather,
    lacking_filesystems,
    lacking_gpu,
    lacking_input,
    require,
)
from preprocess.photo import PhotoConfig
from preprocess.rejects import PASSING, Reject
from preprocess.run_folder import HISTOGRAM, SUMMARY, RunFolder
from preprocess.segment import (
    NETWORKS,
    FaceConfig,
    HumanConfig,
    PanopticConfig,
    check_sources,
    lacks_of_sources,
)
from preprocess.status import collect, describe_rejects
from preprocess.weights import WEIGHTS
from preprocess.worker import SceneConfig, SceneWorker, check_mended

KNOWN_WEIGHTS = {weights.name for weights in WEIGHTS}  # these names are no paths


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Turn photos with captions into photos with captions and scene maps.

    A run that was cut goes on where it was when the same command is given again.

    Args:
        input: tar shards ('DIR/{00000..00099}.tar', a folder of tars, a glob), or a folder of
            images with a .txt beside each; local path or URL.
        output: folder or URL for the scene shards.
        captions: COCO's captions JSON, where the input is a folder of COCO's images.
        samples_per_shard: how many images of a folder make one shard.
        photo: what becomes of the photo.
        panoptic: where panoptic segments come from.
        human: where human parts come from.
        face: where face landmarks come from.
        max_caption_bytes: samples with a longer caption are rejected.
        batch_size: photos given to a network at a time.
        threads: in each worker, to decode and encode while its networks run; 0 = none.
        executor: ray, or serial = one shard after the other in this process.
        workers: processes that share the work; default: as many as CPUs and GPUs allow; 0 = serial.
        address: of a Ray cluster; auto = the one this machine belongs to; default: Ray on this
            machine alone.
        gpus_per_worker: share of a GPU each worker holds, as in 0.5.
        retry_failed: also try the shards that failed and were set aside.
        retry_rejected: also try the samples again that were rejected for a reason that may have
            passed: no_photo, no_annotation, not_segmented; and make shards again in whose input
            what was rejected was mended.
    """

    input: str
    output: str
    captions: str = ""
    samples_per_shard: int = 1000
    photo: PhotoConfig = field(default_factory=PhotoConfig)
    panoptic: PanopticConfig = field(default_factory=PanopticConfig)
    human: HumanConfig = field(default_factory=HumanConfig)
    face: FaceConfig = field(default_factory=FaceConfig)
    max_caption_bytes: int = 10_000
    batch_size: int = 16
    threads: int = 0
    executor: Literal["ray", "serial"] = "ray"
    workers: int | None = None
    address: str | None = None
    gpus_per_worker: float = 0.0
    retry_failed: bool = False
    retry_rejected: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, batch_size=1, threads=0, workers=0, gpus_per_worker=0)

    @property
    def scene(self) -> SceneConfig:
        """What decides the content of the shards."""
        return SceneConfig(
            photo=self.photo,
            panoptic=self.panoptic,
            human=self.human,
            face=self.face,
            max_caption_bytes=self.max_caption_bytes,
        )

    @property
    def sources(self) -> tuple[PanopticConfig, HumanConfig, FaceConfig]:
        """Of the three segmentations."""
        return self.panoptic, self.human, self.face

    @property
    def urls(self) -> tuple[str, ...]:
        """Everything that is read or written and may lie elsewhere."""
        panoptic = self.panoptic
        return self.input, self.output, self.captions, panoptic.json, panoptic.folder

    @property
    def execution(self) -> ExecutorConfig:
        """Where and how wide the run is."""
        return ExecutorConfig(
            kind=self.executor,
            workers=self.workers,
            address=self.address,
            gpus_per_worker=self.gpus_per_worker,
            networks=any(part.source in NETWORKS for part in self.sources),
            retry_failed=self.retry_failed,
            retry_rejected=self.retry_rejected,
        )


def preprocess(config: PreprocessConfig) -> int:
    """Makes the scene shards that are not made yet; returns the exit status.

    Raises:
        ValueError: settings that cannot work, a broken input, or not one usable sample in it.
        OSError: a package or weights are missing, or input or output cannot be reached.
    """
    require(lacking_filesystems(*config.urls))
    check_sources(*config.sources)
    output = absolute(config.output)
    summary = _label(config, output)
    totals = _conclude(summary, RunFolder(output))
    if totals["rejected"] and not totals["photos_out"]:
        raise ValueError(_describe_total_loss(totals["rejected"], config.panoptic, output))
    if not (totals["photos_in"] or summary.failed):
        raise ValueError(f"{config.input}: there is not one sample in it")
    return summary.status


def _label(config: PreprocessConfig, output: str) -> Summary:
    """Runs a worker over the shards of the input.

    Raises:
        ValueError: the output would become part of the input.
    """
    jobs = find_jobs(
        config.input, captions=config.captions, samples_per_shard=config.samples_per_shard
    )
    loose = not config.captions and isinstance(jobs[0].source, FilesSource)
    if loose and f"{output}/".startswith(f"{absolute(config.input)}/"):
        raise ValueError(
            f"{config.output}: lies in --input, whose pictures are taken from any depth; choose an "
            "--output beside it"
        )
    gpus = config.gpus_per_worker if config.execution.networks else 0.0
    return execute(
        jobs,
        partial(
            SceneWorker,
            with_absolute_paths(config.scene),
            output,
            batch_size=config.batch_size,
            threads=config.threads,
        ),
        output,
        command="preprocess",
        settings=settings_of(config.scene),
        config=config.execution,
        passing=[reason.value for reason in PASSING],
        mended=partial(check_mended, output),
        lacks=partial(
            gather,
            partial(lacks_of_sources, *config.sources),
            partial(lacking_input, absolute(jobs[0].source.name)),
            partial(lacking_gpu, gpus),
        ),
    )


def settings_of(config: SceneConfig) -> dict[str, Any]:
    """What decides the output; where a network runs does not."""
    settings = asdict(config)
    for part in ("panoptic", "human", "face"):
        for key in ("device", "batch"):
            settings[part]["options"].pop(key, None)
    return settings


def with_absolute_paths(config: SceneConfig) -> SceneConfig:
    """The same config for workers, which may have been started in another folder."""
    panoptic = config.panoptic
    panoptic = replace(panoptic, json=absolute(panoptic.json), folder=absolute(panoptic.folder))
    config = replace(config, panoptic=panoptic)
    for part in ("panoptic", "human", "face"):
        options = dict(getattr(config, part).options)
        for name in {"weights", "config_file"} & options.keys():
            path = str(options[name])
            if path not in KNOWN_WEIGHTS and Path(path).exists():
                options[name] = absolute(path)
        config = replace(config, **{part: replace(getattr(config, part), options=options)})
    return config


def _describe_total_loss(rejected: dict[str, int], panoptic: PanopticConfig, output: str) -> str:
    """One line for a run that kept nothing; `rejected` has the commonest reason first."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in list(rejected.items())[:3])
    unannotated = next(iter(rejected)) == Reject.NO_ANNOTATION.value
    hint = (
        "; the photos bring no annotations: choose networks that make them, as "
        "configs/preprocess/cc12m.yaml does"
        if unannotated and panoptic.source == "shard-annotations"
        else f"; {output}/*.rejects.jsonl tell of each"
    )
    return f"not one of {sum(rejected.values())} samples could be used: {reasons}{hint}"


def _conclude(summary: Summary, folder: RunFolder) -> dict[str, Any]:
    """Writes summary.json and classes.png, prints what became of the run, returns the sums."""
    totals = collect(folder)
    changed = folder.update(SUMMARY, totals)
    if totals["classes"] and (changed or HISTOGRAM not in folder.list_names()):
        buffer = io.BytesIO()
        draw_histogram(totals["classes"], photos=totals["photos_out"]).save(buffer, "PNG")
        write_file(folder.file(HISTOGRAM), buffer.getvalue())
    rate = summary.seen / max(summary.seconds, 1e-3)
    print(
        f"{summary.done} of {summary.shards} shards done, {summary.skipped} were done before, "
        f"{len(summary.failed)} failed; {summary.seconds:.1f} s, {rate:.1f} photos/s\n"
        f"{totals['photos_in']} photos in, {totals['photos_out']} out"
        + describe_rejects(totals["rejected"])
    )
    passing = sum(totals["rejected"].get(reason.value, 0) for reason in PASSING)
    if passing:
        print(f"{passing} of them may be mended: then run the same command with --retry-rejected")
    for name, error in sorted(summary.failed.items()):
        print(f"failed: {name}: {error}")
    if summary.failed:
        print("mend the input, then run the same command with --retry-failed")
    return totals
