"""`MakeAScene`: tokenizers and GPT together; a caption, and a scene if there is one, to pictures.

In: captions, optionally scenes or pictures of which parts are given. Out: pictures with their
scenes. A model folder holds everything: model_index.json, tokenizer.json, vqseg/, vqgan/, gpt/,
README.md; `"park"` is the one that ships with the package.
Axes: B pictures, T tokens, H W pixels, C colours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mas.candidates import choose_scenes
from mas.codec import Codec
from mas.filter import Sampling, StreamSampling, by_stream, for_both_streams
from mas.generate import Decoder, generate
from mas.gpt import GPT
from mas.hub import push_folder
from mas.judge import SceneJudge
from mas.model_folder import (
    CARD,
    JUDGE,
    REFINER,
    TOKENIZER,
    Index,
    ModelError,
    check_classes,
    check_fit,
    find_folder,
    read_index,
    write_folder,
)
from mas.precision import (
    Precision,
    StoredGPT,
    choose_device,
    choose_precision,
    make_decoder,
    pictures_that_fit,
    undisturbed,
)
from mas.progress import Decoders, Progress, Reporter, Tally, hide
from mas.refiner import Refiner
from mas.request import (
    Generation,
    Request,
    check_candidates,
    check_memory,
    give_image,
    give_scene,
    list_captions,
    release,
    room_for,
    warn_of_void,
    whole_number,
)
from mas.rounding import Weights
from mas.scene import SceneMap
from mas.sequence import FREE, Streams, count_free
from mas.text import Tokenizer, names_side
from mas.vqgan import VQGAN
from mas.vqseg import VQSEG


class MakeAScene(Codec):
    """Text tokenizer, VQ-SEG, VQ-GAN and GPT whose sizes fit together."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        vqseg: VQSEG,
        vqgan: VQGAN,
        gpt: GPT | StoredGPT,
        judge: SceneJudge | None = None,
        refiner: Refiner | None = None,
        sampling: Sampling | StreamSampling | None = None,
        scene_candidates: int = 1,
        classes: tuple[str, ...] = (),
        device: str = "cpu",
        precision: Precision = "float32",
    ) -> None:
        """Takes the parts and the defaults of `generate`; one sampling alone is for both streams.

        Raises:
            ModelError: two parts do not fit together, both named; several scenes and no judge; a
                class that there is none of.
        """
        check_fit(
            tokenizer=tokenizer, vqseg=vqseg, vqgan=vqgan, gpt=gpt, judge=judge, refiner=refiner
        )
        self.tokenizer = tokenizer
        self.device = choose_device(device)
        self.vqseg = vqseg.eval().requires_grad_(False).to(self.device)
        self.vqgan = vqgan.eval().requires_grad_(False).to(self.device)
        if isinstance(gpt, GPT):
            gpt = gpt.eval().requires_grad_(False).to(self.device)
        self._gpt = gpt
        self.judge = judge and judge.eval().requires_grad_(False).to(self.device)
        self.refiner = refiner and refiner.eval().requires_grad_(False).to(self.device)
        self.scene_candidates = check_candidates(scene_candidates, judge)
        check_classes(classes)
        self.classes = classes  # that its scenes were learned from; empty = not known
        self.sampling = for_both_streams(sampling)
        self.card: str | None = None
        self.sha256: str | None = None  # of the folder it was loaded from
        self.precision = choose_precision(gpt, precision)
        self.decoder: Decoder = make_decoder(gpt, self.precision)

    @property
    def gpt(self) -> GPT:
        """The float32 GPT; sampling does not need it, so it is read when first asked for."""
        if isinstance(self._gpt, StoredGPT):
            self._check_stored(self._gpt)
            self._gpt = self._gpt.load()
        return self._gpt

    def _check_stored(self, gpt: StoredGPT) -> None:
        """ModelError where the folder that the other parts came from was replaced since."""
        folder = gpt.folder.parent
        if self.sha256 is not None and read_index(folder).sha256 != self.sha256:
            raise ModelError(f"{folder}: holds another model by now: load it again")

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str = "auto",
        precision: Precision = "auto",
    ) -> MakeAScene:
        """Loads a model folder, a model of the Hugging Face hub, or `"park"`.

        Args:
            name: folder, hub id (`owner/name`) or `"park"`, the model that ships.
            device: auto, cpu, cuda, …
            precision: of the GPT while sampling.

        Raises:
            ModelError: no such model, a missing part, parts that do not fit or were exchanged.
        """
        folder = find_folder(name).absolute()  # part of it is read later, wherever one is then
        index = read_index(folder)
        place = choose_device(device)
        with undisturbed(place):
            model = cls._load(folder, index, place, precision)
        model.sha256 = index.sha256
        model.card = (folder / CARD).read_text("utf-8", "replace")  # people write it
        return model

    @classmethod
    def _load(
        cls, folder: Path, index: Index, device: torch.device, precision: Precision
    ) -> MakeAScene:
        return cls(
            tokenizer=Tokenizer.from_file(folder / TOKENIZER),
            vqseg=VQSEG.from_pretrained(folder / "vqseg"),
            vqgan=VQGAN.from_pretrained(folder / "vqgan"),
            gpt=StoredGPT(folder / "gpt", device),
            judge=SceneJudge.from_pretrained(folder / JUDGE) if JUDGE in index.extras else None,
            refiner=Refiner.from_pretrained(folder / REFINER) if REFINER in index.extras else None,
            sampling=index.sampling,
            scene_candidates=index.scene_candidates,
            classes=index.classes,
            device=str(device),
            precision=precision,
        )

    def __getstate__(self) -> dict[str, Any]:
        """All but the decoder, which holds memory of libraries: a copy makes one of its own.

        Of a GPT that was never asked for, where it lies, not its weights.
        """
        return {name: value for name, value in vars(self).items() if name != "decoder"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if isinstance(self._gpt, StoredGPT):
            self._check_stored(self._gpt)
        self.decoder = make_decoder(self._gpt, self.precision)

    def save_pretrained(
        self, folder: str | Path, *, card: str | None = None, weights: Weights = "float32"
    ) -> None:
        """Writes a model folder, whole or not at all; an older model there is replaced.

        Args:
            folder: new, empty or a model folder.
            card: text of README.md; the one it was loaded with, or a generated one otherwise.
            weights: number format on the disk; int8 is for the GPT's matrices, and leaves out its
                text head, which sampling does not use; tokenizers then get float16 unless they have
                int8 weights already. Loaded again, weights are float32, rounded to it.

        Raises:
            ModelError: the folder holds something else.
            ValueError: weights that the format cannot hold.
        """
        networks = {"vqseg": self.vqseg, "vqgan": self.vqgan, "gpt": self.gpt}
        extras = {JUDGE: self.judge, REFINER: self.refiner}
        write_folder(
            folder,
            tokenizer=self.tokenizer,
            networks=networks | {name: part for name, part in extras.items() if part is not None},
            sampling=self.sampling,
            scene_candidates=self.scene_candidates,
            classes=self.classes,
            card=card or self.card,
            weights=weights,
        )

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Uploads the model folder to the Hugging Face hub and returns its address.

        Raises:
            ModelError: the hub cannot be reached, or takes no such model.
        """
        return push_folder(self.save_pretrained, repo_id, private=private)

    def generate(
        self,
        caption: str | Sequence[str] = "",
        *,
        scene: SceneMap | None = None,
        scene_free: np.ndarray | None = None,
        image: Image.Image | None = None,
        image_free: np.ndarray | None = None,
        count: int = 1,
        negative_prompt: str = "",
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: float | None = None,
        top_p: float | None = None,
        scene_sampling: Mapping[str, float] | None = None,
        image_sampling: Mapping[str, float] | None = None,
        scene_candidates: int | None = None,
        refine: bool = True,
        seed: int = 0,
        batch: int = 16,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Generation:
        """Generates `count` pictures for each caption.

        Picture i of a caption has the seed `seed + i` and depends on nothing else of the call:
        not on `count`, `batch` or the other captions.

        Args:
            caption: one or several; empty where a scene or picture alone shall decide.
            scene: the layout to follow, square, any size; None: the model invents one. Void is
                followed like a label, with a warning where there is much of it.
            scene_free: bool H W like `scene`, True where the model shall choose; a grid cell with
                any such pixel is predicted. Where it is False throughout, as without it.
            image: a square picture of which part is given, together with `image_free`.
            image_free: bool H W like `image`, True where the model shall paint; what lies there
                counts for nothing.
            count: pictures a caption.
            negative_prompt: what not to paint; guidance, which must not be 1, moves away from it.
            guidance: how much more the caption counts, 1 = as it is (None: the model's default
                for each stream, likewise below).
            temperature: 0 = always the likeliest token.
            top_k: keep the k likeliest tokens; below 1 a share of the vocabulary.
            top_p: keep the likeliest tokens of this total probability.
            scene_sampling: settings for scene tokens only, by the four names above.
            image_sampling: settings for image tokens only.
            scene_candidates: scenes that are drawn for a picture, of which the judge keeps the one
                that fits the caption best; 1 = no choice (None: the model's default).
            refine: correct the pictures by their scenes where the model has a refiner; what is
                given of a picture stays as it is.
            seed: of the first picture.
            batch: pictures sampled at a time.
            on_progress: called after every step.

        Raises:
            ValueError: nothing to go by, a value of another kind, settings out of their range, a
                scene or picture that does not fit, or a batch that does not fit the memory.
        """
        common = {
            "guidance": guidance,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }
        vqseg, vqgan = self.vqseg.config, self.vqgan.config
        request = Request(
            captions=list_captions(caption),
            count=whole_number("count", count, least=1),
            seed=whole_number("seed", seed),
            batch=whole_number("batch", batch, least=1),
            candidates=check_candidates(
                self.scene_candidates if scene_candidates is None else scene_candidates, self.judge
            ),
            settings=by_stream(
                self.sampling, common, scene=scene_sampling or {}, image=image_sampling or {}
            ),
            scene=give_scene(scene, scene_free, grid=vqseg.grid, size=vqseg.size),
            image=give_image(image, image_free, grid=vqgan.grid),
            negative=negative_prompt,
            refine=refine,
            on_progress=on_progress,
        )
        at_a_time = min(request.batch, len(request.seeds) * request.draws)
        check_memory(at_a_time, fitting=self.pictures_that_fit())
        with torch.inference_mode(), undisturbed(self.device):
            return self._paint(request)

    def _paint(self, request: Request) -> Generation:
        start = time.perf_counter()
        followed = request.followed
        if followed is not None:
            warn_of_void(followed)
        given = self._encode(request)
        # What is given of a picture knows nothing of a scene that the model invents.
        kept_T = None if request.image is None else given.image[0] != FREE
        tally = Tally(total=count_free(given.scene) * request.draws + count_free(given.image))
        tokens = self._sample(request, given, tally, self._decoders(request, kept_T))
        if followed is None:
            scenes = self.decode_scenes(tokens.scene)
            if request.scene is not None:
                scenes = [request.scene.put_back(scene) for scene in scenes]
        else:
            scenes = [deepcopy(followed) for _ in request.seeds]  # the given one is the caller's
        refined_by = scenes if request.refine else None
        images = self.decode_images(tokens.image, scenes=refined_by, kept_T=kept_T)
        seconds = time.perf_counter() - start
        return Generation(
            images=images,
            scenes=scenes,
            captions=[text for text in request.captions for _ in range(request.count)],
            seeds=request.seeds,
            tokens=tokens,
            settings=self._describe(request),
            negative_prompt=request.negative,
            seconds=seconds,
            tokens_per_second=tally.total / seconds,
        )

    def _encode(self, request: Request) -> Streams:
        """What is given of every picture, long B T."""
        layout, scene, image = self.decoder.layout, request.scene, request.image
        scene_1T, image_1T = layout.free(layout.scene, 1), layout.free(layout.image, 1)
        if scene is not None:
            scene_1T = release(self.encode_given(scene), scene.free_hw)
        if image is not None:
            image_1T = release(self.encode_image(image.filled), image.free_hw)
        text_BT = self.tokenizer.encode(request.captions).repeat_interleave(request.count, dim=0)
        return Streams(text_BT, scene_1T.repeat(len(text_BT), 1), image_1T.repeat(len(text_BT), 1))

    def _decoders(self, request: Request, kept_T: Tensor | None) -> Decoders:
        """How to show what is there of the pictures before they are complete."""
        scene = request.followed
        images = partial(self.decode_preview, scene=scene, kept_T=kept_T, refine=request.refine)
        return Decoders(scenes=self.decode_scenes, images=images)

    def _describe(self, request: Request) -> dict[str, dict[str, Any]]:
        described = asdict(request.settings)
        if request.draws > 1:
            described["scene"]["candidates"] = request.draws
        if self.refiner is not None:
            described["image"]["refined"] = request.refine
        return described

    def pictures_that_fit(self) -> int:
        """How many pictures at a time fit into the memory that is free now; 0 = not one."""
        return pictures_that_fit(self.decoder, self._gpt.config)

    def choose_scenes(
        self,
        given: Streams,
        *,
        seeds: Sequence[int],
        sampling: Sampling,
        candidates: int,
        batch: int,
        negative_1T: Tensor | None = None,
        watch: Callable[[], Callable[[Tensor, Tensor], None]] | None = None,
    ) -> Tensor:
        """Scene tokens, long B T: the given ones, free ones drawn, several times for the judge.

        With one candidate, or where nothing is free, the tokens come back as they are given.
        """
        judge, free_B = self.judge, (given.scene == FREE).any(1)
        if judge is None or candidates == 1 or not free_B.any():
            return given.scene
        return choose_scenes(
            self.decoder,
            judge,
            given.text,
            given.scene,
            seeds=seeds,
            sided_B=[names_side(caption) for caption in self.tokenizer.decode(given.text)],
            candidates=candidates,
            sampling=sampling,
            batch=batch,
            decode=self.decode_scenes,
            encode_mirrored=self.encode_mirrored,
            negative_1T=negative_1T,
            watch=watch,
        ).to(given.scene.device)

    def _sample(
        self, request: Request, given: Streams, tally: Tally, decoders: Decoders
    ) -> Streams:
        """All tokens, long B T on the CPU, batch by batch."""
        parts, settings, tell = [], request.settings, request.on_progress
        negative_1T = self.tokenizer.encode([request.negative]) if request.negative else None
        for start in range(0, len(request.seeds), request.batch):
            rows = slice(start, start + request.batch)
            seeds, part = request.seeds[rows], Streams(*(tokens_BT[rows] for tokens_BT in given))
            report = partial(
                Reporter, layout=self.decoder.layout, decoders=decoders, first=start, tally=tally
            )
            with room_for(min(request.batch, len(seeds) * request.draws)):
                scene_BT = self.choose_scenes(
                    part,
                    seeds=seeds,
                    sampling=settings.scene,
                    candidates=request.draws,
                    batch=request.batch,
                    negative_1T=negative_1T,
                    watch=tell and partial(report, lambda seen: tell(hide(seen))),
                )
                sampled = generate(
                    self.decoder,
                    part.text,
                    seeds=seeds,
                    scene_BT=scene_BT,
                    image_BT=part.image,
                    scene=settings.scene,
                    image=settings.image,
                    negative_1T=negative_1T,
                    on_progress=tell and report(tell),
                )
            parts.append(sampled)
        with torch.inference_mode(False):  # so that results are tensors like any other
            return Streams(*(torch.cat(streams).cpu() for streams in zip(*parts, strict=True)))
