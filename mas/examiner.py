"""A model and a reader at work: what is real and what is generated, seen with the same eyes.

In: cases. Out: scenes, pictures, and what the reader makes of them. Split off mas/evaluate.py.
Axes: B pictures, C colours, H W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from mas.cases import Case, resize
from mas.filter import StreamSampling, by_stream
from mas.generate import generate
from mas.kept_tokens import KeptTokens
from mas.model import MakeAScene
from mas.reader import Reader
from mas.request import room_for
from mas.scene import SceneMap
from mas.sequence import Streams


@dataclass(kw_only=True)
class Made:
    """What was generated, or what is real, for some cases."""

    scenes: list[SceneMap] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)  # uint8 H W C
    readings: list[np.ndarray] = field(default_factory=list)  # labels, of the reader's size
    times: list[str | None] = field(default_factory=list)
    places: list[str | None] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)  # D each
    tokens: list[Streams] = field(default_factory=list)  # one a batch


class Examiner:
    """A model and a reader, put to work batch by batch."""

    def __init__(
        self,
        model: MakeAScene,
        reader: Reader | None,
        *,
        seed: int,
        batch: int,
        kept: KeptTokens | None = None,
    ) -> None:
        self.model, self.seed, self.batch, self.kept = model, seed, batch, kept
        self.reader = reader.to(model.device) if reader else None
        self.bar: tqdm = tqdm(disable=True)
        self._words: dict[str, Tensor] = {}  # caption -> text tokens, 1 T

    @property
    def size(self) -> int:
        """Pixels a side of the model's scenes, in which everything is judged."""
        return self.model.vqseg.config.size

    def at_a_time(self, captions: int) -> int:
        """How many scenes or pictures of so many captions are sampled together at most."""
        return min(self.batch, captions * self.model.scene_candidates)

    def sampling(self, guidance: float | None) -> StreamSampling:
        """What `paint` draws with: the model's own settings, but this guidance of both streams."""
        common = {"guidance": guidance, "temperature": None, "top_k": None, "top_p": None}
        return by_stream(self.model.sampling, common, scene={}, image={})

    def look(self, cases: Sequence[Case]) -> Made:
        """Real scenes and pictures, as the reader sees them."""
        made = Made()
        for part in self.batches(cases):
            scenes = [case.scene(self.size) for case in part]
            self._add(made, scenes, [case.pixels(self.model.vqgan.config.size) for case in part])
        return made

    def paint(
        self,
        cases: Sequence[Case],
        guidance: float | None,
        *,
        follow: Sequence[Case] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Made:
        """Generates a picture for each caption.

        Args:
            cases: the captions.
            guidance: of both streams; None: the model's own, of each.
            follow: cases whose scenes are given, one a caption; None: the model invents them.
            seeds: one a caption; None: the first seed and those that follow.
        """
        made = Made()
        seeds = seeds or range(self.seed, self.seed + len(cases))
        text_BT = self._encode_text([case.caption for case in cases])
        sampling = self.sampling(guidance)
        done = 0
        for part in self.batches(cases):
            now = slice(done, done + len(part))
            given = None if follow is None else [case.scene(self.size) for case in follow[now]]
            with room_for(self.at_a_time(len(part))):
                tokens = self._sample(text_BT[now], given, seeds[now], sampling)
            scenes = given or self.model.decode_scenes(tokens.scene)
            images = self.model.decode_images(tokens.image, scenes=scenes)
            made.tokens.append(Streams(*(stream.cpu() for stream in tokens)))
            self._add(made, scenes, [np.asarray(image) for image in images])
            done += len(part)
        return made

    def to_image(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Pictures (uint8 H W C) as B C H W in [0, 1] on the model's device."""
        image_BCHW = rearrange(torch.from_numpy(np.stack(pictures)), "b h w c -> b c h w")
        return image_BCHW.to(self.model.device).float() / 255

    def _encode_text(self, captions: Sequence[str]) -> Tensor:
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._words]
        if new:  # all at once, so that long ones are warned of once
            self._words |= zip(new, self.model.tokenizer.encode(new).split(1), strict=True)
        return torch.cat([self._words[caption] for caption in captions])

    def _sample(
        self,
        text_BT: Tensor,
        scenes: Sequence[SceneMap] | None,
        seeds: Sequence[int],
        sampling: StreamSampling,
    ) -> Streams:
        """Tokens of a batch; what an earlier run has sampled of it is taken from there."""
        given_BT = None
        if scenes is not None:
            given_BT = torch.cat([self.model.encode_scene(scene) for scene in scenes])

        def sample(rows: list[int]) -> Streams:
            texts_RT, own = text_BT[rows], [seeds[row] for row in rows]
            return generate(
                self.model.decoder,
                texts_RT,
                seeds=own,
                scene_BT=self._choose(texts_RT, own, sampling)
                if given_BT is None
                else given_BT[rows],
                scene=sampling.scene,
                image=sampling.image,
            )

        if self.kept is None:
            return sample([*range(len(text_BT))])
        common = {"sampling": asdict(sampling), "candidates": self.model.scene_candidates}
        whats = [
            {
                **common,
                "text": text_BT[i],
                "seed": seed,
                "scene": None if given_BT is None else given_BT[i],
            }
            for i, seed in enumerate(seeds)
        ]
        tokens = self.kept.complete(whats, sample)
        return Streams(*(stream.to(self.model.device) for stream in tokens))

    def _choose(self, text_BT: Tensor, seeds: Sequence[int], sampling: StreamSampling) -> Tensor:
        """Scene tokens that the judge chose, or free ones."""
        layout = self.model.decoder.layout
        free = (layout.free(stream, len(text_BT)) for stream in (layout.scene, layout.image))
        return self.model.choose_scenes(
            Streams(text_BT, *free),
            seeds=seeds,
            sampling=sampling.scene,
            candidates=self.model.scene_candidates,
            batch=self.batch,
        )

    def batches(self, cases: Sequence[Case]) -> Iterator[Sequence[Case]]:
        """The cases, a few at a time; moves the bar."""
        for start in range(0, len(cases), self.batch):
            part = cases[start : start + self.batch]
            yield part
            self.bar.update(len(part))

    def _add(self, made: Made, scenes: list[SceneMap], pictures: list[np.ndarray]) -> None:
        made.scenes += scenes
        made.pictures += pictures
        if self.reader is None:
            made.times += [None] * len(scenes)
            made.places += [None] * len(scenes)
            return
        config = self.reader.config
        image_BCHW = self.to_image([resize(picture, config.size) for picture in pictures])
        reading = self.reader.read(image_BCHW)
        labels_BHW = np.stack([scene.resized(config.size).labels for scene in scenes])
        places_B = self.reader.read_places(torch.from_numpy(labels_BHW).to(self.model.device))
        made.readings += list(reading.labels_BHW.cpu().numpy())
        made.features += list(reading.features_BD.cpu())
        for names, found, into in (
            (config.times, reading.times_B, made.times),
            (config.places, places_B, made.places),
        ):
            into += [names[i] if names else None for i in found.tolist()]
