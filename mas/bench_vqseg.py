"""`mas bench vqseg`: what a layout of VQ-SEG costs, and what quick VQ-GAN decoding gains.

In: nothing but sizes; scenes are drawn here. Out: one dictionary of figures. A training step is
what training does: loss, backward pass, clipping, AdamW. Every measurement runs in a process of its
own, for its peak memory. On a CPU `peak_mb` is that of the whole process, Python and PyTorch
included (`idle_mb` of it before the network is built); on a GPU that of the card's allocator.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mas.machine import end_with_parent, peak_rss_mb
from mas.scene import CLASSES, VOID, find_edges
from mas.vqgan import VQGAN, VQGANConfig
from mas.vqseg import VQSEG, VQSEGConfig

LAYOUTS = {  # 256 px, 16×16 tokens, 1024 codes each
    "default": VQSEGConfig(),
    "published": VQSEGConfig(
        layout="published",
        patch=1,
        multipliers=(1, 1, 2, 2, 4),
        blocks=2,
        attention=(4,),
        middle=True,
        code_width=256,
    ),
}
REGIONS = 12  # segments a drawn scene, as many as COCO's have
MOST = 50  # measured calls
MATRIX = 4096  # rows and columns of the product that measures a GPU


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One measurement."""

    config: VQSEGConfig
    batch_size: int  # maps a step
    seconds: float  # that each thing is repeated for, once at least
    device: str  # cpu or cuda
    bfloat16: bool  # matrix products and convolutions in bfloat16, as mixed-precision training


def bench_vqseg(
    *,
    batch_size: int = 1,
    seconds: float = 5.0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    vqgan: str | None = None,
) -> dict[str, Any]:
    """Measure both layouts of VQ-SEG at 256 px, and VQ-GAN decoding in float32 and mixed precision.

    Args:
        batch_size: maps a training step, of either layout.
        seconds: for which each measurement is repeated, twice at least.
        device: where; auto takes the GPU if there is one.
        precision: number format of the VQ-SEG layouts.
        vqgan: a vqgan folder to decode with; default: the published f16 with 16384 codes, random
            weights.
    """
    if batch_size < 1 or seconds <= 0:
        raise ValueError("--batch-size must be at least 1, --seconds above 0")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no usable GPU here; use --device cpu")
    place = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    decoding = run_apart(measure_decoding, vqgan, seconds, place)
    common: dict[str, Any] = {"batch_size": batch_size, "seconds": seconds, "device": place}
    bfloat16 = precision == "bf16-mixed"
    layouts = {
        name: run_apart(measure_layout, Setting(config=config, bfloat16=bfloat16, **common))
        for name, config in LAYOUTS.items()
    }
    return {
        "layouts": layouts,
        "ratios": compare(layouts["default"], layouts["published"]),
        "vqgan_decode": decoding,
        "size": LAYOUTS["default"].size,
        "batch_size": batch_size,
        "precision": precision,
        "device": torch.cuda.get_device_name() if place == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def compare(ours: Mapping[str, Any], published: Mapping[str, Any]) -> dict[str, float]:
    """How many times better our layout is."""

    def faster(name: str) -> float:
        return round(ours[name] / published[name], 2)

    return {
        "train": faster("train_maps_per_second"),
        "encode": faster("encode_maps_per_second"),
        "peak": round(published["peak_mb"] / ours["peak_mb"], 2),
    }


def run_apart(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The function's answer from a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
        return pool.submit(function, *arguments).result()


def measure_layout(setting: Setting) -> dict[str, Any]:
    """Maps a second in training and in encoding, peak memory and size of one layout."""
    torch.manual_seed(0)
    device = torch.device(setting.device)
    idle_mb = peak_mb(device)
    network = VQSEG(setting.config).to(device)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad])
    labels_BHW, edges_BHW = draw_scenes(setting.batch_size, setting.config.size)
    labels_BHW, edges_BHW = labels_BHW.to(device), edges_BHW.to(device)
    cast = _casting(device, bfloat16=setting.bfloat16)

    def step() -> None:
        with cast:
            total = network.loss(labels_BHW, edges_BHW).total
        total.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def encode() -> None:
        with cast:
            network.encode(labels_BHW, edges_BHW)

    step_seconds = _fastest(step, setting.seconds, device)
    highest_mb = peak_mb(device)  # before anything else adds to it
    network.eval()
    encode_seconds = _fastest(encode, setting.seconds, device)
    result = {
        "train_maps_per_second": round(setting.batch_size / step_seconds, 3),
        "encode_maps_per_second": round(setting.batch_size / encode_seconds, 3),
        "peak_mb": round(highest_mb, 1),
        "parameters": sum(p.numel() for p in network.parameters()),
        "idle_mb": round(idle_mb, 1),
    }
    if device.type == "cuda":
        step_flops = count_flops(step)
        limit = measure_limit(device, torch.bfloat16 if setting.bfloat16 else torch.float32)
        result["train_share_of_limit"] = round(step_flops / step_seconds / limit, 3)
    return result


