"""Training of the reader: pictures to their scene maps, hours and places.

In: scene shards; hour and place from `park` in KEY.json where it is there. Out: a run folder that
`Reader.from_pretrained` reads. Only some pixels of a picture are learnt from: those near outlines
and of rare classes more often, which costs less and teaches more than all of them.
Axes: B batch, C channels, H W pixels, P sampled pixels, K classes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from mas.metrics import SceneMetrics
from mas.reader import Reader, ReaderConfig
from mas.scene import CLASSES, VOID, SceneMap
from mas.shards import ShardIndex, expand_shards
from train.data import Part, PictureData, PictureItems
from train.stage import Optimiser, Rows, Stage
from train.start import start_from
from train.totals import log_totals

UNKNOWN = -100  # cross-entropy passes over this target


@dataclass(frozen=True, kw_only=True)
class PixelChoice:
    """Which pixels a step learns from."""

    share: float = 0.125  # of a picture's pixels
    outline: float = 2.0  # how much more often a pixel on an outline is drawn
    balance: float = 0.4  # 0: classes as often as they are; 1: all equally often

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.outline < 0 or not 0 <= self.balance <= 1:
            raise ValueError("share is in (0, 1], outline not negative, balance in [0, 1]")

    def draw(self, labels_BHW: Tensor, edges_BHW: Tensor) -> Tensor:
        """Positions in the flattened pictures, long B P; one may come twice."""
        labels_BP = rearrange(labels_BHW, "b h w -> b (h w)").long()
        counts_K = torch.bincount(labels_BP.flatten(), minlength=VOID + 1).clamp(min=1)
        chances_K = (counts_K.sum() / counts_K) ** self.balance
        chances_K[VOID] = 0
        near_B1HW = F.max_pool2d(edges_BHW[:, None].float(), 3, stride=1, padding=1)
        near_BP = rearrange(near_B1HW, "b 1 h w -> b (h w)")
        # A picture without any label still needs chances that sum to more than nothing.
        chances_BP = chances_K[labels_BP] * (1 + self.outline * near_BP) + 1e-9
        count = max(1, round(self.share * labels_BP.shape[1]))
        return torch.multinomial(chances_BP, count, replacement=True)


class LabelMetrics(SceneMetrics):
    """What a reader's labels are worth; it reads no edges."""

    def compute(self) -> dict[str, float]:
        """As of SceneMetrics, without `edge_f1`."""
        return {name: value for name, value in super().compute().items() if name != "edge_f1"}


class Accuracy:
    """How often the reader is right about a fact, where it is known."""

    def __init__(self, fact: str) -> None:
        self.fact = fact
        self.counts = torch.zeros(2, dtype=torch.long)  # right, known

    def update(self, guess_B: Tensor, truth_B: Tensor) -> None:
        """Adds a batch; UNKNOWN truths are passed over."""
        known_B = truth_B != UNKNOWN
        right = ((guess_B == truth_B) & known_B).sum()
        self.counts += torch.stack([right, known_B.sum()]).cpu()

    @property
    def totals(self) -> tuple[Tensor, ...]:
        """What is summed up over ranks."""
        return (self.counts,)

    def compute(self) -> dict[str, float]:
        """The share; NaN where nothing is known."""
        right, known = self.counts.tolist()
        return {f"{self.fact}_accuracy": right / known if known else math.nan}


