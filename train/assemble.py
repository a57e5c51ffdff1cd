"""`mas assemble`: three tokenizers and a GPT become one model folder.

In: tokenizer.json and three run folders (or exported networks). Out: a model folder for
`MakeAScene.from_pretrained`. Sizes are checked against each other, and the tokenizers against
those whose tokens the GPT was trained on, and with those that judge and refiner were trained for.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mas.filter import StreamSampling, by_stream
from mas.gpt import GPT
from mas.judge import SceneJudge
from mas.model import MakeAScene
from mas.refiner import Refiner
from mas.rounding import Weights
from mas.scene import CLASS_NAMES, SceneMap
from mas.shards import ShardIndex, expand_shards
from mas.storage import WEIGHTS_FILE, file_hash, read_json
from mas.text import Tokenizer
from mas.vqgan import VQGAN
from mas.vqseg import VQSEG
from mas.vqseg_tune import tune_decisions

logger = logging.getLogger(__name__)

TOKENIZERS = "tokens.json"  # in a run folder: which tokenizers the network was trained with


def assemble(
    *,
    tokenizer: str,
    vqseg: str,
    vqgan: str,
    gpt: str,
    output: str,
    judge: str | None = None,
    refiner: str | None = None,
    scene_candidates: int = 4,
    guidance: float = 3.0,
    temperature: float = 1.0,
    top_k: float | None = None,
    top_p: float | None = None,
    scene_sampling: dict[str, float] | None = None,
    image_sampling: dict[str, float] | None = None,
    weights: Weights = "float32",
    card: Path | None = None,
    tune: str | None = None,
    tune_count: int = 300,
    classes: str | None = None,
) -> None:
    """Puts a text tokenizer, VQ-SEG, VQ-GAN and GPT together into a model folder.

    Args:
        tokenizer: the tokenizer.json the captions were tokenized with.
        vqseg: run folder of VQ-SEG.
        vqgan: run folder of the VQ-GAN, or what import-vqgan wrote.
        gpt: run folder of the GPT.
        output: the model folder to write.
        judge: run folder of the judge of scenes; without one the first scene is taken.
        refiner: run folder of the refiner; without one pictures stay as the VQ-GAN decodes them.
        scene_candidates: the model's default: scenes drawn for a picture, of which the judge keeps
            one.
        guidance: the model's default: how much the caption counts.
        temperature: the model's default; a model trained for minutes needs less than 1.
        top_k: the model's default: tokens kept; below 1 a share of the vocabulary.
        top_p: the model's default: total probability of the tokens kept.
        scene_sampling: the four settings above for the scene only: --scene-sampling.guidance 2, or
            all at once as '{"guidance": 2}'.
        image_sampling: the same for the picture only.
        weights: number format on the disk; int8 is for the GPT's matrices and leaves out its text
            head, which sampling does not use; the tokenizers then get float16, unless they were
            trained with checkpoints.weights int8.
        card: file with the text of the model card, README.md: data, licences, numbers, limits
            (default: a form that only knows the sizes).
        tune: scene shards of the training, on which VQ-SEG's decisions are tuned for the mean IoU
            of all classes; tokens stay the same. The model also remembers which classes there are,
            for mas studio.
        tune_count: how many scenes are read, spread evenly over the shards.
        classes: scene shards whose classes the model remembers, without tuning, for a VQ-SEG that
            is tuned already; --tune-count scenes of them are read.
    """
    sampling = by_stream(
        StreamSampling(),
        {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p},
        scene=scene_sampling or {},
        image=image_sampling or {},
    )
    text = None if card is None else read_card(card)
    record = Path(gpt) / TOKENIZERS
    if record.is_file():
        check_hashes(record, tokenizer=tokenizer, vqseg=vqseg, vqgan=vqgan)
    if judge:
        check_origin(judge, "judge", stream="text", path=tokenizer, instead="train the judge again")
    if refiner:
        weights_file, again = Path(vqgan) / WEIGHTS_FILE, "train the refiner again"
        check_origin(refiner, "refiner", stream="image", path=weights_file, instead=again)
    model = MakeAScene(
        tokenizer=Tokenizer.from_file(tokenizer),
        vqseg=VQSEG.from_pretrained(vqseg),
        vqgan=VQGAN.from_pretrained(vqgan),
        gpt=GPT.from_pretrained(gpt),
        judge=SceneJudge.from_pretrained(judge) if judge else None,
        refiner=Refiner.from_pretrained(refiner) if refiner else None,
        sampling=sampling,
        scene_candidates=scene_candidates if judge else 1,
    )
    if tune is not None:
        tune_to_scenes(model, tune, tune_count)
    if classes is not None:
        model.classes = name_classes(read_scenes(classes, tune_count, model.vqseg.config.size)[0])
    model.save_pretrained(output, card=text, weights=weights)
    millions = sum(p.numel() for p in model.gpt.parameters()) / 1e6
    megabytes = sum(file.stat().st_size for file in Path(output).rglob("*.*")) / 1e6
    print(f"{output}: GPT of {millions:.1f}M parameters, {megabytes:.1f} MB on the disk")
    print(f"mas sample --model {output} 'a caption'")


def tune_to_scenes(model: MakeAScene, shards: str, count: int) -> None:
    """Tunes the decisions of the model's VQ-SEG on `count` scenes, whose classes it remembers."""
    labels_BHW, edges_BHW = read_scenes(shards, count, model.vqseg.config.size)
    model.classes = name_classes(labels_BHW)
    tuned = tune_decisions(model.vqseg, labels_BHW, edges_BHW)
    print(f"VQ-SEG tuned: mean IoU {tuned.before:.3f}, now {tuned.after:.3f} on these scenes")


