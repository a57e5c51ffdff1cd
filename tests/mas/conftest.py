"""A complete model of the smallest legal sizes, with random weights, for tests that sample."""

import os
import signal

import numpy as np
import pytest
import torch

from mas.__main__ import main
from mas.fast_decoder import find_step, find_steps
from mas.gpt import GPT, GPTConfig
from mas.model import MakeAScene
from mas.scene import CLASS_NAMES, VOID, SceneMap
from mas.text import Tokenizer
from mas.vqgan import VQGAN, VQGANConfig
from mas.vqseg import VQSEG, VQSEGConfig

CAPTIONS = [
    "two brown dogs and a woman with a red umbrella on the beach at sunset",
    "a giraffe in the park",
    "three sheep behind a red bus",
]


@pytest.fixture(params=find_steps())
def kind(request, monkeypatch):
    """Each kind of step that this CPU can run, in turn."""
    if not request.param:
        pytest.skip(f"fast step: {find_step().state}")
    monkeypatch.setenv("MAS_STEP", request.param)
    return request.param


@pytest.fixture
def two_dogs():
    """32 x 32 pixels: two dogs side by side on grass, a hole of void below."""
    labels = np.full((32, 32), CLASS_NAMES.index("grass-merged"), np.uint8)
    labels[4:12, 4:20] = CLASS_NAMES.index("dog")
    labels[20:24, 20:24] = VOID
    things = np.zeros((32, 32), np.int32)
    things[4:12, 4:12] = 1
    return SceneMap.from_labels(labels, things)


def build_parts():
    """Tokenizer and networks: 32 px, 4 x 4 scene tokens, 4 x 4 image tokens."""
    torch.manual_seed(0)
    gpt = GPT(
        GPTConfig(
            layers=2,
            width=32,
            heads=4,
            text_vocabulary=300,
            scene_vocabulary=24,
            image_vocabulary=20,
            text_length=12,
            scene_grid=4,
            image_grid=4,
        )
    )
    with torch.no_grad():
        for head in gpt.heads.values():
            head.weight *= 4  # strong opinions, so that captions and guidance matter
    return {
        "tokenizer": Tokenizer.fit(CAPTIONS * 3, vocab_size=300, length=12),
        "vqseg": VQSEG(
            VQSEGConfig(
                size=32, grid=4, codes=24, code_width=4, patch=4, width=16, features=8, groups=4
            )
        ),
        "vqgan": VQGAN(
            VQGANConfig(
                size=32,
                codes=20,
                code_width=8,
                features=16,
                width=8,
                multipliers=(1, 1, 2, 2),
                blocks=1,
                attention=(),
                groups=4,
            )
        ),
        "gpt": gpt,
    }


@pytest.fixture
def parts():
    return build_parts()


@pytest.fixture(scope="session")
def tiny_model():
    return MakeAScene(**build_parts())


@pytest.fixture(scope="session")
def tiny_folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIP of the smallest sizes with random weights; its words are single letters."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.utils import logging

    folder = tmp_path_factory.mktemp("clip") / "tiny"
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[]).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "projection_dim": 8}
    special = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    special["pad_token_id"] = special["eos_token_id"]
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={"vocab_size": len(words), "max_position_embeddings": 16, **sizes, **special},
        vision_config={"image_size": 32, "patch_size": 16, **sizes},
        projection_dim=8,
    )
    logging.disable_progress_bar()
    CLIPModel(config).save_pretrained(folder)
    logging.enable_progress_bar()
    side = {"height": 32, "width": 32}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capsys):
    """Runs `mas sample` in an empty folder with the tiny model; gives status, output, errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model=tiny_folder, device="cpu"):
        try:
            status = main(["sample", *arguments, "--model", str(model), "--device", device])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def few_keys_a_bucket(monkeypatch):
    """So that the 31 positions of a small GPT lie in four buckets of a recorded step."""
    monkeypatch.setattr("mas.cuda_decoder.BUCKET", 8)


@pytest.fixture(scope="module")
def studio(tiny_folder, tmp_path_factory):
    from studio_visitor import Studio

    studio = Studio(tiny_folder, tmp_path_factory.mktemp("studio"))
    yield studio
    studio.end(signal.SIGINT)


@pytest.fixture(scope="module")
def address(studio):
    return studio.address


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    from studio_visitor import CHROMIUM, launch

    if not os.path.exists(CHROMIUM):
        pytest.skip("needs chromium")
    with api.sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, address):
    """An empty page; at the end nothing must have gone wrong on it."""
    page = chromium.new_page(viewport={"width": 1400, "height": 1300})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    # Nothing is loaded from anywhere else: the page works without a network, and tells nobody.
    page.on(
        "request", lambda r: r.url.startswith((address, "data:", "blob:")) or errors.append(r.url)
    )
    yield page
    page.close()
    assert not errors


@pytest.fixture
def visitor(page, address):
    from studio_visitor import Visitor

    return Visitor(page, address)
