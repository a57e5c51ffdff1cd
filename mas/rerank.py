"""Re-ranking: of many candidates, the pictures that fit their caption best.

In: a generation of several pictures a caption. Out: the same pictures in the order of their scores,
the best ones apart from the rest. The judge is a CLIP (transformers' `CLIPModel`) on this machine:
a folder, or a model in the Hugging Face cache; nothing is downloaded. Score: cosine of caption and
picture, as minDALL-E ranks its candidates.
Axes: B pictures, T tokens, D width of CLIP's common space, C colours, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mas.errors import first_line
from mas.model_folder import HUB_ID, ModelError
from mas.precision import choose_device
from mas.request import Generation
from mas.sequence import Streams

CLIP = "openai/clip-vit-base-patch32"
DOWNLOAD = "hf download {} --exclude '*.h5' --exclude '*.msgpack'"  # not what other frameworks read
AT_ONCE = 16  # pictures
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZER = ("tokenizer.json", "vocab.json")


class Judge(Protocol):
    """Says how well pictures fit their captions; larger is better."""

    def scores(self, captions: Sequence[str], images: Sequence[Image.Image]) -> list[float]: ...


class Clip:
    """A frozen CLIP that scores pictures against captions."""

    def __init__(self, network: Any, tokenizer: Any, processor: Any) -> None:
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.processor = processor
        self.length = network.config.text_config.max_position_embeddings

    @classmethod
    def from_pretrained(cls, name: str | Path = CLIP, *, device: str = "auto") -> Clip:
        """Loads a CLIP that is on this machine.

        Args:
            name: folder with config.json, weights, tokenizer and preprocessor_config.json; or the
                name of a model on the hub that was downloaded before.
            device: auto, cpu, cuda, …

        Raises:
            OSError: transformers is not installed; the message names the extra.
            ModelError: no such folder and no such model in the cache, or one that is not whole.
        """
        try:
            from transformers import CLIPModel, CLIPTokenizer
            from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        except ImportError as error:
            raise OSError(
                f"CLIP needs transformers >= 5.4 ({error}): pip install 'mini-make-a-scene[eval]'"
            ) from error
        folder = find_clip(name)
        try:
            with _quiet():
                loaded: Any = CLIPModel.from_pretrained(
                    folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
                )
                tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
                processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # each of the three readers has errors of its own
            raise ModelError(
                f"{folder}: not a CLIP that transformers can read ({first_line(error)})"
            ) from error
        network, report = loaded
        if report["missing_keys"]:
            first = sorted(report["missing_keys"])[0]
            raise ModelError(f"{folder}: the weights are not those of a CLIP, {first} is missing")
        return cls(network.to(choose_device(device)), tokenizer, processor)

    @property
    def digest(self) -> str:
        """Sha256 of the weights, hexadecimal, whatever name they were loaded by."""
        sha256 = hashlib.sha256()
        for name, weights in sorted(self.network.state_dict().items()):
            sha256.update(name.encode())
            sha256.update(weights.cpu().contiguous().numpy())
        return sha256.hexdigest()

    @torch.inference_mode()
    def scores(self, captions: Sequence[str], images: Sequence[Image.Image]) -> list[float]:
        """Cosine of each picture with its caption, -1 … 1; one caption a picture.

        A caption longer than CLIP reads (77 tokens in the published ones) is cut.
        """
        distinct = list(dict.fromkeys(captions))
        texts_BD = torch.cat([self._embed_text(text) for text in distinct])
        rows = [distinct.index(text) for text in captions]
        images_BD = torch.cat(
            [
                self._embed_images(images[start : start + AT_ONCE])
                for start in range(0, len(images), AT_ONCE)
            ]
        )
        return (texts_BD[rows] * images_BD).sum(-1).tolist()

    def _embed_text(self, text: str) -> Tensor:
        tokens = self.tokenizer(
            [text], truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.network.device)
        pooled_1D = self.network.text_model(**tokens).pooler_output
        return F.normalize(self.network.text_projection(pooled_1D), dim=-1)

    def _embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        pixels_BCHW = self.processor(
            [image.convert("RGB") for image in images], return_tensors="pt"
        )["pixel_values"].to(self.network.device)
        pooled_BD = self.network.vision_model(pixel_values=pixels_BCHW).pooler_output
        return F.normalize(self.network.visual_projection(pooled_BD), dim=-1)


def find_clip(name: str | Path) -> Path:
    """The folder of a CLIP: a path, or a model in the hub's cache on this machine.

    Raises:
        ModelError: it is not there, or not whole; the message says how to get it.
    """
    folder = Path(name)
    if not folder.is_dir():
        if not isinstance(name, str) or not HUB_ID.fullmatch(name):
            raise ModelError(f"{name}: no such folder with a CLIP; use a folder or a hub id")
        import huggingface_hub

        try:
            folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
        except (OSError, ValueError):
            raise ModelError(
                f"the CLIP {name} is not on this machine: name a folder that holds one, or fetch "
                f"it once (0.6 GB or more) with {DOWNLOAD.format(name)}"
            ) from None
    for names in ((CONFIG,), WEIGHTS, TOKENIZER):
        if not any((folder / file).is_file() for file in names):
            raise ModelError(
                f"{folder}: the CLIP is incomplete, {' or '.join(names)} is missing; "
                f"fetch a whole one with {DOWNLOAD.format(CLIP)}"
            )
    return folder


def rerank(
    generation: Generation, judge: Judge, *, keep: int | None = None
) -> tuple[Generation, Generation]:
    """The `keep` best pictures of each caption, best first, and the rest; both with their scores.

    Pictures of equal score stay in the order of their seeds.

    Args:
        generation: of `MakeAScene.generate`.
        judge: such as a `Clip`.
        keep: pictures a caption; None: all.

    Raises:
        ModelError: there are not so many pictures, or a caption is empty.
    """
    count = pictures_a_caption(generation.seeds)
    check_rerank(generation.captions, count=count, keep=keep)
    scores = judge.scores(generation.captions, generation.images)
    best: list[int] = []
    rest: list[int] = []
    for start in range(0, len(scores), count):
        ranked = sorted(range(start, start + count), key=lambda i: (-scores[i], i))
        best += ranked[:keep]
        rest += [] if keep is None else ranked[keep:]
    return _select(generation, scores, best), _select(generation, scores, rest)


def check_rerank(captions: Sequence[str], *, count: int, keep: int | None) -> None:
    """Checks a request for re-ranking before anything is sampled."""
    if not all(text.strip() for text in captions):
        raise ModelError("re-ranking compares pictures with their caption: give one")
    if keep is not None and not 1 <= keep <= count:
        raise ModelError(f"keep is {keep}, use 1 to {count}, the number of candidates a caption")


def pictures_a_caption(seeds: Sequence[int]) -> int:
    """Seeds count up from the first one and start over with each caption."""
    return next((i for i in range(1, len(seeds)) if seeds[i] == seeds[0]), len(seeds))


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no warnings of transformers: what is missing is said by ourselves."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _select(generation: Generation, scores: list[float], rows: list[int]) -> Generation:
    return replace(
        generation,
        images=[generation.images[i] for i in rows],
        scenes=[generation.scenes[i] for i in rows],
        captions=[generation.captions[i] for i in rows],
        seeds=[generation.seeds[i] for i in rows],
        tokens=Streams(*(tokens_BT[rows] for tokens_BT in generation.tokens)),
        scores=[scores[i] for i in rows],
    )
