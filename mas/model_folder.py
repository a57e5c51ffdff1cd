"""The model folder: what lies in it, whether its parts fit, how it is written and found.

In: a folder, a hub id or `"park"`; or the parts of a model. Out: the checked index; or the folder.

    model_index.json   format version, sizes, sampling defaults, hashes
    tokenizer.json     text tokenizer
    vqseg/ vqgan/ gpt/ config.json + model.safetensors each
    judge/ refiner/    the same, of the judge of scenes and the refiner, in models that have them
    README.md          model card
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mas.errors import first_line, naming_full
from mas.filter import Sampling, StreamSampling
from mas.gpt import GPT
from mas.judge import SceneJudge
from mas.precision import StoredGPT
from mas.refiner import Refiner
from mas.rounding import Weights, is_rounded
from mas.scene import CLASS_NAMES
from mas.storage import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    file_hash,
    parse_config,
    read_json,
    save_network,
    write_json,
)
from mas.text import Tokenizer
from mas.vq import token_parts
from mas.vqgan import VQGAN
from mas.vqseg import VQSEG

# Of model_index.json: one sampling for both streams, one for each, that and a judge, that and
# whatever else it names, perhaps with a GPT without text head, or that with a packed GPT.
FORMATS = (1, 2, 3, 4, 5)
INDEX = "model_index.json"
CARD = "README.md"
TOKENIZER = "tokenizer.json"
NETWORKS = ("vqseg", "vqgan", "gpt")
JUDGE, REFINER = EXTRAS = ("judge", "refiner")  # networks that a model may have besides
OWN = {INDEX, CARD, TOKENIZER, *NETWORKS, *EXTRAS}  # all that a model folder holds
SHIPPED = Path(__file__).parent / "models"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class ModelError(ValueError):
    """A model, or a request to one, that cannot be; the message names the mend."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """What model_index.json says."""

    sampling: StreamSampling
    extras: tuple[str, ...]  # of `EXTRAS`, those that are there
    scene_candidates: int  # scenes drawn for a picture unless a request says otherwise
    classes: tuple[str, ...]  # that its scenes were learned from; empty = not known
    sha256: str  # of the list of hashes: one name for the whole model


def check_fit(
    *,
    tokenizer: Tokenizer,
    vqseg: VQSEG,
    vqgan: VQGAN,
    gpt: GPT | StoredGPT,
    judge: SceneJudge | None = None,
    refiner: Refiner | None = None,
) -> None:
    """Checks every size that two parts share.

    Raises:
        ModelError: names both parts, the size and the two values.
    """
    config = gpt.config
    pairs = [
        ("tokenizer", "vocabulary", tokenizer.vocab_size, config.text_vocabulary),
        ("tokenizer", "text length", tokenizer.length, config.text_length),
        ("VQ-SEG", "number of codes", vqseg.config.codes, config.scene_vocabulary),
        ("VQ-SEG", "grid", vqseg.config.grid, config.scene_grid),
        ("VQ-GAN", "number of codes", vqgan.config.codes, config.image_vocabulary),
        ("VQ-GAN", "grid", vqgan.config.grid, config.image_grid),
    ]
    if judge is not None:
        pairs += [
            ("judge", "vocabulary", judge.config.text_vocabulary, config.text_vocabulary),
            ("judge", "text length", judge.config.text_length, config.text_length),
        ]
    if refiner is not None and refiner.config.size != vqgan.config.size:
        raise ModelError(
            f"refiner and VQ-GAN do not fit together: {refiner.config.size} pixels a side against "
            f"{vqgan.config.size}; use the parts that were trained together"
        )
    for part, what, found, expected in pairs:
        if found != expected:
            raise ModelError(
                f"{part} and GPT do not fit together: {what} {found} against {expected}; "
                "use the parts that were trained together"
            )


def find_folder(name: str | Path) -> Path:
    """The folder of a shipped model, of a path, or of a hub id (downloaded into its cache).

    Raises:
        ModelError: there is no such model.
    """
    if not isinstance(name, (str, Path)):
        raise ModelError(f"model is {name!r}, use a folder, a hub id or park")
    if name == "":  # as a path it would be the current folder
        raise ModelError("the name of the model is empty: use a folder, a hub id or park")
    if name == "park":
        folder = SHIPPED / "park"
        if not (folder / INDEX).is_file():
            raise ModelError(
                "this installation ships no park model; install it anew, or train one and "
                "give its folder"
            )
        return folder
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not isinstance(name, str) or not HUB_ID.fullmatch(name):
        raise ModelError(f"{name}: no such model folder; use a folder, a hub id or park")
    import huggingface_hub

    try:
        wanted = [INDEX, CARD, *list_files(EXTRAS)]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub client has no common base class for its errors
        raise ModelError(
            f"{name}: neither a folder nor found on the hub ({first_line(error)})"
        ) from error


def read_index(folder: Path) -> Index:
    """Reads model_index.json and checks that every file is there and is the one it was saved with.

    Raises:
        ModelError: a missing or exchanged part, or a format of another version.
    """
    if not (folder / INDEX).is_file():
        raise ModelError(
            f"{folder}: no model folder, {INDEX} is missing; write one with mas assemble"
        )
    content = read_json(folder / INDEX)
    if not isinstance(content, dict) or content.get("format") not in FORMATS:
        raise ModelError(
            f"{folder / INDEX}: not format {', '.join(map(str, FORMATS))}; assemble the model again"
        )
    extras = _read_extras(content, folder / INDEX)
    files = list_files(extras)
    hashes = content.get("sha256")
    if not isinstance(hashes, dict) or set(hashes) != set(files):
        raise ModelError(f"{folder / INDEX}: its list of hashes is damaged; assemble again")
    for name in (*files, CARD):
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: the model is incomplete, {name} is missing")
    for name, expected in hashes.items():
        if file_hash(folder / name) != expected:
            raise ModelError(
                f"{folder / name}: not the file this model was saved with; assemble it again"
            )
    candidates = content.get("scene_candidates") if JUDGE in extras else 1
    if not isinstance(candidates, int) or candidates < 1:
        raise ModelError(f"{folder / INDEX}: scene_candidates is {candidates}; assemble again")
    return Index(
        sampling=_read_sampling(content, folder / INDEX),
        extras=extras,
        scene_candidates=candidates,
        classes=_read_classes(content, folder / INDEX),
        sha256=_hash(hashes),
    )


def write_folder(
    folder: str | Path,
    *,
    tokenizer: Tokenizer,
    networks: Mapping[str, nn.Module],
    sampling: StreamSampling,
    card: str | None,
    scene_candidates: int = 1,
    classes: tuple[str, ...] = (),
    weights: Weights = "float32",
) -> None:
    """Writes a model folder beside its place and moves it there when it is complete.

    Raises:
        ModelError: the place holds something else than a model, or cannot be exchanged.
        OSError: the place cannot be written.
    """
    folder = Path(folder)
    if card is not None and not isinstance(card, str):
        raise ModelError(f"card is of type {type(card).__name__}, use its text")
    _check_place(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    gpt = networks["gpt"]
    assert isinstance(gpt, GPT)
    if weights == "int8":  # for sampling alone
        gpt = gpt.without_text_head()
    stored = {**networks, "gpt": gpt}
    formats = {name: choose_format(name, network, weights) for name, network in networks.items()}
    extras = tuple(name for name in EXTRAS if name in networks)
    index_format = _choose_index_format(sampling, extras, gpt=gpt, weights=weights)
    sizes = _sizes(tokenizer, stored)
    with _folder_beside(folder) as new:
        tokenizer.save(new / TOKENIZER)
        for name, network in stored.items():
            packed = name == "gpt" and weights == "int8"
            save_network(network, new / name, weights=formats[name], packed=packed)
        content = {
            "sizes": sizes,
            "weights": formats,
            "format": index_format,
            "sampling": _brief(sampling) if index_format < 3 else asdict(sampling),
            "sha256": {name: file_hash(new / name) for name in list_files(extras)},
        }
        if index_format >= 4:
            content["extras"] = list(extras)
        if JUDGE in extras:
            content["scene_candidates"] = scene_candidates
        if classes:
            content["classes"] = list(classes)
        write_json(new / INDEX, content)
        (new / CARD).write_text(card or _write_card(sizes, sampling), "utf-8")
        _exchange(folder, new, old=new.with_name("old"))


def _exchange(folder: Path, new: Path, *, old: Path) -> None:
    """Moves what is there away and the new folder to its place; nothing moves where that fails."""
    try:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:  # a signal may come between the two
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise


def list_files(extras: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Files of a model with these networks besides, all but the index and the card."""
    networks = (*NETWORKS, *extras)
    files = (f"{name}/{file}" for name in networks for file in (CONFIG_FILE, WEIGHTS_FILE))
    return (TOKENIZER, *files)


