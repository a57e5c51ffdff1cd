"""Training of the judge of scenes: to tell a picture's own scene from spoilt ones.

In: scene shards with captions, the text tokenizer. Out: a run folder that
`SceneJudge.from_pretrained` reads. A step shows a caption with its scene and with copies that were
spoilt the way a GPT errs: one thing too many or too few, things in each other's places, another
class, another picture's scene, left for right where the caption names a side; and with another
picture of the very same things, which differs in all else a caption may say. The loss is the
cross-entropy of which one is true, and, where a caption says how things stand to each other, of
which caption is true of the scene, this one or its opposite.
Axes: B captions, T text tokens, K scenes of a caption, N entries of a scene, F numbers an entry.
"""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mas.judge import JudgeConfig, SceneJudge, describe_scenes
from mas.scene import CLASS_NAMES, FACE_IDS, HUMAN_IDS, PERSON, THINGS, SceneMap
from mas.shards import ShardIndex, expand_shards, read_captions
from mas.storage import file_hash
from mas.text import PAD, Tokenizer, contradict_caption, mirror_caption, names_side
from train.assemble import check_origin
from train.data import Part, StreamData
from train.spoil import mirror_entries, spoil
from train.stage import Optimiser, Rows, Stage
from train.start import start_from
from train.stream import Items
from train.totals import log_totals

NEAR = 64  # pictures among which the other scene is looked for
ALIKE = 2048  # pictures among which one of the same things is looked for
PLACED = 3  # how much more often captions that say where things stand are drawn than others
KEPT = 200_000  # pictures whose entries a loader process keeps, about a kilobyte each
LOOKS = 20  # at pictures of the same kinds of things, until one has as many of each
# Kind of thing of every class that is one, or part of one.
KINDS = {name: name for name in CLASS_NAMES[:THINGS]} | {
    name: CLASS_NAMES[PERSON] for name in CLASS_NAMES[HUMAN_IDS.start : FACE_IDS.stop]
}


class Scores(NamedTuple):
    """What the judge says of a batch."""

    scenes_BK: Tensor  # of a caption's scenes, the true one first
    ahead_P: Tensor  # of the opposite caption, of P captions that have one

    @property
    def scene_loss(self) -> Tensor:
        """Cross-entropy of which scene is true."""
        true_B = torch.zeros(len(self.scenes_BK), dtype=torch.long, device=self.scenes_BK.device)
        return F.cross_entropy(self.scenes_BK, true_B)

    @property
    def caption_loss(self) -> Tensor:
        """Cross-entropy of which caption is true; 0 where none has an opposite."""
        return F.softplus(-self.ahead_P).sum() / max(1, len(self.ahead_P))

    @property
    def best(self) -> Tensor:
        """How often the true scene wins."""
        return (self.scenes_BK.argmax(1) == 0).float().mean()

    @property
    def pairs(self) -> Tensor:
        """How often it is better than one that is not true."""
        return (self.scenes_BK[:, :1] > self.scenes_BK[:, 1:]).float().mean()

    @property
    def told(self) -> Tensor:
        """How often a true caption is better than its opposite; 0 where none has one."""
        return (self.ahead_P > 0).float().sum() / max(1, len(self.ahead_P))


class JudgeTotals:
    """Losses and hits over a whole validation set; few captions have an opposite."""

    def __init__(self) -> None:
        self.sums = torch.zeros(5, dtype=torch.double)
        self.counts = torch.zeros(5, dtype=torch.double)

    def update(self, scores: Scores) -> None:
        """Adds a batch."""
        captions, opposed = len(scores.scenes_BK), len(scores.ahead_P)
        counts = torch.tensor([captions] * 3 + [opposed] * 2)
        means = (scores.scene_loss, scores.best, scores.pairs, scores.caption_loss, scores.told)
        self.sums += torch.stack(means).detach().cpu() * counts
        self.counts += counts

    @property
    def totals(self) -> tuple[Tensor, ...]:
        """What is summed up over ranks."""
        return self.sums, self.counts

    def compute(self) -> dict[str, float]:
        """`loss`, `accuracy` and `pairs`; `captions`, where any has an opposite."""
        scenes, accuracy, pairs, captions, told = (self.sums / self.counts).tolist()
        loss = scenes + captions if self.counts[-1] else scenes
        return {"loss": loss, "accuracy": accuracy, "pairs": pairs, "captions": told}


