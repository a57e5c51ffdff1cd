"""Fine-tuning: a network of a run starts from the weights of another.

In: a fresh network, and a folder with a trained one (a run folder, an imported `vqgan/`, a part of
a model folder). Out: the network with those weights. What decides the tensors and their meaning
must agree; picture size and settings of the training may differ, since the networks are
convolutional.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from mas.vqgan import VQGAN
from mas.vqseg import VQSEG

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
}
GROWS = {"blocks", "hidden"}  # may be larger, hidden only from 0: what is new starts as nothing


def start_from(network: VQSEG | VQGAN, folder: str | Path) -> None:
    """Copies the weights of `folder` into `network`.

    A VQ-SEG may also have patches a whole number of times larger than the folder's: it then starts
    as the same network that sees every pixel enlarged by that number. So one trained at 128 px and
    16×16 tokens starts one at 256 px and 16×16 tokens. Residual blocks may be added, and hidden
    layers where there were none: both start as the identity.

    Raises:
        StorageError: the folder holds no such network.
        ValueError: another network; names the keys of its config that must be copied.
    """
    trained: Any = type(network).from_pretrained(folder)
    before, now = asdict(trained.config), asdict(network.config)
    differing = {key for key in now if before[key] != now[key]}
    state = trained.state_dict()
    if "patch" in differing and isinstance(network, VQSEG) and network.head is not None:
        times, rest = divmod(now["patch"], before["patch"])
        if not rest:
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
    network.load_state_dict((network.state_dict() if grown else {}) | state)
    for key in sorted(differing):
        logger.info("%s was %s in %s, is now %s", key, before[key], folder, now[key])


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
