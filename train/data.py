"""What the trainings read: pictures and scenes from scene shards, tokens from token shards.

In: folders written by `mas preprocess` and `mas tokenize`. Out: batches (dicts of tensors), by
`stream`, so that a run resumed in mid-epoch goes on with exactly the next sample. Every
`holdout`-th picture is kept for validation, counted in shard order, which is the same in scene
shards and token shards: a picture held out from one stage is held out from all.
Axes: B batch, C channels, H W pixels, T tokens.
"""

from __future__ import annotations

import bisect
import io
import itertools
import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from mas.scene import SceneMap
from mas.shards import ShardIndex, TokenShards, expand_shards
from mas.storage import file_hash
from mas.text import Tokenizer
from train.boxes import draw_boxes, face_boxes, thing_boxes
from train.repeat import Repeated, Repeats, read_presence
from train.stream import (
    Fixed,
    Items,
    Numbers,
    PlainLoader,
    Stream,
    StreamLoader,
)

logger = logging.getLogger(__name__)


class Part:
    """The training or the validation part of `count` items."""

    def __init__(self, count: int, *, holdout: int, part: Literal["train", "validation"]) -> None:
        if holdout < 2:
            raise ValueError(f"data.holdout is {holdout}: every n-th picture is held out, n ≥ 2")
        held = count // holdout
        self.holdout, self.part = holdout, part
        self.length = held if part == "validation" else count - held

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> int:
        if self.part == "validation":
            return (place + 1) * self.holdout - 1
        return place + place // (self.holdout - 1)


class PictureItems:
    """Photos and scene maps of scene shards, `size` pixels a side."""

    def __init__(
        self,
        index: ShardIndex,
        part: Part,
        *,
        size: int,
        flip: bool,
        photos: bool,
        scenes: bool,
        boxes: int = 0,
    ) -> None:
        self.index, self.part, self.size = index, part, size
        self.flip, self.photos, self.scenes, self.boxes = flip, photos, scenes, boxes

    def __len__(self) -> int:
        return len(self.part)

    def item(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        """`key`, and as asked for `image` (uint8 C H W), `labels` (uint8 H W), `edges` (bool H W).

        With `boxes` also that many `faces` and `things` of the scene (int64 boxes × 4), drawn by
        `rng`; all zeros where there are fewer.

        Raises:
            ValueError: a picture of another size, or one that cannot be read.
        """
        sample = self.index.read(self.part[index], only=("jpg", "scene.png"))
        flipped = self.flip and rng is not None and rng.random() < 0.5
        item: dict[str, Any] = {"key": sample.key}
        if self.photos:
            image_HWC = self._read_photo(sample.key, sample.files["jpg"])
            image_HWC = image_HWC[:, ::-1] if flipped else image_HWC
            item["image"] = torch.from_numpy(image_HWC.transpose(2, 0, 1).copy())
        if self.scenes or self.boxes:
            scene = SceneMap.from_png(io.BytesIO(sample.files["scene.png"]))
            self._check(sample.key, scene.size)
            scene = scene.mirrored() if flipped else scene
        if self.scenes:
            item["labels"] = torch.from_numpy(scene.labels.copy())
            item["edges"] = torch.from_numpy(scene.edges.copy())
        if self.boxes:
            for name, find in (("faces", face_boxes), ("things", thing_boxes)):
                item[name] = torch.from_numpy(draw_boxes(find(scene), self.boxes, rng))
        return item

    def _read_photo(self, key: str, content: bytes) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(content), formats=["JPEG", "PNG", "WEBP"]) as photo:
                self._check(key, photo.size)
                return np.asarray(photo.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"photo {key} cannot be read: {error}") from error

    def _check(self, key: str, size: tuple[int, int]) -> None:
        if size != (self.size, self.size):
            raise ValueError(
                f"picture {key} is {size[0]} x {size[1]} pixels, the network takes "
                f"{self.size} x {self.size}: preprocess with --photo.size {self.size}, "
                "or set model.network.size"
            )


