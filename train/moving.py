"""A trained GPT for the tokens of another VQ-SEG, so that training goes on instead of anew.

In: a GPT, the VQ-SEG of its tokens, the new one, and scenes. Out: the same GPT whose scene tokens
are the new one's. Only the rows of the scene's embedding and head are new: counted is how often old
code a and new code b lie in the same cell of a scene's grid, and the row of b is the mean of the
rows of a with the shares P(a | b).
Axes: A codes before, B codes after, D width, N scenes, T cells, H W pixels, M pairs of codes.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from tqdm import tqdm

from mas.gpt import GPT
from mas.vqseg import VQSEG

AT_ONCE = 32  # scenes


def check_sizes(gpt: GPT, before: VQSEG, after: VQSEG) -> None:
    """Refuses networks that do not fit together.

    Raises:
        ValueError: `before` is not the VQ-SEG of the GPT's tokens, or cells would be others.
    """
    config = gpt.config
    if (before.config.codes, before.config.grid) != (config.scene_vocabulary, config.scene_grid):
        raise ValueError(
            f"the GPT reads {config.scene_vocabulary} codes on a grid of {config.scene_grid}, "
            f"the VQ-SEG before has {before.config.codes} on {before.config.grid}: give the one of "
            "its tokens"
        )
    for name in ("grid", "size"):
        old, new = getattr(before.config, name), getattr(after.config, name)
        if old != new:
            raise ValueError(
                f"the VQ-SEG after has {name} {new}, not {old}: cells must be the same"
            )


@torch.no_grad()
def count_pairs(
    before: VQSEG, after: VQSEG, labels_NHW: Tensor, edges_NHW: Tensor, *, show: bool = False
) -> Tensor:
    """In how many cells of these scenes old code a and new code b lie; float32 A B.

    Args:
        before: the VQ-SEG of the old tokens.
        after: that of the new ones, with the same size and grid.
        labels_NHW: uint8.
        edges_NHW: bool.
        show: a progress bar.
    """
    shape = before.config.codes, after.config.codes
    counts_M = torch.zeros(shape[0] * shape[1], dtype=torch.long)
    parts = torch.arange(len(labels_NHW)).split(AT_ONCE)
    for part in tqdm(parts, desc="scenes", disable=not show):
        old_NT, new_NT = (net.encode(labels_NHW[part], edges_NHW[part]) for net in (before, after))
        counts_M += torch.bincount((old_NT * shape[1] + new_NT).flatten(), minlength=len(counts_M))
    return counts_M.view(shape).float()


@torch.no_grad()
def move(gpt: GPT, counts_AB: Tensor) -> GPT:
    """The same GPT for the new codes; all but embedding and head of the scene stays.

    A head has no bias, so nothing says that a code is rarer than the old ones it is made of. It is
    not missed: lowering the logits of b by the mean of log P(b | a) made the loss of new tokens
    worse (docs/LOG.md).
    """
    codes = counts_AB.shape[1]
    moved = GPT(dataclasses.replace(gpt.config, scene_vocabulary=codes)).requires_grad_(False)
    state = gpt.state_dict()
    shares_AB = shares(counts_AB)
    for name in ("embeddings.scene.weight", "heads.scene.weight"):
        state[name] = shares_AB.T @ state[name]
    moved.load_state_dict(state)
    return moved.eval()


def shares(counts_AB: Tensor) -> Tensor:
    """P(a | b), A B; for codes b that were not seen P(a)."""
    sums_B = counts_AB.sum(0)
    overall_A1 = counts_AB.sum(1, keepdim=True) / sums_B.sum()
    return torch.where(sums_B > 0, counts_AB / sums_B.clamp(min=1), overall_A1)
