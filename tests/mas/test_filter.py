import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

import mas.filter
from mas.filter import Sampling, count_kept, draw, guide, probabilities, uniforms

LOGITS_BV = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("temperature", [0, 1e-300, 0.3, 1, 50])
@pytest.mark.parametrize("top_k", [None, 1, 7, 1000, 0.5, 0.001])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.5, 1.0])
def test_probabilities_sum_to_one_and_keep_at_least_one_token(temperature, top_k, top_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    result = probabilities(LOGITS_BV, sampling)
    assert result.shape == LOGITS_BV.shape and (result >= 0).all()
    torch.testing.assert_close(result.sum(-1), torch.ones(5, dtype=torch.float64))
    kept = (result > 0).sum(-1)
    assert (kept >= 1).all() and (kept <= count_kept(top_k, 50)).all()
    assert (result.argmax(-1) == LOGITS_BV.argmax(-1)).all()


def test_without_filters_it_is_the_softmax_at_the_temperature():
    result = probabilities(LOGITS_BV, Sampling(temperature=0.7))
    torch.testing.assert_close(result, (LOGITS_BV.double() / 0.7).softmax(-1))


def test_top_k_keeps_exactly_the_k_likeliest_even_among_equals():
    logits = torch.tensor([[3.0, 1.0, 3.0, 2.0, 3.0]])
    assert (probabilities(logits, Sampling(top_k=2)) > 0).sum() == 2
    kept = probabilities(logits, Sampling(top_k=4)) > 0
    assert kept.tolist() == [[True, False, True, True, True]]


@pytest.mark.parametrize(("share", "kept"), [(0.5, 25), (0.02, 1), (0.001, 1), (0.99, 50)])
def test_a_share_keeps_this_part_of_the_vocabulary(share, kept):
    result = probabilities(LOGITS_BV, Sampling(top_k=share))
    assert ((result > 0).sum(-1) == kept).all()


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3), (1.0, 4)):
        result = probabilities(logits, Sampling(top_p=top_p))
        assert (result > 0).sum() == kept, top_p
    result = probabilities(logits, Sampling(top_p=0.6))
    expected = torch.tensor([[0.625, 0.375, 0.0, 0.0]]).double()
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-9)


def test_top_p_does_not_depend_on_how_much_is_sorted_at_once(monkeypatch):
    logits = torch.randn(4, 2000, generator=torch.Generator().manual_seed(1))
    for sampling in (Sampling(top_p=0.9), Sampling(top_p=0.3, top_k=1500), Sampling(top_p=1.0)):
        results = []
        for size in (1, 7, 512, 2000):
            monkeypatch.setattr(mas.filter, "FIRST_SORT", size)
            results.append(probabilities(logits, sampling))
        assert all(torch.equal(results[0], result) for result in results[1:])


def test_a_row_that_needs_more_sorting_changes_no_other():
    flatness_B1 = torch.tensor([[8.0], [0.1], [3.0], [0.5]])
    logits_BV = torch.randn(4, 3000, generator=torch.Generator().manual_seed(2)) * flatness_B1
    for sampling in (Sampling(top_p=0.9), Sampling(top_p=0.99, top_k=2000)):
        together_BV = probabilities(logits_BV, sampling)
        assert len({int(kept) for kept in (together_BV > 0).sum(-1)}) == 4
        for row_1V, alone_1V in zip(logits_BV.split(1), together_BV.split(1), strict=True):
            assert torch.equal(probabilities(row_1V, sampling), alone_1V)


def test_top_k_of_one_and_temperature_zero_are_greedy():
    for sampling in (Sampling(top_k=1), Sampling(temperature=0), Sampling(top_p=1e-12)):
        for seed in range(20):
            drawn = draw(probabilities(LOGITS_BV, sampling), uniforms(seed, 5))
            assert torch.equal(drawn, LOGITS_BV.argmax(-1))


def test_guidance_of_one_is_the_conditional_and_of_zero_the_unconditional_stream():
    conditional, unconditional = LOGITS_BV[:2].double(), LOGITS_BV[2:4].double()
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)
    expected = 3 * conditional - 2 * unconditional
    torch.testing.assert_close(guide(conditional, unconditional, 3.0), expected)


def test_the_strongest_guidance_still_gives_probabilities():
    logits_BV = (100 * LOGITS_BV).float()
    guided_BV = guide(logits_BV[:2], logits_BV[2:4], mas.filter.MOST_GUIDANCE)
    assert probabilities(guided_BV, Sampling(guidance=mas.filter.MOST_GUIDANCE)).isfinite().all()


def test_sampled_frequencies_match_the_distribution():
    expected = probabilities(LOGITS_BV[:1, :12] / 3, Sampling(top_k=9))
    count = 40_000
    drawn = draw(expected.expand(count, -1), uniforms(3, count))
    observed = torch.bincount(drawn, minlength=12).double()
    kept = expected[0] > 0
    assert (observed[~kept] == 0).all()
    wanted = expected[0, kept] * count
    chi_square = ((observed[kept] - wanted) ** 2 / wanted).sum()
    assert chi_square < 26.12  # 0.1 % of fair draws exceed it (8 degrees of freedom)


def test_the_ends_of_the_unit_interval_draw_possible_tokens():
    weights = torch.tensor([[0.0, 0.2, 0.0, 0.8, 0.0]]).double()
    ends = torch.tensor([0.0, 1 - 2**-32], dtype=torch.float64)
    assert draw(weights.expand(2, -1), ends).tolist() == [1, 3]


def test_uniforms_depend_on_the_seed_alone_and_stay_below_one():
    assert torch.equal(uniforms(5, 100), uniforms(5, 100))
    assert not torch.equal(uniforms(5, 100), uniforms(6, 100))
    many = uniforms(0, 100_000)
    assert (many >= 0).all() and (many <= 1 - 2**-32).all()
    assert abs(many.mean().item() - 0.5) < 0.005


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": -1.0}, "guidance is -1"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"guidance": 1e38}, r"guidance is 1e\+38, use a number from 0 to 1000"),
        ({"temperature": -0.1}, "temperature is"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 2.5}, r"top_k is 2\.5"),
        ({"top_k": -3}, "top_k is -3"),
        ({"top_k": float("inf")}, "top_k is inf"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
    ],
)
def test_impossible_settings_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**option)


@pytest.mark.parametrize("name", ["guidance", "temperature", "top_k", "top_p"])
@pytest.mark.parametrize("value", [10**400, -(10**400), math.inf, math.nan])
def test_numbers_without_end_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is "):
        Sampling(**{name: value})


def test_equal_settings_are_written_down_alike():
    whole = Sampling(guidance=3, temperature=1, top_k=50, top_p=1)
    parted = Sampling(guidance=3.0, temperature=np.float32(1), top_k=50.0, top_p=np.int64(1))
    assert json.dumps(asdict(whole)) == json.dumps(asdict(parted))
    assert asdict(whole) == {"guidance": 3.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
    assert repr(whole.top_k) == "50" and repr(whole.guidance) == "3.0"
    assert Sampling(top_k=0.5).top_k == 0.5
