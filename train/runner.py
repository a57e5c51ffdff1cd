"""LightningCLI for `mas train`: from a parsed config to a trained run folder.

In: stage and arguments (`cli`). Out: the run folder `trainer.default_root_dir`: config.yaml,
metrics.csv, TensorBoard events, checkpoints/, pictures/, the network itself (config.json +
model.safetensors), and that of the best validation in best/.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from mas.errors import first_line
from mas.field_help import explain_fields
from mas.machine import usable_cores
from train.alone import alone
from train.averaging import Averaging
from train.callbacks import (
    CONFIG,
    LAST,
    MARK,
    AtomicCheckpointIO,
    Checkpoints,
    Pictures,
    StopSignals,
    read_checkpoint,
)
from train.data import PairData, PhotoData, SceneData, TokenData
from train.gpt import GPTTraining
from train.judge import JudgeData, JudgeTraining
from train.metrics_log import MetricsLog
from train.progress import Progress
from train.reader import ReaderData, ReaderTraining
from train.refiner import RefinerTraining
from train.sharding import Sharded, ShardedAveraging
from train.vqgan import VQGANTraining
from train.vqseg import VQSEGTraining

logger = logging.getLogger(__name__)

EVENTS = "tensorboard"  # folder of its events in a run folder
TRAINER_DEFAULTS = {
    "max_steps": -1,
    "max_epochs": -1,  # the data stream has no end: training is counted in optimiser steps
    "val_check_interval": 1000,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 50,
    "use_distributed_sampler": False,  # the stream gives every rank its own samples
    "enable_model_summary": False,
    "enable_progress_bar": False,  # there is one of our own
}


class Job(NamedTuple):
    """What one `mas train STAGE` trains, and on what."""

    module: type[LightningModule]
    data: type[LightningDataModule]
    needs_size: bool  # the data must know the network's picture size


JOBS = {
    "vqseg": Job(VQSEGTraining, SceneData, True),
    "vqgan": Job(VQGANTraining, PhotoData, True),
    "gpt": Job(GPTTraining, TokenData, False),
    "reader": Job(ReaderTraining, ReaderData, True),
    "judge": Job(JudgeTraining, JudgeData, False),
    "refiner": Job(RefinerTraining, PairData, True),
}

DRAWING = ("vqgan", "refiner")  # stages of train/pictures.py


def run(name: str, arguments: list[str]) -> int:
    """Trains stage `name`; 0 when done, 128 + signal when a signal stopped it (saved, resumable).

    Raises:
        ValueError: data, checkpoint or settings that cannot be used, in one line.
    """
    _quieten()
    try:
        with ExitStack() as held:
            cli = TrainCLI(name, arguments, held)
            cli.run()
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    return 128 + cli.signals.received if cli.signals.received else 0


class TrainCLI(LightningCLI):
    """LightningCLI for one stage, with this project's callbacks, loggers and run folder."""

    def __init__(self, name: str, arguments: list[str], held: ExitStack) -> None:
        """`held` keeps the run folder from other trainings until it is closed."""
        self.name, self.held = name, held
        self.signals = StopSignals()
        job = JOBS[name]
        super().__init__(
            job.module,
            job.data,
            args=arguments,
            run=False,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "prog": f"mas train {name}",
                "usage": f"mas train {name} --config FILE.yaml [--ckpt_path last] [--KEY VALUE …]",
                "description": (job.module.__doc__ or "").partition("Args:")[0].strip(),
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            help="checkpoint to resume from: a file; last = this run's; auto = the same if there "
            "is one, else a new run",
        )
        parser.add_class_arguments(Checkpoints, "checkpoints", skip={"config"})
        parser.add_class_arguments(Pictures, "pictures")
        parser.add_argument(
            "--ema_decay",
            type=float,
            default=0.0,
            help="moving average of the weights, for validation and the exported network; 0 = none",
        )
        parser.set_defaults({"trainer.default_root_dir": f"runs/{self.name}"})
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        if JOBS[self.name].needs_size:
            parser.link_arguments("model.network.size", "data.size")
        if self.name in DRAWING:
            parser.link_arguments("model.boxes", "data.boxes", apply_on="instantiate")
        if self.name == "vqgan":
            parser.link_arguments("model.labels", "data.labels", apply_on="instantiate")
        explain_fields(parser)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config_init.trainer
        check_trainer(settings)
        folder = Path(settings.default_root_dir)
        self.held.enter_context(alone(folder))
        self._find_start(folder)
        self._tell_checkpoints()
        sharded = settings.strategy == "fsdp"
        if sharded:
            check_sharding(self.name, self.model)
            kwargs["strategy"] = Sharded()
        callbacks = [
            *(settings.callbacks or []),
            *self._averaging(sharded=sharded),
            self.signals,  # before the pictures, which a stop does not wait for
            self.config_init.pictures,
            Progress(),
            self.checkpoints,
        ]
        kwargs |= {"callbacks": callbacks, "plugins": [AtomicCheckpointIO()]}
        if settings.logger in (None, True):
            kwargs["logger"] = self._loggers()
        trainer = super().instantiate_trainer(**kwargs)
        if sharded and trainer.world_size == 1:
            raise ValueError(
                "trainer.strategy fsdp shards the network over several processes, and here is "
                "one: leave the strategy out, or set trainer.devices"
            )
        return trainer

    def _find_start(self, folder: Path) -> None:
        """Finds the checkpoint and the step that the run in `folder` goes on from."""
        self.folder = folder
        self.checkpoint = find_checkpoint(folder, self.config_init.ckpt_path)
        self.start_step, self.ended = 0, False
        self.model.averaged = bool(self.config_init.ema_decay)
        self.model.checkpoint = self.checkpoint
        if self.checkpoint:
            checkpoint = read_checkpoint(self.checkpoint)
            self.model.on_load_checkpoint(checkpoint)
            self.start_step = checkpoint["global_step"]
            self.ended = self.config_init.checkpoints.is_over(checkpoint)

    def _tell_checkpoints(self) -> None:
        """Gives the checkpoints what they note of the run: its stage and its configs."""
        self.checkpoints: Checkpoints = self.config_init.checkpoints
        self.checkpoints.stage = self.name
        anywhere = self.config.clone()
        anywhere.ckpt_path = None  # the file says how to train, not where this start began
        self.checkpoints.config = self.parser.dump(anywhere)
        self.checkpoints.defaults = self.parser.dump(
            self.parser.get_defaults(), skip_validation=True
        )

    def run(self) -> None:
        """Trains; a finished run is left as it is."""
        step = self.start_step
        done = step >= self.trainer.max_steps
        if done or self.ended:
            logger.info("nothing to do: %s", self._say_why(done=done))
            if self.trainer.is_global_zero:
                self.checkpoints.export(self.folder, self.model.network)
            return
        if self.trainer.is_global_zero:
            tell_of_workers(self.datamodule.workers)
        with self.signals:
            try:
                self.trainer.fit(
                    self.model, self.datamodule, ckpt_path=self.checkpoint, weights_only=True
                )
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise ValueError(self._advise_on_memory()) from error
                if is_lost_process(error):
                    raise ValueError(
                        "another process of this training has ended or cannot be reached: look "
                        "at what it said last, then go on with --ckpt_path last; the network "
                        f"between them said: {first_line(error)}"
                    ) from error
                raise

    def _say_why(self, *, done: bool) -> str:
        """Why nothing is trained, and what to set."""
        step, most = self.start_step, self.trainer.max_steps
        if not done:
            ended = f"the run ended at step {step}, out of patience"
            return f"{ended}; raise checkpoints.patience to go on"
        if step == most and Path(str(self.checkpoint)).parent.parent == self.folder:
            return f"the run has its {step} steps; raise trainer.max_steps to go on"
        return f"the checkpoint is at step {step}, trainer.max_steps is {most}: raise it to go on"

    def _averaging(self, *, sharded: bool) -> list[Callback]:
        decay = self.config_init.ema_decay
        if not decay:
            return []
        averaging = Averaging(decay)
        return [ShardedAveraging(averaging.average) if sharded else averaging]

    def _advise_on_memory(self) -> str:
        size = self.datamodule.batch_size
        accumulate = (
            "model.accumulate" if self.name in DRAWING else "trainer.accumulate_grad_batches"
        )
        recompute = "set model.checkpoint_blocks true, or " if self.name == "gpt" else ""
        return (
            f"a batch of {size} pictures does not fit into the memory of "
            f"{self.trainer.strategy.root_device}: {recompute}divide data.batch_size and "
            f"multiply {accumulate} by the same number; the last checkpoint is untouched"
        )

    def _loggers(self) -> list[Logger]:
        step = self.start_step
        loggers: list[Logger] = [MetricsLog(self.folder, resumed_step=step)]
        purged = step + bool(step)  # the validation at that step stays: it is not repeated
        if importlib.util.find_spec("tensorboard"):
            from train.events import Events

            loggers.append(Events(str(self.folder), name="", version=EVENTS, purge_step=purged))
        return loggers


