"""VQ-SEG: a scene map becomes scene tokens, scene tokens become a scene map.

In: labels (one id a pixel, or void) and edges. Out: one token a grid cell, row by row; and back.
Paper: Make-A-Scene (arXiv 2203.13131) section 3.2. The paper's network reads 158 one-hot channels
at full resolution; the default here looks each label up in a table and folds a patch of pixels
into channels at once, so that nothing wide ever stands at full resolution. `layout: published`
keeps the paper's way for comparison.
Axes: B batch, C channels (157 classes + edge), D features, H W pixels (or grid), K ids, P pixels
in any order, T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mas.scene import CHANNELS, CLASSES, EDGE_CHANNEL, VOID
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
from mas.vq_codebook import Codebook
from mas.vqseg_loss import choose_pixels, decide, positive_weights, scene_loss

Layout = Literal["default", "published"]
QuantizerName = Literal["nearest", "cosine"]
CLASS_BIAS = -math.log(CLASSES)  # logits start at the share of an average class …
EDGE_BIAS = -2.0  # … and of an edge, or the first steps would only learn that most is absent
EDGE_ENDS = 2  # pixels by which an edge between instances may come near a change of label


@dataclass(frozen=True, kw_only=True)
class VQSEGConfig:
    """Sizes of a VQSEG; the defaults are 256 px, 16×16 tokens and the paper's 1024 codes."""

    layout: Layout = "default"  # default | published (one-hot channels at full resolution)
    size: int = 256  # pixels a side
    grid: int = 16  # tokens a side
    codes: int = 1024  # codebook entries
    code_width: int = 32  # numbers a codebook entry
    quantizer: QuantizerName = "nearest"  # nearest | cosine
    embedding: int = 8  # numbers a label is looked up as (default layout)
    patch: int = 8  # pixels a side that the stem folds into channels; 1 in the published layout
    features: int = 32  # numbers a pixel that the logits are computed from (default layout)
    hidden: int = 0  # of a layer between a cell and its patch, on both sides (default layout)
    width: int = 128  # channels of the finest level
    multipliers: tuple[int, ...] = (1, 2)  # of width, finest level first; halving between
    blocks: int = 1  # residual blocks a level in the encoder; the decoder has one more
    attention: tuple[int, ...] = ()  # levels with self-attention, 0 = finest
    middle: bool = False  # block, attention, block on the token grid (published layout: True)
    groups: int = 32  # of the group normalisation; divides every width
    commitment: float = 0.25  # weight that holds the features to their codes
    averaging: bool = True  # codes are running means of their features; False: learnt by gradient
    restart: float = 0.03  # codes used less than this share of the average are moved; 0 = never
    codebook_weight: float = 1.0  # of the codebook loss in the total
    face_weight: float = 20.0  # of face parts where they are present
    pixels: float = 1.0  # share of the pixels that a training step computes its loss from
    balance: float = 0.0  # of that draw: 0 = all pixels alike … 1 = all classes of a batch alike

    def __post_init__(self) -> None:
        for name, legal in (("layout", Layout), ("quantizer", QuantizerName)):
            if getattr(self, name) not in get_args(legal):
                raise ValueError(
                    f"{name} {getattr(self, name)!r}: use one of {', '.join(get_args(legal))}"
                )
        for name in ("size", "grid", "codes", "code_width", "embedding", "patch", "features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden < 0 or (self.hidden and self.layout == "published"):
            raise ValueError(
                f"hidden is {self.hidden}: use 0 or more, and 0 in the published layout"
            )
        if not 0 < self.pixels <= 1 or not 0 <= self.balance <= 1:
            raise ValueError(
                "pixels must be above 0 and at most 1, balance 0 to 1, got "
                f"{self.pixels} and {self.balance}"
            )
        if self.pixels < 1 and self.layout == "published":
            raise ValueError("the published layout has a loss of all pixels: set pixels to 1")
        if self.balance and self.pixels == 1:
            raise ValueError("balance needs pixels to draw from: set pixels below 1")
        if self.layout == "published" and self.patch != 1:
            raise ValueError(
                f"the published layout folds no pixels: set patch to 1, not {self.patch}"
            )
        check_side(self.size)
        factor = self.patch * self.backbone.factor
        if self.size != self.grid * factor:
            raise ValueError(
                f"size {self.size} must be grid {self.grid} x {factor}: patches of {self.patch} "
                f"pixels, then one halving between each two of the {len(self.multipliers)} "
                "multipliers"
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
            middle=self.middle,
        )


class VQSEGLosses(NamedTuple):
    """Outcome of one training step."""

    total: Tensor  # what to minimise
    reconstruction: Tensor  # cross-entropy, summed over channels, averaged over pixels
    codebook: Tensor  # codebook and commitment terms, unweighted
    tokens_BT: Tensor  # long


class Detail(nn.Sequential):
    """What one linear layer between a cell and its patch cannot say; starts as nothing."""

    def __init__(self, width_in: int, hidden: int, width_out: int) -> None:
        super().__init__(nn.Linear(width_in, hidden), nn.SiLU(), nn.Linear(hidden, width_out))

    def start(self) -> None:
        nn.init.zeros_(self.get_submodule("2").get_parameter("weight"))


class PatchStem(nn.Module):
    """Looks labels and edges up in a table and folds each patch of pixels into channels."""

    def __init__(self, *, embedding: int, patch: int, width: int, hidden: int) -> None:
        super().__init__()
        self.patch = patch
        self.table = nn.Embedding(2 * (CLASSES + 1), embedding)  # labels and void, ± edge
        self.project = nn.Linear(patch**2 * embedding, width)
        self.detail = Detail(patch**2 * embedding, hidden, width) if hidden else None

    def forward(self, labels_BHW: Tensor, edges_BHW: Tensor) -> Tensor:
        ids_BHW = labels_BHW.clamp(max=CLASSES).int() + (CLASSES + 1) * edges_BHW  # void follows
        ids_BHWP = fold_patches(ids_BHW, self.patch)
        patches = rearrange(self.table(ids_BHWP), "b h w p d -> b h w (p d)")
        hidden = self.project(patches)
        if self.detail is not None:
            hidden = hidden + self.detail(patches)
        return rearrange(hidden, "b h w d -> b d h w").contiguous()


class PatchHead(nn.Module):
    """Turns each grid cell into the features of its patch of pixels, and those into logits."""

    def __init__(self, *, features: int, patch: int, width: int, hidden: int) -> None:
        super().__init__()
        self.patch = patch
        self.project = nn.Linear(width, patch**2 * features)
        self.detail = Detail(width, hidden, patch**2 * features) if hidden else None
        self.classifier = nn.Linear(features, CHANNELS)

    def forward(self, hidden_BDHW: Tensor) -> Tensor:
        """Features of the pixels, patch by patch, P D; a view, nothing is moved."""
        cells = rearrange(hidden_BDHW, "b d h w -> b h w d")
        hidden = self.project(cells)
        if self.detail is not None:
            hidden = hidden + self.detail(cells)
        return F.silu(rearrange(hidden, "b h w (p d) -> (b h w p) d", p=self.patch**2))


class OneHotStem(nn.Module):
    """The 158 channels of the paper."""

    def forward(self, labels_BHW: Tensor, edges_BHW: Tensor) -> Tensor:
        return one_hot(labels_BHW, edges_BHW)


class VQSEG(nn.Module):
    """Scene map to tokens and back."""

    def __init__(self, config: VQSEGConfig) -> None:
        super().__init__()
        self.config = config
        deepest = config.width * config.multipliers[-1]
        self.stem: PatchStem | OneHotStem
        self.head: PatchHead | None = None  # published: the decoder's last convolution is the head
        if config.layout == "default":
            channels = config.width
            sizes = {"patch": config.patch, "width": channels, "hidden": config.hidden}
            self.stem = PatchStem(embedding=config.embedding, **sizes)
            self.head = PatchHead(features=config.features, **sizes)
        else:
            channels = CHANNELS
            self.stem = OneHotStem()
        self.encoder = ConvEncoder(channels, deepest, config.backbone)
        self.pre_quant = nn.Conv2d(deepest, config.code_width, 1)
        self.quantizer = Codebook(
            config.codes,
            config.code_width,
            normalised=config.quantizer == "cosine",
            commitment=config.commitment,
            restart=config.restart,
            averaging=config.averaging,
        )
        self.post_quant = nn.Conv2d(config.code_width, deepest, 1)
        self.decoder = ConvDecoder(deepest, channels, config.backbone)
        start_weights(self)
        for module in self.modules():
            if isinstance(module, Detail):
                module.start()
        start_bias(self.decoder.head if self.head is None else self.head.classifier)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VQSEG:
        """Reads a `vqseg/` folder: config.json + model.safetensors; frozen, evaluation mode."""
        network = load_network(cls, VQSEGConfig, folder)
        check_finite(network, folder)
        return network

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json + model.safetensors."""
        save_network(self, folder)

    def token_hash(self) -> str:
        """Sha256 of what decides the tokens: equal where only the decoders differ."""
        return hash_tokens(self)

    def encode(self, labels_BHW: Tensor, edges_BHW: Tensor) -> Tensor:
        """Tokens of scene maps.

        Args:
            labels_BHW: uint8, 0-156 or void (255), `config.size` pixels a side.
            edges_BHW: bool.

        Returns:
            Long B T, row by row; T = `config.grid`².

        Raises:
            ValueError: another shape or dtype, an unknown id.
        """
        self._check_scene(labels_BHW, edges_BHW)
        tokens_BHW = self.quantizer.encode(self.encode_features(labels_BHW, edges_BHW))
        return rearrange(tokens_BHW, "b h w -> b (h w)")

    def decode(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (uint8 B H W) and edges (bool B H W) of tokens.

        A pixel is void where that is likelier than all classes together (see `decide`). An edge is
        wherever the label changes: there it is one by definition (`mas.scene.find_edges`). The edge
        channel, where its probability exceeds one half, adds edges between instances (see
        `join_edges`).

        Raises:
            ValueError: T is not `config.grid`², or a token is not below `config.codes`.
        """
        grid = self._decode_grid(tokens_BT)
        features_PD = self._pixels(grid)
        decided = [
            decide(features if self.head is None else self.head.classifier(features))
            for features in features_PD.split(choose_pixels(features_PD.device))
        ]
        labels_BHW, edges_BHW = (
            self._unfold(torch.cat(parts), grid) for parts in zip(*decided, strict=True)
        )
        return labels_BHW, join_edges(edges_BHW, find_changes(labels_BHW))

    def decode_logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits of the 158 channels, B C H W.

        Raises:
            ValueError: as `decode`.
        """
        grid = self._decode_grid(tokens_BT)
        if self.head is None:
            return grid
        logits_PC = self.head.classifier(self._pixels(grid))
        return rearrange(self._unfold(logits_PC, grid), "b h w c -> b c h w")

    def loss(self, labels_BHW: Tensor, edges_BHW: Tensor) -> VQSEGLosses:
        """Loss of one batch; arguments and errors as `encode`."""
        self._check_scene(labels_BHW, edges_BHW)
        quantized = self.quantizer(self.encode_features(labels_BHW, edges_BHW))
        hidden = self.decoder(self.post_quant(quantized.z_BCHW))
        if self.head is None:
            reconstruction = self._dense_loss(hidden, labels_BHW, edges_BHW)
        else:
            features_PD, classifier = self.head(hidden), self.head.classifier
            labels_P = fold_patches(labels_BHW, self.config.patch).flatten()
            edges_P = fold_patches(edges_BHW, self.config.patch).flatten()
            if self.training and self.config.pixels < 1:
                drawn = draw_pixels(labels_P, self.config.pixels, balance=self.config.balance)
                # Backwards, indexing would sort all pixels in case some were drawn twice.
                features_PD = features_PD.index_select(0, drawn)
                labels_P, edges_P = labels_P[drawn], edges_P[drawn]
            with torch.autocast(features_PD.device.type, enabled=False):
                reconstruction = scene_loss(
                    features_PD.float(),
                    classifier.weight,
                    classifier.bias,
                    labels_P=labels_P,
                    edges_P=edges_P,
                    face_weight=self.config.face_weight,
                )
        total = reconstruction + self.config.codebook_weight * quantized.loss
        tokens_BT = rearrange(quantized.tokens_BHW, "b h w -> b (h w)")
        return VQSEGLosses(total, reconstruction, quantized.loss, tokens_BT)

    def forward(self, labels_BHW: Tensor, edges_BHW: Tensor) -> VQSEGLosses:
        """The training step, for wrappers that call the module (DDP, compile)."""
        return self.loss(labels_BHW, edges_BHW)

    def encode_features(self, labels_BHW: Tensor, edges_BHW: Tensor) -> Tensor:
        """Features before the quantizer, B C H W, of scene maps."""
        return self.pre_quant(self.encoder(self.stem(labels_BHW, edges_BHW)))

    def _decode_grid(self, tokens_BT: Tensor) -> Tensor:
        """The decoder's output: a cell a patch, or (published) a cell a pixel; B D H W."""
        check_tokens(tokens_BT, grid=self.config.grid, codes=self.config.codes)
        tokens_BHW = rearrange(tokens_BT, "b (h w) -> b h w", h=self.config.grid)
        return self.decoder(self.post_quant(self.quantizer.lookup(tokens_BHW)))

    def _pixels(self, grid_BDHW: Tensor) -> Tensor:
        """Features (published: logits) of the pixels, patch by patch, P D."""
        if self.head is None:
            return rearrange(grid_BDHW, "b d h w -> (b h w) d")
        return self.head(grid_BDHW)

    def _unfold(self, x_P: Tensor, grid_BDHW: Tensor) -> Tensor:
        """Puts pixels that stand patch by patch back in their places, B H W and the rest."""
        return rearrange(
            x_P,
            "(b h w p q) ... -> b (h p) (w q) ...",
            h=grid_BDHW.shape[2],
            w=grid_BDHW.shape[3],
            p=self.config.patch,
            q=self.config.patch,
        )

    def _dense_loss(self, logits_BCHW: Tensor, labels_BHW: Tensor, edges_BHW: Tensor) -> Tensor:
        """What `scene_loss` computes, from the one-hot target, as published."""
        weights_C11 = positive_weights(self.config.face_weight).to(logits_BCHW)[:, None, None]
        total = F.binary_cross_entropy_with_logits(
            logits_BCHW,
            one_hot(labels_BHW, edges_BHW).to(logits_BCHW),
            pos_weight=weights_C11,
            reduction="sum",
        )
        return total / labels_BHW.numel()

    def _check_scene(self, labels_BHW: Tensor, edges_BHW: Tensor) -> None:
        size = self.config.size
        if labels_BHW.ndim != 3 or tuple(labels_BHW.shape[1:]) != (size, size):
            raise ValueError(
                f"this VQ-SEG takes scene maps B x {size} x {size}, got {shape_text(labels_BHW)}"
            )
        if edges_BHW.shape != labels_BHW.shape or edges_BHW.dtype != torch.bool:
            raise ValueError(
                f"edges must be bool {tuple(labels_BHW.shape)} like labels, got "
                f"{edges_BHW.dtype} {tuple(edges_BHW.shape)}"
            )
        if labels_BHW.dtype != torch.uint8:
            raise ValueError(f"labels must be uint8, got {labels_BHW.dtype}")
        unknown = (labels_BHW >= CLASSES) & (labels_BHW != VOID)
        if unknown.any():
            ids = labels_BHW[unknown].unique().tolist()
            raise ValueError(f"unknown class ids {ids}: use 0-{CLASSES - 1}, or {VOID} for void")


def draw_pixels(labels_P: Tensor, share: float, *, balance: float) -> Tensor:
    """Indices of about `share` of the pixels, drawn from the global generator.

    A pixel's chance falls with the number of pixels of its class in the batch to the power of
    `balance`: most of a scene is sky and ground, most of what is hard to draw is not.

    Args:
        labels_P: uint8.
        share: of the pixels, in expectation; less where whole classes would be drawn twice.
        balance: 0 = all pixels alike, 1 = all classes alike.
    """
    labels_P = labels_P.int()
    counts_K = torch.bincount(labels_P, minlength=VOID + 1).float()
    odds_K = counts_K.clamp(min=1) ** -balance
    chances_K = odds_K * (share * len(labels_P) / (odds_K * counts_K).sum())
    drawn_P = torch.rand(len(labels_P), device=labels_P.device) < chances_K[labels_P]
    return drawn_P.nonzero()[:, 0]


def fold_patches(x_BHW: Tensor, patch: int) -> Tensor:
    """Pixels patch by patch: B, patches high, patches wide, pixels of the patch row by row."""
    return rearrange(x_BHW, "b (h p) (w q) -> b h w (p q)", p=patch, q=patch)


def find_changes(labels_BHW: Tensor) -> Tensor:
    """Where the right or the lower neighbour has another label, bool B H W."""
    changes_BHW = torch.zeros_like(labels_BHW, dtype=torch.bool)
    changes_BHW[:, :, :-1] |= labels_BHW[:, :, :-1] != labels_BHW[:, :, 1:]
    changes_BHW[:, :-1] |= labels_BHW[:, :-1] != labels_BHW[:, 1:]
    return changes_BHW


def join_edges(edges_BHW: Tensor, changes_BHW: Tensor) -> Tensor:
    """Changes of label, and those decoded edges that are more than their doubles, bool B H W.

    An outline that is decoded a pixel beside the change of label would cut a sliver off a thing,
    and things are counted by their edges. So an edge inside a label must have a part that no change
    of label touches; its ends, which do touch one, are kept with it.
    """
    inner_BHW = edges_BHW & ~changes_BHW
    joined_BHW = inner_BHW & ~_widen(changes_BHW)
    for _ in range(EDGE_ENDS):
        joined_BHW = _widen(joined_BHW) & inner_BHW
    return joined_BHW | changes_BHW


def _widen(mask_BHW: Tensor) -> Tensor:
    """The mask and all neighbours of its pixels, diagonal ones too."""
    return F.max_pool2d(mask_BHW[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0


def one_hot(labels_BHW: Tensor, edges_BHW: Tensor) -> Tensor:
    """The 158 channels of a scene map, float32 B C H W; a void pixel has no class."""
    ids_BHW = labels_BHW.clamp(max=CLASSES).long()
    channels_BHWC = F.one_hot(ids_BHW, CHANNELS).float()
    channels_BHWC[..., EDGE_CHANNEL] = edges_BHW.float()  # held void until here
    return rearrange(channels_BHWC, "b h w c -> b c h w").contiguous()


@torch.no_grad()
def start_bias(layer: nn.Conv2d | nn.Linear) -> None:
    """Starts the logits low, so that the first steps do not only learn that most is absent."""
    assert layer.bias is not None
    layer.bias[:CLASSES] = CLASS_BIAS
    layer.bias[EDGE_CHANNEL] = EDGE_BIAS
