"""Training of the refiner: decoded pictures and their scenes to the pictures they came from.

In: scene shards, and the VQ-GAN whose pictures it shall correct. Out: a run folder that
`Refiner.from_pretrained` reads. Loss: that of train/pictures.py + the consistency of scene and
picture (Li et al., ControlNet++, arXiv 2404.07987, section 3.2): a frozen reader shall read the
scene from the refined picture. Some tokens are exchanged for others, as a GPT errs, so that the
scene is believed where picture and scene differ.
Axes: B batch, C channels, H W pixels, T tokens, P sampled pixels, K classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mas.metrics import PictureMetrics
from mas.reader import pick_pixels
from mas.refiner import Refiner, RefinerConfig
from mas.scene import SceneMap
from mas.storage import WEIGHTS_FILE, file_hash
from mas.vqgan import VQGAN
from train.adversary import AdversaryConfig
from train.assemble import check_origin
from train.crops import CropsConfig
from train.focus import EVEN, FocusConfig
from train.perceptual import PerceptualConfig, ReaderPerceptual
from train.pictures import Drawn, PictureTraining, to_picture
from train.reader import PixelChoice, pixel_loss
from train.stage import Optimiser, Rows
from train.start import start_from
from train.totals import log_totals

PIXELS = PixelChoice()


class RefinerTraining(PictureTraining):
    """The refiner, a frozen VQ-GAN before it, and a discriminator.

    Args:
        network: sizes of the refiner; the picture size is the VQ-GAN's.
        optimiser: how it is trained.
        adversary: the discriminator; weight 0 trains without one.
        perceptual: LPIPS by VGG-16, whose weights are given by file, or the distance a reader sees;
            weight 0 leaves it out.
        crops: terms for faces and things of the scene map; weights 0 leave them out.
        vqgan: folder of the VQ-GAN.
        consistency: weight of the cross-entropy between the scene and what the reader of the
            perceptual term reads from the picture; 0 leaves it out.
        pixels: at which pixels it reads.
        exchanged: of a picture up to this share of the tokens, the share drawn evenly, is exchanged
            for any other tokens.
        gradient_weight: of the L1 between differences of neighbouring pixels; 0 leaves it out.
        focus: what the pixels of things, people and faces count in both L1 terms.
        accumulate: batches whose gradients are added up for one step.
        init_from: folder of a trained refiner to go on from; its picture size may be another.
        seed: of the random numbers of a step; linked to seed_everything.
    """

    name = "refiner"
    network: Refiner

    def __init__(
        self,
        *,
        network: RefinerConfig,
        optimiser: Optimiser,
        adversary: AdversaryConfig,
        perceptual: PerceptualConfig,
        crops: CropsConfig,
        vqgan: str,
        consistency: float = 0.0,
        pixels: PixelChoice = PIXELS,
        exchanged: float = 0.05,
        gradient_weight: float = 0.0,
        focus: FocusConfig = EVEN,
        accumulate: int = 1,
        init_from: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            Refiner(network),
            optimiser,
            adversary=adversary,
            perceptual=perceptual,
            crops=crops,
            gradient_weight=gradient_weight,
            focus=focus,
            accumulate=accumulate,
            seed=seed,
        )
        if consistency < 0:
            raise ValueError(f"model.consistency is {consistency}, use 0 or more")
        if not 0 <= exchanged <= 1:
            raise ValueError(f"model.exchanged is {exchanged}, use 0 to 1")
        self.exchanged, self.pixels = exchanged, pixels
        self.weights["consistency"] = consistency
        if consistency and not isinstance(self.judges.network, ReaderPerceptual):
            raise ValueError(
                "model.consistency needs a reader: set model.perceptual.reader to a folder of mas "
                "train reader and model.perceptual.weight above 0"
            )
        self.before = Before(vqgan)
        self.vqgan_file = Path(vqgan) / WEIGHTS_FILE
        size = self.before.network.config.size
        if network.size != size:
            raise ValueError(
                f"model.network.size is {network.size}, the VQ-GAN in {vqgan} makes pictures of "
                f"{size} pixels: set it to that"
            )
        if init_from is not None:
            start_from(self.network, init_from)

    def setup(self, stage: str) -> None:
        """Raises ValueError when the run goes on from one with another VQ-GAN, as `super` does."""
        super().setup(stage)
        if self.checkpoint is not None:
            run, instead = Path(self.checkpoint).parent.parent, "train a new refiner from this one"
            instead += " with model.init_from, in another folder"
            check_origin(run, "refiner", stream="image", path=self.vqgan_file, instead=instead)
        self.origin = {"image": {"sha256": file_hash(self.vqgan_file)}}

    def draw(self, batch: dict[str, Any], real_BCHW: Tensor) -> Drawn:
        decoded_BCHW = self.before.decode(
            real_BCHW, exchanged=self.exchanged if self.training else 0.0
        )
        refined_BCHW = self.network(decoded_BCHW, batch["labels"], batch["edges"])
        return Drawn(refined_BCHW, source=decoded_BCHW)

    def perceive(
        self, real_BCHW: Tensor, fake_BCHW: Tensor, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        network = self.judges.network
        if not self.weights["consistency"] or not isinstance(network, ReaderPerceptual):
            return super().perceive(real_BCHW, fake_BCHW, batch)
        distance_B, seen_BDHW = network.to(fake_BCHW.device).compare(fake_BCHW, real_BCHW)
        labels_BHW = batch["labels"]
        pixels_BP = self.pixels.draw(labels_BHW, batch["edges"])
        seen_BPD = pick_pixels(seen_BDHW, pixels_BP)
        read = pixel_loss(network.reader.classifier(seen_BPD), labels_BHW, pixels_BP)
        return {"perceptual": distance_B.mean(), "consistency": read}

    def measure(self, drawn: Drawn, real_BCHW: Tensor) -> None:
        super().measure(drawn, real_BCHW)
        self._decoded.update(drawn.source, true_image_BCHW=real_BCHW)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._decoded = PictureMetrics()

    def on_validation_epoch_end(self) -> None:
        log_totals(self, [self._pictures])
        log_totals(self, [self._decoded], prefix="decoded_")

    def header(self) -> list[str]:
        return ["photo", "scene", "decoded", "refined"]

    @torch.no_grad()
    def rows(self, batch: dict[str, Any]) -> Rows:
        real_BCHW = batch["image"].float() / 255
        decoded_BCHW = self.before.decode(real_BCHW, exchanged=0.0)
        labels_BHW, edges_BHW = batch["labels"], batch["edges"]
        refined_BCHW = self.network(decoded_BCHW, labels_BHW, edges_BHW)
        return [
            [
                to_picture(real_BCHW[i]),
                SceneMap(labels_BHW[i].cpu().numpy(), edges_BHW[i].cpu().numpy()).to_rgb(),
                to_picture(decoded_BCHW[i]),
                to_picture(refined_BCHW[i]),
            ]
            for i in range(len(real_BCHW))
        ]


class Before:
    """The frozen VQ-GAN; no nn.Module, so that it is in no checkpoint and no moving average."""

    def __init__(self, folder: str) -> None:
        self.network = VQGAN.from_pretrained(folder)

    def __deepcopy__(self, memo: dict[int, object]) -> Before:
        return self

    @torch.no_grad()
    def decode(self, image_BCHW: Tensor, *, exchanged: float) -> Tensor:
        """Pictures through the VQ-GAN and back, in [0, 1]; some tokens exchanged on the way."""
        network = self.network.to(image_BCHW.device)
        with torch.autocast(image_BCHW.device.type, enabled=False):  # the tokens of mas tokenize
            tokens_BT = network.encode(image_BCHW)
        if exchanged:
            chance_B1 = exchanged * torch.rand(len(tokens_BT), 1, device=tokens_BT.device)
            others_BT = torch.randint_like(tokens_BT, network.config.codes)
            drawn_BT = torch.rand(tokens_BT.shape, device=tokens_BT.device)
            tokens_BT = torch.where(drawn_BT < chance_B1, others_BT, tokens_BT)
        return network.decode(tokens_BT).float()