def _read_extras(content: dict[str, Any], source: Path) -> tuple[str, ...]:
    if content["format"] < 4:
        return (JUDGE,) if content["format"] == 3 else ()
    found = content.get("extras")
    if not isinstance(found, list) or not all(name in EXTRAS for name in found):
        raise ModelError(f"{source}: names no extras that this version knows; install a newer one")
    return tuple(name for name in EXTRAS if name in found)


def check_classes(names: Iterable[object]) -> None:
    """Refuses names that are of no class.

    Raises:
        ModelError: names the first of them.
    """
    for name in names:
        if name not in CLASS_NAMES:
            raise ModelError(f"{name!r} is no class: mas.scene.CLASS_NAMES lists them")


def _read_classes(content: dict[str, Any], source: Path) -> tuple[str, ...]:
    found = content.get("classes", [])
    if not isinstance(found, list):
        raise ModelError(f"{source}: its list of classes is damaged; assemble again")
    try:
        check_classes(found)
    except ModelError as error:
        raise ModelError(f"{source}: {error}; assemble again") from None
    return tuple(found)


def _choose_index_format(
    sampling: StreamSampling, extras: tuple[str, ...], *, gpt: GPT, weights: Weights
) -> int:
    """The oldest of `FORMATS` that can say it, so that older versions read on."""
    if weights == "int8":
        return 5
    if REFINER in extras or not gpt.config.text_head:
        return 4
    if extras:
        return 3
    return 1 if sampling.scene == sampling.image else 2


