"""The quick decoder computes what the plain one does, but for the rounding it admits to."""

import pytest
import torch
from published import published_shapes, rule_state

from mas import vq_fast
from mas.pretrained import _OWN_BUFFERS, _published_name
from mas.vq import Backbone, ConvDecoder, Upsample
from mas.vqgan import VQGAN, VQGANConfig

TINY = dict(size=32, codes=20, code_width=8, features=12, width=16, groups=4)


def randomised(network):
    """Start weights leave residual blocks without effect; none of these do."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, x in network.named_parameters():
            scale = x[0].numel() ** -0.5 if x.ndim > 1 else 0.1
            x.copy_(torch.randn(x.shape, generator=generator) * scale)
            if "norm" in name and name.endswith("weight"):
                x.add_(1)
    return network


def vqgan(**changes):
    options = {"multipliers": (1, 2, 2), "attention": (2,), **changes}
    return randomised(VQGAN(VQGANConfig(**TINY, **options))).eval()


def tokens(count=3, grid=8):
    return torch.randint(20, (count, grid * grid), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("strip_cells", [1, 100, vq_fast.STRIP_CELLS])
@pytest.mark.parametrize("changes", [{}, {"patch": 2}, {"attention": (0, 1), "blocks": 1}])
def test_without_rounding_it_is_the_plain_decoder(changes, strip_cells, monkeypatch):
    monkeypatch.setattr(vq_fast, "STRIP_CELLS", strip_cells)
    network = vqgan(**changes)
    given = tokens(grid=network.config.grid)
    with torch.no_grad():
        found, wanted = network.decode(given, precision="mixed"), network.decode(given)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
    assert wanted.std() > 0.1  # pictures, not one grey


@pytest.mark.parametrize("strip_cells", [1, 100, vq_fast.STRIP_CELLS])
def test_rounding_shows_little_and_only_where_it_is_allowed(strip_cells, monkeypatch):
    monkeypatch.setattr(vq_fast, "STRIP_CELLS", strip_cells)
    network = vqgan()
    with torch.no_grad():
        exact = network.decode(tokens())
        errors = []
        for cells in (64, 32, 16, 8):  # none, then one more level at a time
            monkeypatch.setattr(vq_fast, "HALF_FROM", cells)
            found = network.decode(tokens(), precision="mixed")
            errors.append((found - exact).square().mean().sqrt().item())
    assert errors == sorted(errors) and errors[0] < 1e-5 < 1e-4 < errors[1] and errors[-1] < 0.02


def test_doubling_by_four_small_kernels_is_doubling_and_convolving():
    torch.manual_seed(0)
    layer = Upsample(6).double()
    x = torch.randn(1, 6, 5, 7, dtype=torch.double)
    torch.testing.assert_close(vq_fast.upsample(layer, x), layer(x))


def test_neither_weights_nor_features_are_changed(monkeypatch):
    monkeypatch.setattr(vq_fast, "HALF_FROM", 8)
    shape = Backbone(width=16, multipliers=(1,), blocks=1, attention=(), groups=4, middle=False)
    decoder = randomised(ConvDecoder(5, 3, shape))
    before = {name: x.clone() for name, x in decoder.state_dict().items()}
    z = torch.randn(1, 5, 8, 8, requires_grad=True)
    kept = z.detach().clone()
    assert not vq_fast.decode_fast(decoder, z).requires_grad
    assert torch.equal(z, kept)
    assert all(torch.equal(x, before[name]) for name, x in decoder.state_dict().items())


@pytest.mark.parametrize("there", [False, True])
def test_auto_rounds_where_the_processor_can(there, monkeypatch):
    monkeypatch.setattr("mas.vqgan.has_bfloat16", lambda: there)
    monkeypatch.setattr(vq_fast, "HALF_FROM", 8)
    network = vqgan()
    with torch.no_grad():
        wanted = network.decode(tokens(), precision="mixed" if there else "float32")
        assert torch.equal(network.decode(tokens(), precision="auto"), wanted)
        assert torch.equal(network.decode(tokens()), network.decode(tokens(), precision="float32"))


def test_another_precision_is_refused():
    with pytest.raises(ValueError, match="'float16': use one of float32, mixed, auto"):
        vqgan().decode(tokens(), precision="float16")


@pytest.mark.slow
def test_no_pixel_of_the_published_network_is_off_by_more_than_two_of_255():
    network = VQGAN(VQGANConfig()).eval()
    state = rule_state(published_shapes(network.config, "mindalle"), {})
    levels = len(network.config.multipliers)
    for name, x in network.state_dict().items():
        if name not in _OWN_BUFFERS:
            x.copy_(state[_published_name(name, "mindalle", levels)])
    given = torch.randint(16384, (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = network.decode(given)
        error = (network.decode(given, precision="mixed") - wanted).abs().max()
    assert wanted.std() > 0.1 and 0 < error <= 2 / 255
