"""Quantizers and the encoder and decoder around them."""

import math

import pytest
import torch
import torch.nn.functional as F

from mas.vq import Attention, Backbone, ConvDecoder, ConvEncoder, check_tokens
from mas.vq_codebook import MEMORY, SEARCH_ROWS, Codebook, GumbelCodebook, perplexity, split_codes


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def codebook(codes=32, width=6, **options):
    torch.manual_seed(1)
    return Codebook(codes, width, **{"normalised": False, **options})


@pytest.mark.parametrize("normalised", [False, True])
def test_quantising_a_codebook_entry_returns_its_index(normalised):
    quantizer = codebook(normalised=normalised)
    tokens = torch.randint(32, (2, 3, 4), generator=seeded())
    rows = quantizer.codebook.detach()[tokens].permute(0, 3, 1, 2)
    scale = 3.7 if normalised else 1  # an angle does not know lengths
    assert torch.equal(quantizer.encode(rows * scale), tokens)
    assert torch.equal(quantizer.eval()(rows * scale).tokens_BHW, tokens)


@pytest.mark.parametrize("normalised", [False, True])
def test_the_code_is_the_nearest_row_whatever_the_chunks(normalised):
    quantizer = codebook(codes=50, normalised=normalised).double()
    z = torch.randn(1, 6, 1, SEARCH_ROWS + 7, generator=seeded(), dtype=torch.double)
    vectors, rows = z[0, :, 0].T.float(), quantizer.codebook.detach().float()
    if normalised:
        vectors, rows = F.normalize(vectors, dim=1), F.normalize(rows, dim=1)
    assert torch.equal(quantizer.encode(z)[0, 0], torch.cdist(vectors, rows).argmin(1))


@pytest.mark.parametrize("normalised", [False, True])
def test_straight_through_gradient_equals_its_definition(normalised):
    quantizer = codebook(normalised=normalised, commitment=0.25, restart=0.0)
    quantizer.usage.fill_(1 / 32)
    z = torch.randn(2, 6, 3, 3, generator=seeded(), requires_grad=True)
    weights = torch.randn(2, 6, 3, 3, generator=seeded(5))
    quantized = quantizer(z)
    ((quantized.z_BCHW * weights).sum() + quantized.loss).backward()

    other = z.detach().clone().requires_grad_()
    used = F.normalize(other, dim=1) if normalised else other
    rows = quantizer.lookup(quantizer.encode(other)).detach()
    torch.testing.assert_close(quantized.z_BCHW, rows)  # the decoder sees codebook rows
    # d(decoder)/d(rows) goes to the features unchanged, and the commitment pulls them to the rows.
    definition = (used * weights).sum() + 0.25 * F.mse_loss(used, rows)
    definition.backward()
    torch.testing.assert_close(z.grad, other.grad)

    again = quantizer.codebook.detach().clone().requires_grad_()
    shown = F.normalize(again, dim=1) if normalised else again
    looked = F.embedding(quantizer.encode(z), shown).permute(0, 3, 1, 2)
    F.mse_loss(looked, used.detach()).backward()
    torch.testing.assert_close(quantizer.codebook.grad, again.grad)


@pytest.mark.parametrize("normalised", [False, True])
def test_a_fresh_codebook_starts_on_the_data_and_is_all_in_use(normalised):
    quantizer = codebook(normalised=normalised)
    z = torch.randn(4, 6, 8, 8, generator=seeded()) * 5 + 20
    tokens = quantizer(z).tokens_BHW
    if not normalised:
        assert (quantizer.codebook.mean(0) - 20).abs().max() < 3
    assert perplexity(tokens, 32)[0] == 1


def test_more_codes_than_vectors_start_without_nan():
    quantizer = codebook(codes=64)
    quantized = quantizer(torch.randn(1, 6, 4, 4, generator=seeded()))
    assert quantizer.codebook.isfinite().all() and quantized.loss < 1


def test_split_codes_go_where_most_is_rounded_away():
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [11.0, 0.0], [9.0, 9.0], [11.0, 9.0]])
    vectors = (centres.repeat(200, 1) + 0.1 * torch.randn(1000, 2))[torch.randperm(1000)]
    rows = torch.tensor([[0.0, 0.0], [10.0, 0.0], [10.0, 9.0]])
    before = rows.clone()

    def split(*words):
        return split_codes(*words, generator=torch.Generator().manual_seed(0))

    grown = split(rows, vectors, 5)
    assert torch.equal(rows, before)
    assert torch.cdist(grown, centres).min(0).values.max() < 0.05
    # More than double: in rounds, each of which rounds less away.
    errors = [torch.cdist(vectors, split(rows, vectors, n)).min(1).values.mean() for n in
              (3, 4, 5, 12)]  # fmt: skip
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.85 * errors[-2]
    for few, codes in ((vectors[:9], 9), (vectors, 2)):
        with pytest.raises(ValueError, match="ask for at least as many codes"):
            split(rows, few, codes)


def test_restart_brings_a_dead_code_back():
    quantizer = codebook(restart=0.03)
    z = torch.randn(4, 6, 8, 8, generator=seeded())
    quantizer(z)
    with torch.no_grad():
        quantizer.codebook[5] = 1e3  # where no vector will ever be nearest
    assert not (quantizer(z).tokens_BHW == 5).any()
    steps = 1
    while steps < 1000 and not (quantizer(z).tokens_BHW == 5).any():
        steps += 1
    assert steps == pytest.approx(math.log(0.03) / math.log(MEMORY), abs=10)
    assert quantizer.codebook[5].abs().max() < 10


