import dataclasses
import logging
import os
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from unittest.mock import MagicMock

import pytest
import torch

import mas.cuda_decoder
from mas.cuda_decoder import CUDADecoder, CUDASteps
from mas.filter import Sampling
from mas.generate import generate
from mas.gpt import GPT, GPTConfig
from mas.precision import pictures_that_fit
from mas.sequence import FREE

pytestmark = pytest.mark.usefixtures("few_keys_a_bucket")

CONFIG = GPTConfig(
    layers=3,
    width=32,
    heads=4,
    text_vocabulary=40,
    scene_vocabulary=20,
    image_vocabulary=30,
    text_length=6,
    scene_grid=3,
    image_grid=4,
)
LAYOUT = CONFIG.layout
OPTIONS = {
    "default": {},
    "qk_norm": {"qk_norm": True},
    "gated": {"gated": True},
    "rotary": {"rotary": True},
    "all": {"qk_norm": True, "gated": True, "rotary": True},
}


def build(**options):
    """Random weights in which norms do something and captions matter."""
    torch.manual_seed(0)
    gpt = GPT(dataclasses.replace(CONFIG, **options)).eval().requires_grad_(False)
    for parameter in gpt.parameters():
        if parameter.ndim == 1:
            parameter += 0.2 * torch.randn_like(parameter)
    for head in gpt.heads.values():
        head.weight *= 4
    return gpt


def draw(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(1, stream.vocabulary, (count, stream.length), generator=generator)
        for stream in LAYOUT.streams
    ]


