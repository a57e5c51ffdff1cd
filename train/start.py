"""Fine-tuning: a network of a run starts from the weights of another.

In: a fresh network, and a folder with a trained one (a run folder, an imported `vqgan/`, a part of
a model folder, whatever its number format). Out: the network with those weights. What decides the
tensors and their meaning must agree; settings of the training may differ, and the picture size of
those networks that are convolutional: all but the GPT.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn

from mas.gpt import GPT
from mas.judge import SceneJudge
from mas.model_folder import INDEX
from mas.reader import Reader
from mas.refiner import Refiner
from mas.sequence import Streams
from mas.storage import (
    CONFIG_FILE,
    StorageError,
    StoredTensors,
    parse_config,
    read_json,
)
from mas.vq import token_parts
from mas.vqgan import VQGAN
from mas.vqseg import VQSEG
from train.assemble import TOKENIZERS

logger = logging.getLogger(__name__)

# Of the network's config: what may differ from the folder's.
MAY_DIFFER = {
    "size",
    "grid",
    "commitment",
    "averaging",
    "restart",
    "codebook_weight",
    "face_weight",
    "pixels",
    "balance",
    "dropout",
}
# May be more, the last two only where there was none: what is new starts as nothing, a text head at
# random.
GROWS = {"blocks", "hidden", "text_head"}
PARTS = {VQSEG: "vqseg", VQGAN: "vqgan", GPT: "gpt", SceneJudge: "judge", Refiner: "refiner"}
Network = VQSEG | VQGAN | GPT | Reader | SceneJudge | Refiner


def start_from(network: Network, folder: str | Path) -> None:
    """Copies the weights of `folder` into `network`, one tensor at a time.

    A VQ-SEG may also have patches a whole number of times larger than the folder's: it then starts
    as the same network that sees every pixel enlarged by that number. So one trained at 128 px and
    16×16 tokens starts one at 256 px and 16×16 tokens. Residual blocks may be added, and hidden
    layers where there were none: both start as the identity.

    Raises:
        StorageError: the folder holds no such network.
        ValueError: another network; names the keys of its config that must be copied.
    """
    source = Path(folder) / CONFIG_FILE
    if type(network) in PARTS and not source.is_file() and (Path(folder) / INDEX).is_file():
        part = Path(folder) / PARTS[type(network)]
        raise ValueError(f"{folder} is a whole model: start from its part {part}")
    if Path(folder).is_file():
        raise StorageError(
            f"model.init_from: {folder} is a file: name the folder of the run or the network, in "
            f"which {CONFIG_FILE} and the weights lie; a checkpoint's run goes on with --ckpt_path"
        )
    if not source.is_file():
        raise StorageError(
            f"model.init_from: {source}: no such file; train or import that network first, or "
            "train from nothing with --model.init_from null"
        )
    config = parse_config(type(network.config), read_json(source), source)
    before, now = asdict(config), asdict(network.config)
    differing = {key for key in now if before[key] != now[key]}
    state: Mapping[str, Tensor] = StoredTensors(folder, type(network), config)
    if "patch" in differing and isinstance(network, VQSEG) and network.head is not None:
        times, rest = divmod(now["patch"], before["patch"])
        if not rest:
            state = dict(state)
            _enlarge_patches(state, before["patch"], times)
            differing.remove("patch")
    grown = {
        key
        for key in differing & GROWS
        if now[key] > before[key] and (key == "blocks" or not before[key])
    }
    wrong = sorted(differing - MAY_DIFFER - grown)
    if wrong:
        raise ValueError(
            f"{folder} holds another network: "
            + ", ".join(f"{key} is {before[key]}, not {now[key]}" for key in wrong)
            + "; set model.network to what it has"
        )
    for name, tensor in network.state_dict().items():
        if not grown or name in state:
            tensor.copy_(state[name])
    for key in sorted(differing):
        logger.info("%s was %s in %s, is now %s", key, before[key], folder, now[key])


def find_token_parts(network: VQSEG | VQGAN, folder: str | None) -> list[nn.Module]:
    """What a training of the decoder alone must leave as it is.

    Raises:
        ValueError: no `folder` to start from, or the tokens are others than those of its network.
    """
    if folder is None:
        raise ValueError("model.keep_tokens keeps the tokens of model.init_from: name its folder")
    if network.token_hash() != type(network).from_pretrained(folder).token_hash():
        raise ValueError(
            f"model.keep_tokens: with these sizes the tokens are others than those of {folder}; "
            "set model.network to what it has, size and grid too"
        )
    return token_parts(network)


def check_tokens(manifest: Mapping[str, Any], folder: str | Path, *, instead: str) -> None:
    """Checks that the GPT in `folder` was trained on tokens of the tokenizers behind `manifest`.

    Only a run folder knows them; for a part of a model folder a warning says that they are unknown.

    Args:
        manifest: of the tokens that the GPT shall learn.
        folder: of the run, or gpt/ of a model folder.
        instead: what else can be done than to tokenize with the tokenizers of that run.

    Raises:
        ValueError: names the streams whose tokens mean something else, or a damaged record.
    """
    source = Path(folder) / TOKENIZERS
    if not source.is_file():
        logger.warning(
            "%s has no %s, so it cannot be checked whether its GPT knows these tokens",
            folder,
            TOKENIZERS,
        )
        return
    before = read_json(source)
    try:
        other = [s for s in Streams._fields if not _same_tokens(before[s], manifest[s])]
    except (KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(
            f"{source} does not name the tokenizers: it is damaged; copy manifest.json of that "
            "training's tokens in its place"
        ) from None
    if other:
        raise ValueError(
            f"the GPT in {folder} was trained on other tokens than those of data.input: the "
            f"tokenizer of {' and '.join(other)} is another one; tokenize with the tokenizers of "
            f"that run, or {instead}"
        )


def _same_tokens(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two records are of one file, or of networks that only decode differently."""
    tokens = before.get("tokens_sha256")
    same = tokens is not None and tokens == now.get("tokens_sha256")
    return before["sha256"] == now["sha256"] or same


@torch.no_grad()
def _enlarge_patches(state: dict[str, Tensor], patch: int, times: int) -> None:
    """Every pixel of a patch becomes `times` × `times` pixels: read as one, drawn alike."""
    sizes = {"p": patch, "q": patch, "k": times, "l": times}
    for name in ("stem.project.weight", "stem.detail.0.weight"):
        if name in state:
            copies = repeat(state[name], "o (p q d) -> o (p k q l d)", **sizes)
            state[name] = copies / times**2  # mean of the copies
    for name in ("head.project", "head.detail.2"):
        for part in (f"{name}.weight", f"{name}.bias"):
            if part in state:
                state[part] = repeat(state[part], "(p q d) ... -> (p k q l d) ...", **sizes)
