"""The judge of scenes: a small network that says how well a scene fits its caption.

In: a caption's text tokens, and what lies in a scene: things and kinds of stuff with their boxes.
Out: one number; of several scenes for one caption the highest fits best. A GPT that draws scenes
token by token draws too many things now and then, and cannot take them back; drawing several and
keeping the best mends that (best of N, as Make-A-Scene does with pictures and CLIP, arXiv
2203.13131 section 4.1, but before a picture is painted).
Axes: B captions, T text tokens, K scenes of a caption, N entries of a scene, F numbers an entry, D
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from mas.scene import CLASSES, HUMAN_IDS, THINGS, SceneMap
from mas.storage import load_network, save_network
from mas.text import PAD
from mas.things import find_things
from mas.vq import check_finite

NUMBERS = 6  # of an entry: class, box x0 y0 x1 y1, area; all but the class as shares of the picture
NOTHING = CLASSES  # class of the entries that fill a scene up
ENTRIES = 24  # of a scene at most; smaller ones are left out
PAIRED = 6  # things, large ones first, of which every two of different classes are compared
PAIR_NUMBERS = 4  # of a pair: how far right and down the second is, columns shared, gap
MOST = 7  # of one class that are told apart; more are as good as 7
LEAST_STUFF = 0.002  # share of the picture from which a kind of stuff counts


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Sizes of a SceneJudge; the defaults are 0.2M parameters for 1024 text tokens."""

    text_vocabulary: int  # of the tokenizer
    text_length: int  # tokens a caption
    width: int = 64  # channels of a token
    heads: int = 4  # of attention; divide the width
    hidden: int = 96  # channels inside the feed-forward layers
    text_layers: int = 1  # that read the caption
    scene_layers: int = 2  # that read the scene and look the caption up

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")


class SceneJudge(nn.Module):
    """Caption and scene to one number, higher where they belong together."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.words = nn.Embedding(config.text_vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(config.text_length, width))
        self.classes = nn.Embedding(NOTHING + 1, width)
        self.counts = nn.Embedding(MOST + 1, width)
        self.boxes = nn.Linear(2 * (NUMBERS - 1), width)
        self.pairs = nn.Linear(2 * width + PAIR_NUMBERS, width)
        layers = (config.text_layers, config.scene_layers)
        self.text, self.scene = (
            nn.ModuleList(
                kind(
                    width,
                    config.heads,
                    config.hidden,
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(count)
            )
            for kind, count in zip(
                (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer), layers, strict=True
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)
        for table in (self.words, self.classes, self.counts):
            nn.init.normal_(table.weight, std=width**-0.5)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SceneJudge:
        """Reads a folder of config.json + model.safetensors; frozen, evaluation mode."""
        network = load_network(cls, JudgeConfig, folder)
        check_finite(network, folder)
        return network

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json + model.safetensors."""
        save_network(self, folder)

    def forward(self, text_BT: Tensor, scenes_BKNF: Tensor) -> Tensor:
        """Scores B K of K scenes for each caption.

        Args:
            text_BT: long, padded with PAD.
            scenes_BKNF: float, what `describe_scenes` writes.
        """
        captions, candidates = scenes_BKNF.shape[:2]
        text_BT, scenes_BKNF = _trim(text_BT, scenes_BKNF)
        padded_BT = text_BT == PAD
        padded_BT[:, 0] = False  # attention to nothing at all is no number
        words_BTD = self.words(text_BT) + self.positions[: text_BT.shape[1]]
        for layer in self.text:
            words_BTD = layer(words_BTD, src_key_padding_mask=padded_BT)
        x_RND, missing_RN = self._embed(rearrange(scenes_BKNF, "b k n f -> (b k) n f"))
        read_RTD = repeat(words_BTD, "b t d -> (b k) t d", k=candidates)
        hidden_RT = repeat(padded_BT, "b t -> (b k) t", k=candidates)
        for layer in self.scene:
            x_RND = layer(
                x_RND,
                read_RTD,
                tgt_key_padding_mask=missing_RN,
                memory_key_padding_mask=hidden_RT,
            )
        present_RN1 = (~missing_RN)[..., None].float()
        pooled_RD = (self.norm(x_RND) * present_RN1).sum(1) / present_RN1.sum(1)
        return rearrange(self.head(pooled_RD), "(b k) 1 -> b k", b=captions)

    def _embed(self, entries_RNF: Tensor) -> tuple[Tensor, Tensor]:
        """Entries, and pairs of things, as R N D; and which of them are missing."""
        classes_RN, numbers_RNF = entries_RNF[..., 0].long(), entries_RNF[..., 1:]
        # Attention averages and cannot count: an entry is told how many there are of its class.
        alike_RN = (classes_RN[:, :, None] == classes_RN[:, None]).sum(-1).clamp(max=MOST)
        alike_RN[classes_RN == NOTHING] = 0  # how much a scene is filled up by says nothing
        boxes_RND = self.boxes(torch.cat([numbers_RNF, numbers_RNF.square()], -1))
        named_RND = self.classes(classes_RN)
        entries_RND = named_RND + self.counts(alike_RN) + boxes_RND
        missing_RN = classes_RN == NOTHING
        missing_RN[:, 0] = False
        # Nor does it compare: two things of different classes make an entry of their own, the lower
        # class first, so that "left of" looks the same whichever is larger.
        paired = min(PAIRED, classes_RN.shape[1])
        a, b = torch.triu_indices(paired, paired, 1, device=classes_RN.device)
        turned_RP = classes_RN[:, a] > classes_RN[:, b]
        first_RP, second_RP = torch.where(turned_RP, b, a), torch.where(turned_RP, a, b)
        pairs_RPD = self.pairs(
            torch.cat(
                [
                    _gather(named_RND, first_RP),
                    _gather(named_RND, second_RP),
                    _compare(_gather(numbers_RNF, first_RP), _gather(numbers_RNF, second_RP)),
                ],
                -1,
            )
        )
        things_RN = classes_RN < THINGS
        unpaired_RP = ~(things_RN[:, a] & things_RN[:, b]) | (classes_RN[:, a] == classes_RN[:, b])
        return torch.cat([entries_RND, pairs_RPD], 1), torch.cat([missing_RN, unpaired_RP], 1)

    @torch.inference_mode()
    def choose(self, text_BT: Tensor, scenes: Sequence[Sequence[SceneMap]]) -> list[int]:
        """Which of its scenes fits each caption best; the first of equals.

        Captions are judged one at a time, so that none depends on the batch around it.

        Args:
            text_BT: long.
            scenes: one or more for each caption, of any size.
        """
        chosen = []
        for text_T, candidates in zip(text_BT, scenes, strict=True):
            described_KNF = torch.from_numpy(describe_scenes(candidates)).to(text_T.device)
            chosen.append(int(self(text_T[None], described_KNF[None]).argmax()))
        return chosen