def partly(tokens_BT, *, share=0.5, seed=0):
    """The same tokens with a share of them free, in every row others."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.rand(tokens_BT.shape, generator=generator) < share
    return tokens_BT.masked_fill(free, FREE)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("prefix", [1, 6, 15])
def test_a_step_computes_what_the_uncached_gpt_computes_at_every_position(options, prefix):
    gpt = build(**options).double()
    decoder, tokens = CUDADecoder(gpt), draw(2)
    expected, sequence = gpt(*tokens), LAYOUT.pack(*tokens)
    cache = decoder.new_cache(2)
    state = decoder.extend(sequence[:, :prefix], cache=cache, start=0)
    for position in range(prefix, LAYOUT.length):
        stream = LAYOUT.stream_at(position)
        if stream is not LAYOUT.text:
            logits = getattr(expected, stream.name)[:, position - stream.start]
            torch.testing.assert_close(decoder.head(state, stream), logits, rtol=0, atol=1e-10)
        for keys in {min(-(-(position + 1) // 8) * 8, LAYOUT.length), LAYOUT.length}:
            state = decoder.read(
                sequence[:, position], torch.tensor([position]), stream, cache=cache, keys=keys
            )
    exact = gpt.extend(sequence, cache=gpt.new_cache(2), start=0)
    torch.testing.assert_close(state, exact, rtol=0, atol=1e-10)


def test_what_lies_behind_the_position_is_never_seen():
    gpt = build().double()
    decoder, sequence = CUDADecoder(gpt), LAYOUT.pack(*draw(2))
    states = []
    for rest in (0.0, 1e3):
        cache = decoder.new_cache(2)
        decoder.extend(sequence[:, :9], cache=cache, start=0)
        for pair in cache.pairs:
            pair[:, :, :, 9:] = rest
        position = torch.tensor([9])
        states.append(decoder.read(sequence[:, 9], position, LAYOUT.scene, cache=cache, keys=16))
    assert torch.equal(*states)


GIVEN = {
    "caption": lambda scene, image: {},
    "scene": lambda scene, image: {"scene_BT": scene},
    "part of a scene": lambda scene, image: {"scene_BT": partly(scene)},
    "parts of both": lambda scene, image: {
        "scene_BT": partly(scene, share=0.2),
        "image_BT": partly(image, share=0.3, seed=1),
    },
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_the_loop_gives_the_tokens_of_the_plain_gpt(given, guidance, count):
    gpt = build()
    decoder = CUDADecoder(gpt)
    text_BT, scene_BT, image_BT = draw(count)
    settings = {
        "seeds": range(count),
        "scene": Sampling(guidance=guidance, top_p=0.9),
        "image": Sampling(guidance=guidance, temperature=0.9, top_k=0.5),
        **given(scene_BT, image_BT),
    }
    expected, seen = generate(gpt, text_BT, **settings), []
    result = generate(
        decoder, text_BT, **settings, on_progress=lambda _, tokens_BT: seen.append(tokens_BT.sum())
    )
    assert same(result, expected)
    plain = []
    generate(
        gpt, text_BT, **settings, on_progress=lambda _, tokens_BT: plain.append(tokens_BT.sum())
    )
    assert seen == plain


@pytest.mark.parametrize("count", [2, 5])
def test_own_kernels_compute_what_the_plain_gpt_computes(count, monkeypatch):
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        pytest.skip("needs Triton and TRITON_INTERPRET=1")
    from mas import cuda_kernels

    monkeypatch.setattr(cuda_kernels, "PROGRAMS", 1)  # the interpreter takes long for each
    monkeypatch.setattr(cuda_kernels, "KEYS", 8)
    for options in ({}, OPTIONS["all"]):
        gpt = build(**options)
        decoder, sequence = CUDADecoder(gpt, kernels="triton"), LAYOUT.pack(*draw(count))
        cache, plain = decoder.new_cache(count), gpt.new_cache(count)
        for network, its in ((decoder, cache), (gpt, plain)):
            network.extend(sequence[:, :14], cache=its, start=0)
        for position in range(14, 20):
            stream, place = LAYOUT.stream_at(position), torch.tensor([position])
            state = decoder.read(sequence[:, position], place, stream, cache=cache, keys=31)
            piece = sequence[:, position : position + 1]
            expected = gpt.extend(piece, cache=plain, start=position)
            torch.testing.assert_close(state, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_kind_of_network_gives_the_tokens_of_the_plain_gpt(options):
    gpt = build(**options)
    text_BT = draw(2)[0]
    expected = generate(gpt, text_BT, seeds=[1, 2])
    assert same(generate(CUDADecoder(gpt), text_BT, seeds=[1, 2]), expected)


def test_one_batch_leaves_nothing_to_the_next_one():
    gpt = build()
    decoder = CUDADecoder(gpt)
    texts = [draw(count, seed=seed)[0] for seed, count in enumerate([2, 2, 1, 2])]
    results = [generate(decoder, text_BT, seeds=range(len(text_BT))) for text_BT in texts]
    for text_BT, result in zip(texts, results, strict=True):
        assert same(result, generate(gpt, text_BT, seeds=range(len(text_BT))))


def test_memory_is_lent_to_one_loop_at_a_time_and_kept_for_the_next_of_its_size():
    decoder = CUDADecoder(build())
    tokens_BT, uniforms_BT = torch.zeros(2, 31).long(), torch.zeros(2, 31).double()
    one = decoder.start_steps(tokens_BT, uniforms_BT, rows=4)
    assert decoder.start_steps(tokens_BT, uniforms_BT, rows=4) is not one
    assert decoder.idle_bytes == 0
    one.close()
    assert decoder.idle_bytes == 3 * 2 * 4 * 31 * 32 * 4
    assert decoder.start_steps(tokens_BT, uniforms_BT, rows=2) is not one
    assert decoder.idle_bytes == 0
    one.close()
    assert decoder.start_steps(tokens_BT, uniforms_BT, rows=4) is one


def test_memory_that_is_kept_counts_as_free(monkeypatch):
    decoder = CUDADecoder(build())
    monkeypatch.setattr(mas.precision, "free_memory", lambda _: mas.precision.SPARE)
    assert pictures_that_fit(decoder, CONFIG) == 0
    generate(decoder, draw(3)[0], seeds=range(3))
    assert pictures_that_fit(decoder, CONFIG) == 3


def test_a_failed_run_gives_back_what_it_was_lent():
    decoder = CUDADecoder(build())

    def stop(*_):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        generate(decoder, draw(2)[0], seeds=[1, 2], on_progress=stop)
    assert decoder.idle is not None
    assert same(
        generate(decoder, draw(2)[0], seeds=[1, 2]),
        generate(decoder.gpt, draw(2)[0], seeds=[1, 2]),
    )


def test_steps_that_cannot_be_compiled_run_as_they_are(caplog):
    gpt = build()
    decoder = CUDADecoder(gpt, kernels="compiled")

    def broken(*_):
        raise RuntimeError("no compiler\nhere")

    decoder.cross = broken
    with caplog.at_level(logging.WARNING):
        result = generate(decoder, draw(2)[0], seeds=[1, 2])
    assert same(result, generate(gpt, draw(2)[0], seeds=[1, 2]))
    assert [r.message for r in caplog.records] == [
        "compiled kernels failed, torch is used: no compiler"
    ]
    assert decoder.mode == "torch"


def test_own_kernels_that_do_not_work_are_left_for_simpler_ones(caplog, monkeypatch):
    gpt = build()
    decoder = CUDADecoder(gpt, kernels="persistent")
    expected = generate(gpt, draw(2)[0], seeds=[1, 2])

    def broken(*_):
        raise ModuleNotFoundError("No module named 'cuda'")

    def broken_too(*_):
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(decoder, "_find_step", broken)
    monkeypatch.setattr(decoder, "_read_fused", broken_too)
    with caplog.at_level(logging.WARNING):
        assert same(generate(decoder, draw(2)[0], seeds=[1, 2]), expected)
    assert [r.message for r in caplog.records] == [
        "persistent kernels failed, triton is used: No module named 'cuda'",
        "triton kernels failed, torch is used: No module named 'triton'",
    ]
    assert decoder.mode == "torch"


class FakeGraph:
    """Stands for a CUDA graph."""


def pretend_cuda(monkeypatch, decoder, *, record):
    """Runs the bookkeeping of recordings on a CPU."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: MagicMock())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    decoder.graphs = True


