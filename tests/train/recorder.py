"""A callback that notes which samples every step of every rank trained on."""

from pathlib import Path

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
