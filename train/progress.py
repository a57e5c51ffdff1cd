"""The bar of a training run: loss, throughput, MFU, time left.

In: the running trainer. Out: one line on stderr. Time spent on validation, sheets and checkpoints
does not count as time of steps, but is part of the time left.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from tqdm import tqdm

from train.flops import peak_flops

MEMORY = 0.9  # share of the earlier steps in the smoothed time of a step


def in_words(speed: float) -> str:
    """A number of things a second: whole, or below ten with two digits."""
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


class Progress(Callback):
    """One bar over all optimiser steps."""

    def __init__(self) -> None:
        self.seconds = 0.0  # a picture, smoothed; 0 before the first
        self.peak: float | None = None  # operations a second the machine could do
        self._pictures = 0  # since the last optimiser step
        self._since = 0.0  # its end
        self._interrupted = True  # by something that is no training; the clock starts anew

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            unit="step",
            desc=pl_module.name,
            disable=not trainer.is_global_zero,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
        )
        if trainer.is_global_zero and pl_module.flops_per_picture:
            dtype = torch.bfloat16 if "16" in str(trainer.precision) else torch.float32
            self.peak = peak_flops(pl_module.device, dtype)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._pictures += len(batch["number"])
        done = trainer.global_step - self.bar.n
        if not done:
            return
        now = time.perf_counter()
        seconds = (now - self._since) / self._pictures
        self.seconds = MEMORY * self.seconds + (1 - MEMORY) * seconds if self.seconds else seconds
        self._pictures, self._since = 0, now
        if not self.bar.update(done):
            return
        loss = trainer.callback_metrics.get("train/loss")
        rate = 1 / self.seconds  # pictures a second and process
        words = [
            f"loss {loss:.4f}" if loss is not None else "",
            f"{in_words(rate * trainer.world_size * pl_module.per_picture)} {pl_module.unit}/s",
            f"MFU {pl_module.flops_per_picture * rate / self.peak:.0%}" if self.peak else "",
        ]
        self.bar.set_postfix_str(", ".join(filter(None, words)), refresh=False)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._interrupted:
            self._pictures, self._since, self._interrupted = 0, time.perf_counter(), False

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._interrupted = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: Any) -> None:
        self._interrupted = True

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.bar.close()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.close()
