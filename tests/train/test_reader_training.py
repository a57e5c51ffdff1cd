"""Training of the reader: what it learns from, and that it learns."""

import csv
import json
import math

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mas.reader import Reader, ReaderConfig
from mas.scene import PALETTE, VOID
from mas.shards import Sample, ShardWriter
from mas.storage import parse_config
from tests.train.conftest import COMMON, SIZE, encoded, make_scene
from tests.train.test_configs import CONFIGS
from train.cli import train
from train.reader import UNKNOWN, Accuracy, PixelChoice

PICTURES = 24


@pytest.fixture(scope="module")
def fact_shards(tmp_path_factory):
    """Landscapes by day and by night; the time is told of all but one, whose park is another."""
    folder = tmp_path_factory.mktemp("facts")
    rng = np.random.default_rng(0)
    with ShardWriter(str(folder / "00000.tar")) as writer:
        for number in range(PICTURES):
            scene, time = make_scene(rng), ("day", "night")[number % 2]
            pixels = PALETTE[scene.labels] // (1 if time == "day" else 3)
            content = {"park": {"time": time, "place": "park"} if number else "Yosemite"}
            files = {
                "jpg": encoded(Image.fromarray(pixels).save, format="JPEG", quality=95),
                "scene.png": encoded(scene.to_png),
                "txt": b"a dog",
                "json": json.dumps(content).encode(),
            }
            writer.write(Sample(f"{number:05}", files))
    return folder


def words(shards, folder, **settings):
    values = {
        **COMMON,
        "data.input": shards,
        "trainer.default_root_dir": folder,
        "model.network.size": SIZE,
        "model.network.width": 8,
        "model.network.multipliers": [1, 2],
        "model.network.groups": 4,
        "model.network.features": 8,
        "model.network.times": ["day", "night"],
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    return ["reader", *(f"--{key}={value}" for key, value in values.items())]


def test_a_reader_starts_from_another(fact_shards, tmp_path):
    settings = {"trainer__max_steps": 1, "pictures__count": 0, "ema_decay": 0}
    assert train(words(fact_shards, tmp_path / "first", **settings)) == 0
    settings |= {"model__init_from": tmp_path / "first", "model__optimiser.learning_rate": 1e-30}
    assert train(words(fact_shards, tmp_path / "second", **settings)) == 0
    first, second = (Reader.from_pretrained(tmp_path / name) for name in ("first", "second"))
    for name, tensor in second.state_dict().items():
        torch.testing.assert_close(tensor, first.state_dict()[name], rtol=0, atol=1e-20, msg=name)


def test_the_reader_learns_pixels_and_hours(fact_shards, tmp_path):
    settings = dict(ema_decay=0, trainer__max_steps=80, trainer__val_check_interval=80)
    settings |= {"model.optimiser.learning_rate": 0.01}
    assert train(words(fact_shards, tmp_path / "run", **settings)) == 0
    with open(tmp_path / "run/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    (last,) = [row for row in rows if row["validation/loss"]]
    assert float(last["validation/pixel_accuracy"]) > 0.9
    assert float(last["validation/time_accuracy"]) == 1
    network = Reader.from_pretrained(tmp_path / "run")
    assert network.config.times == ("day", "night")
    with Image.open(next((tmp_path / "run/pictures").iterdir())) as sheet:
        sheet.load()


def test_accuracy_is_that_of_what_is_known_on_all_ranks_together():
    first, second = Accuracy("time"), Accuracy("time")
    first.update(torch.tensor([0, 1, 1]), torch.tensor([0, UNKNOWN, 0]))
    second.update(torch.tensor([1, 1]), torch.tensor([UNKNOWN, UNKNOWN]))
    assert math.isnan(second.compute()["time_accuracy"])
    second.totals[0].add_(first.totals[0])  # as the sum over ranks does
    assert second.compute() == {"time_accuracy": 0.5}


def test_shards_without_facts_train_it_too(scene_shards, tmp_path):
    settings = {"trainer.max_steps": 4, "model.network.times": []}
    assert train(words(scene_shards, tmp_path / "run", **settings)) == 0
    assert Reader.from_pretrained(tmp_path / "run").config.times == ()


def test_an_hour_nobody_named_is_refused_by_name(fact_shards, tmp_path):
    settings = {"trainer.max_steps": 4, "model.network.times": ["day"]}
    with pytest.raises(ValueError, match="the data has the time 'night', model"):
        train(words(fact_shards, tmp_path / "run", **settings))


def test_rare_classes_and_outlines_are_drawn_more_often_and_void_never():
    torch.manual_seed(0)
    labels_BHW = torch.zeros(1, 40, 40, dtype=torch.uint8)
    labels_BHW[:, :4] = VOID
    labels_BHW[:, 30:34, 30:34] = 7
    edges_BHW = torch.zeros(1, 40, 40, dtype=torch.bool)
    edges_BHW[:, :, 10] = True

    def shares(**options):
        drawn = PixelChoice(share=1.0, **options).draw(labels_BHW, edges_BHW)[0]
        labels, near = labels_BHW.flatten()[drawn], (drawn % 40 - 10).abs() <= 1
        return {
            "rare": float((labels == 7).float().mean()),
            "void": float((labels == VOID).float().mean()),
            "outline": float(near.float().mean()),
        }

    plain = shares(outline=0.0, balance=0.0)
    assert plain["rare"] == pytest.approx(16 / 1440, abs=0.01)
    assert shares(outline=0.0, balance=1.0)["rare"] == pytest.approx(0.5, abs=0.05)
    assert shares(outline=5.0, balance=0.0)["outline"] > 2 * plain["outline"]
    assert plain["void"] == 0


def test_a_picture_of_nothing_but_void_can_be_drawn_from():
    labels_BHW = torch.full((2, 8, 8), VOID, dtype=torch.uint8)
    drawn = PixelChoice().draw(labels_BHW, torch.zeros(2, 8, 8, dtype=torch.bool))
    assert drawn.shape == (2, 8)


@pytest.mark.parametrize("options", [{"share": 0.0}, {"outline": -1.0}, {"balance": 2.0}])
def test_impossible_choices_are_refused(options):
    with pytest.raises(ValueError, match="share is in"):
        PixelChoice(**options)


@pytest.mark.parametrize(("folder", "size", "most"), [("tiny", 64, 1e6), ("park", 128, 2.1e6)])
def test_the_configs_parse_and_their_networks_build(folder, size, most, capsys):
    path = CONFIGS / folder / "reader.yaml"
    with pytest.raises(SystemExit) as caught:
        train(["reader", "--config", str(path), "--print_config"])
    assert caught.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_steps"] > 0
    values = yaml.safe_load(path.read_text())["model"]["network"]
    config = parse_config(ReaderConfig, values, path)
    with torch.device("meta"):
        assert sum(p.numel() for p in Reader(config).parameters()) < most
    assert config.size == size


def test_every_validation_reads_the_same_pixels(fact_shards, tmp_path):
    rate = 1e-30  # leaves the weights as they are
    settings = {"model__optimiser__learning_rate": rate, "trainer__val_check_interval": 1}
    assert train(words(fact_shards, tmp_path, trainer__max_steps=3, **settings)) == 0
    with open(tmp_path / "metrics.csv") as file:
        losses = [row["validation/loss"] for row in csv.DictReader(file)]
    assert len(set(filter(None, losses))) == 1
