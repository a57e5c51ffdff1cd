"""Metrics over the whole validation set, whatever its batches and ranks.

In: metrics that sum up (mas/metrics.py). Out: logged values. A mean over batches would not do: IoU
and code usage of a set are no means of those of its parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from pytorch_lightning import LightningModule
from torch import Tensor


class Totals(Protocol):
    """A metric that sums up."""

    @property
    def totals(self) -> tuple[Tensor, ...]:
        """What is summed up."""

    def compute(self) -> dict[str, float]:
        """The metric of the sums."""


def log_totals(module: LightningModule, metrics: Sequence[Totals], *, prefix: str = "") -> None:
    """Adds up the metrics of all ranks and logs them as validation/NAME, `prefix` first.

    What nothing was seen of (face IoU without faces) is not logged.
    """
    values: dict[str, float] = {}
    for metric in metrics:
        for total in metric.totals if module.trainer.world_size > 1 else ():
            summed = module.trainer.strategy.reduce(total.to(module.device), reduce_op="sum")
            assert isinstance(summed, Tensor)
            total.copy_(summed)
        values |= metric.compute()
    step = float(module.global_step)  # the row's; else Lightning counts batches
    seen = {f"validation/{prefix}{k}": v for k, v in values.items() if not math.isnan(v)}
    module.log_dict({**seen, "step": step}, sync_dist=True)  # equal on all ranks already
