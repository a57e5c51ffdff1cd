"""`mas bench train`: tokens a second of the GPT's training, against the loader and a reference.

In: a config of `mas train gpt`. Out: one dictionary of figures. A step is what training does:
forward pass with the losses of all streams, backward pass, clipping, AdamW. The reference
(train/reference.py) is measured in its forward and backward pass only, so ratios to it are on the
low side. Every measurement runs in a process of its own, for its peak memory; data are random
tokens in a temporary folder.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from mas.bench_vqseg import now, peak_mb, run_apart
from mas.gpt import GPT, GPTConfig
from mas.sequence import Streams
from mas.shards import MANIFEST, TOKEN_FORMAT, write_token_shard
from mas.storage import parse_config
from train.data import TokenData
from train.flops import peak_flops, training_flops
from train.gpt import StreamWeights
from train.reference import ReferenceGPT
from train.stage import Optimiser

SMALL = GPTConfig(layers=10, width=256, heads=4, dropout=0.1)  # configs/small/gpt.yaml
WARM_UP = 2  # steps before the clock starts; compilation falls into the first
PICTURES = 512  # of the random token shard

Precision = Literal["32-true", "bf16-mixed"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One measurement."""

    network: GPTConfig
    batch_size: int  # pictures a step
    steps: int  # measured
    device: str  # cpu or cuda
    precision: Precision = "32-true"
    compiled: bool = False
    reference: bool = False  # the published architecture instead of ours
    checkpoint_blocks: bool = False  # recompute blocks backwards


def bench_train(
    *,
    config: str | None = None,
    batch_size: int = 4,
    steps: int = 5,
    dropout: float = 0.0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["both", "32-true", "bf16-mixed"] = "both",
    compile: bool = True,
    checkpoint_blocks: bool = False,
    reference: bool = True,
) -> dict[str, Any]:
    """Measure the GPT's training: eager and compiled, the loader alone, a published architecture.

    Args:
        config: a config of mas train gpt, for the sizes of the network; default: 25M parameters.
        batch_size: pictures a step.
        steps: measured ones, after two that do not count.
        dropout: of both networks, whatever the config says; the published recipe has none.
        device: where; auto takes the GPU if there is one.
        precision: number format; both measures float32 and bfloat16.
        compile: measure compiled as well.
        checkpoint_blocks: recompute blocks in the backward pass.
        reference: measure the reference as well.
    """
    if batch_size < 1 or steps < 1:
        raise ValueError("--batch-size and --steps must be at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no usable GPU here; use --device cpu")
    network = replace(read_network(config) if config else SMALL, dropout=dropout)
    place = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    kinds: tuple[Precision, ...] = (
        ("32-true", "bf16-mixed") if precision == "both" else (precision,)
    )
    ours = Setting(
        network=network,
        batch_size=batch_size,
        steps=steps,
        device=place,
        checkpoint_blocks=checkpoint_blocks,
    )
    results, references = measure_all(ours, kinds, compile=compile, reference=reference)
    best = max(results, key=lambda result: result["tokens_per_second"])
    loader = measure_loader(network, batch_size)
    figures = {
        "parameters": best["parameters"],
        "tokens_per_second": best["tokens_per_second"],
        "loader_tokens_per_second": loader,
        "mfu": best["mfu"],
        "compiled": best["compiled"],
        "precision": best["precision"],
        "loader_over_step": round(loader / best["tokens_per_second"], 1),
        "batch_size": batch_size,
        "sequence": network.layout.length,
        "dropout": dropout,
        "device": torch.cuda.get_device_name() if place == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "results": results,
    }
    if references:
        figures |= {"reference": references, "over_reference": compare(results, references)}
    return figures


