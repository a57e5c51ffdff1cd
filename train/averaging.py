"""The moving average of a network's weights that a training validates and exports.

In: the running trainer. Out: the average in the trained weights' place while validating and saving.
"""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor


class Averaging(WeightAveraging):
    """Exponential moving average of the weights; used in validation and for the exported network.

    Args:
        decay: share of the average that a step keeps, reached after a warm-up of about
            10 / (1 - decay) steps so that short runs are not tied to their beginning.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"averaging.decay is {decay}, use a number between 0 and 1")
        self.decay = decay
        super().__init__(use_buffers=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device  # where the module is about to move
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        self._count = int(self._average_model.n_averaged)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """As Lightning's, but counts beside the GPU, which would be asked three times a step."""
        assert self._average_model is not None
        if trainer.global_step <= self._latest_update_step:
            return
        network = self._average_model.module
        share = self._share(self._count) if self._count else 1.0
        # Codebooks that follow their features are moving averages themselves, as buffers are, and
        # what is held must stay as it is: an average of -0.0 and -0.0 is 0.0.
        learned = [parameter.requires_grad for parameter in pl_module.parameters()]
        fixed = [not part for part in learned]
        ours, theirs = list(network.parameters()), list(pl_module.parameters())
        torch._foreach_lerp_(list(compress(ours, learned)), list(compress(theirs, learned)), share)
        if copies := [*compress(ours, fixed), *network.buffers()]:
            torch._foreach_copy_(copies, [*compress(theirs, fixed), *pl_module.buffers()])
        self._average_model.n_averaged += 1
        self._count += 1
        self._latest_update_step = trainer.global_step

    def average(self, average: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        return torch.lerp(average, current, self._share(count))

    def _share(self, count: Tensor | int) -> float:
        """What the current weights count after `count` steps."""
        steps = int(count)
        return 1 - min(self.decay, (1 + steps) / (10 + steps))
