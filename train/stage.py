"""What the trainings of all networks share: optimiser, schedule, exactness, failing early.

In: a network and the `Optimiser` settings. Out: a LightningModule whose subclass only adds losses.
Learning rate and random numbers of a step are functions of the step and of the samples in its
batch, so nothing about them has to be saved: a resumed run repeats an uninterrupted one exactly.
A GPU is waited for once a step, to see that loss and gradient are numbers (and by codebooks, which
look for codes to replace): what asks it more often leaves it without work meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

import torch
from PIL import Image
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mas.storage import write_json
from mas.vq_codebook import perplexity
from train.assemble import TOKENIZERS
from train.muon import MuonAdamW
from train.stream import mix

Rows = list[list[Image.Image | str]]
NAMED = 4  # samples that a message about a batch names; the saved batch has all


def to_step(when: float, *, steps: int) -> int:
    """The optimiser step meant by `when`: itself, or below 1 a share of the run's `steps`."""
    return round(when * steps) if when < 1 else int(when)


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """AdamW or Muon with linear warm-up and a schedule over `trainer.max_steps`."""

    kind: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices in a GPT's blocks
    learning_rate: float = 5e-4  # peak
    betas: tuple[float, float] = (0.9, 0.95)  # of Adam
    weight_decay: float = 0.01  # of the weights of linear and convolution layers; nothing else
    warmup_steps: int = 500  # optimiser steps from 0 to the peak
    schedule: Literal["cosine", "step", "constant"] = "cosine"  # after the warm-up
    drop_at: float = 0.235  # step: where the rate drops; a step, below 1 a share of the run
    final_share: float = 0.05  # of the peak, at the end of the cosine and after the drop
    clip: float = 1.0  # largest norm of all gradients together; 0 = no clipping

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.warmup_steps < 0 or self.clip < 0:
            raise ValueError("learning_rate must be above 0, warmup_steps and clip not below 0")
        if self.drop_at < 0 or not 0 <= self.final_share <= 1:
            raise ValueError("drop_at must not be below 0, final_share lie between 0 and 1")

    def rate(self, step: int, *, steps: int) -> float:
        """Learning rate of optimiser step `step` (from 0) of `steps`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "step":
            dropped = step >= to_step(self.drop_at, steps=steps)
            return self.learning_rate * (self.final_share if dropped else 1)
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.learning_rate * (self.final_share + (1 - self.final_share) * cosine)

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of the trainable parameters of `module`.

        Raises:
            ValueError: Muon for a network without blocks.
        """
        decayed, kept = split_parameters(module)
        matrices = find_matrices(module) if self.kind == "muon" else []
        chosen = {id(parameter) for parameter in matrices}
        groups = [
            {
                "params": [p for p in decayed if id(p) not in chosen],
                "weight_decay": self.weight_decay,
            },
            {"params": kept, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if self.kind == "adamw":
            return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, fused=True)
        return MuonAdamW(
            matrices,
            groups,
            learning_rate=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
        )


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with weight decay (weights of linear and convolution layers) and all others."""
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    weights = {id(part.weight) for part in module.modules() if isinstance(part, layers)}
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return (
        [parameter for parameter in trainable if id(parameter) in weights],
        [parameter for parameter in trainable if id(parameter) not in weights],
    )


def find_matrices(module: nn.Module) -> list[Tensor]:
    """Weights of the linear layers in the blocks of a transformer.

    Raises:
        ValueError: a network that has no such blocks.
    """
    blocks = getattr(module, "blocks", None)
    layers = [part for part in blocks.modules() if isinstance(part, nn.Linear)] if blocks else []
    if not layers:
        raise ValueError("model.optimiser.kind muon is for the gpt: set adamw here")
    return [layer.weight for layer in layers]


class Stage(LightningModule):
    """A network in training; subclasses give `training_step`, `validation_step` and `rows`."""

    name = ""  # of the stage
    network: Any  # which one, says the subclass
    unit = "pictures"  # of the throughput in the progress bar
    per_picture = 1  # units a picture
    averaged = False  # whether a callback averages the weights
    checkpoint: str | None = None  # that the run goes on from
    flops_per_picture = 0.0  # of forward and backward pass, for the MFU; 0 = not known

    def __init__(self, network: nn.Module, optimiser: Optimiser, *, seed: int) -> None:
        super().__init__()
        self.network = network
        self.optimiser = optimiser
        self.seed = seed
        self.origin: dict[str, Any] = {}  # tokenizers that it is trained with, for TOKENIZERS
        self.held: list[nn.Module] = []  # parts of the network that the training leaves as they are
        # Batches and losses since the last step, to be saved should they break the run.
        self._batch: dict[str, Any] = {}
        self._checked: list[tuple[Tensor, dict[str, Any]]] = []

    def hold(self, parts: list[nn.Module]) -> None:
        """Leaves these parts of the network as they are; codebooks move no code, either."""
        self.held = parts
        for part in parts:
            part.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for part in self.held:
            part.eval()
        return self

    def on_fit_start(self) -> None:
        if self.origin and self.trainer.is_global_zero:
            write_json(Path(self.trainer.default_root_dir) / TOKENIZERS, self.origin)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["network"] = asdict(self.network.config)
        checkpoint |= {"stage": self.name, "optimiser": self.optimiser.kind}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the weights that were trained, not their average, where none is made any more.

        Raises:
            ValueError: the checkpoint is of another stage, of a network of other sizes, or of
                another kind of optimiser; names them.
        """
        stage = checkpoint.get("stage", self.name)
        if stage != self.name:
            raise ValueError(f"the checkpoint is one of mas train {stage}, not of {self.name}")
        kind = checkpoint.get("optimiser", self.optimiser.kind)
        if kind != self.optimiser.kind:
            raise ValueError(
                f"the checkpoint was trained with {kind}, whose state {self.optimiser.kind} does "
                "not know: keep model.optimiser.kind, or start a new run from this network with "
                "model.init_from"
            )
        if not self.averaged and "current_model_state" in checkpoint:
            checkpoint["state_dict"] = checkpoint["current_model_state"]
        now = asdict(self.network.config)
        # What a config did not have yet when the checkpoint was written had its default.
        known = {field.name: field.default for field in fields(self.network.config)}
        before = known | checkpoint["network"]
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
        self._batch = batch
        rate = self.optimiser.rate(self.global_step, steps=self.trainer.max_steps)
        for optimizer in self._raw_optimizers():
            for group in optimizer.param_groups:
                group["lr"] = rate
        self.log("learning_rate", self._on_device(rate))

    def on_validation_batch_start(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # What is drawn (pixels to read) is drawn alike at every validation: what differs between
        # two of them is the network's.
        torch.manual_seed(mix(self.seed, batch_idx))

    def _on_device(self, number: float) -> Tensor:
        """Made where it is needed; Lightning would copy it there and wait."""
        return torch.full((), float(number), device=self.device)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        norm = self.clip(self.network.parameters())
        self.log("gradient_norm", norm)

    def clip(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Clips the gradients as configured and returns their norm before.

        Raises:
            ValueError: a gradient, or a loss that was checked since the last step, is no number;
                names the step, the samples and the file with the batch.
        """
        norm = nn.utils.clip_grad_norm_(parameters, self.optimiser.clip or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        checked, self._checked = self._checked, []
        numbers = torch.stack([norm.float(), *(loss.float() for loss, _ in checked)])
        if not numbers.isfinite().all():
            for loss, batch in checked:
                if not loss.isfinite():
                    self._refuse(f"the loss is {float(loss)}", batch)
            self._refuse(f"the gradient norm is {float(norm)}", self._batch)
        return norm

    def check(self, loss: Tensor, batch: dict[str, Any]) -> None:
        """Lets `clip` stop the run at a loss that is no number, before it reaches the weights."""
        self._checked.append((loss.detach(), batch))

    def _refuse(self, what: str, batch: dict[str, Any]) -> NoReturn:
        numbers, keys = batch["number"].tolist(), batch.get("key", [])
        more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
        rank = f".{self.global_rank}" if self.trainer.world_size > 1 else ""
        path = Path(self.trainer.default_root_dir) / f"failed_batch{rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({k: v.cpu() if isinstance(v, Tensor) else v for k, v in batch.items()}, path)
        raise ValueError(
            f"{what} at step {self.global_step}, batch of samples {numbers[0]}-{numbers[-1]} "
            f"(keys {', '.join(keys[:NAMED])}{more}), saved as {path}: lower the learning rate "
            "or look at this data; the last checkpoint is untouched"
        )

    def log_losses(self, part: str, values: dict[str, Tensor], *, count: int) -> None:
        """Logs `values` as part/name; validation values are averages over pictures and ranks."""
        on_validation = part == "validation"
        metrics = {f"{part}/{name}": value for name, value in values.items()}
        step = self._on_device(self.global_step)  # the row's; else Lightning counts batches
        self.log_dict(
            {**metrics, "step": step},
            batch_size=count,
            on_step=not on_validation,
            on_epoch=on_validation,
            sync_dist=on_validation,
        )

    def used_codes(self, tokens_BT: Tensor) -> dict[str, Tensor]:
        """The perplexity of a batch's codes, at steps that are logged: counting waits for a GPU."""
        if not self.trainer._logger_connector.should_update_logs:
            return {}
        return {"perplexity": torch.tensor(perplexity(tokens_BT, self.network.config.codes)[1])}

    def header(self) -> list[str]:
        """Names of the columns of `rows`."""
        raise NotImplementedError

    def rows(self, batch: dict[str, Any]) -> Rows:
        """Rows of a contact sheet that show what the network does with a validation batch."""
        raise NotImplementedError

    def _raw_optimizers(self) -> list[torch.optim.Optimizer]:
        optimizers = self.optimizers(use_pl_optimizer=False)
        return optimizers if isinstance(optimizers, list) else [optimizers]
