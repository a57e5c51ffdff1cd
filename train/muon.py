"""Muon for the matrices inside the blocks of a GPT, AdamW for everything else, as one optimiser.

In: both kinds of parameters. Out: an optimiser that Lightning steps, saves and loads like any
other. Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes each update
orthogonal; scaled to the size of AdamW's updates (arXiv 2502.16982) it takes the same learning rate
and weight decay. torch has it for matrices only, hence the pair.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon


class MuonAdamW(torch.optim.Optimizer):
    """Muon over the first group of parameters, AdamW over the others."""

    def __init__(
        self,
        matrices: list[Tensor],
        groups: list[dict[str, Any]],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        """Takes the matrices, and groups as AdamW takes them.

        Args:
            matrices: weights of two axes each, hidden ones: no embeddings, no heads.
            groups: of all other parameters.
            learning_rate: of both.
            betas: of AdamW; Muon's momentum is 0.95.
            weight_decay: of the matrices.
        """
        muon = Muon(
            matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        adamw = AdamW(groups, lr=learning_rate, betas=betas, fused=True)
        self._parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Lets both work on this optimiser's groups and state, so that it is saved as one."""
        for part, groups in zip(
            self._parts, (self.param_groups[:1], self.param_groups[1:]), strict=True
        ):
            part.param_groups, part.state = groups, self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both; `closure` is called once, as by every optimiser."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss
