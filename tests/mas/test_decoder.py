import dataclasses
from functools import partial

import pytest
import torch

import mas.precision
from mas.decoder import CPUDecoder
from mas.generate import generate
from mas.gpt import GPT, GPTConfig
from mas.precision import StoredGPT, make_decoder
from mas.quantize import FloatLinear
from mas.rounding import Weights
from mas.sequence import FREE
from mas.storage import StorageError, save_network

CONFIG = GPTConfig(
    layers=2,
    width=32,
    heads=4,
    text_vocabulary=40,
    scene_vocabulary=20,
    image_vocabulary=30,
    text_length=6,
    scene_grid=3,
    image_grid=4,
)
OPTIONS = {
    "default": {},
    "qk_norm": {"qk_norm": True},
    "gated": {"gated": True},
    "rotary": {"rotary": True},
    "all": {"qk_norm": True, "gated": True, "rotary": True},
}


@pytest.fixture(params=["float32", "bfloat16", "int8", "int8 in torch"])
def precision(request, monkeypatch):
    if request.param.endswith("torch"):
        monkeypatch.setattr(mas.precision, "can_step", lambda config: False)
    return request.param.split()[0]


def build(**options):
    torch.manual_seed(0)
    gpt = GPT(dataclasses.replace(CONFIG, **options)).eval().requires_grad_(False)
    for parameter in gpt.parameters():  # norms that do nothing would hide mistakes
        if parameter.ndim == 1:
            parameter += 0.2 * torch.randn_like(parameter)
    for head in gpt.heads.values():
        head.weight *= 4
    return gpt


def draw(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(1, stream.vocabulary, (count, stream.length), generator=generator)
        for stream in CONFIG.layout.streams
    ]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("prefix", [1, 6, 10, 15, 20])
def test_the_decoder_computes_what_the_uncached_gpt_computes_at_every_position(options, prefix):
    gpt = build(**options).double()
    linear = partial(FloatLinear, dtype=torch.float64)
    decoder = CPUDecoder(gpt.config, gpt.state_dict(), make_linear=linear, stored=torch.float64)
    layout, tokens = gpt.layout, draw(2)
    expected = gpt(*tokens)
    sequence = layout.pack(*tokens)
    cache = decoder.new_cache(2)
    state = decoder.extend(sequence[:, :prefix], cache=cache, start=0)
    for position in range(prefix, layout.length):
        stream = layout.stream_at(position)
        if stream is not layout.text:
            logits = getattr(expected, stream.name)[:, position - stream.start]
            torch.testing.assert_close(decoder.head(state, stream), logits, rtol=0, atol=1e-10)
        state = decoder.extend(sequence[:, position : position + 1], cache=cache, start=position)
    several = decoder.extend(sequence[:, prefix:], cache=cache, start=prefix)
    torch.testing.assert_close(several, state, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_precision_stays_near_the_gpt(options, precision):
    gpt, tokens = build(**options), draw(3)
    decoder = make_decoder(gpt, precision)
    sequence = gpt.layout.pack(*tokens)
    cache = decoder.new_cache(3)
    state = decoder.extend(sequence[:, :9], cache=cache, start=0)
    for position in range(9, gpt.layout.length):
        state = decoder.extend(sequence[:, position : position + 1], cache=cache, start=position)
    exact = gpt.extend(sequence, cache=gpt.new_cache(3), start=0)
    tolerance = 1e-4 if precision == "float32" else 0.2
    torch.testing.assert_close(state, exact, rtol=0, atol=tolerance)
    image = gpt.layout.image
    torch.testing.assert_close(
        decoder.head(exact, image), gpt.head(exact, image), rtol=0, atol=tolerance
    )


def test_a_picture_of_a_batch_is_the_same_alone(precision):
    decoder = make_decoder(build(), precision)
    text_BT = draw(8)[0]
    batch = generate(decoder, text_BT, seeds=range(8))
    for i in range(8):
        alone = generate(decoder, text_BT[i : i + 1], seeds=[i])
        assert all(torch.equal(b[i : i + 1], a) for b, a in zip(batch, alone, strict=True)), i


def test_forcing_what_would_have_been_drawn_changes_nothing(precision):
    decoder = make_decoder(build(), precision)
    free = generate(decoder, draw(2)[0], seeds=[1, 2])
    image_BT = free.image.clone()
    image_BT[:, [0, 1, 7]] = FREE
    forced = generate(decoder, draw(2)[0], seeds=[1, 2], image_BT=image_BT)
    assert torch.equal(free.scene, forced.scene) and torch.equal(free.image, forced.image)


@pytest.mark.parametrize("weights", Weights.__args__)
def test_a_stored_gpt_becomes_the_decoder_of_the_loaded_one(precision, weights, tmp_path):
    save_network(build(gated=True, qk_norm=True), tmp_path, weights=weights)
    stored = StoredGPT(tmp_path, torch.device("cpu"))
    assert stored.config == CONFIG.__class__(**{**vars(CONFIG), "gated": True, "qk_norm": True})
    text_BT = draw(2)[0]
    results = [
        generate(make_decoder(gpt, precision), text_BT, seeds=[1, 2])
        for gpt in (stored, stored.load())
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_wrong_with_a_stored_gpt_is_named(tmp_path):
    stored = StoredGPT(tmp_path / "none", torch.device("cpu"))
    with pytest.raises(StorageError, match=r"config\.json: no such file"):
        _ = stored.config
    save_network(build(), tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"layers": 2', '"layers": 3'))
    with pytest.raises(StorageError, match=r"missing tensors: blocks\.2"):
        make_decoder(StoredGPT(tmp_path, torch.device("cpu")), "int8")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(StorageError, match="not a readable safetensors file"):
        make_decoder(StoredGPT(tmp_path, torch.device("cpu")), "int8")


def test_broken_weights_are_named_in_every_precision(precision):
    broken = build()
    broken.blocks[0].feedforward.expand.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="computes NaN"):
        generate(make_decoder(broken, precision), draw(1)[0], seeds=[1])
