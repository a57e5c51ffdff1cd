"""What happens around a training run: checkpoints, signals, picture sheets.

In: the running trainer. Out: the run folder: checkpoints/last.ckpt and best.ckpt, config.json +
model.safetensors (so that the folder can be used as the network at any time), best/ with the same
of best.ckpt, pictures/*.png.
"""

from __future__ import annotations

import logging
import pickle
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor

from mas.errors import naming_full
from mas.rounding import Weights, is_rounded
from mas.shard_files import remove_temporary, replacing, write_file
from mas.sheet import contact_sheet
from mas.storage import CONFIG_FILE, WEIGHTS_FILE, save_network
from train.assemble import TOKENIZERS
from train.stream import STOPPING

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
MARK = "# mas train"  # how the config.yaml of a run begins
LAST = Path("checkpoints/last.ckpt")
BEST = Path("checkpoints/best.ckpt")
BEST_NETWORK = Path("best")  # folder of the network of best.ckpt
WORSE = 0.02  # of the best value: what the last one must be above, for the run to say so
UNIMPORTANT = {"ckpt_path", "config"}  # keys that may differ between a run and its resumption
PREFIX = "network."  # of the network's tensors in a checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: no half-written file is ever found."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(str(path)) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch covers what the disk says with one of its own; a file that closes names none
            cause = error if isinstance(error, OSError) else error.__context__
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            raise


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of `mas train`; its tensors are read when they are used.

    Raises:
        ValueError: the file is no checkpoint of `mas train`, or damaged.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not {"global_step", "network", "config"} <= checkpoint.keys():
            raise KeyError("not written by mas train")
        return checkpoint
    except (RuntimeError, KeyError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        path = Path(path)
        other = path.with_name(LAST.name if path.name == BEST.name else BEST.name)
        beside = f"go on from the one beside it with --ckpt_path {other}, or "
        raise ValueError(
            f"{path}: not a readable checkpoint of mas train; {beside if other.is_file() else ''}"
            "start afresh in another folder (--trainer.default_root_dir)"
        ) from error


class StopSignals(Callback):
    """SIGTERM, SIGINT or SIGUSR1 stops the run after the step at hand, saved and resumable.

    Amid a validation the rest of it is left out, and one more step ends the run. SLURM can be told
    to send either TERM or USR1 before the time is up. A second signal stops at once. As a context
    manager it leaves the handlers as they were before.
    """

    NUMBERS = STOPPING

    def __init__(self) -> None:
        self.received = 0  # number of the signal, 0 = none
        self._stepped = 0  # optimiser steps at the end of the last batch
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> None:
        self._handlers = {number: signal.getsignal(number) for number in self.NUMBERS}

    def __exit__(self, *error: object) -> None:
        self._restore()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stepped = trainer.global_step
        for number in self.NUMBERS:
            signal.signal(number, self._receive)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._stepped:
            return  # gradients are still being accumulated; they would be in no checkpoint
        self._stepped = trainer.global_step
        if trainer.strategy.reduce_boolean_decision(bool(self.received), all=False):
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # whoever sends SIGTERM does not wait for a validation

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.strategy.reduce_boolean_decision(bool(self.received), all=False):
            # Lightning logs nothing of a sanity check: a part of the pictures is no measure.
            trainer.sanity_checking = True
            raise StopIteration  # as if the loader had no more

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        logger.warning("signal %d: saving after this step; once more stops at once", number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


class Checkpoints(Checkpoint):
    """Saves the run every few steps and at its end, and the network beside it.

    Args:
        every_n_steps: optimiser steps between two checkpoints.
        monitor: metric of the validation whose smallest value makes best.ckpt; null: no best.ckpt.
        weights: number format of model.safetensors; a tokenizer that shall be shipped in int8 must
            make its tokens with int8 weights, too.
        patience: optimiser steps after which the run ends unless a validation has been better
            than all before; 0 = never.
    """

    # Lightning's EarlyStopping counts validations. The one that follows a checkpoint is not in it,
    # so a resumed run would wait longer; steps since the best one need no counting.

    def __init__(
        self,
        every_n_steps: int = 1000,
        monitor: str | None = "validation/loss",
        weights: Weights = "float32",
        patience: int = 0,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"checkpoints.every_n_steps is {every_n_steps}, use 1 or more")
        if patience < 0:
            raise ValueError(f"checkpoints.patience is {patience}, use 0 or more")
        if patience and monitor is None:
            raise ValueError(
                "checkpoints.patience waits for a better checkpoints.monitor, and that is null"
            )
        self.every_n_steps, self.monitor, self.weights = every_n_steps, monitor, weights
        self.patience = patience
        self.stage = ""  # which network is trained
        self.config = ""  # the run's resolved YAML, kept in every checkpoint
        self.defaults = ""  # the YAML of a config that sets nothing
        self.best = float("inf")
        self.best_step = 0  # optimiser step of the best validation
        self.ended = False  # whether the patience has ended the run
        self._warned = False  # that nothing logs the monitor
        self._latest = float("-inf")  # value of the last validation
        self._stepped = 0  # optimiser steps at the end of the last batch
        self._weights: dict[str, Tensor] = {}  # of the network, as the last checkpoint has them

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        # Data and settings have passed all checks by now: a run refused leaves nothing behind.
        if not all(is_rounded(part.state_dict(), self.weights) for part in pl_module.held):
            raise ValueError(
                f"checkpoints.weights {self.weights} would round what model.keep_tokens keeps: "
                "set it to what the network in model.init_from was saved with"
            )
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            files = [LAST, BEST, Path(CONFIG)]
            for part in (Path(), BEST_NETWORK):
                files += [part / name for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZERS)]
            for file in files:
                remove_temporary(str(folder / file))  # of a run that was killed
            write_file(str(folder / CONFIG), f"{MARK} {self.stage}\n{self.config}".encode())
            millions = sum(p.numel() for p in pl_module.network.parameters()) / 1e6
            logger.info("%s: %.2fM parameters, run folder %s", self.stage, millions, folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stepped = trainer.global_step
        if not trainer.global_step:
            return
        folder = Path(trainer.default_root_dir)
        # The validation that follows a checkpoint is not in it, and is not repeated.
        step, best = self._read_best(folder)
        if 0 < step <= trainer.global_step and best <= self.best:
            self.best, self.best_step = best, step
        if trainer.is_global_zero:
            self.export(folder, pl_module.network)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._stepped:
            return  # gradients are still being accumulated; they would be in no checkpoint
        self._stepped = trainer.global_step
        due = trainer.global_step % self.every_n_steps == 0
        if due or trainer.should_stop or trainer.global_step >= trainer.max_steps:
            self._save(trainer, pl_module, LAST)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self.monitor is None:
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            self._warn_of_monitor(trainer)
            return
        # All ranks must decide alike, and of a training loss each has logged its own.
        own = torch.tensor(float(value), device=pl_module.device)
        mean = float(trainer.strategy.reduce(own, reduce_op="mean"))
        self._latest = mean
        if mean < self.best:  # which a loss that is no number is not
            self.best, self.best_step = mean, trainer.global_step
            self._save(trainer, pl_module, BEST)
        elif 0 < self.patience <= trainer.global_step - self.best_step:
            self.ended = trainer.should_stop = True
            self._save(trainer, pl_module, LAST)
            if trainer.is_global_zero:
                logger.info(
                    "%s has been no better than at step %d for %d steps: the run ends at step %d",
                    *(self.monitor, self.best_step, trainer.global_step - self.best_step),
                    trainer.global_step,
                )

    def _warn_of_monitor(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and not self._warned:
            self._warned = True
            logger.warning(
                "nothing logs checkpoints.monitor %s, so no network is the best; there are %s",
                *(self.monitor, ", ".join(sorted(trainer.callback_metrics)) or "none"),
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        worse = not self._latest - self.best <= WORSE * abs(self.best)  # or no number
        if not worse or not trainer.is_global_zero:
            return
        step, best = self._read_best(folder)
        if not step or best != self.best:
            return  # there is none, or it lies in the folder that this run went on from
        logger.warning(
            "%s is %.4g, at step %d it was %.4g: the network of that step is in %s; give it to "
            "mas tokenize, mas assemble and others in place of %s",
            *(self.monitor, self._latest, step, self.best),
            *(folder / BEST_NETWORK, folder),
        )

    def export(self, folder: Path, network: Any) -> None:
        """Writes the networks of last.ckpt and best.ckpt, as far as the run in `folder` has them.

        Training does so, too; here for runs that were killed between checkpoint and network, or
        are older than best/. `network` tells the class and the sizes.
        """
        for path, export in ((LAST, self._export), (BEST, self._export_best)):
            if not (folder / path).is_file():
                continue
            try:
                state = read_checkpoint(folder / path)["state_dict"]
            except ValueError:
                logger.warning(
                    "%s is damaged and passed over: the network in %s is left as it is until the "
                    "training writes both anew",
                    *(folder / path, folder if path == LAST else folder / BEST_NETWORK),
                )
            else:
                export(network, _weights_of(state), folder)

    def is_over(self, checkpoint: dict[str, Any]) -> bool:
        """Whether the run of this checkpoint has ended, and has no more patience now."""
        state = checkpoint["callbacks"].get(self.state_key, {})
        waited = checkpoint["global_step"] - state.get("best_step", 0)
        same = state.get("monitor") == self.monitor
        return same and state.get("ended", False) and 0 < self.patience <= waited

    def _read_best(self, folder: Path) -> tuple[int, float]:
        """Step and value of best.ckpt; 0 and infinite where there is none, or a damaged one."""
        try:
            found = read_checkpoint(folder / BEST)
        except (OSError, ValueError):
            return 0, float("inf")
        return found["global_step"], self._best_of(found["callbacks"].get(self.state_key, {}))

    def _save(self, trainer: Trainer, pl_module: Any, path: Path) -> None:
        folder = Path(trainer.default_root_dir)
        trainer.save_checkpoint(folder / path)
        if trainer.is_global_zero:
            export = self._export if path == LAST else self._export_best
            export(pl_module.network, self._weights, folder)
        self._weights = {}

    def _export_best(self, network: Any, weights: dict[str, Tensor], folder: Path) -> None:
        self._export(network, weights, folder / BEST_NETWORK)
        record = folder / TOKENIZERS
        if record.is_file():
            write_file(str(folder / BEST_NETWORK / TOKENIZERS), record.read_bytes())

    def _export(self, before: Any, weights: dict[str, Tensor], folder: Path) -> None:
        """Writes a network like `before`, but with these weights, into `folder`."""
        with torch.device("meta"):
            network = type(before)(before.config)
        network.load_state_dict(weights, assign=True)
        save_network(network, folder, weights=self.weights)

    def state_dict(self) -> dict[str, Any]:
        best = {"best": self.best, "best_step": self.best_step, "ended": self.ended}
        return best | {"monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = self._best_of(state_dict)
        if state_dict.get("monitor") == self.monitor:  # earlier versions have noted no step
            self.best_step = state_dict.get("best_step", self.best_step)

    def _best_of(self, state: dict[str, Any]) -> float:
        """The best value that a checkpoint knows of; of another metric it says nothing."""
        same = state.get("monitor", self.monitor) == self.monitor
        return state.get("best", float("inf")) if same else float("inf")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config
        # Checkpoint callbacks come last: with averaging, `state_dict` is the average by now.
        self._weights = _weights_of(checkpoint["state_dict"])

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.best_step = checkpoint["global_step"]  # unless the state knows better
        before, now, defaults = (
            _flatten(yaml.safe_load(content) or {})
            for content in (checkpoint["config"], self.config, self.defaults)
        )
        for key in sorted(before.keys() | now.keys()):
            # A key the checkpoint does not know is newer than it: it had what is now the default.
            value = before.get(key, defaults.get(key))
            if value != now.get(key) and key not in UNIMPORTANT:
                logger.warning(
                    "%s was %s until this checkpoint, is now %s", key, value, now.get(key)
                )


def _weights_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network's tensors in the `state_dict` of a checkpoint."""
    return {k[len(PREFIX) :]: v for k, v in state.items() if k.startswith(PREFIX)}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class Pictures(Callback):
    """Writes contact sheets of the first validation batch, always the same: pictures/STEP.png.

    Args:
        count: rows of a sheet, at most data.batch_size; 0 writes none.
        cell: pixels a side of a picture in the sheet.
        every_n_steps: optimiser steps from one sheet to the next, rounded up to a validation;
            0 writes one at every validation.
    """

    def __init__(self, count: int = 8, cell: int = 128, every_n_steps: int = 0) -> None:
        if count < 0 or cell < 1 or every_n_steps < 0:
            raise ValueError("pictures needs count ≥ 0, cell ≥ 1 and every_n_steps ≥ 0")
        self.count, self.cell, self.every_n_steps = count, cell, every_n_steps
        self.drawn = 0  # optimiser step of the last sheet

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.drawn = state_dict["drawn"]

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx or not self.count or trainer.global_step - self.drawn < self.every_n_steps:
            return
        self.drawn = trainer.global_step
        if not trainer.is_global_zero:
            return
        rows = pl_module.rows({name: values[: self.count] for name, values in batch.items()})
        if not rows:
            return
        folder = Path(trainer.default_root_dir) / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        sheet = contact_sheet(rows, cell=self.cell, header=pl_module.header())
        path = folder / f"{trainer.global_step:08d}.png"
        with naming_full(path):
            sheet.save(path)
