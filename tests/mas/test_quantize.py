import dataclasses

import pytest
import torch
from torch import nn

from mas.filter import Sampling
from mas.generate import generate
from mas.gpt import GPT, GPTConfig
from mas.quantize import Bfloat16Linear, Int8Linear, with_linears

CONFIG = GPTConfig(
    layers=2,
    width=64,
    heads=4,
    text_vocabulary=40,
    scene_vocabulary=24,
    image_vocabulary=32,
    text_length=6,
    scene_grid=4,
    image_grid=4,
)
LINEARS = [Int8Linear, Bfloat16Linear]


def draw(count, seed=0):
    """Captions whose scene and image follow from them by a rule, so that there is much to learn."""
    generator = torch.Generator().manual_seed(seed)
    text_BT = torch.randint(1, 40, (count, 6), generator=generator)
    places = torch.arange(16)
    scene_BT = (text_BT[:, places % 6] + places) % 24
    return text_BT, scene_BT, (scene_BT * 5 + text_BT[:, :1]) % 32


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    gpt = GPT(CONFIG)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=4e-3)
    for step in range(150):
        losses = gpt.losses(*draw(32, seed=step))
        optimizer.zero_grad()
        (losses.scene + losses.image).backward()
        optimizer.step()
    return gpt.eval().requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 2, 5, 64])
def test_int8_is_the_rounded_weight_times_the_bfloat16_input(rows):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=False)
    linear.weight.data[3] = 0  # an output nobody uses must not divide by zero
    quantized = Int8Linear(linear)
    assert quantized.weight.dtype == torch.int8 and (quantized.weight[3] == 0).all()
    restored = quantized.weight.float() * quantized.scale.float()[:, None]
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    assert ((restored - linear.weight).abs() <= 0.51 * step + 1e-9).all()
    x = torch.randn(rows, 96)
    torch.testing.assert_close(
        quantized(x), x.bfloat16().float() @ restored.T, rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("make", LINEARS)
def test_leading_axes_are_kept(make):
    linear = nn.Linear(32, 48, bias=False)
    x = torch.randn(2, 3, 32)
    result = make(linear)(x)
    assert result.shape == (2, 3, 48) and result.dtype == torch.float32
    torch.testing.assert_close(result, linear(x), rtol=0.05, atol=0.05)


def test_a_row_of_int8_is_the_same_alone():
    quantized = Int8Linear(nn.Linear(256, 128, bias=False))
    x = torch.randn(9, 256)
    for rows in range(1, 9):
        assert torch.equal(quantized(x)[:rows], quantized(x[:rows]))


@pytest.mark.parametrize("make", LINEARS)
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "gated": True, "rotary": True}])
def test_the_twin_holds_small_linears_and_shares_the_rest(make, options):
    gpt = GPT(dataclasses.replace(CONFIG, **options)).eval()
    twin = with_linears(gpt, make)
    assert not any(isinstance(module, nn.Linear) for module in twin.modules())
    assert not any(tensor.is_meta for tensor in twin.state_dict().values())
    assert twin.embeddings["image"].weight.data_ptr() == gpt.embeddings["image"].weight.data_ptr()
    assert sum(isinstance(module, nn.Linear) for module in gpt.modules()) == 2 * 4 + 3
    for a, b in zip(gpt(*draw(2)), twin(*draw(2)), strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("make", LINEARS)
def test_a_trained_network_predicts_the_same_tokens(trained, make):
    twin = with_linears(trained, make)
    tokens = draw(64, seed=10_000)
    assert trained.losses(*tokens).scene_accuracy > 0.5  # it has learnt the rule
    for stream in (1, 2):
        exact, small = trained(*tokens)[stream], twin(*tokens)[stream]
        assert (exact.argmax(-1) == small.argmax(-1)).double().mean() >= 0.97
    exact, small = trained.losses(*tokens), twin.losses(*tokens)
    for name in ("scene", "image"):
        change = (getattr(small, name) - getattr(exact, name)).exp()
        assert abs(change.item() - 1) < 0.01  # of the perplexity


def test_int8_pictures_do_not_depend_on_the_batch_around_them(trained):
    twin = with_linears(trained, Int8Linear)
    text_BT = draw(5)[0]
    settings = {"scene": Sampling(guidance=2.0), "image": Sampling(top_p=0.9)}
    batch = generate(twin, text_BT, seeds=range(5), **settings)
    for i in range(5):
        alone = generate(twin, text_BT[i : i + 1], seeds=[i], **settings)
        assert all(torch.equal(b[i : i + 1], a) for b, a in zip(batch, alone, strict=True))
