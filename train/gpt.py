"""Training of the GPT on token shards.

In: token shards (text, scene and image tokens of each picture). Out: a run folder that
`GPT.from_pretrained` reads, with the manifest of the tokens it was trained on. Losses are weighted
per stream; captions are dropped at random so that guidance has an unconditional model to work with.
Paper: Make-A-Scene (arXiv 2203.13131) sections 3.1 and 3.5.
Axes: B batch, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mas.filter import Sampling
from mas.generate import generate
from mas.gpt import GPT, GPTConfig, StreamLosses
from mas.scene import SceneMap
from mas.sequence import Streams
from mas.shards import MANIFEST, TokenShards
from mas.text import PAD, Tokenizer
from mas.vqgan import VQGAN
from mas.vqseg import VQSEG
from train.assemble import check_hashes
from train.flops import training_flops
from train.sharding import shard
from train.stage import Optimiser, Rows, Stage, to_step
from train.start import check_tokens, start_from
from train.totals import log_totals
from train.vqgan import to_picture


@dataclass(frozen=True, kw_only=True)
class StreamWeights:
    """What a stream's mean cross-entropy counts in the loss; only the ratios matter."""

    text: float = 1.0  # the paper has 7 image : 1 text
    scene: float = 7.0  # as the image: both are what the model is for
    image: float = 7.0  # as the scene

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 0 or sum(vars(self).values()) == 0:
            raise ValueError(f"stream weights must not be negative, nor all zero: {self}")

    def mean(self, losses: StreamLosses) -> Tensor:
        """The weighted mean of the streams' losses."""
        total = self.text * losses.text + self.scene * losses.scene + self.image * losses.image
        return total / (self.text + self.scene + self.image)


