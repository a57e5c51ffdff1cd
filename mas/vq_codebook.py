"""Quantizers: features on the token grid become codes, and codes become features again.

Nearest: the closest codebook row (van den Oord et al., arXiv 1711.00937; taming, minDALL-E).
Cosine: the same between L2-normalised vectors, which is also what the decoder sees (Yu et al.,
arXiv 2110.04627; LlamaGen). Gumbel: a projection to one logit a code (Jang et al., arXiv
1611.01144; DALL-E, taming gumbel).
Axes: B batch, C code width, H W token grid, N vectors, K codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SEARCH_ROWS = 4096  # vectors compared with the whole codebook at once; bounds the memory
KMEANS_STEPS = 10
MEMORY = 0.97  # what usage and running means keep a step: about the last thirty steps count


class Quantized(NamedTuple):
    """What a quantizer makes of features in training."""

    z_BCHW: Tensor  # codebook rows; their gradient reaches the features
    tokens_BHW: Tensor  # long, 0 to K-1
    loss: Tensor  # scalar: codebook and commitment terms (Gumbel: divergence from uniform use)


class Codebook(nn.Module):
    """Nearest codebook row, by distance or (`normalised`) by angle.

    A fresh codebook starts as the k-means centres of the first training batch, and a code that is
    used less than `restart` times the average is moved onto a random vector of the current batch,
    so that all codes stay in play. `usage` all zero means: has seen no batch yet. With `averaging`
    a row is the running mean of its vectors (arXiv 1711.00937, appendix A.1) instead of learning by
    gradient, and the loss is the commitment alone.
    """

    usage: Tensor

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        normalised: bool,
        commitment: float = 0.25,
        restart: float = 0.03,
        averaging: bool = False,
    ) -> None:
        super().__init__()
        self.normalised = normalised
        self.averaging = averaging
        self.commitment = commitment
        self.restart = restart
        self.codebook = nn.Parameter(
            torch.randn(codes, width) / width**0.5, requires_grad=not averaging
        )
        self.register_buffer("usage", torch.zeros(codes))  # share of the vectors, running mean

    def rows(self) -> Tensor:
        """The codebook as the decoder sees it, K C."""
        return F.normalize(self.codebook, dim=1) if self.normalised else self.codebook

    def encode(self, z_BCHW: Tensor) -> Tensor:
        """Index of the nearest row, long B H W; the lower index wins a tie."""
        batch, _, height, _ = z_BCHW.shape
        tokens_N = self._search(self._vectors(z_BCHW))
        return rearrange(tokens_N, "(b h w) -> b h w", b=batch, h=height)

    def lookup(self, tokens_BHW: Tensor) -> Tensor:
        """Rows of the codes, B C H W."""
        return rearrange(F.embedding(tokens_BHW, self.rows()), "b h w c -> b c h w")

    def forward(self, z_BCHW: Tensor) -> Quantized:
        """Quantizes with the straight-through gradient dz := dq."""
        with torch.autocast(z_BCHW.device.type, enabled=False):
            z_BCHW = z_BCHW.float()
            if self.normalised:
                z_BCHW = F.normalize(z_BCHW, dim=1)
            if self.training:
                self._revive(self._vectors(z_BCHW))
            tokens_BHW = self.encode(z_BCHW)
            rows_BCHW = self.lookup(tokens_BHW)
            loss = self.commitment * F.mse_loss(z_BCHW, rows_BCHW.detach())
            if not self.averaging:
                loss = loss + F.mse_loss(rows_BCHW, z_BCHW.detach())
            if self.training:
                self._count(tokens_BHW.flatten(), self._vectors(z_BCHW))
            return Quantized(z_BCHW + (rows_BCHW - z_BCHW).detach(), tokens_BHW, loss)

    def _vectors(self, z_BCHW: Tensor) -> Tensor:
        vectors_NC = rearrange(z_BCHW.detach().float(), "b c h w -> (b h w) c")
        return F.normalize(vectors_NC, dim=1) if self.normalised else vectors_NC

    @torch.no_grad()
    def _search(self, vectors_NC: Tensor) -> Tensor:
        with torch.autocast(vectors_NC.device.type, enabled=False):
            return _nearest(vectors_NC, self.rows().float())

    @torch.no_grad()
    def _revive(self, vectors_NC: Tensor) -> None:
        """Starts a fresh codebook; moves dead codes onto vectors of this batch."""
        codes = len(self.codebook)
        if not self.usage.any():
            self.codebook.copy_(_kmeans(vectors_NC, codes))
            self.usage.fill_(1 / codes)
        elif (dead_K := self.usage < self.restart / codes).any():
            picks_K = torch.randint(len(vectors_NC), (codes,), device=vectors_NC.device)
            moved_KC = vectors_NC[picks_K].to(self.codebook)
            self.codebook.copy_(torch.where(dead_K[:, None], moved_KC, self.codebook))
            self.usage.masked_fill_(dead_K, 1 / codes)
        else:
            return
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(self.codebook, 0)  # every process saw other vectors

    @torch.no_grad()
    def _count(self, tokens_N: Tensor, vectors_NC: Tensor) -> None:
        """Updates the usage and, with `averaging`, moves each row towards its vectors.

        A row that always was the running mean of its vectors, weighted like the usage u, follows
        from itself: with n and s the number and sum of a code's new vectors among N,
        row += (1 - memory) (s - n row) / (N u).
        """
        codes = len(self.usage)
        counts_K = torch.bincount(tokens_N, minlength=codes).float()
        sums_KC = vectors_NC.new_zeros(codes, vectors_NC.shape[1])
        if self.averaging:
            sums_KC.index_add_(0, tokens_N, vectors_NC)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts_K)
            dist.all_reduce(sums_KC)
        total = counts_K.sum()
        self.usage.lerp_(counts_K / total, 1 - MEMORY)
        if self.averaging:
            pull_KC = (sums_KC - counts_K[:, None] * self.codebook) / total
            self.codebook.add_((1 - MEMORY) * pull_KC / self.usage.clamp(min=1e-12)[:, None])


class GumbelCodebook(nn.Module):
    """One logit a code; training samples codes with Gumbel noise, encoding takes the largest.

    Published encoders also add the noise when encoding, so two calls agree on almost no code;
    here the same picture always gives the same codes.
    """

    temperature: Tensor

    def __init__(self, codes: int, width: int, *, divergence: float = 5e-4) -> None:
        super().__init__()
        self.divergence = divergence
        self.logits = nn.Conv2d(width, codes, 1)
        self.codebook = nn.Parameter(torch.randn(codes, width))
        self.register_buffer("temperature", torch.ones(()))  # of the samples; training lowers it

    def rows(self) -> Tensor:
        """The codebook as the decoder sees it, K C."""
        return self.codebook

    def encode(self, z_BCHW: Tensor) -> Tensor:
        """Index of the largest logit, long B H W; the lower index wins a tie."""
        return self.logits(z_BCHW).argmax(dim=1)

    def lookup(self, tokens_BHW: Tensor) -> Tensor:
        """Rows of the codes, B C H W."""
        return rearrange(F.embedding(tokens_BHW, self.codebook), "b h w c -> b c h w")

    def forward(self, z_BCHW: Tensor) -> Quantized:
        """Samples codes (in training); the gradient is that of the soft sample."""
        with torch.autocast(z_BCHW.device.type, enabled=False):
            logits_BKHW = self.logits(z_BCHW.float())
            codes = len(self.codebook)
            if self.training:
                soft_BKHW = F.gumbel_softmax(
                    logits_BKHW, tau=float(self.temperature), hard=True, dim=1
                )
            else:
                hard = F.one_hot(logits_BKHW.argmax(dim=1), codes)
                soft_BKHW = rearrange(hard, "b h w k -> b k h w").to(logits_BKHW)
            log_shares = F.log_softmax(logits_BKHW, dim=1)
            divergence = (log_shares.exp() * (log_shares + torch.tensor(codes).log())).sum(1)
            z_out_BCHW = torch.einsum("bkhw,kc->bchw", soft_BKHW, self.codebook)
            return Quantized(
                z_out_BCHW, soft_BKHW.argmax(dim=1), self.divergence * divergence.mean()
            )


def _nearest(vectors_NC: Tensor, rows_KC: Tensor) -> Tensor:
    """The argmin over rows of |v|² + |e|² - 2 v·e; |v|² changes nothing and is left out."""
    squares_K = rows_KC.square().sum(1)
    return torch.cat(
        [
            torch.addmm(squares_K, chunk, rows_KC.T, alpha=-2).argmin(dim=1)
            for chunk in vectors_NC.split(SEARCH_ROWS)
        ]
    )


def _kmeans(vectors_NC: Tensor, codes: int) -> Tensor:
    """`codes` centres by Lloyd's iterations from random vectors."""
    count = len(vectors_NC)
    if count >= codes:
        picks = torch.randperm(count, device=vectors_NC.device)[:codes]
    else:  # fewer vectors than codes: the surplus ones start as jittered copies
        picks = torch.randint(count, (codes,), device=vectors_NC.device)
    centres_KC = vectors_NC[picks].clone()
    if count < codes:
        centres_KC += 0.01 * vectors_NC.std() * torch.randn_like(centres_KC)
    return _lloyd(vectors_NC, centres_KC)


