"""The VQ-GAN's interface; that it computes what is published stands in test_vq_vectors."""

import json

import pytest
import torch

from mas.storage import StorageError
from mas.vqgan import VQGAN, VQGANConfig

TINY = dict(size=16, codes=20, code_width=8, features=12, width=8, groups=4)


def config(**changes):
    return VQGANConfig(**{**TINY, "multipliers": (1, 2, 2), "attention": (2,), **changes})


def network(**changes):
    torch.manual_seed(0)
    return VQGAN(config(**changes))


def pictures(count=2, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("quantizer", ["nearest", "cosine", "gumbel"])
def test_tokens_and_pictures_have_the_promised_form(quantizer):
    vqgan = network(quantizer=quantizer).eval()
    tokens = vqgan.encode(pictures())
    assert tokens.shape == (2, 16) and tokens.dtype == torch.long
    assert 0 <= tokens.min() and tokens.max() < 20
    decoded = vqgan.decode(tokens)
    assert decoded.shape == (2, 3, 16, 16) and 0 <= decoded.min() and decoded.max() <= 1


@pytest.mark.parametrize("quantizer", ["nearest", "cosine", "gumbel"])
def test_evaluated_forward_is_decode_of_encode(quantizer):
    vqgan = network(quantizer=quantizer).eval()
    with torch.no_grad():
        there = vqgan(pictures())
        assert torch.equal(there.tokens_BT, vqgan.encode(pictures()))
        back = vqgan.decode(there.tokens_BT)
    torch.testing.assert_close(there.image_BCHW.clamp(0, 1), back)


@pytest.mark.parametrize("quantizer", ["nearest", "cosine", "gumbel"])
def test_training_reaches_every_parameter(quantizer):
    vqgan = network(quantizer=quantizer)
    for _ in range(2):  # residual blocks start as the identity: their inside moves in the second
        there = vqgan(pictures(4))
        loss = (there.image_BCHW - pictures(4)).square().mean() + there.codebook_loss
        vqgan.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in vqgan.parameters():
                parameter -= 0.1 * parameter.grad
    still = [name for name, x in vqgan.named_parameters() if not x.grad.abs().sum() > 0]
    # A constant added to all keys changes no softmax.
    assert [name for name in still if not name.endswith("key.bias")] == []


def test_folding_patches_moves_the_pictures_of_a_token_but_no_pixels_between_tokens():
    vqgan = network(patch=2, multipliers=(1, 2), attention=(), quantizer="nearest").eval()
    assert vqgan.config.grid == network().config.grid
    pixels = pictures()
    with torch.no_grad():
        assert vqgan.decode(vqgan.encode(pixels)).shape == pixels.shape
        folded = torch.nn.functional.pixel_unshuffle(pixels, 2)
        assert torch.equal(vqgan._unfold(folded), pixels)
        assert torch.equal(vqgan.encode_features(pixels), vqgan.pre_quant(vqgan.encoder(folded)))


def test_a_few_steps_on_one_batch_lower_the_error():
    vqgan = network()
    optimizer = torch.optim.Adam(vqgan.parameters(), lr=3e-3)
    errors = []
    target = torch.nn.functional.interpolate(pictures(4, 4), scale_factor=4.0)
    for _ in range(60):
        there = vqgan(target)
        error = (there.image_BCHW - target).abs().mean()
        optimizer.zero_grad()
        (error + there.codebook_loss).backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.35 * errors[0]
    assert vqgan.last_layer.grad.abs().sum() > 0


def test_saved_and_loaded_networks_agree(tmp_path):
    vqgan = network()
    vqgan(pictures())
    vqgan.save_pretrained(tmp_path)
    again = VQGAN.from_pretrained(tmp_path)
    assert again.config == vqgan.config and not again.training
    vqgan.eval()
    tokens = vqgan.encode(pictures())
    assert torch.equal(tokens, again.encode(pictures()))
    assert torch.equal(vqgan.decode(tokens), again.decode(tokens))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_weights_are_refused_by_name(value, tmp_path):
    broken = network()
    with torch.no_grad():
        broken.decoder.norm.bias[2] = value
    broken.save_pretrained(tmp_path)
    with pytest.raises(StorageError, match=r"NaN or infinity in 1 tensors.*decoder\.norm\.bias"):
        VQGAN.from_pretrained(tmp_path)


def test_unknown_config_keys_are_refused_by_name(tmp_path):
    network().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "widht": 64}))
    with pytest.raises(StorageError, match="widht"):
        VQGAN.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(1, 3, 24, 16), "takes pictures B x 3 x 16 x 16, got 1 x 3 x 24 x 16"),
        (torch.zeros(3, 16, 16), "got 3 x 16 x 16"),
        (torch.zeros(1, 1, 16, 16), "got 1 x 1 x 16 x 16"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "floats in .0, 1., got torch.uint8"),
        (torch.full((1, 3, 16, 16), 200.0), "pixels span 200 to 200"),
        (torch.full((1, 3, 16, 16), -1.0), "pixels span -1 to -1"),
        (torch.full((1, 3, 16, 16), torch.nan), "pixels span nan"),
    ],
)
def test_pictures_of_wrong_size_or_range_are_named(image, words):
    with pytest.raises(ValueError, match=words):
        network().encode(image)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 2**30}, "size is 1073741824, use 4096 pixels a side or fewer"),
        ({"size": 18}, "size 18 must be a multiple of 4"),
        ({"size": 0}, "size must be at least 1"),
        ({"quantizer": "fsq"}, "quantizer 'fsq': use one of nearest, cosine, gumbel"),
        ({"width": 6}, "width 6 must be a multiple of groups 4"),
        ({"attention": (7,)}, r"attention names levels \[7\]"),
    ],
)
def test_impossible_configs_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        config(**changes)