class JudgeTraining(Stage):
    """The judge with its loss.

    Args:
        network: sizes of the judge; vocabulary and length are the tokenizer's.
        optimiser: how it is trained.
        init_from: folder of a trained judge to go on from, of the same tokenizer.
        seed: of the random numbers of a step; linked to seed_everything.
    """

    name = "judge"
    network: SceneJudge

    def __init__(
        self,
        *,
        network: JudgeConfig,
        optimiser: Optimiser,
        init_from: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(SceneJudge(network), optimiser, seed=seed)
        self.init_from = init_from
        if init_from is not None:
            start_from(self.network, init_from)

    def setup(self, stage: str) -> None:
        """Raises ValueError when the tokenizer is of other sizes than the network, or another."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit
        config, found = self.network.config, data.tokenizer
        for name, size in (
            ("text_vocabulary", found.vocab_size),
            ("text_length", found.length),
        ):
            if getattr(config, name) != size:
                raise ValueError(
                    f"the tokenizer has {name} {size}, the network {getattr(config, name)}: set "
                    f"model.network.{name} to {size}"
                )
        before, instead = self.init_from, "leave out model.init_from"
        if self.checkpoint is not None:
            before = str(Path(self.checkpoint).parent.parent)
            instead = "train a new judge in another folder"
        if before is not None:
            file = data.tokenizer_file
            check_origin(before, "judge", stream="text", path=file, instead=instead)
        self.origin = {"text": {"sha256": file_hash(data.tokenizer_file)}}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        scores = self._score(batch)
        loss = scores.scene_loss + scores.caption_loss
        self.check(loss, batch)
        losses = {"loss": loss, "accuracy": scores.best, "pairs": scores.pairs}
        self.log_losses("train", losses, count=len(batch["text"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._totals = JudgeTotals()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._totals.update(self._score(batch))

    def on_validation_epoch_end(self) -> None:
        log_totals(self, [self._totals])

    def rows(self, batch: dict[str, Any]) -> Rows:
        """Nothing: a score cannot be looked at."""
        return []

    def header(self) -> list[str]:
        return []

    def _score(self, batch: dict[str, Any]) -> Scores:
        scores_BK = self.network(batch["text"], batch["scenes"]).float()
        placed_B = (batch["opposite"] != PAD).any(1)
        opposite_PT, scenes_PKNF = batch["opposite"][placed_B], batch["scenes"][placed_B, :1]
        if len(opposite_PT):
            opposed_P = self.network(opposite_PT, scenes_PKNF).float()[:, 0]
        else:
            opposed_P = scores_BK[placed_B, 0]
        return Scores(scores_BK, scores_BK[placed_B, 0] - opposed_P)


class _Seen(NamedTuple):
    """What is kept of a picture."""

    key: str
    captions: list[str]
    entries_NF: np.ndarray


class JudgeItems:
    """A caption, its scene, and spoilt copies of it."""

    def __init__(
        self,
        index: ShardIndex,
        part: Part | list[int],
        *,
        tokenizer: Tokenizer,
        candidates: int,
        flip: bool,
        naming: re.Pattern[str] | None = None,
    ) -> None:
        self.index, self.part, self.tokenizer = index, part, tokenizer
        self.candidates, self.flip, self.naming = candidates, flip, naming
        self.seen: dict[int, _Seen] = {}
        self.blocks: dict[int, dict[frozenset[str], list[int]]] = {}
        self.kinds: dict[int, frozenset[str]] = {}  # of the pictures in these

    def __len__(self) -> int:
        return len(self.part)

    def item(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        """`key`, `text` (long T), `opposite` and `scenes` (float K N F, the true one first).

        `opposite` is the caption that contradicts the true scene, all padding where `text` says
        nothing of where things stand.

        Raises:
            ShardError, SceneError: a sample that cannot be read.
        """
        fixed = rng is None
        rng = np.random.default_rng(index) if rng is None else rng
        seen = self._describe(index)
        # Validation takes them in turn: first captions seldom say where things stand.
        true_NF, caption = seen.entries_NF, seen.captions[index % len(seen.captions)]
        alike_NF = self._find_alike(index, rng)
        if not fixed:
            caption = _draw_caption(seen.captions, rng)
            if self.flip and rng.random() < 0.5:
                true_NF, caption = mirror_entries(true_NF), mirror_caption(caption)
                alike_NF = alike_NF if alike_NF is None else mirror_entries(alike_NF)
        other_NF = self._describe(self._neighbour(index, rng)).entries_NF
        spoilt = [spoil(true_NF, other_NF, rng) for _ in range(self.candidates - 1)]
        if alike_NF is not None and not np.array_equal(alike_NF, true_NF):
            spoilt[-1] = alike_NF
        opposite = contradict_caption(caption)
        text_T, opposite_T = self.tokenizer.encode([caption, opposite], warn=False)
        if torch.equal(text_T, opposite_T):  # it says nothing of that, or is cut before it does
            opposite_T = torch.full_like(text_T, PAD)
        if names_side(caption):  # only here left and right can be told
            spoilt[0] = mirror_entries(true_NF)
        elif opposite != caption:  # and here near and far
            spoilt[0] = spoil(true_NF, other_NF, rng, way="swap")
        return {
            "key": seen.key,
            "text": text_T,
            "opposite": opposite_T,
            "scenes": torch.from_numpy(np.stack([true_NF, *spoilt])),
        }

    def _neighbour(self, index: int, rng: np.random.Generator) -> int:
        """Any picture nearby: soon all of them are kept."""
        first = index - index % NEAR
        return int(rng.integers(first, min(first + NEAR, len(self.part))))

    def _find_alike(self, index: int, rng: np.random.Generator) -> np.ndarray | None:
        """Entries of another picture of the same things and other captions, if one is nearby."""
        mine = self._describe(index)
        classes = _list_classes(mine.entries_NF)
        if not classes:
            return None
        block = index // ALIKE
        if block not in self.blocks:
            by_kinds = self.blocks[block] = defaultdict(list)
            for other in range(block * ALIKE, min((block + 1) * ALIKE, len(self.part))):
                self.kinds[other] = self._list_kinds(other)
                by_kinds[self.kinds[other]].append(other)
        alike = self.blocks[block][self.kinds[index]]
        for other in rng.permutation(alike)[:LOOKS].tolist():
            seen = self._describe(other)
            # What is said of both cannot tell them apart; the picture itself is among these.
            said = set(seen.captions) & set(mine.captions)
            if _list_classes(seen.entries_NF) == classes and not said:
                return seen.entries_NF
        return None

    def _list_kinds(self, index: int) -> frozenset[str]:
        """Names of the kinds of things in a picture, as preprocessing has counted them."""
        content = json.loads(self.index.read(self.part[index]).files["json"])
        names = content.get("scene", {}).get("classes", {})
        return frozenset(KINDS[name] for name in names if name in KINDS)

    def _describe(self, index: int) -> _Seen:
        """Key, captions and entries of a picture; kept, since finding things takes longest."""
        if index not in self.seen:
            sample = self.index.read(self.part[index])
            scene = SceneMap.from_png(io.BytesIO(sample.files["scene.png"]))
            captions = read_captions(sample)
            if self.naming is not None:
                captions = [caption for caption in captions if self.naming.search(caption)]
            captions = captions or [""]
            seen = _Seen(sample.key, captions, describe_scenes([scene])[0])
            if len(self.seen) >= KEPT:
                return seen
            self.seen[index] = seen
        return self.seen[index]


class JudgeData(StreamData):
    """Captions and scenes of scene shards.

    Args:
        input: folder of scene shards, 'DIR/{00000..00099}.tar' or one tar.
        tokenizer: the text tokenizer's tokenizer.json.
        candidates: scenes a caption, the true one among them.
        words: only captions with one of these words, in any case. Few captions say where things
            stand, so a judge that sees all of them takes long to learn it; a second run on those
            with "left", "behind" and the like is quick.
        batch_size: captions a step and rank.
        workers: processes that read scenes; 0 reads in the training process.
        holdout: every n-th picture is kept for validation.
        flip: mirror half of the training scenes, left and right exchanged in their captions.
        seed: of the order and of what is spoilt; linked to seed_everything.
    """

    def __init__(
        self,
        *,
        input: str,
        tokenizer: str,
        candidates: int = 6,
        words: list[str] | None = None,
        batch_size: int = 128,
        workers: int = 2,
        holdout: int = 50,
        flip: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, workers=workers, holdout=holdout, seed=seed)
        if candidates < 2:
            raise ValueError(f"data.candidates is {candidates}, use 2 or more")
        self.input, self.candidates, self.words, self.flip = input, candidates, words, flip
        self.tokenizer_file, self.tokenizer = tokenizer, Tokenizer.from_file(tokenizer)

    def open(self) -> int:
        wanted = ("scene.png", "txt", "json")
        self.index = ShardIndex(expand_shards(self.input), extensions=wanted)
        return len(self.index)

    def items(self, part: Part) -> Items:
        """Raises ValueError where no caption has a word that is asked for."""
        if not self.words:
            return self._items(part, None)
        either = "|".join(re.escape(word) for word in self.words)
        naming = re.compile(rf"\b(?:{either})\b", re.IGNORECASE)
        every = (part[place] for place in range(len(part)))
        chosen = [index for index in every if self._has(index, naming)]
        if not chosen and part.part == "train":
            named = ", ".join(self.words)
            raise ValueError(f"{self.input}: no caption has one of data.words ({named})")
        return self._items(chosen, naming)

    def _items(self, part: Part | list[int], naming: re.Pattern[str] | None) -> JudgeItems:
        return JudgeItems(
            self.index,
            part,
            tokenizer=self.tokenizer,
            candidates=self.candidates,
            flip=self.flip,
            naming=naming,
        )

    def _has(self, index: int, naming: re.Pattern[str]) -> bool:
        return any(naming.search(caption) for caption in read_captions(self.index.read(index)))


def _draw_caption(captions: Sequence[str], rng: np.random.Generator) -> str:
    placed = [contradict_caption(caption) != caption for caption in captions]
    weights = np.where(placed, PLACED, 1)
    return captions[rng.choice(len(captions), p=weights / weights.sum())]


def _list_classes(entries_NF: np.ndarray) -> tuple[float, ...]:
    """The classes of the things, in order of number, each as often as there is one."""
    return tuple(sorted(entries_NF[entries_NF[:, 0] < THINGS, 0].tolist()))
