"""What the trainings share that end in a picture: its losses, and two players who take turns.

In: pictures as a network draws them, and the real ones. Out: steps of the network and of the
discriminator that judges it. Loss: L1 + perceptual + adversarial term with adaptive weight (Esser
et al., arXiv 2012.09841), + terms for faces and things (Make-A-Scene, arXiv 2203.13131, sections
3.3 and 3.4). Two optimisers take turns by hand; only the network's steps count as steps of the run.
Axes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn

from mas.metrics import PictureMetrics
from train.adversary import (
    AdversaryConfig,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from train.crops import CropsConfig, Judges
from train.focus import FocusConfig
from train.perceptual import PerceptualConfig
from train.stage import Optimiser, Stage
from train.totals import log_totals


@dataclass(frozen=True)
class Drawn:
    """What a network makes of a batch."""

    image_BCHW: Tensor  # about [0, 1], with gradients
    loss: Tensor | None = None  # what is trained besides the picture, weighted
    values: dict[str, Tensor] = field(default_factory=dict)  # to be logged
    source: Any = None  # what it is drawn from, where that is looked at, too


class PictureTraining(Stage):
    """A network that draws pictures, and a discriminator; subclasses say how it draws."""

    def __init__(
        self,
        network: nn.Module,
        optimiser: Optimiser,
        *,
        adversary: AdversaryConfig,
        perceptual: PerceptualConfig,
        crops: CropsConfig,
        gradient_weight: float,
        focus: FocusConfig,
        accumulate: int,
        seed: int,
    ) -> None:
        super().__init__(network, optimiser, seed=seed)
        if accumulate < 1:
            raise ValueError(f"model.accumulate is {accumulate}, use 1 or more")
        self.automatic_optimization = False
        self.adversary, self.gradient_weight = adversary, gradient_weight
        self.focus, self.accumulate = focus, accumulate
        self.discriminator = PatchDiscriminator(self.adversary) if self.adversary.weight else None
        self.weights, self.crops = {"perceptual": perceptual.weight}, crops
        self.judges = Judges(perceptual, crops)

    def draw(self, batch: dict[str, Any], real_BCHW: Tensor) -> Drawn:
        """What the network makes of a batch; `real_BCHW` are its pictures in [0, 1]."""
        raise NotImplementedError

    def watch(self, drawn: Drawn) -> dict[str, Tensor]:
        """What is logged of a training step besides its losses."""
        return {}

    @property
    def boxes(self) -> int:
        """Faces and things that each photo must bring along; tells the data."""
        return self.crops.boxes

    def setup(self, stage: str) -> None:
        """Raises ValueError for settings under which the two players cannot take turns."""
        super().setup(stage)
        strategy = self.trainer.strategy
        if self.discriminator is not None and isinstance(strategy, DDPStrategy):
            if not strategy._ddp_kwargs.get("find_unused_parameters"):
                raise ValueError(
                    "the network and its discriminator take turns: set trainer.strategy "
                    "ddp_find_unused_parameters_true"
                )

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        players = [self.network, self.discriminator]
        return [self.optimiser.build(player) for player in players if player is not None]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        real_BCHW = batch["image"].float() / 255
        drawn = self.draw(batch, real_BCHW)
        fake_BCHW = drawn.image_BCHW
        # The losses of the picture see it as a leaf: every judge is gone through backwards once,
        # though the adaptive weight wants the gradients of two losses apart.
        leaf_BCHW = fake_BCHW.detach().requires_grad_()
        values = self.reconstruction(real_BCHW, leaf_BCHW, batch)
        loss = values.pop("sum")
        pull_BCHW = _gradient(loss, leaf_BCHW)
        gradient_BCHW = pull_BCHW
        if drawn.loss is not None:
            loss = loss + drawn.loss
        if (crops := self._crops(real_BCHW, leaf_BCHW, batch, values)) is not None:
            loss, gradient_BCHW = loss + crops, gradient_BCHW + _gradient(crops, leaf_BCHW)
        say = self.adversary.say(self.global_step)
        if self.discriminator is not None and say:
            values["adversarial"] = generator_loss(self.judge(leaf_BCHW, frozen=True))
            push_BCHW = _gradient(values["adversarial"], leaf_BCHW)
            weight = adaptive_weight(
                fake_BCHW, self.network.last_layer, pull_BCHW=pull_BCHW, push_BCHW=push_BCHW
            )
            loss = loss + say * weight * values["adversarial"]
            gradient_BCHW = gradient_BCHW + say * weight * push_BCHW
            values["adaptive_weight"] = weight
        self.check(loss, batch)
        # Its value means nothing; its gradient is that of `loss`.
        stand_in = (fake_BCHW * gradient_BCHW).sum()
        if drawn.loss is not None:
            stand_in = stand_in + drawn.loss
        self.manual_backward(stand_in / self.accumulate)
        if self.discriminator is not None and say:
            values["discriminator"] = discriminator_loss(
                self.judge(real_BCHW), self.judge(fake_BCHW.detach())
            )
            self.manual_backward(values["discriminator"] / self.accumulate)
        values |= {**drawn.values, **self.watch(drawn), "loss": loss}
        self.log_losses(
            "train", {name: x.detach() for name, x in values.items()}, count=len(real_BCHW)
        )
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        self.log("gradient_norm", nn.utils.get_total_norm(gradients))
        if (batch_idx + 1) % self.accumulate == 0:
            self.step(judged=bool(say))
        return loss.detach()

    def _crops(
        self,
        real_BCHW: Tensor,
        fake_BCHW: Tensor,
        batch: dict[str, Any],
        values: dict[str, Tensor],
    ) -> Tensor | None:
        """Weighted sum of the terms for faces and things, which are added to `values`."""
        total = None
        for name, weight, judge in (
            ("faces", self.crops.face_weight, self.judges.faces),
            ("things", self.crops.object_weight, self.judges.things),
        ):
            if weight:
                values[name] = judge(fake_BCHW, real_BCHW, batch[name])
                term = weight * values[name]
                total = term if total is None else total + term
        return total

    def reconstruction(
        self, real_BCHW: Tensor, fake_BCHW: Tensor, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """`reconstruction`: L1 between pictures and, if weighted, between their differences of
        neighbours, pixels weighted by their labels where there is a focus; what `perceive` says;
        `sum`: all of it, weighted.
        """
        loss = self._compare_pixels(real_BCHW, fake_BCHW, batch.get("labels"))
        values = {"reconstruction": loss}
        for name, term in self.perceive(real_BCHW, fake_BCHW, batch).items():
            values[name] = term
            loss = loss + self.weights[name] * term
        return {**values, "sum": loss}

    def perceive(
        self, real_BCHW: Tensor, fake_BCHW: Tensor, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Terms of frozen networks that look at whole pictures; `weights` has their weights."""
        if not self.weights["perceptual"]:
            return {}
        return {"perceptual": self.judges.perceptual(fake_BCHW, real_BCHW)}

    def _compare_pixels(
        self, real_BCHW: Tensor, fake_BCHW: Tensor, labels_BHW: Tensor | None
    ) -> Tensor:
        error_BCHW = fake_BCHW - real_BCHW
        weights_B1HW = error_BCHW.new_ones(1, 1, 1, 1).expand(-1, -1, *error_BCHW.shape[2:])
        if labels_BHW is not None:
            weights_B1HW = self.focus.weigh(labels_BHW)[:, None]
        loss = (error_BCHW.abs() * weights_B1HW).mean()
        if self.gradient_weight:
            # A difference belongs to both of its pixels, so all sides of a thing count alike.
            across_B1HW = (weights_B1HW[..., 1:] + weights_B1HW[..., :-1]) / 2
            down_B1HW = (weights_B1HW[..., 1:, :] + weights_B1HW[..., :-1, :]) / 2
            across = (error_BCHW.diff(dim=3).abs() * across_B1HW).mean()
            down = (error_BCHW.diff(dim=2).abs() * down_B1HW).mean()
            loss = loss + self.gradient_weight * (across + down)
        return loss

    def judge(self, image_BCHW: Tensor, *, frozen: bool = False) -> Tensor:
        """Scores of pictures in [0, 1]; `frozen` keeps the gradient from the discriminator."""
        assert self.discriminator is not None
        self.discriminator.requires_grad_(not frozen)
        scores = self.discriminator(image_BCHW * 2 - 1)
        self.discriminator.requires_grad_(True)
        return scores

    def step(self, *, judged: bool) -> None:
        """Steps of both players; Lightning counts steps of wrapped optimisers, so one is raw."""
        wrapped = self.optimizers()
        first = wrapped[0] if isinstance(wrapped, list) else wrapped
        self.clip(self.network.parameters())
        first.step()
        first.zero_grad()
        if self.discriminator is not None and judged:
            other = self._raw_optimizers()[1]
            for group in other.param_groups:
                group["lr"] *= self.adversary.learning_rate
            self.clip(self.discriminator.parameters())
            other.step()
            other.zero_grad()

    def measure(self, drawn: Drawn, real_BCHW: Tensor) -> None:
        """Adds a validation batch to the metrics."""
        self._pictures.update(drawn.image_BCHW, true_image_BCHW=real_BCHW)

    def on_validation_model_zero_grad(self) -> None:
        """Keeps the gradients, which may be those of half a step; Lightning would drop them."""

    def on_validation_epoch_start(self) -> None:
        self._pictures = PictureMetrics()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        real_BCHW = batch["image"].float() / 255
        drawn = self.draw(batch, real_BCHW)
        self.measure(drawn, real_BCHW)
        values = self.reconstruction(real_BCHW, drawn.image_BCHW, batch)
        loss = values.pop("sum")
        values["loss"] = loss if drawn.loss is None else loss + drawn.loss
        self.log_losses("validation", values, count=len(real_BCHW))

    def on_validation_epoch_end(self) -> None:
        log_totals(self, [self._pictures])


def to_picture(image_CHW: Tensor) -> Image.Image:
    """A picture of a tensor in [0, 1], values outside clipped."""
    pixels = (image_CHW.float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _gradient(loss: Tensor, leaf_BCHW: Tensor) -> Tensor:
    (gradient_BCHW,) = torch.autograd.grad(loss, leaf_BCHW)
    return gradient_BCHW
