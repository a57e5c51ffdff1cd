"""The shipped configs: every one parses, and its network can be built."""

import dataclasses
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml

from mas.gpt import GPT, GPTConfig
from mas.judge import JudgeConfig, SceneJudge
from mas.model_folder import SHIPPED
from mas.refiner import Refiner, RefinerConfig
from mas.storage import parse_config, read_json
from mas.vqgan import VQGAN, VQGANConfig
from mas.vqseg import VQSEG, VQSEGConfig
from train.cli import train

CONFIGS = Path(__file__).parents[2] / "configs"
CLASSES = {
    "vqseg": (VQSEG, VQSEGConfig),
    "vqgan": (VQGAN, VQGANConfig),
    "gpt": (GPT, GPTConfig),
    "judge": (SceneJudge, JudgeConfig),
    "refiner": (Refiner, RefinerConfig),
}
STAGES = ["vqseg", "vqgan", "gpt"]  # of every folder
FOLDERS = ["tiny", "park", "base"]
# Of configs/park, beside the stages'.
RUNS = [
    ("vqgan-first", "vqgan"),
    ("vqseg-second", "vqseg"),
    ("vqseg-photos", "vqseg"),
    ("gpt-first", "gpt"),
]


def read(folder, stage, run=""):
    values = yaml.safe_load((CONFIGS / folder / f"{stage}{run}.yaml").read_text())
    return parse_config(CLASSES[stage][1], values["model"]["network"], stage)


@pytest.mark.parametrize(
    ("folder", "stage"),
    [
        *product(FOLDERS, STAGES),
        *((folder, "gpt") for folder in ("small", "1b", "4b")),
        *product(("tiny", "park"), ("judge", "refiner")),
    ],
)
def test_config_parses_and_its_network_builds(folder, stage, capsys):
    path = CONFIGS / folder / f"{stage}.yaml"
    with pytest.raises(SystemExit) as caught:
        train([stage, "--config", str(path), "--print_config"])
    assert caught.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["max_steps"] > 0
    with torch.device("meta"):
        network = CLASSES[stage][0](read(folder, stage))
    assert sum(p.numel() for p in network.parameters()) > 0
    head = path.read_text().splitlines()
    assert head[0].startswith("# ") and f"mas train {stage}" in "".join(head[:12])


@pytest.mark.parametrize(("name", "stage"), RUNS)
def test_a_further_run_of_the_park_parses_and_has_tensors_of_its_stage(name, stage, capsys):
    path = CONFIGS / f"park/{name}.yaml"
    with pytest.raises(SystemExit) as caught:
        train([stage, "--config", str(path), "--print_config"])
    assert caught.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["max_steps"] > 0
    of_stage = yaml.safe_load((CONFIGS / f"park/{stage}.yaml").read_text())["model"]["network"]
    keys = {"codes", "code_width", "width", "multipliers", "blocks", "groups", "layers", "heads"}
    for key in keys & of_stage.keys():
        assert printed["model"]["network"][key] == of_stage[key]


@pytest.mark.parametrize(("folder", "run"), [("tiny", ""), ("park", "-first"), ("base", "")])
def test_the_three_configs_of_a_folder_fit_together(folder, run):
    gpt, vqseg, vqgan = (read(folder, stage, run) for stage in ("gpt", "vqseg", "vqgan"))
    assert (gpt.scene_vocabulary, gpt.scene_grid) == (vqseg.codes, vqseg.grid)
    assert (gpt.image_vocabulary, gpt.image_grid) == (vqgan.codes, vqgan.grid)
    assert vqseg.size == vqgan.size


def test_the_last_runs_of_the_park_are_those_of_the_networks_that_ship():
    for stage, changed in (
        ("vqseg", {"codes": 4096}),
        ("vqgan", {}),
        ("gpt", {"text_head": False}),
    ):
        shipped = read_json(SHIPPED / f"park/{stage}/config.json")
        config = dataclasses.replace(read("park", stage), **changed)
        assert parse_config(CLASSES[stage][1], shipped, stage) == config


@pytest.mark.parametrize("folder", ["tiny", "park"])
def test_a_judge_reads_what_the_gpt_of_its_folder_reads(folder):
    gpt, judge = read(folder, "gpt"), read(folder, "judge")
    assert judge.text_vocabulary == gpt.text_vocabulary
    assert judge.text_length == gpt.text_length


@pytest.mark.parametrize(
    ("folder", "least", "most"), [("tiny", 2, 6), ("park", 10, 30), ("base", 265, 280)]
)
def test_the_gpts_have_the_promised_sizes(folder, least, most):
    with torch.device("meta"):
        network = GPT(read(folder, "gpt"))
    assert least <= sum(p.numel() for p in network.parameters()) / 1e6 <= most
