"""Features of pictures by a network from a file, and how far apart two sets of pictures are (FID).

In: pictures, and the file of a feature extractor: Inception's published weights or any network
saved with its graph. Out: Fréchet and kernel distance with all that such a number depends on: how
many pictures of each side, which extractor (sha256), which resize filter.
Axes: B batch, C channels, H W pixels, N pictures, D features.
"""

from __future__ import annotations

import logging
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas.distances import frechet_distance, kernel_distance
from mas.inception import SIZE, Inception
from mas.storage import file_hash
from mas.weights_file import WeightsError, check_file, load_graph, pick_tensors, read_tensors

logger = logging.getLogger(__name__)

Filter = Literal["bilinear", "bicubic"]
SOURCE = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)


class Extractor:
    """A frozen network from pictures to features.

    Args:
        path: Inception's weights (.pth, .safetensors), or a network saved with its graph
            (TorchScript, .pt2) that maps RGB pictures B 3 H W in [0, 1] to features B D. NVIDIA's
            inception-2015-12-05.pt, known by its argument `return_features`, gets what it takes:
            pictures of bytes.
        trust_program: also load a network saved with its graph, which runs code from the file.
        resize: how pictures are brought to Inception's 299 pixels: bilinear without smoothing, as
            pytorch-fid does, or bicubic with it, as clean-fid does. Other networks resize
            themselves.

    Raises:
        WeightsError: a missing or damaged file, tensors missing or misshaped, by name; a program
            that nobody trusts.
    """

    def __init__(
        self, path: str | Path, *, trust_program: bool = False, resize: Filter = "bilinear"
    ) -> None:
        if resize not in get_args(Filter):
            raise ValueError(f"resize {resize!r}: use one of {', '.join(get_args(Filter))}")
        check_file(path, source=SOURCE)
        self.path, self.sha256 = Path(path), file_hash(path)
        self.network: nn.Module
        self.resize: Filter | None = None
        self.takes_bytes = False
        if _has_graph(self.path):
            if not trust_program:
                raise WeightsError(
                    f"{path}: is a program (a network saved with its graph, sha256 {self.sha256}); "
                    "loading it runs code from the file. If you trust where it comes from, add "
                    "--trust-program"
                )
            self.network = load_graph(
                path, source="a network saved by torch.export or as TorchScript"
            )
            self.takes_bytes = _returns_features_on_request(self.network)
        else:
            self.network, self.resize = _load_inception(self.path), resize

    @torch.no_grad()
    def __call__(self, image_BCHW: Tensor) -> Tensor:
        """Features B D, float32, of pictures in [0, 1].

        Raises:
            WeightsError: the network returns something else.
        """
        image_BCHW = image_BCHW.float().clamp(0, 1)
        if self.resize is not None:
            image_BCHW = _to_inception(image_BCHW, self.resize)
        network = self.network.to(image_BCHW.device)
        if self.takes_bytes:
            features = network((image_BCHW * 255).round().to(torch.uint8), return_features=True)
        else:
            features = network(image_BCHW)
        if not isinstance(features, Tensor) or features.shape[:-1] != image_BCHW.shape[:1]:
            found = (
                tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            )
            raise WeightsError(
                f"{self.path}: returns {found} for {len(image_BCHW)} pictures, but must return "
                "one row of features each"
            )
        return features.float()


@dataclass(frozen=True, kw_only=True)
class PictureDistance:
    """Distance of two sets of pictures, and what it was measured with."""

    fid: float  # Fréchet distance, 0 and up
    kid: float  # squared maximum mean discrepancy, not scaled; about 0, of either sign, for equals
    count: int  # pictures measured
    true_count: int  # pictures they were measured against
    extractor: str  # name of the file
    sha256: str  # of the file
    resize: str  # filter, or "by the network"


class DistanceMetrics:
    """Collects features of two sets of pictures, batch by batch."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self.features: dict[bool, list[Tensor]] = {True: [], False: []}

    def update(self, image_BCHW: Tensor, *, real: bool) -> None:
        """Adds pictures in [0, 1]."""
        self.features[real].append(self.extractor(image_BCHW).cpu())

    def compute(self, *, seed: int = 0) -> PictureDistance:
        """The distances; `seed` draws the subsets of KID.

        Raises:
            ValueError: fewer than two pictures on a side.
        """
        counts = {real: sum(map(len, parts)) for real, parts in self.features.items()}
        if min(counts.values()) < 2:
            raise ValueError(
                f"{counts[False]} pictures against {counts[True]}: a distance needs two of each"
            )
        made_ND, real_ND = (torch.cat(self.features[real]) for real in (False, True))
        if min(counts.values()) < real_ND.shape[1]:
            logger.warning(
                "FID of %d against %d pictures by %d features is too high: use KID, or more "
                "pictures than features",
                counts[False],
                counts[True],
                real_ND.shape[1],
            )
        return PictureDistance(
            fid=frechet_distance(made_ND, real_ND),
            kid=kernel_distance(made_ND, real_ND, seed=seed),
            count=counts[False],
            true_count=counts[True],
            extractor=self.extractor.path.name,
            sha256=self.extractor.sha256,
            resize=self.extractor.resize or "by the network",
        )


def _has_graph(path: Path) -> bool:
    if path.suffix == ".pt2":
        return True
    try:
        with zipfile.ZipFile(path) as archive:  # tensors alone have no constants
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return False  # whoever reads tensors tells what is wrong


def _returns_features_on_request(network: nn.Module) -> bool:
    """Whether it returns class probabilities unless told otherwise, as the one of StyleGAN does."""
    if not isinstance(network, torch.jit.ScriptModule):
        return False
    schema = network.forward.schema  # type: ignore[attr-defined]  # a method of TorchScript
    return any(argument.name == "return_features" for argument in schema.arguments)


def _load_inception(path: Path) -> Inception:
    network = Inception()
    expected = {
        name: tensor
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")  # of its training; older files lack it
    }
    tensors = read_tensors(path, source=SOURCE)
    found = pick_tensors(tensors, expected, path=path, source=SOURCE)
    network.load_state_dict(found, strict=False)
    return network.eval().requires_grad_(False)


def _to_inception(image_BCHW: Tensor, resize: Filter) -> Tensor:
    """Pictures in [-1, 1], 299 pixels a side."""
    resized = F.interpolate(
        image_BCHW,
        size=(SIZE, SIZE),
        mode=resize,
        align_corners=False,
        antialias=resize == "bicubic",
    )
    return resized.clamp(0, 1) * 2 - 1
