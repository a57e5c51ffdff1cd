"""Training of the judge of scenes: to tell a picture's own scene from spoilt ones.

In: scene shards with captions, the text tokenizer. Out: a run folder that
`SceneJudge.from_pretrained` reads. A step shows a caption with its scene and with copies that were
spoilt the way a GPT errs: one thing too many or too few, things in each other's places, another
class, another picture's scene, left for right where the caption names a side; and with another
picture of the very same things, which differs in all else a caption may say. The loss is the
cross-entropy of which one is true.
Axes: B captions, T text tokens, K scenes of a caption, N entries of a scene, F numbers an entry.
"""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mas.judge import NOTHING, JudgeConfig, SceneJudge, describe_scenes
from mas.scene import CLASS_NAMES, FACE_IDS, HUMAN_IDS, PERSON, THINGS, SceneMap
from mas.shards import ShardIndex, expand_shards, read_captions
from mas.text import Tokenizer, mirror_caption, names_side
from train.data import Part, StreamData
from train.stage import Optimiser, Rows, Stage
from train.start import start_from
from train.stream import Items

NEAR = 64  # pictures among which the other scene is looked for
ALIKE = 2048  # pictures among which one of the same things is looked for
HANDED = 3  # how much more often captions that name a side are drawn than others
KEPT = 200_000  # pictures whose entries a loader process keeps, about a kilobyte each
APART = 0.1  # of the picture's width: how far a thing is moved at least, if it has that room
LOOKS = 20  # at pictures of the same kinds of things, until one has as many of each
TRIES = 10  # to spoil a scene; a way may leave it as it is, as a class put for itself does
# Kind of thing of every class that is one, or part of one.
KINDS = {name: name for name in CLASS_NAMES[:THINGS]} | {
    name: CLASS_NAMES[PERSON] for name in CLASS_NAMES[HUMAN_IDS.start : FACE_IDS.stop]
}