@dataclass(frozen=True, kw_only=True)
class CaptionDropout:
    """How often a caption is replaced by padding, for classifier-free guidance.

    The default is the paper's: only in a last phase. `share: 0.1, start: 0` drops all along.
    """

    share: float = 0.2  # of the captions, 0-1
    start: float = 0.82  # when it begins: an optimiser step, below 1 a share of the run

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1 or self.start < 0:
            raise ValueError(f"caption dropout needs 0 ≤ share < 1 and start ≥ 0, got {self}")

    def __call__(self, text_BT: Tensor, *, step: int, steps: int) -> Tensor:
        """Text tokens with some captions all padding, for optimiser step `step` of `steps`."""
        if not self.share or step < to_step(self.start, steps=steps):
            return text_BT
        dropped_B1 = torch.rand(len(text_BT), 1, device=text_BT.device) < self.share
        return text_BT.masked_fill(dropped_B1, PAD)


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The tokenizers behind the tokens; with all three, validation draws sheets of samples."""

    tokenizer: str | None = None  # tokenizer.json
    vqseg: str | None = None  # run folder
    vqgan: str | None = None  # run folder
    guidance: float = 3.0  # of the samples

    @property
    def complete(self) -> bool:
        """Whether sheets can be drawn."""
        return None not in (self.tokenizer, self.vqseg, self.vqgan)


class Painter:
    """Captions, scenes and pictures of tokens."""

    def __init__(self, preview: Preview, manifest: Path) -> None:
        tokenizer, vqseg, vqgan = preview.tokenizer, preview.vqseg, preview.vqgan
        assert tokenizer and vqseg and vqgan
        check_hashes(manifest, tokenizer=tokenizer, vqseg=vqseg, vqgan=vqgan)
        self.tokenizer = Tokenizer.from_file(tokenizer)
        self.vqseg = VQSEG.from_pretrained(vqseg)
        self.vqgan = VQGAN.from_pretrained(vqgan)

    def captions(self, text_BT: Tensor) -> list[str]:
        return self.tokenizer.decode(text_BT.cpu())

    def scenes(self, scene_BT: Tensor) -> list[Image.Image]:
        labels_BHW, edges_BHW = self.vqseg.decode(scene_BT.cpu())
        return [
            SceneMap(labels.numpy(), edges.numpy()).to_rgb()
            for labels, edges in zip(labels_BHW, edges_BHW, strict=True)
        ]

    def pictures(self, image_BT: Tensor) -> list[Image.Image]:
        return [to_picture(image) for image in self.vqgan.decode(image_BT.cpu())]


class StreamTotals:
    """Losses and accuracies of the streams, averaged over all tokens of a set.

    Captions differ in length, so a mean of batches would be another number for every batch size.
    """

    def __init__(self, weights: StreamWeights) -> None:
        self.weights = weights
        self.sums = torch.zeros(2, 3, dtype=torch.double)  # losses and hits of the streams
        self.counts = torch.zeros(3, dtype=torch.double)  # tokens

    def update(self, losses: StreamLosses, tokens: Streams) -> None:
        """Adds a batch, of which `losses` are means over the tokens that count."""
        text_BT, scene_BT, image_BT = tokens
        captioned = int((text_BT[:, 1:] != PAD).sum())
        counts = torch.tensor([captioned, scene_BT.numel(), image_BT.numel()])
        self.sums += torch.stack(losses).view(2, 3).detach().cpu() * counts
        self.counts += counts

    @property
    def totals(self) -> tuple[Tensor, ...]:
        """What is summed up over ranks."""
        return self.sums, self.counts

    def compute(self) -> dict[str, float]:
        """`loss`, and the losses and accuracies by the names of StreamLosses."""
        means = StreamLosses(*(self.sums / self.counts.clamp(min=1)).flatten())
        values = {"loss": self.weights.mean(means), **means._asdict()}
        return {name: float(value) for name, value in values.items()}


class GPTTraining(Stage):
    """GPT with weighted losses.

    Args:
        network: sizes of the GPT.
        optimiser: how it is trained.
        weights: of the streams in the loss.
        caption_dropout: how often captions are dropped.
        preview: what is needed to show samples; without it no sheets are written.
        compile: fuse the blocks' operations (torch.compile; the first steps take minutes).
        checkpoint_blocks: recompute blocks backwards: a fraction of the memory, a third more time.
        init_from: folder of a trained GPT to go on from: a run, or gpt/ of a model folder. Its
            tokens must be of the same tokenizers; dropout may differ.
        seed: of the random numbers of a step; linked to seed_everything.
    """

    name = "gpt"
    network: GPT
    unit = "tokens"

    def __init__(
        self,
        *,
        network: GPTConfig,
        optimiser: Optimiser,
        weights: StreamWeights,
        caption_dropout: CaptionDropout,
        preview: Preview,
        compile: bool = False,
        checkpoint_blocks: bool = False,
        init_from: str | None = None,
        seed: int = 0,
    ) -> None:
        if not network.text_head:
            raise ValueError(
                "model.network.text_head is false: only stored models go without; to learn nothing "
                "of captions set model.weights.text 0"
            )
        super().__init__(GPT(network), optimiser, seed=seed)
        self.init_from = init_from
        if init_from is not None:
            start_from(self.network, init_from)
        self.weights = weights
        self.caption_dropout = caption_dropout
        self.preview = preview
        self.sampling = Sampling(guidance=preview.guidance)
        self.painter: Painter | None = None
        self.per_picture = network.layout.length
        self.flops_per_picture = training_flops(network)
        self.network.checkpoint_blocks = checkpoint_blocks
        if compile:  # one block after the other: one compilation serves them all
            for block in self.network.blocks:
                block.compile()

    def configure_model(self) -> None:
        shard(self)

    def setup(self, stage: str) -> None:
        check_manifest(self._manifest, self.network.config)
        if self.checkpoint is not None:
            run = Path(self.checkpoint).parent.parent
            check_tokens(self._manifest, run, instead="train a new GPT in another folder")
        elif self.init_from is not None:
            check_tokens(self._manifest, self.init_from, instead="leave out model.init_from")
        self.origin = {name: self._manifest[name] for name in Streams._fields}
        if self.trainer.is_global_zero and self.preview.complete:
            self.painter = Painter(self.preview, self._shards.folder / MANIFEST)

    @property
    def _shards(self) -> TokenShards:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit
        return data.shards

    @property
    def _manifest(self) -> dict[str, Any]:
        return self._shards.manifest

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        text_BT = self.caption_dropout(
            batch["text"], step=self.global_step, steps=self.trainer.max_steps
        )
        losses = self.network.losses(text_BT, batch["scene"], batch["image"])
        loss = self.weights.mean(losses)
        self.check(loss, batch)
        self.log_losses("train", {"loss": loss, **losses._asdict()}, count=len(text_BT))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._totals = StreamTotals(self.weights)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        tokens = Streams(*(batch[name] for name in Streams._fields))
        self._totals.update(self.network.losses(*tokens), tokens)

    def on_validation_epoch_end(self) -> None:
        log_totals(self, [self._totals])

    def header(self) -> list[str]:
        return [
            "caption",
            "scene",
            "picture for it",
            "own scene",
            "own picture",
            "original, decoded",
        ]

    @torch.no_grad()
    def rows(self, batch: dict[str, Any]) -> Rows:
        """Samples for held-out captions: with the true scene, and with a scene of its own."""
        if self.painter is None:
            return []
        text_BT, scene_BT, image_BT = (batch[name] for name in Streams._fields)
        how: dict[str, Any] = {
            "seeds": range(len(text_BT)),
            "scene": self.sampling,
            "image": self.sampling,
        }
        with torch.compiler.set_stance("force_eager"):  # compiled blocks know only whole sequences
            guided = generate(self.network, text_BT, scene_BT=scene_BT, **how)
            free = generate(self.network, text_BT, **how)
        columns = (
            self.painter.captions(text_BT),
            self.painter.scenes(scene_BT),
            self.painter.pictures(guided.image),
            self.painter.scenes(free.scene),
            self.painter.pictures(free.image),
            self.painter.pictures(image_BT),
        )
        return [list(row) for row in zip(*columns, strict=True)]


def check_manifest(manifest: dict[str, Any], config: GPTConfig) -> None:
    """Refuses tokens that do not fit the network.

    Raises:
        ValueError: names every stream and size that differ, and both values.
    """
    sizes = {
        (stream, size): (manifest[stream][size], getattr(config, f"{stream}_{size}"))
        for stream, size in (
            ("text", "vocabulary"),
            ("text", "length"),
            ("scene", "vocabulary"),
            ("scene", "grid"),
            ("image", "vocabulary"),
            ("image", "grid"),
        )
    }
    differing = {name: both for name, both in sizes.items() if both[0] != both[1]}
    if differing:
        found = ", ".join(
            f"{stream} {size} {of_tokens} (the network {of_network})"
            for (stream, size), (of_tokens, of_network) in differing.items()
        )
        settings = ", ".join(
            f"model.network.{stream}_{size} to {of_tokens}"
            for (stream, size), (of_tokens, _) in differing.items()
        )
        raise ValueError(
            f"the tokens have {found}: set {settings}, or tokenize with other tokenizers"
        )
