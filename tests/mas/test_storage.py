"""Weights travel with their config, and whatever does not fit is named."""

import dataclasses
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mas.gpt import GPT, GPTConfig
from mas.judge import JudgeConfig, SceneJudge
from mas.reader import Reader, ReaderConfig
from mas.refiner import Refiner, RefinerConfig
from mas.storage import (
    StorageError,
    StoredTensors,
    file_hash,
    load_network,
    save_network,
    write_json,
)
from mas.vqgan import VQGAN, VQGANConfig
from mas.vqseg import VQSEG, VQSEGConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineConfig:
    inputs: int  # features in
    widths: tuple[int, ...] = (3, 2)  # features out of each layer
    share: float | None = None  # anything

    def __post_init__(self):
        if self.inputs < 1:
            raise ValueError(f"inputs must be positive, got {self.inputs}")


class Line(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        sizes = (config.inputs, *config.widths)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    network = Line(LineConfig(inputs=4))
    save_network(network, tmp_path / "line")
    return tmp_path / "line", network


def test_a_network_comes_back_with_its_config_and_weights(folder):
    path, network = folder
    loaded = load_network(Line, LineConfig, path)
    assert loaded.config == network.config and not loaded.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]


def test_others_may_read_what_was_saved(folder):
    for path in folder[0].iterdir():
        assert path.stat().st_mode & 0o444 == 0o444


def test_half_precision_files_load_as_float32(folder):
    path, network = folder
    weights = path / "model.safetensors"
    save_file({k: v.half() for k, v in load_file(weights).items()}, weights)
    loaded = load_network(Line, LineConfig, path)
    assert loaded.layers[0].weight.dtype == torch.float32
    assert torch.allclose(loaded.layers[0].weight, network.layers[0].weight, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, r"unknown config keys \['depth'\]"),
        ({"inputs": None}, "inputs"),
        ({"inputs": 5}, r"layers\.0\.weight \(3, 4\) instead of \(3, 5\)"),
        ({"inputs": 0}, "inputs must be positive"),
        ({"widths": [3, 2, 1]}, r"missing tensors: layers\.2\.weight"),
        ({"widths": [3]}, r"2 unexpected tensors: layers\.1\."),
        ({"inputs": 4.0}, r"inputs is 4\.0, but must be int"),
        ({"inputs": True}, "inputs is True, but must be int"),
        ({"widths": 3}, "widths is 3, but must be tuple"),
        ({"widths": [3, "2"]}, "widths is .*, but must be tuple"),
        ({"share": "half"}, "share is 'half', but must be float"),
    ],
)
def test_configs_that_do_not_fit_are_named(folder, change, message):
    path, _ = folder
    config = json.loads((path / "config.json").read_text()) | change
    (path / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )
    with pytest.raises(StorageError, match=message):
        load_network(Line, LineConfig, path)


def test_missing_and_broken_files_are_named(folder, tmp_path):
    path, _ = folder
    with pytest.raises(StorageError, match=r"config\.json: no such file"):
        load_network(Line, LineConfig, tmp_path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(StorageError, match=r"model\.safetensors: not a readable"):
        load_network(Line, LineConfig, path)
    weights.unlink()
    with pytest.raises(StorageError, match=r"model\.safetensors: no such file"):
        load_network(Line, LineConfig, path)


def test_a_failed_save_leaves_the_old_files(folder, monkeypatch):
    path, network = folder
    before = file_hash(path / "model.safetensors")

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("mas.storage.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_network(network, path)
    assert file_hash(path / "model.safetensors") == before
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "change", [{"inputs": 10**12}, {"widths": [3, 10**9]}, {"widths": [30_000] * 9}]
)
def test_a_config_of_a_few_letters_takes_no_memory(folder, change):
    path, _ = folder
    config = json.loads((path / "config.json").read_text()) | change
    (path / "config.json").write_text(json.dumps(config))
    message = r"config\.json: describes a far larger network than the one that is stored; get it"
    with pytest.raises(StorageError, match=message):
        load_network(Line, LineConfig, path)
    with pytest.raises(StorageError, match=message):
        StoredTensors(path, Line, LineConfig(**{"inputs": 4} | change))


def test_json_of_many_brackets_is_said_to_be_unreadable(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(StorageError, match=r"config\.json: not a readable JSON file"):
        load_network(Line, LineConfig, tmp_path)


def test_numbers_of_another_kind_are_named(folder):
    path, _ = folder
    tensors = load_file(path / "model.safetensors")
    whole = {"layers.1.bias": tensors["layers.1.bias"].long()}
    save_file(tensors | whole, path / "model.safetensors")
    message = r"model\.safetensors: 1 tensors of the wrong kind of number: layers\.1\.bias"
    with pytest.raises(StorageError, match=message):
        load_network(Line, LineConfig, path)
    with pytest.raises(StorageError, match=message):
        StoredTensors(path, Line, LineConfig(inputs=4))


NETWORKS = {
    "VQ-SEG": (VQSEG, VQSEGConfig()),
    "VQ-GAN": (VQGAN, VQGANConfig()),
    "GPT": (GPT, GPTConfig()),
    "reader": (Reader, ReaderConfig()),
    "judge": (SceneJudge, JudgeConfig(text_vocabulary=300, text_length=8)),
    "refiner": (Refiner, RefinerConfig()),
}


@pytest.mark.parametrize(("found", "wanted"), list(itertools.permutations(NETWORKS, 2)))
def test_another_network_is_called_by_its_name(found, wanted, tmp_path):
    write_json(tmp_path / "config.json", dataclasses.asdict(NETWORKS[found][1]))
    message = rf"config\.json: this is a {found}; give the folder of a {wanted}"
    with pytest.raises(StorageError, match=message):
        NETWORKS[wanted][0].from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_of_the_right_name_lacks_only_its_weights(kind, tmp_path):
    network_class, config = NETWORKS[kind]
    write_json(tmp_path / "config.json", dataclasses.asdict(config))
    with pytest.raises(StorageError, match=r"model\.safetensors: no such file"):
        network_class.from_pretrained(tmp_path)


def test_a_folder_of_networks_names_those_inside(folder, tmp_path):
    with pytest.raises(StorageError, match=r"networks inside, in line: give one of these folders"):
        load_network(Line, LineConfig, tmp_path)