def check_trainer(settings: Any) -> None:
    """Refuses settings of Lightning's that trainings counted in optimiser steps cannot follow.

    Raises:
        ValueError: names the setting.
    """
    if settings.max_steps < 1:
        raise ValueError("set trainer.max_steps: training is counted in optimiser steps")
    if settings.max_epochs != -1:
        raise ValueError(
            "leave trainer.max_epochs alone and set trainer.max_steps: "
            "the data stream has no epochs that end"
        )
    for name in ("min_steps", "min_epochs"):
        if getattr(settings, name):
            raise ValueError(
                f"leave trainer.{name} alone: with it a run goes on that a signal or "
                "checkpoints.patience was to end"
            )
    interval = settings.val_check_interval
    share = interval is None or isinstance(interval, float)
    if share or (isinstance(interval, int) and interval < 1):
        raise ValueError(
            f"trainer.val_check_interval is {interval}: give the batches between two validations, "
            "a whole number of 1 or more; the data stream has no epochs to take a share of"
        )
    if settings.accumulate_grad_batches < 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches is {settings.accumulate_grad_batches}: give the "
            "batches whose gradients make a step, 1 or more"
        )
    if str(settings.precision) in ("16", "16-mixed", "16-true"):
        raise ValueError(
            f"trainer.precision {settings.precision} needs a scaled loss, which is not "
            "offered: use bf16-mixed, or 32-true where the card has no bfloat16"
        )


