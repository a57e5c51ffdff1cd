"""VQ-GAN: a picture becomes image tokens, image tokens become a picture.

In: RGB pictures in [0, 1]. Out: one token a grid cell, row by row; and back. The network is the
published one (Esser et al., arXiv 2012.09841), so that public checkpoints load (`pretrained`); the
losses that train it are in the training package.
Axes: B batch, C channels, H W pixels (or grid), T tokens, K codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from einops import rearrange
from torch import Tensor, nn

from mas.storage import load_network, save_network
from mas.vq import (
    Backbone,
    ConvDecoder,
    ConvEncoder,
    check_finite,
    check_side,
    check_tokens,
    hash_tokens,
    shape_text,
    start_weights,
)
from mas.vq_codebook import Codebook, GumbelCodebook
from mas.vq_fast import decode_fast, has_bfloat16

QuantizerName = Literal["nearest", "cosine", "gumbel"]
Decoding = Literal["float32", "mixed", "auto"]
RANGE_SLACK = 1e-3  # how far rounding may carry a pixel out of [0, 1]


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Sizes of a VQGAN; the defaults are minDALL-E's, which are taming's f16 with 16384 codes."""

    size: int = 256  # pixels a side
    codes: int = 16384  # codebook entries
    code_width: int = 256  # numbers a codebook entry
    quantizer: QuantizerName = "nearest"  # nearest | cosine | gumbel
    features: int = 256  # channels of the encoder's output and the decoder's input
    patch: int = 1  # pixels a side folded into channels before the first convolution; published: 1
    width: int = 128  # channels of the finest level
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # of width, finest level first; halving between
    blocks: int = 2  # residual blocks a level in the encoder; the decoder has one more
    attention: tuple[int, ...] = (4,)  # levels with self-attention, 0 = full resolution
    groups: int = 32  # of the group normalisation; divides every width
    commitment: float = 0.25  # weight that holds the features to their codes
    averaging: bool = False  # codes are running means of their features; False: learnt by gradient
    restart: float = 0.03  # codes used less than this share of the average are moved; 0 = never

    def __post_init__(self) -> None:
        backbone = self.backbone
        if self.quantizer not in get_args(QuantizerName):
            raise ValueError(
                f"quantizer {self.quantizer!r}: use one of {', '.join(get_args(QuantizerName))}"
            )
        for name in ("size", "codes", "code_width", "features", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_side(self.size)
        factor = self.patch * backbone.factor
        if self.size % factor:
            raise ValueError(
                f"size {self.size} must be a multiple of {factor}, which is what patches of "
                f"{self.patch} and the {len(self.multipliers)} multipliers shrink a picture by"
            )

    @property
    def backbone(self) -> Backbone:
        """Shape of encoder and decoder."""
        return Backbone(
            width=self.width,
            multipliers=self.multipliers,
            blocks=self.blocks,
            attention=self.attention,
            groups=self.groups,
        )

    @property
    def grid(self) -> int:
        """Tokens a side."""
        return self.size // (self.patch * self.backbone.factor)


class Reconstruction(NamedTuple):
    """What a training step needs of a picture's way through the network."""

    image_BCHW: Tensor  # scaled as the input, but not clamped to [0, 1]
    codebook_loss: Tensor  # scalar
    tokens_BT: Tensor  # long


class VQGAN(nn.Module):
    """Picture to tokens and back."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        channels = 3 * config.patch**2
        self.encoder = ConvEncoder(channels, config.features, config.backbone)
        self.decoder = ConvDecoder(config.features, channels, config.backbone)
        self.quantizer: Codebook | GumbelCodebook
        if config.quantizer == "gumbel":
            self.quantizer = GumbelCodebook(config.codes, config.code_width)
        else:
            self.quantizer = Codebook(
                config.codes,
                config.code_width,
                normalised=config.quantizer == "cosine",
                commitment=config.commitment,
                restart=config.restart,
                averaging=config.averaging,
            )
        self.pre_quant = nn.Conv2d(config.features, config.code_width, 1)
        self.post_quant = nn.Conv2d(config.code_width, config.features, 1)
        start_weights(self)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VQGAN:
        """Reads a `vqgan/` folder: config.json + model.safetensors; frozen, evaluation mode."""
        network = load_network(cls, VQGANConfig, folder)
        check_finite(network, folder)
        return network

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json + model.safetensors."""
        save_network(self, folder)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last convolution, where the adaptive GAN weight compares gradients."""
        return self.decoder.head.weight

    def token_hash(self) -> str:
        """Sha256 of what decides the tokens: equal where only the decoders differ."""
        return hash_tokens(self)

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Tokens of pictures.

        Args:
            image_BCHW: RGB, [0, 1], `config.size` pixels a side.

        Returns:
            Long B T, row by row; T = `config.grid`².

        Raises:
            ValueError: another shape, integer pixels, values outside [0, 1].
        """
        self._check_image(image_BCHW)
        low, high = image_BCHW.aminmax()
        if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):  # also true of NaN
            raise ValueError(
                f"pixels span {low:.4g} to {high:.4g}; encode takes [0, 1] (divide bytes by 255)"
            )
        tokens_BHW = self.quantizer.encode(self.encode_features(image_BCHW * 2 - 1))
        return rearrange(tokens_BHW, "b h w -> b (h w)")

    def decode(self, tokens_BT: Tensor, *, precision: Decoding = "float32") -> Tensor:
        """Pictures of tokens: RGB B C H W, clamped to [0, 1].

        Args:
            tokens_BT: long, as `encode` writes them.
            precision: float32 is the network as it stands, with gradients where they are wanted.
                mixed is for looking at pictures on a CPU (`mas.vq_fast`): about twice as fast, no
                pixel off by more than 2/255. auto is mixed on CPUs that have bfloat16
                instructions, else float32.

        Raises:
            ValueError: T is not `config.grid`², a token is not below `config.codes`, or mixed
                where the network is not on a CPU.
        """
        tokens_BHW = self._grid_of(tokens_BT)
        if precision not in get_args(Decoding):
            raise ValueError(f"precision {precision!r}: use one of {', '.join(get_args(Decoding))}")
        on_cpu = self.last_layer.device.type == "cpu"
        if precision == "mixed" and not on_cpu:
            raise ValueError(f"mixed is for CPUs, the network is on {self.last_layer.device}")
        if precision == "mixed" or (precision == "auto" and on_cpu and has_bfloat16()):
            z_BCHW = self.post_quant(self.quantizer.lookup(tokens_BHW))
            raw_BCHW = self._unfold(decode_fast(self.decoder, z_BCHW))
        else:
            raw_BCHW = self.decode_raw(tokens_BHW)
        return (raw_BCHW * 0.5 + 0.5).clamp(0, 1)

    def forward(self, image_BCHW: Tensor) -> Reconstruction:
        """One way through encoder, quantizer and decoder, with gradients; pictures in [0, 1]."""
        self._check_image(image_BCHW)
        quantized = self.quantizer(self.encode_features(image_BCHW * 2 - 1))
        raw_BCHW = self._unfold(self.decoder(self.post_quant(quantized.z_BCHW)))
        tokens_BT = rearrange(quantized.tokens_BHW, "b h w -> b (h w)")
        return Reconstruction(raw_BCHW * 0.5 + 0.5, quantized.loss, tokens_BT)

    def encode_features(self, raw_BCHW: Tensor) -> Tensor:
        """Features before the quantizer, B C H W, of pictures in [-1, 1]."""
        p = self.config.patch
        folded = rearrange(raw_BCHW, "b c (h p) (w q) -> b (c p q) h w", p=p, q=p)
        return self.pre_quant(self.encoder(folded))

    def decode_raw(self, tokens_BHW: Tensor) -> Tensor:
        """Pictures as the network draws them: about [-1, 1], not clamped."""
        return self._unfold(self.decoder(self.post_quant(self.quantizer.lookup(tokens_BHW))))

    def _unfold(self, folded_BCHW: Tensor) -> Tensor:
        p = self.config.patch
        return rearrange(folded_BCHW, "b (c p q) h w -> b c (h p) (w q)", p=p, q=p)

    def _check_image(self, image_BCHW: Tensor) -> None:
        size = self.config.size
        if image_BCHW.ndim != 4 or tuple(image_BCHW.shape[1:]) != (3, size, size):
            raise ValueError(
                f"this VQ-GAN takes pictures B x 3 x {size} x {size}, got {shape_text(image_BCHW)}"
            )
        if not image_BCHW.is_floating_point():
            raise ValueError(
                f"pictures must be floats in [0, 1], got {image_BCHW.dtype} (divide bytes by 255)"
            )

    def _grid_of(self, tokens_BT: Tensor) -> Tensor:
        grid, codes = self.config.grid, self.config.codes
        check_tokens(tokens_BT, grid=grid, codes=codes)
        return rearrange(tokens_BT, "b (h w) -> b h w", h=grid)
