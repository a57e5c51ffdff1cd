"""TensorBoard events of a run, written only once there is something to show.

In: what the modules log. Out: tensorboard/ in the run folder. Lightning's own logger makes its
folder and files before data and settings are checked, so that a refused run leaves a folder.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only


class Events(TensorBoardLogger):
    """Lightning's logger for TensorBoard, started by the first metric."""

    started = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        return super().experiment if self.started else None

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *more: Any, **named: Any) -> None:
        """The run's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.started = True
        super().log_metrics(metrics, step)

    @rank_zero_only
    def save(self) -> None:
        """Nothing to do: the events are on the disk, hyperparameters in config.yaml."""