def test_without_restart_a_dead_code_stays_dead():
    quantizer = codebook(restart=0.0)
    z = torch.randn(4, 6, 8, 8, generator=seeded())
    quantizer(z)
    with torch.no_grad():
        quantizer.codebook[5] = 1e3
    for _ in range(600):
        quantizer(z)
    assert (quantizer.codebook[5] == 1e3).all()


@pytest.mark.parametrize("normalised", [False, True])
def test_averaged_rows_become_the_means_of_their_vectors(normalised):
    centres = torch.eye(6)[:3] * 5
    noise = torch.randn(3, 100, 6, generator=seeded()) * 0.1
    vectors = (centres[:, None] + noise).flatten(0, 1)
    quantizer = codebook(codes=3, normalised=normalised, averaging=True)
    quantizer(vectors.T.reshape(1, 6, 10, 30))
    with torch.no_grad():
        quantizer.codebook.copy_(centres + 0.4)
    for _ in range(400):
        quantized = quantizer(vectors.T.reshape(1, 6, 10, 30))
    if normalised:
        vectors = F.normalize(vectors, dim=1)
    means = vectors.reshape(3, 100, 6).mean(1)
    torch.testing.assert_close(quantizer.codebook.detach(), means, atol=1e-3, rtol=0)
    torch.testing.assert_close(quantizer.usage, torch.full((3,), 1 / 3))
    assert not quantized.loss.requires_grad and not quantizer.codebook.requires_grad


def test_evaluation_changes_nothing():
    quantizer = codebook().eval()
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer(torch.randn(4, 6, 8, 8, generator=seeded()))
    assert all(torch.equal(before[name], x) for name, x in quantizer.state_dict().items())


def test_half_precision_around_the_quantizer_does_not_change_codes():
    quantizer = codebook(normalised=True).eval()
    z = torch.randn(4, 6, 8, 8, generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(z).tokens_BHW, quantizer.encode(z))
    assert torch.equal(quantizer(z).tokens_BHW, quantizer.encode(z))


def test_gumbel_encoding_is_repeatable_and_training_samples():
    torch.manual_seed(2)
    quantizer = GumbelCodebook(16, 4)
    z = torch.randn(2, 4, 5, 5, generator=seeded())
    assert torch.equal(quantizer.encode(z), quantizer.logits(z).argmax(1))
    assert not torch.equal(quantizer(z).tokens_BHW, quantizer(z).tokens_BHW)
    quantized = quantizer.eval()(z)
    assert torch.equal(quantized.tokens_BHW, quantizer.encode(z))
    torch.testing.assert_close(quantized.z_BCHW, quantizer.lookup(quantized.tokens_BHW))


def test_gumbel_divergence_is_zero_for_even_use_and_log_codes_for_one():
    quantizer = GumbelCodebook(16, 4, divergence=1.0)
    with torch.no_grad():
        quantizer.logits.weight.zero_()
        quantizer.logits.bias.zero_()
        assert quantizer(torch.zeros(1, 4, 2, 2)).loss.abs() < 1e-6
        quantizer.logits.bias[3] = 50
        assert quantizer(torch.zeros(1, 4, 2, 2)).loss == pytest.approx(2.7726, abs=1e-3)


def test_perplexity_counts_codes_and_their_evenness():
    assert perplexity(torch.arange(8).repeat(3), 8) == pytest.approx((1.0, 8.0))
    assert perplexity(torch.zeros(9, dtype=torch.long), 8) == pytest.approx((1 / 8, 1.0))


def test_attention_mixes_all_positions_by_scaled_products():
    torch.manual_seed(3)
    attention = Attention(8, groups=4).double()
    x = torch.randn(2, 8, 3, 4, generator=seeded(), dtype=torch.double)
    normed = attention.norm(x).flatten(2)
    query, key, value = (
        torch.einsum("oi,bin->bon", layer.weight[:, :, 0, 0], normed) + layer.bias[:, None]
        for layer in (attention.query, attention.key, attention.value)
    )
    shares = (torch.einsum("bcn,bcm->bnm", query, key) * 8**-0.5).softmax(-1)
    mixed = torch.einsum("bnm,bcm->bcn", shares, value).reshape(x.shape)
    torch.testing.assert_close(attention(x), x + attention.out(mixed))


def shape(**changes):
    plain = dict(width=8, multipliers=(1, 2, 2), blocks=1, attention=(2,), groups=4)
    return Backbone(**{**plain, **changes})


def test_encoder_and_decoder_mirror_each_other():
    encoder, decoder = ConvEncoder(5, 6, shape()), ConvDecoder(6, 5, shape())
    x = torch.randn(2, 5, 16, 16, generator=seeded())
    z = encoder(x)
    assert z.shape == (2, 6, 4, 4) and decoder(z).shape == x.shape


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"multipliers": ()}, "multipliers must be positive"),
        ({"multipliers": (1, 0)}, "multipliers must be positive"),
        ({"width": 10}, "width 10 must be a multiple of groups 4"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"attention": (1, 3)}, r"attention names levels \[3\], but there are 3"),
    ],
)
def test_impossible_shapes_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        shape(**changes)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.zeros(2, 5, dtype=torch.long), "tokens must be B x 4 .*got 2 x 5"),
        (torch.zeros(4, dtype=torch.long), "got 4"),
        (torch.zeros(2, 4), "whole numbers"),
        (torch.full((2, 4), 8), "tokens must be 0 to 7, got 8 to 8"),
        (torch.full((2, 4), -1), "got -1 to -1"),
    ],
)
def test_impossible_tokens_are_refused(tokens, words):
    with pytest.raises(ValueError, match=words):
        check_tokens(tokens, grid=2, codes=8)