def measure_decoding(folder: str | None, seconds: float, place: str) -> dict[str, Any]:
    """Seconds to decode one picture in each precision, and what mixed precision changes in it."""
    device = torch.device(place)
    if folder is None:
        network = VQGAN(VQGANConfig()).eval()
        randomise(network)
    else:
        network = VQGAN.from_pretrained(folder)
    network, generator = network.to(device), torch.Generator().manual_seed(0)
    config = network.config
    tokens_1T = torch.randint(config.codes, (1, config.grid**2), generator=generator).to(device)
    ways: tuple[Literal["float32", "mixed"], ...] = ("float32", "mixed")
    results: dict[str, Any] = {}
    pictures: list[Tensor] = []
    for precision in ways if place == "cpu" else ways[:1]:

        @torch.no_grad()
        def decode(precision: Literal["float32", "mixed"] = precision) -> Tensor:
            return network.decode(tokens_1T, precision=precision)

        took = _fastest(decode, seconds, device)
        results[precision] = {"seconds": round(took, 4), "pictures_per_second": round(1 / took, 3)}
        if device.type == "cuda":
            limit = measure_limit(device, torch.float32)
            share = count_flops(decode) / took / limit
            results[precision]["share_of_limit"] = round(share, 3)
        pictures.append(decode())
    if len(pictures) == len(ways):
        error_CHW = 255 * (pictures[1] - pictures[0]).abs()[0]
        results["mixed"] |= {
            "faster": round(results["float32"]["seconds"] / results["mixed"]["seconds"], 2),
            "largest_error_of_255": round(error_CHW.max().item(), 3),
            "mean_error_of_255": round(error_CHW.mean().item(), 3),
        }
    return {
        "size": config.size,
        "parameters": sum(p.numel() for p in network.parameters()),
        "weights": folder or "random",
        "contrast": round(pictures[0].std().item(), 3),  # of the pictures; a grey one has no errors
        **results,
    }


@torch.no_grad()
def randomise(network: nn.Module) -> None:
    """Weights that let every layer count: start values leave residual blocks without effect."""
    generator = torch.Generator().manual_seed(0)
    for x in network.parameters():
        scale = x[0].numel() ** -0.5 if x.ndim > 1 else 0.1
        x.copy_(torch.randn(x.shape, generator=generator) * scale)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.add_(1)


def draw_scenes(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Labels and edges of `count` scenes of random rectangles, with void and faces among them."""
    random = np.random.default_rng(0)
    labels_BHW = np.zeros((count, size, size), np.uint8)
    for labels_HW in labels_BHW:
        labels_HW[:] = random.integers(CLASSES)
        for label in [*random.integers(CLASSES, size=REGIONS - 1), VOID]:
            top, left = random.integers(size - 1, size=2)
            high, wide = random.integers(1, size // 2, size=2)
            labels_HW[top : top + high, left : left + wide] = label
    edges_BHW = np.stack([find_edges(labels_HW) for labels_HW in labels_BHW])
    return torch.from_numpy(labels_BHW), torch.from_numpy(edges_BHW)


def measure_limit(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that `device` reaches in a product of two large square matrices."""
    a, b = torch.rand(2, MATRIX, MATRIX, device=device).to(dtype)
    return 2 * MATRIX**3 / _fastest(lambda: nn.functional.linear(a, b), 0.2, device)


def count_flops(function: Callable[[], Any]) -> int:
    """Operations of the matrix products and convolutions in one call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_mb(device: torch.device) -> float:
    """Most memory held at once so far: of the card's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_rss_mb()


def _fastest(function: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Seconds of the quickest of several calls; others can only have been disturbed."""
    best, spent = float("inf"), 0.0
    function()
    for _ in range(MOST):
        start = now(device)
        function()
        took = now(device) - start
        best, spent = min(best, took), spent + took
        if spent >= seconds:
            break
    return best


def _casting(device: torch.device, *, bfloat16: bool) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
