"""Metrics of a run as one CSV file that survives resuming.

In: what the modules log. Out: metrics.csv, one row per logged step, one column per metric.
Lightning's own CSV logger deletes the file of the run it continues.
"""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only

from mas.errors import naming_full

FILE = "metrics.csv"


class MetricsLog(Logger):
    """Appends rows to `folder`/metrics.csv.

    Args:
        folder: of the run.
        resumed_step: rows of later steps are dropped: the resumed run logs them anew.
    """

    def __init__(self, folder: str | Path, *, resumed_step: int = 0) -> None:
        super().__init__()
        self.path = Path(folder) / FILE
        self.resumed_step = resumed_step
        self.columns: list[str] = []
        self.opened = False

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        return self

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """The run's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if not self.opened:
            self._open()
        row = {
            "step": int(step or 0),
            **{k: f"{v:.9g}" for k, v in metrics.items() if k != "epoch"},
        }
        new = [name for name in row if name not in self.columns]
        if new:
            rows = self._read()
            self.columns += new
            self._rewrite(rows)
        with naming_full(self.path), open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def _open(self) -> None:
        rows = [row for row in self._read() if self._stays(row)]
        if rows:
            self.columns = list(rows[0])
            self._rewrite(rows)
        else:
            self.path.unlink(missing_ok=True)
        self.opened = True

    def _stays(self, row: dict[str, str]) -> bool:
        # Training rows carry the steps before theirs; validation comes after a checkpoint's step.
        step = int(row["step"])
        return step < self.resumed_step or (step == self.resumed_step and not row.get("train/loss"))

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with open(self.path, newline="") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{FILE}")
        with naming_full(self.path), open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)
