import dataclasses
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import mas.fast_decoder
from mas.decoder import CPUDecoder
from mas.fast_decoder import FastDecoder, StepLinear, can_step, find_step, find_steps
from mas.filter import Sampling
from mas.generate import generate
from mas.gpt import GPT, GPTConfig, make_cache
from mas.heap import Slabs
from mas.precision import make_decoder
from mas.quantize import Int8Linear, make_int8, sums_are_exact
from mas.rounding import to_int8

CONFIG = GPTConfig(
    layers=2,
    width=48,
    heads=4,
    text_vocabulary=40,
    scene_vocabulary=21,
    image_vocabulary=34,
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
    "heads of 64": {"width": 128, "heads": 2, "rotary": True},
    "heads of 66": {"width": 66, "heads": 1},
}
there = pytest.mark.skipif(not find_step().calls, reason=f"fast step: {find_step().state}")


def build(**options):
    torch.manual_seed(0)
    gpt = GPT(dataclasses.replace(CONFIG, **options)).eval().requires_grad_(False)
    for parameter in gpt.parameters():  # norms that do nothing would hide mistakes
        if parameter.ndim == 1:
            parameter += 0.2 * torch.randn_like(parameter)
    for head in gpt.heads.values():
        head.weight *= 4
    return gpt


def draw(count, seed=0, config=CONFIG):
    generator = torch.Generator().manual_seed(seed)
    tokens = [
        torch.randint(1, stream.vocabulary, (count, stream.length), generator=generator)
        for stream in config.layout.streams
    ]
    return config.layout.pack(*tokens)


def make_fast(gpt):
    return FastDecoder(gpt.config, gpt.state_dict())


def make_plain(gpt):
    return CPUDecoder(gpt.config, gpt.state_dict(), make_linear=make_int8, stored=torch.bfloat16)


