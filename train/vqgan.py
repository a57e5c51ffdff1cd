"""Training of the VQ-GAN: pictures through the network and back, judged by a discriminator.

In: scene shards (their photos). Out: a run folder that `VQGAN.from_pretrained` reads. Loss: L1 +
codebook + adversarial term with adaptive weight (Esser et al., arXiv 2012.09841). Two optimisers
take turns by hand; only the VQ-GAN's steps count as steps of the run.
Axes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mas.storage import parse_config, read_json
from mas.vq_codebook import perplexity
from mas.vqgan import VQGAN, VQGANConfig
from train.adversary import (
    AdversaryConfig,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from train.stage import Optimiser, Rows, Stage


class VQGANTraining(Stage):
    """VQ-GAN and discriminator.

    Args:
        network: sizes of the VQ-GAN.
        optimiser: how both players are trained.
        adversary: the discriminator; weight 0 trains without one.
        codebook_weight: of the codebook loss; L1 has weight 1.
        gradient_weight: of the L1 between differences of neighbouring pixels; 0 leaves it out.
        accumulate: batches whose gradients are added up for one step.
        initial: a folder with trained weights to fine-tune; its sizes must be those of `network`.
        seed: of the random numbers of a step; linked to seed_everything.
    """

    name = "vqgan"
    network: VQGAN

    def __init__(
        self,
        *,
        network: VQGANConfig,
        optimiser: Optimiser,
        adversary: AdversaryConfig,
        codebook_weight: float = 1.0,
        gradient_weight: float = 0.0,
        accumulate: int = 1,
        initial: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(VQGAN(network), optimiser, seed=seed)
        self.automatic_optimization = False
        self.adversary = adversary
        self.codebook_weight, self.gradient_weight = codebook_weight, gradient_weight
        self.accumulate = accumulate
        self.discriminator = PatchDiscriminator(self.adversary) if self.adversary.weight else None
        if initial is not None:
            self._start_from(Path(initial))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        players = [self.network, self.discriminator]
        return [self.optimiser.build(player) for player in players if player is not None]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        real_BCHW = batch["image"].float() / 255
        fake_BCHW, codebook_loss, tokens_BT = self.network(real_BCHW)
        reconstruction = self.reconstruction(real_BCHW, fake_BCHW)
        values = {"reconstruction": reconstruction, "codebook": codebook_loss}
        loss = reconstruction + self.codebook_weight * codebook_loss
        say = self.adversary.say(self.global_step)
        if self.discriminator is not None and say:
            values["adversarial"] = generator_loss(self.judge(fake_BCHW, frozen=True))
            weight = adaptive_weight(reconstruction, values["adversarial"], self.network.last_layer)
            loss = loss + say * weight * values["adversarial"]
            values["adaptive_weight"] = weight
        self.check(loss, batch)
        self.manual_backward(loss / self.accumulate)
        if self.discriminator is not None and say:
            values["discriminator"] = discriminator_loss(
                self.judge(real_BCHW), self.judge(fake_BCHW.detach())
            )
            self.manual_backward(values["discriminator"] / self.accumulate)
        _, used = perplexity(tokens_BT, self.network.config.codes)
        values |= {"loss": loss, "perplexity": torch.tensor(used)}
        self.log_losses("train", values, count=len(real_BCHW))
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        self.log("gradient_norm", nn.utils.get_total_norm(gradients))
        if (batch_idx + 1) % self.accumulate == 0:
            self.step(judged=bool(say))
        return loss

    def reconstruction(self, real_BCHW: Tensor, fake_BCHW: Tensor) -> Tensor:
        """L1 between pictures and, if weighted, between their differences of neighbours."""
        loss = F.l1_loss(fake_BCHW, real_BCHW)
        if self.gradient_weight:
            error_BCHW = fake_BCHW - real_BCHW
            across = error_BCHW.diff(dim=3).abs().mean()
            down = error_BCHW.diff(dim=2).abs().mean()
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

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        real_BCHW = batch["image"].float() / 255
        fake_BCHW, codebook_loss, _ = self.network(real_BCHW)
        errors_B = (fake_BCHW.clamp(0, 1) - real_BCHW).square().mean(dim=(1, 2, 3))
        reconstruction = self.reconstruction(real_BCHW, fake_BCHW)
        self.log_losses(
            "validation",
            {
                "loss": reconstruction + self.codebook_weight * codebook_loss,
                "reconstruction": reconstruction,
                "psnr": -10 * errors_B.clamp(min=1e-10).log10().mean(),
            },
            count=len(real_BCHW),
        )

    def header(self) -> list[str]:
        return ["photo", "reconstruction"]

    @torch.no_grad()
    def rows(self, batch: dict[str, Any]) -> Rows:
        real_BCHW = batch["image"].float() / 255
        fake_BCHW = self.network(real_BCHW).image_BCHW
        return [
            [to_picture(real), to_picture(fake)]
            for real, fake in zip(real_BCHW, fake_BCHW, strict=True)
        ]

    def _start_from(self, folder: Path) -> None:
        config = parse_config(VQGANConfig, read_json(folder / "config.json"), folder)
        if config != self.network.config:
            raise ValueError(
                f"{folder} holds a {config}, model.network asks for {self.network.config}: "
                "copy its sizes into the config"
            )
        self.network.load_state_dict(VQGAN.from_pretrained(folder).state_dict())


def to_picture(image_CHW: Tensor) -> Image.Image:
    """A picture of a tensor in [0, 1], values outside clipped."""
    pixels = (image_CHW.float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
