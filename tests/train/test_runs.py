"""Every stage through the real `mas train`: what a run leaves behind, and that it learns."""

import pytest
import torch

from mas.gpt import GPT
from mas.vqgan import VQGAN
from mas.vqseg import VQSEG
from train.cli import train

NETWORKS = {"vqseg": VQSEG, "vqgan": VQGAN, "gpt": GPT}


@pytest.mark.parametrize("stage", NETWORKS)
def test_run_folder_is_a_network(stage, words, tmp_path):
    assert train(words(stage, trainer__max_steps=4)) == 0
    run = tmp_path / "run"
    network = NETWORKS[stage].from_pretrained(run)
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, checkpoint["state_dict"][f"network.{name}"])