def _gather(x_RNF: Tensor, index_RP: Tensor) -> Tensor:
    return x_RNF.gather(1, repeat(index_RP, "r p -> r p f", f=x_RNF.shape[-1]))


def _compare(first_RPF: Tensor, second_RPF: Tensor) -> Tensor:
    """The numbers of a pair, of two boxes: R P 4."""
    left, _, right, foot, _ = first_RPF.unbind(-1)
    other_left, _, other_right, other_foot, _ = second_RPF.unbind(-1)
    narrower = torch.minimum(right - left, other_right - other_left).clamp(min=1e-3)
    gap = torch.maximum(left, other_left) - torch.minimum(right, other_right)
    return torch.stack(
        [
            (other_left + other_right - left - right) / 2,
            other_foot - foot,
            (-gap / narrower).clamp(-2, 1),
            gap,
        ],
        -1,
    )


def _trim(text_BT: Tensor, scenes_BKNF: Tensor) -> tuple[Tensor, Tensor]:
    """Both without the places that are empty in all of them; they change no score."""
    words = int((text_BT != PAD).sum(1).max())
    entries = int((scenes_BKNF[..., 0] != NOTHING).sum(-1).max())
    return text_BT[:, : max(1, words)], scenes_BKNF[:, :, : max(1, entries)]


def describe_scenes(scenes: Sequence[SceneMap]) -> np.ndarray:
    """Entries of scenes, float32 K N F: things, large ones first, then kinds of stuff."""
    described_KNF = np.zeros((len(scenes), ENTRIES, NUMBERS), np.float32)
    described_KNF[..., 0] = NOTHING
    for entries_NF, scene in zip(described_KNF, scenes, strict=True):
        found = _list_things(scene) + _list_stuff(scene)
        for entry, values in zip(entries_NF, found, strict=False):
            entry[:] = values
    return described_KNF


def _list_things(scene: SceneMap) -> list[tuple[float, ...]]:
    things = [thing for alike in find_things(scene).values() for thing in alike]
    listed = [(thing.class_id, *thing.box, float(thing.mask_HW.mean())) for thing in things]
    return sorted(listed, key=lambda entry: -entry[-1])


def _list_stuff(scene: SceneMap) -> list[tuple[float, ...]]:
    height, width = scene.labels.shape
    shares = np.bincount(scene.labels.ravel(), minlength=256) / scene.labels.size
    listed = []
    for class_id in range(THINGS, HUMAN_IDS.start):
        if shares[class_id] < LEAST_STUFF:
            continue
        mask_HW = scene.labels == class_id
        rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
        box = (
            columns[0] / width,
            rows[0] / height,
            (columns[-1] + 1) / width,
            (rows[-1] + 1) / height,
        )
        listed.append((class_id, *box, shares[class_id]))
    return sorted(listed, key=lambda entry: -entry[-1])
