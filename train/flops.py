"""How much a training step calculates, and how much the machine could: both halves of the MFU.

In: sizes of the GPT; a device and a number format. Out: floating point operations a picture, and a
second. MFU (model FLOPs utilisation, arXiv 2204.02311 appendix B) counts what the model needs, not
what recomputing blocks adds.
"""

from __future__ import annotations

import time

import torch

from mas.gpt import GPT, GPTConfig

# Dense bfloat16 TFLOP/s as the makers state them; the first name that the card's contains counts.
PEAKS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
MATRIX = 512  # rows and columns of the product that measures a CPU; short: some are not interrupted
SECONDS = 0.3  # that it is repeated


def training_flops(config: GPTConfig) -> float:
    """Operations of one picture's forward and backward pass; the backward pass is twice as long."""
    layout, width = config.layout, config.width
    tokens = layout.length - 1  # the last one predicts nothing
    with torch.device("meta"):
        blocks = GPT(config).blocks
    weights = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    attention = config.layers * 2 * tokens**2 * width  # two products, half of each is masked
    predicted = (layout.text.length - 1, layout.scene.length, layout.image.length)
    heads = sum(
        2 * count * width * stream.vocabulary
        for count, stream in zip(predicted, layout.streams, strict=True)
    )
    return 3.0 * (2 * tokens * weights + attention + heads)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second that `device` could do; None for cards and formats not in the table.

    A CPU is measured: the best of several multiplications of square matrices.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((peak for part, peak in PEAKS.items() if part in name), None)
        return known * 1e12 if known and dtype in (torch.bfloat16, torch.float16) else None
    return measure_peak(dtype) if device.type == "cpu" else None


def measure_peak(dtype: torch.dtype) -> float:
    """Operations a second of square matrix multiplications on this CPU, with all of its threads."""
    a, b = (torch.full((MATRIX, MATRIX), 0.5, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * MATRIX**3 / best
