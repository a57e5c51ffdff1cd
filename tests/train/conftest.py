"""A world of tiny landscapes: scene shards, token shards, and the smallest legal settings."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mas.scene import CLASS_NAMES, PALETTE, SceneMap
from mas.shards import Sample, ShardWriter, write_token_shard
from mas.storage import parse_config
from mas.text import Tokenizer
from mas.vqgan import VQGAN, VQGANConfig
from train.stage import Stage

SIZE = 32
GRASS, SKY, DOG = 125, 119, 16
PICTURES = 24


def make_scene(rng):
    labels = np.full((SIZE, SIZE), SKY, np.uint8)
    labels[rng.integers(8, 24) :] = GRASS
    x, y = rng.integers(0, 20, 2)
    labels[y : y + 10, x : x + 10] = DOG
    return SceneMap.from_labels(labels)


def encoded(save, **options):
    buffer = io.BytesIO()
    save(buffer, **options)
    return buffer.getvalue()


def write_scenes(folder, pictures, *, length):
    """A shard of scenes with one caption each, and a tokenizer of 270 entries that knows these."""
    captions = [caption for _, caption in pictures]
    with ShardWriter(str(folder / "00000.tar")) as writer:
        for number, (scene, caption) in enumerate(pictures):
            classes = {CLASS_NAMES[k]: 1 for k in np.unique(scene.labels).tolist()}
            content = {"captions": [caption], "scene": {"classes": classes}}
            files = {
                "scene.png": encoded(scene.to_png),
                "txt": caption.encode(),
                "json": json.dumps(content).encode(),
            }
            writer.write(Sample(f"{number:05}", files))
    Tokenizer.fit(captions, vocab_size=270, length=length).save(folder / "tokenizer.json")


@pytest.fixture(scope="session")
def scene_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    for shard in range(2):
        with ShardWriter(str(folder / f"{shard:05}.tar")) as writer:
            for picture in range(PICTURES // 2):
                scene = make_scene(rng)
                photo = Image.fromarray(PALETTE[scene.labels])
                captions = [f"a dog on the grass, picture {picture}", "a dog"]
                files = {
                    "jpg": encoded(photo.save, format="JPEG", quality=95),
                    "scene.png": encoded(scene.to_png),
                    "txt": captions[0].encode(),
                    "json": json.dumps({"captions": captions}).encode(),
                }
                writer.write(Sample(f"{shard:05}{picture:04}", files))
    return folder


@pytest.fixture(scope="session")
def token_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    row = np.repeat(np.arange(PICTURES, dtype=np.int32), 2)
    text = rng.integers(1, 300, (len(row), 8)).astype(np.uint16)
    text[:, 5:] = 0
    write_token_shard(
        str(folder),
        "00000",
        scene=rng.integers(0, 16, (PICTURES, 4)).astype(np.uint16),
        image=rng.integers(0, 32, (PICTURES, 16)).astype(np.uint16),
        text=text,
        row=row,
    )
    manifest = {
        "format": 1,
        "text": {"vocabulary": 300, "length": 8, "sha256": "t"},
        "scene": {"vocabulary": 16, "grid": 2, "sha256": "s"},
        "image": {"vocabulary": 32, "grid": 4, "sha256": "i"},
        "shards": [{"name": "00000", "pictures": PICTURES, "captions": len(row)}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


COMMON = {
    "data.batch_size": 4,
    "data.workers": 0,
    "data.holdout": 6,
    "model.optimiser.warmup_steps": 2,
    "model.optimiser.learning_rate": 0.003,
    "trainer.accelerator": "cpu",
    "trainer.val_check_interval": 4,
    "trainer.log_every_n_steps": 1,
    "ema_decay": 0.9,
}
NETWORKS = {
    "vqseg": {
        "size": SIZE,
        "grid": 4,
        "codes": 16,
        "code_width": 4,
        "width": 8,
        "groups": 4,
        "patch": 4,
        "features": 8,
        "multipliers": [1, 1],
    },
    "vqgan": {
        "size": SIZE,
        "codes": 32,
        "code_width": 4,
        "features": 8,
        "width": 8,
        "groups": 4,
        "multipliers": [1, 1, 1, 1],
        "blocks": 1,
        "attention": [],
    },
    "gpt": {
        "layers": 2,
        "width": 32,
        "heads": 2,
        "text_vocabulary": 300,
        "scene_vocabulary": 16,
        "image_vocabulary": 32,
        "text_length": 8,
        "scene_grid": 2,
        "image_grid": 4,
        "dropout": 0.1,
    },
    "judge": {"text_vocabulary": 270, "text_length": 8, "width": 16, "heads": 2, "hidden": 16},
    "refiner": {"size": SIZE, "width": 8, "groups": 4, "features": 8, "label_width": 4},
}
ADVERSARY = {
    "model.adversary.start": 2,
    "model.adversary.warmup_steps": 2,
    "model.adversary.width": 8,
    "model.adversary.levels": 1,
    "model.adversary.learning_rate": 0.5,
}
EXTRAS = {
    "vqseg": {},
    "vqgan": ADVERSARY,
    "gpt": {"model.caption_dropout.share": 0.3, "model.caption_dropout.start": 0},
    "judge": {},
    "refiner": ADVERSARY,
}


@pytest.fixture(scope="session")
def vqgan_folder(tmp_path_factory):
    """A VQ-GAN of random weights, for the refiner."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vqgan") / "vqgan"
    VQGAN(parse_config(VQGANConfig, NETWORKS["vqgan"], folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def network_sizes():
    return NETWORKS


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tokenizer.json"
    captions = [f"a dog on the grass, picture {picture}" for picture in range(PICTURES // 2)]
    Tokenizer.fit(captions, vocab_size=270, length=8).save(path)
    return path


@pytest.fixture
def words(scene_shards, token_shards, tokenizer_file, vqgan_folder, tmp_path):
    """words(stage, key=value …): the command line of a tiny run into tmp_path/run."""
    files = {
        "judge": {"data.tokenizer": tokenizer_file},
        "refiner": {"model.vqgan": vqgan_folder},
    }

    def make(stage, folder="run", **settings):
        values = {
            "data.input": token_shards if stage == "gpt" else scene_shards,
            "trainer.default_root_dir": tmp_path / folder,
            **COMMON,
            **{f"model.network.{key}": value for key, value in NETWORKS[stage].items()},
            **EXTRAS[stage],
            **files.get(stage, {}),
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        return [stage, *(f"--{key}={value}" for key, value in values.items() if value is not None)]

    return make


@pytest.fixture
def at_step(monkeypatch):
    """at_step(k, act): calls `act` as optimiser step k (from 0) begins; at_step(None) undoes.

    `batch` waits for that batch of the run, where a step takes several.
    """
    original = Stage.on_train_batch_start

    def arrange(step, act=None, batch=None):
        def hook(self, content, batch_idx):
            if self.global_step == step and batch in (None, batch_idx):
                act()
            original(self, content, batch_idx)

        monkeypatch.setattr(Stage, "on_train_batch_start", hook if act else original)

    return arrange


@pytest.fixture
def scripted(monkeypatch):
    """scripted({step: loss}): what the validations of a run say."""
    original = Stage.log_losses

    def arrange(losses):
        def log_losses(self, part, values, *, count):
            if part == "validation":
                values = values | {"loss": torch.tensor(losses[self.global_step])}
            original(self, part, values, count=count)

        monkeypatch.setattr(Stage, "log_losses", log_losses)

    return arrange
