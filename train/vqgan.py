"""Training of the VQ-GAN: pictures through the network and back, judged by a discriminator.

In: scene shards: their photos and of their scene maps boxes for the crop terms, labels for the
focus. Out: a run folder that `VQGAN.from_pretrained` reads. Loss: that of train/pictures.py + the
codebook's.
Axes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mas.metrics import CodeMetrics
from mas.vq_codebook import GumbelCodebook
from mas.vqgan import VQGAN, VQGANConfig
from train.adversary import AdversaryConfig
from train.crops import CropsConfig
from train.focus import EVEN, FocusConfig
from train.perceptual import PerceptualConfig
from train.pictures import Drawn, PictureTraining, to_picture
from train.stage import Optimiser, Rows
from train.start import find_token_parts, start_from
from train.totals import log_totals


class VQGANTraining(PictureTraining):
    """VQ-GAN and discriminator.

    Args:
        network: sizes of the VQ-GAN.
        optimiser: how both players are trained.
        adversary: the discriminator; weight 0 trains without one.
        perceptual: LPIPS by VGG-16, whose weights are given by file, or the distance a reader sees;
            weight 0 leaves it out.
        crops: terms for faces and things of the scene map; weights 0 leave them out.
        codebook_weight: of the codebook loss; L1 has weight 1.
        gumbel_temperature: to which the samples of a Gumbel codebook cool down from 1, by a cosine
            over the run (DALL-E, arXiv 2102.12092: 1/16); 1 leaves them as they are.
        gradient_weight: of the L1 between differences of neighbouring pixels; 0 leaves it out.
        focus: what the pixels of things, people and faces count in both L1 terms.
        accumulate: batches whose gradients are added up for one step.
        compile: fuse operations on a GPU (torch.compile; the first steps take a minute).
        init_from: folder of a trained VQ-GAN to fine-tune: a run, or what mas import-vqgan wrote.
        keep_tokens: train the decoder only, so that tokens stay what they are: with those of the
            network in init_from, and a GPT that was trained on them, the result goes together.
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
        perceptual: PerceptualConfig,
        crops: CropsConfig,
        codebook_weight: float = 1.0,
        gumbel_temperature: float = 0.0625,
        gradient_weight: float = 0.0,
        focus: FocusConfig = EVEN,
        accumulate: int = 1,
        compile: bool = False,
        init_from: str | None = None,
        keep_tokens: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            VQGAN(network),
            optimiser,
            adversary=adversary,
            perceptual=perceptual,
            crops=crops,
            gradient_weight=gradient_weight,
            focus=focus,
            accumulate=accumulate,
            seed=seed,
        )
        if not 0 < gumbel_temperature <= 1:
            raise ValueError(
                f"model.gumbel_temperature is {gumbel_temperature}, use a number above 0, at most 1"
            )
        self.codebook_weight, self.gumbel_temperature = codebook_weight, gumbel_temperature
        if init_from is not None:
            start_from(self.network, init_from)
        if keep_tokens:
            self.hold(find_token_parts(self.network, init_from))
        if compile:
            self._fuse()

    @property
    def labels(self) -> bool:
        """Whether each photo must bring the labels of its scene map along; tells the data."""
        return not self.focus.even

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        quantizer = self.network.quantizer
        if isinstance(quantizer, GumbelCodebook):
            done = min(1.0, self.global_step / self.trainer.max_steps)
            above = (1 - self.gumbel_temperature) * (1 + math.cos(math.pi * done)) / 2
            quantizer.temperature.fill_(self.gumbel_temperature + above)

    def draw(self, batch: dict[str, Any], real_BCHW: Tensor) -> Drawn:
        image_BCHW, codebook_loss, tokens_BT = self.network(real_BCHW)
        values = {"codebook": codebook_loss}
        return Drawn(image_BCHW, self.codebook_weight * codebook_loss, values, tokens_BT)

    def watch(self, drawn: Drawn) -> dict[str, Tensor]:
        return self.used_codes(drawn.source)

    def measure(self, drawn: Drawn, real_BCHW: Tensor) -> None:
        super().measure(drawn, real_BCHW)
        self._codes.update(drawn.source)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._codes = CodeMetrics(self.network.config.codes)

    def on_validation_epoch_end(self) -> None:
        log_totals(self, [self._pictures, self._codes])

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

    def _fuse(self) -> None:
        """Compiles all that is large but the last layer, whose gradient is wanted apart."""
        decoder = self.network.decoder
        parts = [self.network.encoder, decoder.middle, *decoder.levels]
        for part in (*parts, self.discriminator, self.judges.network):
            if part is not None:
                part.compile()