class ReaderTraining(Stage):
    """The reader with its losses.

    Args:
        network: sizes of the reader, and the hours and places it tells apart.
        optimiser: how it is trained.
        pixels: which pixels of a picture a step learns from.
        time_weight: of the loss of the hour.
        init_from: folder of a trained reader to go on from; its picture size may be another.
        seed: of the random numbers of a step; linked to seed_everything.
    """

    name = "reader"
    network: Reader

    def __init__(
        self,
        *,
        network: ReaderConfig,
        optimiser: Optimiser,
        pixels: PixelChoice = PixelChoice(),  # frozen
        time_weight: float = 0.2,
        init_from: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(Reader(network), optimiser, seed=seed)
        self.pixels, self.time_weight = pixels, time_weight
        if init_from is not None:
            start_from(self.network, init_from)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self._losses(batch)
        self.check(losses["loss"], batch)
        self.log_losses("train", losses, count=len(batch["labels"]))
        return losses["loss"]

    def on_validation_epoch_start(self) -> None:
        self._scenes = LabelMetrics()
        self._facts = {fact: Accuracy(fact) for fact in ("time", "place")}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        losses = self._losses(batch)
        reading = self.network.read(batch["image"].float() / 255)
        labels_BHW, edges_BHW = batch["labels"], batch["edges"]
        self._scenes.update(
            reading.labels_BHW, edges_BHW, true_labels_BHW=labels_BHW, true_edges_BHW=edges_BHW
        )
        places_B = self.network.place_logits(labels_BHW).argmax(1)
        for fact, guess_B in (("time", reading.times_B), ("place", places_B)):
            self._facts[fact].update(guess_B, self._targets(batch, fact))
        self.log_losses("validation", losses, count=len(labels_BHW))

    def on_validation_epoch_end(self) -> None:
        log_totals(self, [self._scenes, *self._facts.values()])

    def header(self) -> list[str]:
        return ["picture", "its scene", "as it was read"]

    @torch.no_grad()
    def rows(self, batch: dict[str, Any]) -> Rows:
        reading = self.network.read(batch["image"].float() / 255)
        return [
            [
                Image.fromarray(rearrange(image_CHW, "c h w -> h w c").cpu().numpy()),
                SceneMap.from_labels(labels_HW.cpu().numpy()).to_rgb(),
                SceneMap.from_labels(read_HW.cpu().numpy()).to_rgb(),
            ]
            for image_CHW, labels_HW, read_HW in zip(
                batch["image"], batch["labels"], reading.labels_BHW, strict=True
            )
        ]

    def _losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        labels_BHW = batch["labels"]
        pixels_BP = self.pixels.draw(labels_BHW, batch["edges"])
        logits_BPK, times_BK = self.network.logits(batch["image"].float() / 255, pixels_BP)
        losses = {
            "pixels": pixel_loss(logits_BPK, labels_BHW, pixels_BP),
            "time": _cross_entropy(times_BK, self._targets(batch, "time")),
            "place": _cross_entropy(
                self.network.place_logits(labels_BHW), self._targets(batch, "place")
            ),
        }
        # The place is read by a layer of its own from the true scene: its weight weighs nothing.
        total = losses["pixels"] + self.time_weight * losses["time"] + losses["place"]
        return {"loss": total, **losses}

    def _targets(self, batch: dict[str, Any], fact: str) -> Tensor:
        """Positions of the batch's hours or places in the config, B; UNKNOWN where it is not said.

        Raises:
            ValueError: the data names one that the config does not.
        """
        known = {"time": self.network.config.times, "place": self.network.config.places}[fact]
        unheard = sorted(set(batch[fact]) - {*known, ""})
        if known and unheard:
            raise ValueError(
                f"the data has the {fact} {unheard[0]!r}, model.network.{fact}s has {list(known)}"
            )
        positions = [known.index(name) if name in known else UNKNOWN for name in batch[fact]]
        return torch.tensor(positions, device=batch["labels"].device)


def pixel_loss(logits_BPK: Tensor, labels_BHW: Tensor, pixels_BP: Tensor) -> Tensor:
    """Cross-entropy of the labels at some pixels (positions in the flattened pictures)."""
    targets_BP = rearrange(labels_BHW, "b h w -> b (h w)").long().gather(1, pixels_BP)
    targets_BP[targets_BP >= CLASSES] = UNKNOWN
    return _cross_entropy(logits_BPK.flatten(0, 1), targets_BP.flatten())


def _cross_entropy(logits_NK: Tensor, targets_N: Tensor) -> Tensor:
    """Mean over the known targets; 0 where there is none."""
    total = F.cross_entropy(logits_NK.float(), targets_N, ignore_index=UNKNOWN, reduction="sum")
    return total / (targets_N != UNKNOWN).sum().clamp(min=1)


class FactItems(PictureItems):
    """Pictures with their scene maps, hours and places."""

    def item(self, index: int, rng: Any) -> dict[str, Any]:
        """As PictureItems, and `time` and `place`: texts, empty where nothing is said of them."""
        item = super().item(index, rng)
        content = json.loads(self.index.read(self.part[index]).files["json"])
        facts = content.get("park")
        facts = facts if isinstance(facts, dict) else {}  # it may be somebody's own field
        return item | {name: facts.get(name, "") for name in ("time", "place")}


class ReaderData(PictureData):
    """Pictures, scene maps and facts of scene shards; arguments as for PictureData."""

    photos = True
    scenes = True

    def open(self) -> int:
        wanted = ("jpg", "scene.png", "json")
        self.index = ShardIndex(expand_shards(self.input), extensions=wanted)
        return len(self.index)

    def pictures(self, part: Part) -> FactItems:
        return FactItems(self.index, part, size=self.size, flip=self.flip, photos=True, scenes=True)