def find_checkpoint(folder: Path, wanted: str | None) -> str | None:
    """The checkpoint a run in `folder` starts from, None for a fresh start.

    Raises:
        ValueError: the checkpoint is missing, or a fresh run would overwrite what is there.
    """
    last = folder / LAST
    if wanted not in (None, "auto"):
        path = last if wanted == "last" else Path(str(wanted))
        if not path.is_file():
            hint = ": start without --ckpt_path" if wanted == "last" else ""
            raise ValueError(f"there is no checkpoint {path}{hint}")
        if not last.exists():
            check_folder(folder)
        elif path.resolve().parent != last.parent.resolve():
            raise ValueError(
                f"{folder} already holds a run, which one from {path} would overwrite: "
                "give a new --trainer.default_root_dir"
            )
        return str(path)
    if last.exists():
        if wanted == "auto":
            return str(last)
        raise ValueError(
            f"{folder} already holds a run: go on with --ckpt_path last, "
            "or give another --trainer.default_root_dir"
        )
    check_folder(folder)
    return None


def check_folder(folder: Path) -> None:
    """Refuses a folder of other things; empty ones and those of earlier tries may be used.

    Raises:
        ValueError: names up to three of the things that are there.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder as --trainer.default_root_dir")
    # TensorBoard's events are there before the data has passed its checks.
    found = sorted(path.name for path in folder.glob("[!.]*") if path.name != EVENTS)
    config = folder / CONFIG
    if not found or (config.is_file() and config.read_bytes().startswith(MARK.encode())):
        return
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    raise ValueError(
        f"{folder} holds {', '.join(found[:3])}{more}, which no mas train has written: "
        "give a new or empty folder as --trainer.default_root_dir"
    )


def check_sharding(name: str, model: Any) -> None:
    """Refuses what `trainer.strategy fsdp` cannot do.

    Raises:
        ValueError: names the setting.
    """
    if name != "gpt":
        raise ValueError(f"trainer.strategy fsdp is for gpt; {name} fits every card: use ddp")
    if model.optimiser.kind == "muon":
        raise ValueError(
            "trainer.strategy fsdp holds pieces of matrices, muon needs whole ones: set "
            "model.optimiser.kind adamw, or trainer.strategy ddp"
        )
    if model.preview.complete:
        raise ValueError(
            "trainer.strategy fsdp draws no sheets of samples, no process holds the whole "
            "network: leave model.preview out and run mas sample on the run folder"
        )


def tell_of_workers(count: int) -> None:
    """Says it where more processes shall read than there are cores."""
    cores = usable_cores()
    if count > cores:
        logger.warning(
            "data.workers is %d, more than this machine has cores: give --data.workers %d or less",
            *(count, cores),
        )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether `error` says that a card or the machine has not enough memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_lost_process(error: RuntimeError) -> bool:
    """Whether `error` says that a process of the training does not answer any more."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _quieten() -> None:
    """Silences what Lightning says on every start and what does not apply here."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*args parameter is intended to run from within Python.*",
        ".*does not have many workers.*",
        "This DataLoader will create.*",  # said in words of the config
        ".*GPU available but not used.*",
        "Total length of `PlainLoader` across ranks is zero.*",  # the data says more
        "(?s).*``instantiate_classes`` was deprecated.*",  # LightningCLI calls it
        "(?s).*JsonargparseDeprecationWarning per type.*",
        ".*LeafSpec.*",  # in Lightning's own code
        ".*WeightAveraging callback with a model that overrides.*",  # it shards with fsdp only
        # A run that goes on with another ema_decay says so in a line of ours.
        "The checkpoint was not created with WeightAveraging.*",
        r".*Please add the following callbacks: \['(Sharded)?Averaging'\]\.",
        ".*module\\(s\\) in eval mode at the start of training.*",  # model.keep_tokens; judges
        "Mismatch dtype between input and weight.*",  # norms under mixed precision
    ):
        warnings.filterwarnings("ignore", message=message)
