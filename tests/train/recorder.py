"""Callbacks that note what every rank did: its samples, its weights at the end."""

from pathlib import Path

import torch
from pytorch_lightning import Callback


class Recorder(Callback):
    """Appends a line `step number key` per sample to FOLDER/RANK.txt once the step is done."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"{trainer.global_rank}.txt", "a") as file:
            for number, key in zip(batch["number"].tolist(), batch["key"], strict=True):
                file.write(f"{trainer.global_step} {number} {key}\n")


class WeightsKeeper(Callback):
    """Saves all weights of a rank as FOLDER/weightsRANK.pt when it has trained."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), self.folder / f"weights{trainer.global_rank}.pt")