class JudgeTraining(Stage):
    """The judge with its loss.

    Args:
        network: sizes of the judge; vocabulary and length are the tokenizer's.
        optimiser: how it is trained.
        init_from: folder of a trained judge to go on from.
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
        if init_from is not None:
            start_from(self.network, init_from)

    def setup(self, stage: str) -> None:
        """Raises ValueError when the tokenizer is of other sizes than the network."""
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

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self._losses(batch)
        self.check(losses["loss"], batch)
        self.log_losses("train", losses, count=len(batch["text"]))
        return losses["loss"]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log_losses("validation", self._losses(batch), count=len(batch["text"]))

    def rows(self, batch: dict[str, Any]) -> Rows:
        """Nothing: a score cannot be looked at."""
        return []

    def header(self) -> list[str]:
        return []

    def _losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The cross-entropy; how often the true scene wins, and of each pair by itself."""
        scores_BK = self.network(batch["text"], batch["scenes"]).float()
        true_B = torch.zeros(len(scores_BK), dtype=torch.long, device=scores_BK.device)
        return {
            "loss": F.cross_entropy(scores_BK, true_B),
            "accuracy": (scores_BK.argmax(1) == 0).float().mean(),
            "pairs": (scores_BK[:, :1] > scores_BK[:, 1:]).float().mean(),
        }


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
        """`key`, `text` (long T) and `scenes` (float K N F, the true one first).

        Raises:
            ShardError, SceneError: a sample that cannot be read.
        """
        fixed = rng is None
        rng = np.random.default_rng(index) if rng is None else rng
        seen = self._describe(index)
        true_NF, caption = seen.entries_NF, seen.captions[0]
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
        if names_side(caption):  # only here left and right can be told
            spoilt[0] = mirror_entries(true_NF)
        return {
            "key": seen.key,
            "text": self.tokenizer.encode([caption], warn=False)[0],
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
        self.tokenizer = Tokenizer.from_file(tokenizer)

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


def spoil(true_NF: np.ndarray, other_NF: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A scene that is not the true one, if only just; float32 N F as `describe_scenes` writes.

    A thing the caption does not speak of may be spoilt, too: nobody knows which one that is.

    Args:
        true_NF: entries of the true scene.
        other_NF: entries of any other scene.
        rng: of what is done.
    """
    ways = [way for least, way in WAYS.values() if _count_things(true_NF) >= least]
    for _ in range(TRIES):
        spoilt_NF = ways[rng.integers(len(ways))](true_NF.copy(), other_NF, rng)
        if not np.array_equal(spoilt_NF, true_NF):
            return spoilt_NF
    return _invent(true_NF, rng)


def mirror_entries(entries_NF: np.ndarray) -> np.ndarray:
    """The entries of the mirrored scene."""
    mirrored_NF = entries_NF.copy()
    present = entries_NF[:, 0] != NOTHING
    mirrored_NF[present, 1] = 1 - entries_NF[present, 3]
    mirrored_NF[present, 3] = 1 - entries_NF[present, 1]
    return mirrored_NF


def _draw_caption(captions: Sequence[str], rng: np.random.Generator) -> str:
    weights = np.where([names_side(caption) for caption in captions], HANDED, 1)
    return captions[rng.choice(len(captions), p=weights / weights.sum())]


def _list_classes(entries_NF: np.ndarray) -> tuple[float, ...]:
    """The classes of the things, in order of number, each as often as there is one."""
    return tuple(sorted(entries_NF[entries_NF[:, 0] < THINGS, 0].tolist()))


def _count_things(entries_NF: np.ndarray) -> int:
    return int((entries_NF[:, 0] < THINGS).sum())


def _draw_thing(entries_NF: np.ndarray, rng: np.random.Generator) -> int:
    return int(rng.integers(_count_things(entries_NF)))  # things come first


def _shift(entry: np.ndarray, across: float, down: float) -> None:
    """Moves an entry's box, as far as the picture goes."""
    entry[[1, 3]] += np.clip(across, -entry[1], 1 - entry[3])
    entry[[2, 4]] += np.clip(down, -entry[2], 1 - entry[4])


def _add(entries_NF: np.ndarray, _: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One more of something, elsewhere and up to a third smaller."""
    more = entries_NF[_draw_thing(entries_NF, rng)].copy()
    _shift(more, _far(more, rng), rng.normal(0, 0.03))
    scale = rng.uniform(0.7, 1.0)  # about its feet
    middle, half = (more[1] + more[3]) / 2, (more[3] - more[1]) / 2 * scale
    more[[1, 3]] = middle - half, middle + half
    more[2] = more[4] - (more[4] - more[2]) * scale
    more[5] *= scale**2
    return np.concatenate([more[None], entries_NF[:-1]])


def _invent(entries_NF: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A thing where there may be none at all."""
    (x, y), (width, height) = rng.uniform(0, 0.5, 2), rng.uniform(0.1, 0.5, 2)
    thing = (rng.integers(THINGS), x, y, x + width, y + height, width * height)
    return np.concatenate([np.array([thing], entries_NF.dtype), entries_NF[:-1]])


def _remove(entries_NF: np.ndarray, _: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    kept_NF = np.delete(entries_NF, _draw_thing(entries_NF, rng), axis=0)
    nothing = np.zeros_like(entries_NF[:1])
    nothing[0, 0] = NOTHING
    return np.concatenate([kept_NF, nothing])


def _move(entries_NF: np.ndarray, _: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    entry = entries_NF[_draw_thing(entries_NF, rng)]
    _shift(entry, _far(entry, rng), rng.normal(0, 0.08))
    return entries_NF


def _swap(entries_NF: np.ndarray, other_NF: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two things of two classes in each other's places: middles across, feet down."""
    a = _draw_thing(entries_NF, rng)
    others = np.flatnonzero((entries_NF[:, 0] < THINGS) & (entries_NF[:, 0] != entries_NF[a, 0]))
    if not len(others):
        return _move(entries_NF, other_NF, rng)
    b = rng.choice(others)
    across = (entries_NF[b, [1, 3]].sum() - entries_NF[a, [1, 3]].sum()) / 2
    down = entries_NF[b, 4] - entries_NF[a, 4]
    _shift(entries_NF[a], across, down)
    _shift(entries_NF[b], -across, -down)
    return entries_NF


def _replace(entries_NF: np.ndarray, other_NF: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All things of one class become another class, one of the other scene if it has things."""
    old = entries_NF[_draw_thing(entries_NF, rng), 0]
    things = _count_things(other_NF)
    new = other_NF[rng.integers(things), 0] if things else rng.integers(THINGS)
    entries_NF[entries_NF[:, 0] == old, 0] = new
    return entries_NF


def _exchange(_: np.ndarray, other_NF: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return other_NF


def _far(entry: np.ndarray, rng: np.random.Generator) -> float:
    """How far across, to the other side where the drawn one leaves no room."""
    side, distance = rng.choice([-1, 1]), rng.uniform(APART, 0.6)
    room = entry[1] if side < 0 else 1 - entry[3]
    return float((side if room >= APART else -side) * distance)


Way = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
# How a scene is spoilt: the things it takes, and what is done. What GPTs do most comes twice.
WAYS: Mapping[str, tuple[int, Way]] = {
    "add": (1, _add),
    "add again": (1, _add),
    "remove": (1, _remove),
    "move": (1, _move),
    "move again": (1, _move),
    "swap": (2, _swap),
    "replace": (1, _replace),
    "exchange": (0, _exchange),
}