@torch.no_grad()
def split_codes(
    rows_KC: Tensor, vectors_NC: Tensor, codes: int, *, generator: torch.Generator
) -> Tensor:
    """A codebook of `codes` rows for these vectors, grown from a smaller one.

    Rows that round away most are split in two, along a random direction of what they stand for,
    and Lloyd's iterations follow (LBG: Linde, Buzo and Gray 1980).

    Args:
        rows_KC: a codebook; not changed.
        vectors_NC: features that it shall stand for, more than `codes`.
        codes: K or more.
        generator: of the directions.

    Raises:
        ValueError: too few vectors, or fewer codes than there are.
    """
    if not len(rows_KC) <= codes < len(vectors_NC):
        raise ValueError(
            f"{len(rows_KC)} codes cannot become {codes} for {len(vectors_NC)} vectors: "
            "ask for at least as many codes, and for fewer than vectors"
        )
    rows_KC = rows_KC.clone()
    while len(rows_KC) < codes:
        count = len(rows_KC)
        tokens_N = _nearest(vectors_NC, rows_KC)
        squares_NC = (vectors_NC - rows_KC[tokens_N]).square()
        lost_KC = torch.zeros_like(rows_KC).index_add_(0, tokens_N, squares_NC)
        picks_M = lost_KC.sum(1).topk(min(count, codes - count)).indices
        sizes_K1 = torch.bincount(tokens_N, minlength=count).clamp(min=1)[:, None]
        shifts_MC = 0.5 * (lost_KC / sizes_K1).sqrt()[picks_M]
        shifts_MC *= torch.randn(shifts_MC.shape, generator=generator)
        rows_KC = torch.cat([rows_KC, rows_KC[picks_M] + shifts_MC])
        rows_KC[picks_M] -= shifts_MC
        rows_KC = _lloyd(vectors_NC, rows_KC)
    return rows_KC


def _lloyd(vectors_NC: Tensor, centres_KC: Tensor) -> Tensor:
    """Centres moved to the mean of the vectors nearest to them; an empty one stays put."""
    codes = len(centres_KC)
    for _ in range(KMEANS_STEPS):
        tokens_N = _nearest(vectors_NC, centres_KC)
        sums_KC = torch.zeros_like(centres_KC).index_add_(0, tokens_N, vectors_NC)
        sizes_K1 = torch.bincount(tokens_N, minlength=codes)[:, None]
        centres_KC = torch.where(sizes_K1 > 0, sums_KC / sizes_K1.clamp(min=1), centres_KC)
    return centres_KC


def perplexity(tokens: Tensor, codes: int) -> tuple[float, float]:
    """How much of a codebook `tokens` use: share of codes that occur, and exp(entropy).

    Perplexity equals the number of codes when all are used equally often.
    """
    shares_K = torch.bincount(tokens.flatten(), minlength=codes).cpu().double() / tokens.numel()
    entropy = -(shares_K * shares_K.clamp(min=1e-12).log()).sum()
    return float((shares_K > 0).double().mean()), float(entropy.exp())