def _brief(sampling: StreamSampling) -> dict[str, Any]:
    """One sampling where it is the same for both streams, else one of each."""
    return asdict(sampling.scene if sampling.scene == sampling.image else sampling)


def _read_sampling(content: dict[str, Any], source: Path) -> StreamSampling:
    found = content.get("sampling")
    if content["format"] == 1:
        both = parse_config(Sampling, found, source)
        return StreamSampling(scene=both, image=both)
    if not isinstance(found, dict) or set(found) != {"scene", "image"}:
        raise ModelError(f"{source}: needs a sampling for scene and image; assemble again")
    scene, image = (parse_config(Sampling, found[name], source) for name in ("scene", "image"))
    return StreamSampling(scene=scene, image=image)


def choose_format(name: str, network: nn.Module, weights: Weights) -> Weights:
    """A tokenizer must find the code it found in training: only one that had int8 weights when it
    made the tokens keeps them, though its decoder may have been trained since.
    """
    deciding = token_parts(network) if name in ("vqseg", "vqgan") else [network]
    if weights != "int8" or name == "gpt":
        return weights
    rounded = all(is_rounded(part.state_dict(), "int8") for part in deciding)
    return "int8" if rounded else "float16"


def _check_place(folder: Path) -> None:
    """Refuses a place where writing a model would take something else away."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ModelError(f"{folder}: is a file; choose a new folder")
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if name not in OWN]
    if foreign or (names and INDEX not in names):
        raise ModelError(
            f"{folder}: holds something else than a model ({(foreign or names)[0]}); "
            "choose a new folder"
        )
    if folder.is_mount() or folder.resolve() == Path.cwd():
        raise ModelError(
            f"{folder}: a mounted or the current folder cannot be exchanged; name one inside it"
        )


@contextlib.contextmanager
def _folder_beside(folder: Path) -> Iterator[Path]:
    """A new folder on the disk of `folder`, by whose name errors call it; it is gone afterwards."""
    try:
        temporary = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    new = Path(temporary, "new")
    try:
        with naming_full(new):
            new.mkdir()
            yield new
    except OSError as error:
        if error.filename is None or not Path(error.filename).is_relative_to(new):
            raise
        known = folder / Path(error.filename).relative_to(new)
        raise OSError(error.errno, error.strerror, str(known)) from error
    finally:
        shutil.rmtree(temporary)


def _sizes(tokenizer: Tokenizer, networks: Mapping[str, nn.Module]) -> dict[str, Any]:
    vqseg: Any = networks["vqseg"].config
    vqgan: Any = networks["vqgan"].config
    parameters = {
        n: sum(p.numel() for p in network.parameters()) for n, network in networks.items()
    }
    return {
        "text": {"vocabulary": tokenizer.vocab_size, "length": tokenizer.length},
        "scene": {"vocabulary": vqseg.codes, "grid": vqseg.grid, "pixels": vqseg.size},
        "image": {"vocabulary": vqgan.codes, "grid": vqgan.grid, "pixels": vqgan.size},
        "parameters": parameters,
    }


def _write_card(sizes: dict[str, Any], sampling: StreamSampling) -> str:
    parameters = sizes["parameters"]
    rows = "\n".join(
        f"| {stream} | {size['vocabulary']} | {size.get('grid', size.get('length'))} |"
        for stream, size in sizes.items()
        if stream != "parameters"
    )
    return f"""---
pipeline_tag: text-to-image
tags: [make-a-scene, text-to-image, scene-to-image]
---
# A mini Make-A-Scene model

Caption → scene → picture of {sizes["image"]["pixels"]} x {sizes["image"]["pixels"]} pixels.

```python
from mas import MakeAScene

model = MakeAScene.from_pretrained("this folder")
model.generate("two dogs in the park", count=4).images[0].show()
```

| stream | vocabulary | length or tokens a side |
|---|---|---|
{rows}

Parameters: {", ".join(f"{name} {count:,}" for name, count in parameters.items())}.
Sampling defaults: `{json.dumps(_brief(sampling))}`.

## Data

Not stated by who saved this model: which pictures and captions, how many, from where.

## Licences

Not stated by who saved this model: of these weights, and of data and weights they come from.

## Numbers

Not stated by who saved this model: what `mas evaluate` measured, and on what.

## Limits

Not stated by who saved this model: what it draws badly, and what it must not be used for.
"""


def _hash(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