def name_classes(labels_BHW: Tensor) -> tuple[str, ...]:
    """The classes that occur, in the order of their ids."""
    found = set(labels_BHW.unique().tolist())
    return tuple(name for i, name in enumerate(CLASS_NAMES) if i in found)


def read_scenes(shards: str, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Labels (uint8 B H W) and edges (bool B H W) of `count` scenes, spread over the shards.

    Raises:
        ValueError: no such shards, no scene in them, or scenes smaller than `size` pixels a side.
    """
    if count < 1:
        raise ValueError(f"--tune-count must be at least 1, got {count}")
    index = ShardIndex(expand_shards(shards), extensions=("scene.png",))
    if not len(index):
        raise ValueError(f"{shards}: no scene to tune on")
    chosen = sorted({place * len(index) // count for place in range(count)})
    pngs = (io.BytesIO(index.read(place).files["scene.png"]) for place in chosen)
    scenes = [SceneMap.from_png(png) for png in pngs]
    small = next((scene.size for scene in scenes if min(scene.size) < size), None)
    if small:
        raise ValueError(f"{shards}: a scene has {small[0]} x {small[1]} pixels, needed are {size}")
    scenes = [scene.resized(size) for scene in scenes]
    labels_BHW, edges_BHW = (
        torch.from_numpy(np.stack([getattr(scene, name) for scene in scenes]))
        for name in ("labels", "edges")
    )
    return labels_BHW, edges_BHW


def read_card(path: Path) -> str:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error.reason})") from error
    if not text.strip():
        raise ValueError(f"{path}: the card is empty; say what the model learned from")
    return text


def check_origin(
    folder: str | Path, network: str, *, stream: str, path: str | Path, instead: str
) -> None:
    """Checks that judge or refiner goes with a tokenizer; for folders that note none it warns.

    Args:
        folder: of the run of the network.
        network: judge or refiner.
        stream: of the tokenizer.
        path: tokenizer.json, or the weights of the tokenizer.
        instead: what else can be done than to give the one of that run.

    Raises:
        ValueError: another tokenizer, or a damaged record.
    """
    record = Path(folder) / TOKENIZERS
    if not record.is_file():
        logger.warning(
            "%s has no %s, so it cannot be checked whether its %s was trained with %s",
            *(folder, TOKENIZERS, network, path),
        )
        return
    try:
        wanted = read_json(record)[stream]["sha256"]
    except (KeyError, TypeError, IndexError):
        raise ValueError(
            f"{record} names no {stream} tokenizer: it is damaged; remove it to go on unchecked"
        ) from None
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    if file_hash(path) != wanted:
        raise ValueError(
            f"{path} is not what the {network} in {folder} was trained with: give that one, or "
            f"{instead}"
        )


def check_hashes(record: Path, *, tokenizer: str, vqseg: str, vqgan: str) -> None:
    """Checks that these are the tokenizers that wrote the tokens behind `record`.

    Args:
        record: manifest.json of the tokens, or what a run folder keeps of it.
        tokenizer: tokenizer.json.
        vqseg: folder.
        vqgan: folder.

    Raises:
        ValueError: names the first that is another one; a damaged record.
    """
    manifest = read_json(record)
    for stream, path, network_class in (
        ("text", Path(tokenizer), None),
        ("scene", Path(vqseg) / WEIGHTS_FILE, VQSEG),
        ("image", Path(vqgan) / WEIGHTS_FILE, VQGAN),
    ):
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        try:
            wanted, tokens = manifest[stream]["sha256"], manifest[stream].get("tokens_sha256")
        except (KeyError, TypeError, IndexError):
            raise ValueError(
                f"{record} names no {stream} tokenizer: it is damaged; copy manifest.json of the "
                "training tokens in its place"
            ) from None
        if file_hash(path) == wanted:
            continue
        # Manifests of the text, and those from before decoders could be trained alone, have none.
        if (
            network_class
            and tokens
            and network_class.from_pretrained(path.parent).token_hash() == tokens
        ):
            continue
        raise ValueError(
            f"{path} is not what the {stream} tokens of {record.parent} were made with: give that "
            "one, or one that was trained on from it with model.keep_tokens, or tokenize and train "
            "the GPT again"
        )