def read_all(decoder, sequence, threads=1):
    """States after every position, R T D."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cache = decoder.new_cache(len(sequence))
        states = [
            decoder.extend(sequence[:, t : t + 1], cache=cache, start=t)
            for t in range(sequence.shape[1])
        ]
    finally:
        torch.set_num_threads(before)
    return torch.stack(states, dim=1)


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 70])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 32), (5, 7), (68, 100), (130, 1), (1, 50)])
def test_the_linear_layer_is_exact_between_its_roundings(kind, rows, inputs, outputs):
    generator = torch.Generator().manual_seed(rows)
    weight_VK = torch.randn(outputs, inputs, generator=generator)
    x_RK = torch.randn(rows, inputs, generator=generator)
    result = StepLinear(weight_VK, Slabs())(x_RK)
    integers_VK, scale_V = to_int8(weight_VK)
    step_R1 = x_RK.abs().amax(1, keepdim=True) / 127
    sums_RV = (x_RK / step_R1).round().double() @ integers_VK.double().T
    expected = sums_RV * step_R1.double() * scale_V.double()
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
    if sums_are_exact():
        assert torch.equal(result, Int8Linear(weight_VK)(x_RK))


@pytest.mark.parametrize("x", [1.0, -1.0])
def test_no_sum_overflows(kind, x):
    """Every product is the largest there is: two of them nearly fill 16 bits, all nearly 32."""
    result = StepLinear(torch.ones(33, 2**16), Slabs())(torch.full((3, 2**16), x))
    torch.testing.assert_close(result, torch.full((3, 33), 2**16 * x), rtol=1e-4, atol=0)


def test_the_linear_layer_keeps_zeros_and_shows_nan(kind):
    linear = StepLinear(torch.randn(40, 70), Slabs())
    x_RK = torch.randn(3, 70)
    x_RK[0], x_RK[1, 69] = 0, float("nan")
    result = linear(x_RK)
    assert (result[0] == 0).all() and result[1].isnan().all() and result[2].isfinite().all()
    assert linear(x_RK[:0]).shape == (0, 40)
    turned_RK = x_RK[2:].T.contiguous().T.expand(2, -1)  # neither lies in memory row by row
    assert torch.equal(linear(turned_RK), result[[2, 2]])


@there
def test_inputs_that_do_not_fit_are_refused():
    linear = StepLinear(torch.randn(40, 70), Slabs())
    for wrong in (torch.randn(3, 69), torch.randn(70), torch.randn(3, 70).double()):
        with pytest.raises(ValueError, match="not float32 R 70"):
            linear(wrong)


def step_differences(gpt, sequence, first=0):
    """How far the state of each row is from the plain decoder's after each position from `first`.

    Both read the same cache, filled by the plain decoder: what differs in the last bit before it is
    rounded to 8 bits may differ by 1/127 behind, and would do so ever more.
    """
    fast, plain = make_fast(gpt), make_plain(gpt)
    cache, rows = fast.new_cache(len(sequence)), len(sequence)
    float_weights = make_cache(
        gpt.config, rows, length=None, dtype=torch.bfloat16, device=plain.device, grows=False
    )
    if first:
        plain.extend(sequence[:, :first], cache=float_weights, start=0)
    differences = []
    for t in range(first, sequence.shape[1]):
        for pair, filled in zip(cache.pairs, float_weights.pairs, strict=True):
            pair.copy_(filled)
        found, expected = (
            decoder.extend(sequence[:, t : t + 1], cache=place, start=t)
            for decoder, place in ((fast, cache), (plain, float_weights))
        )
        differences.append((found - expected).abs().amax(1))
        for pair, filled in zip(cache.pairs, float_weights.pairs, strict=True):
            torch.testing.assert_close(pair.float(), filled.float(), rtol=0.05, atol=0.1)
    return torch.cat(differences)


@there
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step_computes_what_the_plain_decoder_computes_at_every_position(options):
    differences = step_differences(build(**options), draw(3))
    assert (differences < 1e-5).float().mean() > 0.9
    assert differences.max() < 0.1


@pytest.mark.skipif(len(find_steps()) < 2, reason="this CPU can run one kind of step only")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_all_kinds_of_steps_compute_the_same_bits(options, monkeypatch):
    gpt, sequence, found = build(**options), draw(11), []
    for kind in find_steps():
        monkeypatch.setenv("MAS_STEP", kind)
        found.append(read_all(make_fast(gpt), sequence, threads=2))
    assert all(torch.equal(states, found[0]) for states in found[1:])


@there
def test_long_sequences_are_read_in_blocks():
    config = dataclasses.replace(CONFIG, text_length=1020)
    gpt = GPT(config).eval().requires_grad_(False)
    gpt.blocks[0].attention.to_qkv.weight *= 8  # so that attention looks at few places
    differences = step_differences(gpt, draw(2, config=config), first=1010)
    assert (differences < 1e-5).float().mean() > 0.8
    assert differences.max() < 0.1


@there
def test_several_tokens_at_once_are_the_same_tokens_one_by_one():
    decoder, sequence = make_fast(build(rotary=True)), draw(2)
    cache = decoder.new_cache(2)
    decoder.extend(sequence[:, :9], cache=cache, start=0)
    several = decoder.extend(sequence[:, 9:20], cache=cache, start=9)
    torch.testing.assert_close(
        several, read_all(decoder, sequence[:, :20])[:, -1], rtol=0, atol=0.1
    )


@there
@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["default", "all"])
def test_the_number_of_threads_changes_no_bit(options):
    decoder, sequence = make_fast(build(**options)), draw(3)
    expected = read_all(decoder, sequence, threads=1)
    for threads in (2, 5, 3):
        assert torch.equal(read_all(decoder, sequence, threads=threads), expected)


@there
def test_a_row_is_the_same_alone():
    decoder, sequence = make_fast(build(**OPTIONS["all"])), draw(11)
    together = read_all(decoder, sequence)
    for rows in (slice(0, 1), slice(3, 5), slice(2, 11)):
        assert torch.equal(read_all(decoder, sequence[rows]), together[rows])


@there
def test_callers_in_several_threads_take_turns():
    decoder, sequence = make_fast(build()), draw(4)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda i: read_all(decoder, sequence[i : i + 1], threads=3), range(4))
            together = torch.cat(list(found))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, read_all(decoder, sequence))


@there
def test_a_forked_child_computes_the_same():
    decoder, sequence = make_fast(build()), draw(2)
    expected = read_all(decoder, sequence, threads=3)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if torch.equal(read_all(decoder, sequence, threads=3), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(read_all(decoder, sequence, threads=3), expected)


@there
def test_more_threads_than_cores_in_two_processes_come_to_an_end(tmp_path):
    build().save_pretrained(tmp_path)
    script = (
        "import sys, torch; from mas.fast_decoder import FastDecoder; from mas.gpt import GPT\n"
        "gpt = GPT.from_pretrained(sys.argv[1]).requires_grad_(False)\n"
        "decoder = FastDecoder(gpt.config, gpt.state_dict())\n"
        "torch.set_num_threads(6)\n"
        "cache, tokens = decoder.new_cache(2), torch.ones(2, 1, dtype=torch.long)\n"
        "for i in range(100): decoder.extend(tokens, cache=cache, start=i % 20)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]


@there
def test_wrong_tokens_and_caches_are_refused():
    decoder = make_fast(build())
    cache, token = decoder.new_cache(2), torch.ones(2, 1, dtype=torch.long)
    short = decoder.new_cache(2, length=4)
    for message, tokens, place, start in (
        ("text tokens must be 0 to 39", token * 40, cache, 0),
        ("scene tokens must be 0 to 20", -token, cache, 6),
        ("not long", token.int(), cache, 0),
        ("position 31", token, cache, 31),
        ("position 4 is outside", token, short, 4),
        ("the cache is", token[:1], cache, 0),
        ("`new_cache`", token, make_plain(build()).new_cache(2), 0),
        ("`new_cache`", token, make_fast(build(layers=1)).new_cache(2), 0),
        ("the cache is torch.bfloat16", token, make_fast(build(width=32)).new_cache(2), 0),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.extend(tokens, cache=place, start=start)
    with pytest.raises(ValueError, match="made of float32"):
        make_fast(build().double())


@there
def test_both_decoders_paint_the_same_greedily():
    """Of a network that is sure of what it has learnt: scene and image repeat the caption."""
    torch.manual_seed(0)
    gpt = GPT(CONFIG)
    places = torch.arange(9), torch.arange(16)
    text_BT = draw(64)[:, :6] % 20 + 1
    scene_BT, image_BT = (text_BT[:, place % 6] for place in places)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=5e-3)
    for _ in range(80):
        losses = gpt.losses(text_BT, scene_BT, image_BT)
        optimizer.zero_grad()
        (losses.scene + losses.image).backward()
        optimizer.step()
    gpt = gpt.eval().requires_grad_(False)
    greedy = Sampling(temperature=0.0, guidance=1.0)
    fast, plain = (
        generate(decoder, text_BT[:16], seeds=range(16), scene=greedy, image=greedy)
        for decoder in (make_fast(gpt), make_plain(gpt))
    )
    assert (plain.image == image_BT[:16]).float().mean() > 0.9  # it has learnt it
    same = [(a == b).all(1) for a, b in ((fast.scene, plain.scene), (fast.image, plain.image))]
    assert (same[0] & same[1]).float().mean() >= 0.9


@there
def test_int8_takes_the_fast_step_where_it_fits():
    assert isinstance(make_decoder(build(), "int8"), FastDecoder)
    assert not isinstance(make_decoder(build(), "bfloat16"), FastDecoder)
    wide = dataclasses.replace(CONFIG, width=512, heads=1)
    assert not can_step(wide)


def test_without_the_library_pytorch_computes_the_steps(monkeypatch):
    missing = {"": mas.fast_decoder.Step({}, "not built")}
    monkeypatch.setattr(mas.fast_decoder, "find_steps", lambda: missing)
    assert not can_step(CONFIG)
    assert type(make_decoder(build(), "int8")) is CPUDecoder
    with pytest.raises(RuntimeError, match="not built"):
        make_fast(build())


def test_a_library_that_cannot_be_loaded_is_none(monkeypatch, tmp_path):
    damaged = tmp_path / "_step.so"
    damaged.write_bytes(b"half a library")
    spec = SimpleNamespace(origin=str(damaged))
    monkeypatch.setattr(mas.fast_decoder.importlib.util, "find_spec", lambda name: spec)
    (found,) = find_steps.__wrapped__().values()
    assert not found.calls and "cannot be loaded, install again" in found.state


def test_the_kind_of_step_can_be_chosen(kind, monkeypatch):
    assert find_step().state == f"there ({kind})"
    monkeypatch.setenv("MAS_STEP", "none")
    assert not can_step(CONFIG) and find_step().state == "switched off by MAS_STEP=none"
    monkeypatch.setenv("MAS_STEP", "sse2")
    with pytest.raises(
        ValueError, match=f"MAS_STEP=sse2: .*; use {next(iter(find_steps()))}, .*none"
    ):
        can_step(CONFIG)
    monkeypatch.setenv("MAS_STEP", "")
    assert find_step() is next(iter(find_steps().values()))