class TokenItems:
    """One caption, the scene and the image of a picture, as tokens.

    With a tokenizer and `bpe_dropout`, a caption's tokens are turned into text and encoded anew,
    each merge skipped with that probability (arXiv 1910.13267). With `flip`, half of the samples in
    training are mirrored pictures, where the shards hold them.
    """

    def __init__(
        self,
        shards: TokenShards,
        part: Part,
        *,
        flip: bool = True,
        tokenizer: Tokenizer | None = None,
        bpe_dropout: float = 0.0,
    ) -> None:
        self.shards, self.part = shards, part
        self.flip = flip and shards.has_mirrored
        self.tokenizer, self.bpe_dropout = tokenizer, bpe_dropout
        counts = [shard["pictures"] for shard in shards.manifest["shards"]]
        self.stops = list(itertools.accumulate(counts))  # of the shards, in pictures

    def __len__(self) -> int:
        return len(self.part)

    def item(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        """`key` and `text`, `scene`, `image`: long T; a caption at random, without `rng` the first.

        Raises:
            ShardError: a shard that is damaged, by name.
        """
        picture = self.part[index]
        flipped = self.flip and rng is not None and rng.random() < 0.5
        text_CT, scene, image = self.shards.mirrored(picture) if flipped else self.shards[picture]
        caption = 0 if rng is None else int(rng.integers(len(text_CT)))
        streams = {"text": text_CT[caption], "scene": scene, "image": image}
        tensors = {name: torch.from_numpy(np.int64(tokens)) for name, tokens in streams.items()}
        if rng is not None and self.tokenizer is not None and self.bpe_dropout:
            words = self.tokenizer.decode(tensors["text"][None])
            seed = int(rng.integers(2**63))
            tensors["text"] = self.tokenizer.encode(words, dropout=self.bpe_dropout, seed=seed)[0]
        return {"key": self._key(picture), **tensors}

    def _key(self, picture: int) -> str:
        """SHARD/ROW, by which the picture can be found."""
        shard = bisect.bisect_right(self.stops, picture)
        row = picture - (self.stops[shard - 1] if shard else 0)
        return f"{self.shards.manifest['shards'][shard]['name']}/{row}"


class StreamData(LightningDataModule):
    """Training and validation loaders over `items`, one file format per subclass."""

    def __init__(self, *, batch_size: int, workers: int, holdout: int, seed: int) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
            if value < least:
                raise ValueError(f"data.{name} is {value}, use {least} or more")
        self.batch_size, self.workers, self.holdout, self.seed = batch_size, workers, holdout, seed

    def open(self) -> int:
        """Opens the input and returns how many pictures it holds."""
        raise NotImplementedError

    def items(self, part: Part) -> Items:
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Raises ValueError when there is too little data for one batch of all ranks."""
        self.count = count = self.open()
        self.training = self.items(Part(count, holdout=self.holdout, part="train"))
        self.validation = self.items(Part(count, holdout=self.holdout, part="validation"))
        rank, world = self._rank()
        wanted = self.batch_size * world
        if len(self.training) < wanted:
            raise ValueError(
                f"{count} pictures ({len(self.training)} without those held out) are fewer than "
                f"one batch of {wanted}: {_advise('batch_size', len(self.training) // world, 1)}"
            )
        if 0 < len(self.validation) < world:
            raise ValueError(
                f"{len(self.validation)} pictures are held out for {world} processes, so some "
                f"would have none to validate on: {_advise('holdout', count // world, 2)}"
            )
        self.training.item(0, None)  # what is wrong with all of the data shows here, in one line
        if rank == 0:
            logger.info(
                "%d pictures to train on, %d held out", len(self.training), len(self.validation)
            )
            if not len(self.validation):
                logger.warning(
                    "nothing is validated, so no best.ckpt and no pictures/ come: of %d pictures "
                    "every %d-th would be held out, %s",
                    *(count, self.holdout),
                    _advise("holdout", count if count < 4 else count // 2, 2),
                )

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint says of the data; Lightning calls it."""
        return {"pictures": self.count}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Tells where the data is no more what it was; Lightning calls it after `setup`."""
        before = state_dict["pictures"]
        if before != self.count and self._rank()[0] == 0:
            logger.warning(
                "data.input held %d pictures until this checkpoint, holds %d now: their order is "
                "another one, and pictures that were trained on may be held out now, so that the "
                "validation flatters; where that matters, start anew in another folder",
                *(before, self.count),
            )

    def train_dataloader(self) -> StreamLoader:
        rank, world = self._rank()
        numbers = Numbers(self.batch_size, rank=rank, world=world)
        return StreamLoader(Stream(self.training, seed=self.seed), numbers, workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        rank, world = self._rank()
        return PlainLoader(
            Fixed(self.validation, rank=rank, world=world),
            batch_size=self.batch_size,
            workers=min(self.workers, 1),
        )

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """All but the numbers of the samples, which nothing but the CPU looks at."""
        moved = {name: value for name, value in batch.items() if name != "number"}
        return batch | super().transfer_batch_to_device(moved, device, dataloader_idx)

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def _advise(name: str, most: int, least: int) -> str:
    """What helps where pictures are few; `least` is the smallest value the setting may have."""
    return "give more data" + (f", or set data.{name} to {most} or less" if most >= least else "")


class PictureData(StreamData):
    """Scene shards for VQ-SEG and VQ-GAN.

    Args:
        input: folder of scene shards, 'DIR/{00000..00099}.tar' or one tar.
        batch_size: pictures a step and rank.
        workers: processes that decode pictures; 0 decodes in the training process.
        holdout: every n-th picture is kept for validation.
        flip: mirror half of the training pictures (left and right body parts swap names).
        repeat: class name: how many times an epoch a training picture that holds it comes.
        repeat_below: training pictures with a class that fewer than this share of them hold come
            more often, by the root of how much rarer it is; 0 = all alike.
        seed: of the order and the flips; linked to seed_everything.
        size: pixels a side; linked to the network.
    """

    photos = False  # which files of a sample a stage reads
    scenes = False
    boxes = 0  # faces and things of the scene that a picture brings along

    def __init__(
        self,
        *,
        input: str,
        batch_size: int = 16,
        workers: int = 2,
        holdout: int = 50,
        flip: bool = True,
        repeat: dict[str, float] | None = None,
        repeat_below: float = 0.0,
        seed: int = 0,
        size: int = 256,
    ) -> None:
        super().__init__(batch_size=batch_size, workers=workers, holdout=holdout, seed=seed)
        self.input, self.flip, self.size = input, flip, size
        self.repeats = Repeats(below=repeat_below, named=repeat or {})

    def open(self) -> int:
        reads = (
            ("jpg", self.photos),
            ("scene.png", self.scenes or self.boxes > 0),
            ("json", bool(self.repeats)),
        )
        wanted = [name for name, on in reads if on]
        self.index = ShardIndex(expand_shards(self.input), extensions=tuple(wanted))
        return len(self.index)

    def items(self, part: Part) -> Items:
        items = self.pictures(part)
        if part.part == "validation" or not self.repeats:
            return items
        samples = (self.index.read(part[place], only=("json",)) for place in range(len(part)))
        factors_N = self.repeats.factors(read_presence(samples, len(part)))
        repeated = Repeated(items, factors_N, seed=self.seed)
        logger.info("%d pictures, repeated: %d an epoch", len(items), len(repeated))
        return repeated

    def pictures(self, part: Part) -> PictureItems:
        """The pictures of a part, each once."""
        return PictureItems(
            self.index,
            part,
            size=self.size,
            flip=self.flip,
            photos=self.photos,
            scenes=self.scenes,
            boxes=self.boxes,
        )


class SceneData(PictureData):
    """The scene maps of scene shards; arguments as for PictureData."""

    scenes = True


class PhotoData(PictureData):
    """The photos of scene shards.

    Args:
        boxes: faces and things of its scene that a photo brings along; linked to model.crops.
        labels: whether a photo brings the labels of its scene along; linked to model.focus.
        arguments: as for PictureData.
    """

    photos = True

    def __init__(self, *, boxes: int = 0, labels: bool = False, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.boxes, self.scenes = boxes, labels


class PairData(PictureData):
    """The photos and the scene maps of scene shards.

    Args:
        boxes: faces and things of its scene that a photo brings along; linked to model.crops.
        arguments: as for PictureData.
    """

    photos = True
    scenes = True

    def __init__(self, *, boxes: int = 0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.boxes = boxes


class TokenData(StreamData):
    """Token shards for the GPT.

    Args:
        input: folder written by `mas tokenize`.
        batch_size: pictures a step and rank.
        workers: processes that read; 0 reads in the training process.
        holdout: every n-th picture is kept for validation.
        flip: mirror half of the training pictures, captions included, where the tokens were made
            with --mirror; others are taken as they are.
        bpe_dropout: probability with which a merge is skipped when captions are encoded anew in
            training; 0 takes the tokens as they are stored.
        tokenizer: the tokenizer.json behind the text tokens; needed by bpe_dropout.
        seed: of the order, the flips and the choice of captions; linked to seed_everything.
    """

    def __init__(
        self,
        *,
        input: str,
        batch_size: int = 16,
        workers: int = 0,
        holdout: int = 50,
        flip: bool = True,
        bpe_dropout: float = 0.0,
        tokenizer: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, workers=workers, holdout=holdout, seed=seed)
        if not 0 <= bpe_dropout < 1:
            raise ValueError(f"data.bpe_dropout is {bpe_dropout}, use 0 ≤ p < 1")
        if bpe_dropout and tokenizer is None:
            raise ValueError("data.bpe_dropout needs data.tokenizer, the captions' tokenizer.json")
        self.input, self.flip = input, flip
        self.bpe_dropout, self.tokenizer_file = bpe_dropout, tokenizer

    def open(self) -> int:
        self.shards = TokenShards(Path(self.input))
        self.tokenizer: Tokenizer | None = None
        if self.bpe_dropout and self.tokenizer_file is not None:
            self.tokenizer = Tokenizer.from_file(self.tokenizer_file)
            if file_hash(self.tokenizer_file) != self.shards.manifest["text"]["sha256"]:
                raise ValueError(
                    f"{self.tokenizer_file} is not the tokenizer of {self.input}: give the one "
                    "that mas tokenize was given"
                )
        return len(self.shards)

    def items(self, part: Part) -> Items:
        return TokenItems(
            self.shards,
            part,
            flip=self.flip,
            tokenizer=self.tokenizer,
            bpe_dropout=self.bpe_dropout,
        )
