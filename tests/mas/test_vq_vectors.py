"""The published networks' own outputs, through the loader that reads published checkpoints."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from published import TINY, as_input, published_shapes, rule_state, worst

from mas.pretrained import load_published
from mas.vqgan import VQGANConfig

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests/data/vqgan-f16-tiny"
VECTORS = Path(os.environ.get("MAS_VECTORS", ROOT.parent / "shared/vectors"))
MODELS = {  # folder -> format, size, key of the file that holds the weights
    "vqgan-f16-tiny": ("mindalle", 64, "state_dict"),
    "vqgan-f16-16384": ("taming", 256, "state_dict"),
    "vqgan-gumbel-f8-8192": ("taming-gumbel", 256, "state_dict"),
    "llamagen-vq-16": ("llamagen", 256, "model"),
}


def check(network, images, reference, tolerance):
    """Codes exactly, features and pixels within the tolerance; both directions separately."""
    with torch.no_grad():
        features = network.encode_features(as_input(images))
        assert worst(reference, "prequant", features) <= tolerance["prequant"]
        assert np.array_equal(network.quantizer.encode(features).numpy(), reference["codes"])
        for codes, pixels in (("codes", "pixels"), ("rand_codes", "rand_pixels")):
            raw = network.decode_raw(torch.from_numpy(reference[codes]).long())
            assert worst(reference, pixels, raw) <= tolerance[pixels]
        if "logits" in reference:
            logits = network.quantizer.logits(features)
            assert worst(reference, "logits", logits) <= tolerance["logits"]


def test_synthetic_pictures_give_the_published_codes_and_pixels(tmp_path):
    meta = json.loads((HERE / "meta.json").read_text())
    shapes = published_shapes(VQGANConfig(**TINY), "mindalle")
    torch.save({"state_dict": rule_state(shapes, meta["scales"])}, tmp_path / "stage1_last.ckpt")
    network, ignored = load_published(tmp_path / "stage1_last.ckpt", format="mindalle", size=64)
    assert network.config == VQGANConfig(**TINY) and ignored == []
    images = np.load(HERE / "input.npz")["images"]
    check(network, images, np.load(HERE / "output.npz"), meta["tolerance_abs"])


@pytest.mark.vectors
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_published_network_is_reproduced(model, tmp_path):
    folder = VECTORS / model
    if not folder.is_dir():
        pytest.skip(f"no golden vectors at {VECTORS}: set MAS_VECTORS")
    format, size, container = MODELS[model]
    meta = json.loads((folder / "meta.json").read_text())
    keys = json.loads((folder / "keys.json").read_text())
    shapes = {name: tuple(key["shape"]) for name, key in keys.items()}
    state = rule_state(shapes, meta["rule"]["scales"])
    torch.save({container: state, "epoch": 3}, tmp_path / "last.ckpt")
    network, ignored = load_published(tmp_path / "last.ckpt", format=format, size=size)
    left_out = {name: shapes.pop(name) for name in ignored}
    assert set(left_out) <= {"quantize.codebook_used"}
    assert published_shapes(network.config, format) == shapes
    assert network.config.codes == meta["hyper_parameters"].get("n_embed", 16384)
    images = np.load(folder / "input.npz")["images"]
    check(network, images, np.load(folder / "output.npz"), meta["tolerance_abs"])