def test_each_bucket_and_way_of_choosing_is_recorded_once_and_replayed(monkeypatch):
    gpt, run, recording = build(), CUDASteps._run, []

    @contextmanager
    def record(graph, **_):
        recording.append(graph)
        yield
        recording.pop()

    def traced(steps, choice, keys):
        if not recording:  # a recording computes nothing
            return run(steps, choice, keys)
        recording[-1].replay_of = (choice.stream.name, keys)
        recording[-1].replay = lambda: replayed.append(1) or run(steps, choice, keys)

    replayed = []
    decoder = CUDADecoder(gpt)
    pretend_cuda(monkeypatch, decoder, record=record)
    monkeypatch.setattr(CUDASteps, "_run", traced)
    for seeds in ([1, 2], [3, 4]):
        expected = generate(gpt, draw(2)[0], seeds=seeds)
        assert same(generate(decoder, draw(2)[0], seeds=seeds), expected)
    made = {graph.replay_of for graph in decoder.idle.graphs.values()}
    assert made == {("scene", 8), ("scene", 16), ("image", 16), ("image", 24), ("image", 31)}
    # The last token is drawn only; the first step of each bucket runs as it is.
    assert len(replayed) == 2 * (9 + 16 - 1) - len(made)


def test_steps_that_cannot_be_recorded_run_as_they_are(monkeypatch, caplog):
    def record(graph, **_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    gpt = build()
    decoder = CUDADecoder(gpt)
    pretend_cuda(monkeypatch, decoder, record=record)
    with caplog.at_level(logging.WARNING):
        result = generate(decoder, draw(2)[0], seeds=[1, 2])
    assert same(result, generate(gpt, draw(2)[0], seeds=[1, 2]))
    assert [r.message for r in caplog.records] == [
        "CUDA graphs failed, steps run without: operation not permitted when stream is capturing"
    ]
    assert decoder.mode == "torch"


def test_broken_weights_are_named():
    broken = build()
    broken.blocks[0].feedforward.expand.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="computes NaN"):
        generate(CUDADecoder(broken), draw(1)[0], seeds=[1])
