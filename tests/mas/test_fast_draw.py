import dataclasses
import itertools

import pytest
import torch

from mas.fast_decoder import FastDecoder
from mas.filter import Sampling, draw_guided
from mas.generate import generate
from mas.gpt import GPT, GPTConfig

CONFIG = GPTConfig(
    layers=1,
    width=32,
    heads=2,
    text_vocabulary=40,
    scene_vocabulary=300,
    image_vocabulary=70,
    text_length=4,
    scene_grid=3,
    image_grid=3,
)
SETTINGS = [
    Sampling(guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
    for guidance, temperature, top_k, top_p in itertools.product(
        (0.5, 3.0), (0.0, 0.4, 1.0, 1e-30), (None, 1, 20, 0.5), (None, 1e-6, 0.5, 0.999, 1.0)
    )
]
LARGEST = 1 - 2**-32  # number to draw by


@pytest.fixture
def decoder(kind):
    torch.manual_seed(0)
    gpt = GPT(CONFIG).eval().requires_grad_(False)
    return FastDecoder(gpt.config, gpt.state_dict())


def make_logits(rows, vocabulary, *, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits_NBV = spread * torch.randn(2, rows, vocabulary, generator=generator)
    return *logits_NBV, torch.rand(rows, generator=generator, dtype=torch.float64) * LARGEST


@pytest.mark.parametrize("vocabulary", [1, 2, 33, 4096])
def test_tokens_are_those_that_pytorch_draws(decoder, vocabulary):
    for seed, sampling in enumerate(SETTINGS):
        if sampling.top_k == 20 > vocabulary:
            continue
        logits_BV, others_BV, uniform_B = make_logits(5, vocabulary, seed=seed)
        for others in (others_BV, None):
            found_B = decoder.draw(logits_BV, others, uniform_B, sampling)
            expected_B = draw_guided(logits_BV, others, uniform_B, sampling)
            assert torch.equal(found_B, expected_B), sampling


def test_flat_logits_are_drawn_by_their_order(decoder):
    uniform_B = torch.tensor([0.0, 0.26, 0.51, LARGEST], dtype=torch.float64)
    flat_BV = torch.full((4, 4), 7.0)
    assert decoder.draw(flat_BV, None, uniform_B, Sampling()).tolist() == [0, 1, 2, 3]
    halved_B = decoder.draw(flat_BV, None, uniform_B, Sampling(top_k=2))
    assert halved_B.tolist() == [0, 0, 1, 1]
    assert decoder.draw(flat_BV, None, uniform_B, Sampling(top_k=1)).tolist() == [0] * 4
    assert decoder.draw(flat_BV, None, uniform_B, Sampling(temperature=0)).tolist() == [0] * 4


@pytest.mark.parametrize("uniform", [0.0, LARGEST])
@pytest.mark.parametrize("top_p", [None, 0.999])
def test_what_has_no_probability_is_never_drawn(decoder, uniform, top_p):
    logits_BV = torch.tensor([[-1e30, -torch.inf, 0.0, 1.0, -1e4, -torch.inf]])
    uniform_B = torch.tensor([uniform], dtype=torch.float64)
    token = decoder.draw(logits_BV, None, uniform_B, Sampling(top_p=top_p)).item()
    assert token == (3 if uniform else 2)


@pytest.mark.parametrize("sampling", [Sampling(top_p=0.9), Sampling(top_k=9), Sampling()])
def test_broken_logits_give_a_token_all_the_same(decoder, sampling):
    logits_BV = torch.full((2, 50), torch.nan)
    uniform_B = torch.tensor([0.3, 0.9], dtype=torch.float64)
    tokens_B = decoder.draw(logits_BV, None, uniform_B, sampling)
    assert ((tokens_B >= 0) & (tokens_B < 50)).all()


def test_neither_other_rows_nor_threads_change_a_token(decoder):
    logits_BV, others_BV, uniform_B = make_logits(11, 500)
    sampling = Sampling(guidance=2.0, top_p=0.8)
    together_B = decoder.draw(logits_BV, others_BV, uniform_B, sampling)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for rows in (slice(0, 1), slice(2, 9)):
                alone_B = decoder.draw(logits_BV[rows], others_BV[rows], uniform_B[rows], sampling)
                assert torch.equal(alone_B, together_B[rows])
    finally:
        torch.set_num_threads(before)


def test_tensors_that_do_not_fit_are_refused(decoder):
    logits_BV, others_BV, uniform_B = make_logits(3, 50)
    for wrong in (
        (logits_BV.double(), None, uniform_B),
        (logits_BV, others_BV.double(), uniform_B),
        (logits_BV, others_BV[:2], uniform_B),
        (logits_BV, None, uniform_B[:2]),
        (logits_BV, None, uniform_B.float()),
        (logits_BV[:, :0], None, uniform_B),
    ):
        with pytest.raises(ValueError, match="logits"):
            decoder.draw(*wrong, Sampling())


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_the_loop_samples_the_same_tokens_with_either_draw(decoder, guidance, monkeypatch):
    text_BT = torch.tensor([[5, 6, 0, 0], [9, 1, 2, 0]])
    sampling = Sampling(guidance=guidance, top_p=0.9)
    other = dataclasses.replace(sampling, top_k=0.5)
    drawn = []

    def sample():
        return generate(decoder, text_BT, seeds=[3, 4], scene=sampling, image=other)

    def draw(*arguments):
        drawn.append(arguments)
        return draw_guided(*arguments)

    found = sample()
    monkeypatch.setattr(decoder, "draw", draw)
    expected = sample()
    assert len(drawn) == 18
    assert torch.equal(found.scene, expected.scene)
    assert torch.equal(found.image, expected.image)
