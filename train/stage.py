"""What the trainings of the three networks share: optimiser, schedule, exactness, failing early.

In: a network and the `Optimiser` settings. Out: a LightningModule whose subclass only adds losses.
Learning rate and random numbers of a step are functions of the step and of the samples in its
batch, so nothing about them has to be saved: a resumed run repeats an uninterrupted one exactly.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from PIL import Image
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from train.stream import mix

logger = logging.getLogger(__name__)

Rows = list[list[Image.Image | str]]


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """AdamW with linear warm-up and a schedule over `trainer.max_steps`."""

    learning_rate: float = 5e-4  # peak
    betas: tuple[float, float] = (0.9, 0.95)  # of Adam
    weight_decay: float = 0.01  # of the weights of linear and convolution layers; nothing else
    warmup_steps: int = 500  # optimiser steps from 0 to the peak
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    final_share: float = 0.05  # of the peak, at the end of the cosine
    clip: float = 1.0  # largest norm of all gradients together; 0 = no clipping

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.warmup_steps < 0 or self.clip < 0:
            raise ValueError("learning_rate must be above 0, warmup_steps and clip not below 0")

    def rate(self, step: int, *, steps: int) -> float:
        """Learning rate of optimiser step `step` (from 0) of `steps`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.learning_rate * (self.final_share + (1 - self.final_share) * cosine)

    def build(self, module: nn.Module) -> torch.optim.AdamW:
        """AdamW over the trainable parameters of `module`."""
        decayed, kept = split_parameters(module)
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": kept, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, fused=True)


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with weight decay (weights of linear and convolution layers) and all others."""
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    weights = {id(part.weight) for part in module.modules() if isinstance(part, layers)}
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return (
        [parameter for parameter in trainable if id(parameter) in weights],
        [parameter for parameter in trainable if id(parameter) not in weights],
    )


class Stage(LightningModule):
    """A network in training; subclasses give `training_step`, `validation_step` and `rows`."""

    name = ""  # of the stage
    network: Any  # which one, says the subclass
    unit = "pictures"  # of the throughput in the progress bar
    per_picture = 1  # units a picture

    def __init__(self, network: nn.Module, optimiser: Optimiser, *, seed: int) -> None:
        super().__init__()
        self.network = network
        self.optimiser = optimiser
        self.seed = seed

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["network"] = asdict(self.network.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError when the checkpoint is of a network of other sizes, naming them."""
        before, now = checkpoint["network"], asdict(self.network.config)
        differing = [key for key in now if before.get(key) != now[key]]
        if differing:
            raise ValueError(
                "the checkpoint is of another network: "
                + ", ".join(f"{key} is {before.get(key)}, not {now[key]}" for key in differing)
            )

    def configure_optimizers(self) -> Any:
        return self.optimiser.build(self.network)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        # Dropout, restarts of codes and the like draw from the global generator. Seeded by the
        # samples of the batch, a step draws the same numbers whether or not the run was resumed.
        torch.manual_seed(mix(self.seed, int(batch["number"][0])))
        rate = self.optimiser.rate(self.global_step, steps=self.trainer.max_steps)
        for optimizer in self._raw_optimizers():
            for group in optimizer.param_groups:
                group["lr"] = rate
        self.log("learning_rate", rate)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        norm = self.clip(self.network.parameters())
        self.log("gradient_norm", norm)

    def clip(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Clips the gradients as configured and returns their norm before."""
        return nn.utils.clip_grad_norm_(parameters, self.optimiser.clip or math.inf)

    def check(self, loss: Tensor, batch: dict[str, Any]) -> None:
        """Stops at a loss that is no number, before it reaches the weights.

        Raises:
            ValueError: names the step and the samples.
        """
        if not torch.isfinite(loss):
            numbers = batch["number"].tolist()
            raise ValueError(
                f"the loss is {float(loss.detach())} at step {self.global_step}, batch of samples "
                f"{numbers[0]}-{numbers[-1]} {batch.get('key', '')}: lower the learning rate or "
                "look at this data; the last checkpoint is untouched"
            )

    def log_losses(self, part: str, values: dict[str, Tensor], *, count: int) -> None:
        """Logs `values` as part/name; validation values are averages over pictures and ranks."""
        on_validation = part == "validation"
        metrics = {f"{part}/{name}": value for name, value in values.items()}
        step = torch.tensor(float(self.global_step))  # the row's; else Lightning counts batches
        self.log_dict(
            {**metrics, "step": step},
            batch_size=count,
            on_step=not on_validation,
            on_epoch=on_validation,
            sync_dist=on_validation,
        )

    def header(self) -> list[str]:
        """Names of the columns of `rows`."""
        raise NotImplementedError

    def rows(self, batch: dict[str, Any]) -> Rows:
        """Rows of a contact sheet that show what the network does with a validation batch."""
        raise NotImplementedError

    def _raw_optimizers(self) -> list[torch.optim.Optimizer]:
        optimizers = self.optimizers(use_pl_optimizer=False)
        return optimizers if isinstance(optimizers, list) else [optimizers]
