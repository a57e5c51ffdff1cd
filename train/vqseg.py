"""Training of VQ-SEG: scene maps through the network and back.

In: scene shards. Out: a run folder that `VQSEG.from_pretrained` reads. The loss is the network's
own (mas/vqseg.py). Paper: Make-A-Scene (arXiv 2203.13131) section 3.2.
Axes: B batch, H W pixels, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mas.metrics import CodeMetrics, SceneMetrics
from mas.scene import SceneMap
from mas.vqseg import VQSEG, VQSEGConfig
from train.stage import Optimiser, Rows, Stage
from train.start import find_token_parts, start_from
from train.totals import log_totals


class VQSEGTraining(Stage):
    """VQ-SEG with its loss.

    Args:
        network: sizes of the VQ-SEG.
        optimiser: how it is trained.
        compile: fuse operations on a GPU (torch.compile; the first steps take a minute).
        init_from: folder of a trained VQ-SEG to fine-tune; its picture size may be another.
        keep_tokens: train the decoder only, so that tokens stay what they are: with those of the
            network in init_from, and a GPT that was trained on them, the result goes together.
        seed: of the random numbers of a step; linked to seed_everything.
    """

    name = "vqseg"
    network: VQSEG

    def __init__(
        self,
        *,
        network: VQSEGConfig,
        optimiser: Optimiser,
        compile: bool = False,
        init_from: str | None = None,
        keep_tokens: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(VQSEG(network), optimiser, seed=seed)
        if init_from is not None:
            start_from(self.network, init_from)
        if keep_tokens:
            self.hold(find_token_parts(self.network, init_from))
        if compile:
            self.network.encoder.compile()
            self.network.decoder.compile()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self.network.loss(batch["labels"], batch["edges"])
        self.check(losses.total, batch)
        values = {
            "loss": losses.total,
            "reconstruction": losses.reconstruction,
            "codebook": losses.codebook,
        }
        values |= self.used_codes(losses.tokens_BT)
        self.log_losses("train", values, count=len(batch["labels"]))
        return losses.total

    def on_validation_epoch_start(self) -> None:
        self._scenes, self._codes = SceneMetrics(), CodeMetrics(self.network.config.codes)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        labels_BHW, edges_BHW = batch["labels"], batch["edges"]
        losses = self.network.loss(labels_BHW, edges_BHW)
        decoded_BHW, decoded_edges_BHW = self.network.decode(losses.tokens_BT)
        self._scenes.update(
            decoded_BHW, decoded_edges_BHW, true_labels_BHW=labels_BHW, true_edges_BHW=edges_BHW
        )
        self._codes.update(losses.tokens_BT)
        self.log_losses(
            "validation",
            {"loss": losses.total, "reconstruction": losses.reconstruction},
            count=len(labels_BHW),
        )

    def on_validation_epoch_end(self) -> None:
        log_totals(self, [self._scenes, self._codes])

    def header(self) -> list[str]:
        return ["scene", "reconstruction", "its edges"]

    @torch.no_grad()
    def rows(self, batch: dict[str, Any]) -> Rows:
        labels_BHW, edges_BHW = batch["labels"], batch["edges"]
        decoded = self.network.decode(self.network.encode(labels_BHW, edges_BHW))
        before = _scenes(labels_BHW, edges_BHW)
        after = _scenes(*decoded)
        return [
            [a.to_rgb(), b.to_rgb(), b.to_rgb(edges=True)]
            for a, b in zip(before, after, strict=True)
        ]


def _scenes(labels_BHW: Tensor, edges_BHW: Tensor) -> list[SceneMap]:
    return [
        SceneMap(labels.cpu().numpy(), edges.cpu().numpy())
        for labels, edges in zip(labels_BHW, edges_BHW, strict=True)
    ]