def measure_all(
    ours: Setting, kinds: Sequence[Precision], *, compile: bool, reference: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Figures of our network and of the reference in each precision, one after the other."""
    results, references = [], []
    for kind in kinds:
        for compiled in (False, True) if compile else (False,):
            results.append(run_apart(measure, replace(ours, precision=kind, compiled=compiled)))
        if reference:
            references.append(run_apart(measure, replace(ours, precision=kind, reference=True)))
    return results, references


def compare(results: list[dict[str, Any]], references: list[dict[str, Any]]) -> dict[str, float]:
    """Our whole step over the reference's two passes: the best of each, and per precision."""

    def fastest(found: list[dict[str, Any]], key: str, precision: str = "") -> float:
        return max(r[key] for r in found if precision in ("", r["precision"]))

    passes = "forward_backward_tokens_per_second"
    ratios = {
        "best": fastest(results, "tokens_per_second") / fastest(references, passes),
        "best_passes": fastest(results, passes) / fastest(references, passes),
    }
    for kind in {r["precision"]: None for r in references}:
        ratios[kind] = fastest(results, "tokens_per_second", kind) / fastest(
            references, passes, kind
        )
    return {name: round(ratio, 2) for name, ratio in ratios.items()}


def read_network(path: str) -> GPTConfig:
    """The sizes in a config of `mas train gpt`.

    Raises:
        ValueError: no such file, no YAML, or one without model.network.
    """
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
        network = values["model"]["network"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a config of mas train gpt ({error})") from error
    return parse_config(GPTConfig, network, path)


def measure(setting: Setting) -> dict[str, Any]:
    """Tokens a second, MFU and peak memory of one setting."""
    torch.manual_seed(0)
    device = torch.device(setting.device)
    network = build(setting).to(device)
    optimiser = Optimiser()
    optimizer = optimiser.build(network)
    tokens = random_tokens(setting.network, setting.batch_size, device)
    dtype = torch.bfloat16 if setting.precision == "bf16-mixed" else torch.float32
    context = torch.autocast(device.type, dtype) if dtype is torch.bfloat16 else nullcontext()
    start, both, whole = time.perf_counter(), [], []
    for step in range(WARM_UP + setting.steps):
        if step == WARM_UP:
            warm = time.perf_counter() - start
        begin = now(device)
        with context:
            loss = training_loss(network, tokens)
        loss.backward()
        both.append(now(device) - begin)
        nn.utils.clip_grad_norm_(network.parameters(), optimiser.clip)
        optimizer.step()
        optimizer.zero_grad()
        whole.append(now(device) - begin)
    length = setting.batch_size * setting.network.layout.length
    step_seconds = statistics.median(whole[WARM_UP:])
    passes = statistics.median(both[WARM_UP:])
    result: dict[str, Any] = {
        "precision": setting.precision,
        "compiled": setting.compiled,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "tokens_per_second": round(length / step_seconds, 1),
        "forward_backward_tokens_per_second": round(length / passes, 1),
        "peak_mb": round(peak_mb(device), 1),
        "warm_up_seconds": round(warm, 1),
    }
    if not setting.reference:
        peak = peak_flops(device, dtype)
        flops = training_flops(setting.network) * setting.batch_size
        result["mfu"] = round(flops / step_seconds / peak, 3) if peak else None
    return result


def build(setting: Setting) -> nn.Module:
    """The network in training, as `setting` says."""
    if setting.reference:
        return ReferenceGPT(setting.network)
    network = GPT(setting.network)
    network.checkpoint_blocks = setting.checkpoint_blocks
    if setting.compiled:
        for block in network.blocks:
            block.compile()
    return network


def training_loss(network: nn.Module, tokens: Streams) -> Tensor:
    if isinstance(network, ReferenceGPT):
        return network.loss(*tokens)
    assert isinstance(network, GPT)
    return StreamWeights().mean(network.losses(*tokens))


def random_tokens(config: GPTConfig, count: int, device: torch.device) -> Streams:
    """Tokens of `count` pictures; no caption holds padding."""
    return Streams(
        *(
            torch.randint(1, stream.vocabulary, (count, stream.length), device=device)
            for stream in config.layout.streams
        )
    )


def measure_loader(config: GPTConfig, batch_size: int, *, seconds: float = 2.0) -> float:
    """Tokens a second that the loader alone delivers, read in the training process."""
    with tempfile.TemporaryDirectory() as folder:
        write_random_shard(folder, config)
        data = TokenData(input=folder, batch_size=batch_size, holdout=PICTURES)
        data.setup("fit")
        pictures, start = 0, time.perf_counter()
        for batch in data.train_dataloader():
            pictures += len(batch["number"])
            taken = time.perf_counter() - start
            if taken > seconds:
                break
    return round(pictures * config.layout.length / taken, 1)


def write_random_shard(folder: str, config: GPTConfig) -> None:
    """A token folder of one shard, one caption a picture."""
    rng = np.random.default_rng(0)
    streams: dict[str, Any] = {
        s.name: rng.integers(1, s.vocabulary, (PICTURES, s.length)).astype(np.uint16)
        for s in config.layout.streams
    }
    write_token_shard(folder, "00000", row=np.arange(PICTURES, dtype=np.int32), **streams)
    manifest: dict[str, Any] = {"format": TOKEN_FORMAT}
    for stream in config.layout.streams:
        size = {"length": stream.length} if stream.grid is None else {"grid": stream.grid}
        manifest[stream.name] = {"vocabulary": stream.vocabulary, "sha256": "random", **size}
    manifest["shards"] = [{"name": "00000", "pictures": PICTURES, "captions": PICTURES}]
    Path(folder, MANIFEST).write_text(json.dumps(manifest))
