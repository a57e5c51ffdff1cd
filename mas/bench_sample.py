"""`mas bench sample`: how fast the GPT samples, against the speed at which memory can be read.

In: nothing (random weights of the 271M sizes), or a model folder; token shards, where the number
formats shall be compared with float32. Out: one dictionary of figures. Sampling one token reads
every matrix once, so `bandwidth_share` says how near a step comes to reading alone. On a CPU every
setting runs in a process of its own that loads the folder as `mas sample` does; its peak memory
counts everything, Python and PyTorch included, and `peak_limit_mb` is what it should stay under:
1.2 x weights + cache + 300 MB. On a GPU all settings run in this process, each after a run that
compiles and records what it needs (`prepare_seconds`), and the peak is that of the card's memory.
Axes: B pictures, T tokens, V vocabulary.
"""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mas.bench_vqseg import peak_mb, run_apart
from mas.cuda_decoder import CUDADecoder, Kernels
from mas.decoder import CPUDecoder
from mas.filter import Sampling
from mas.generate import Decoder, generate
from mas.gpt import GPT, GPTConfig
from mas.model_folder import find_folder
from mas.precision import Precision, StoredGPT, choose_device, free_memory, make_decoder
from mas.sequence import Streams
from mas.storage import build_unfilled
from mas.token_shards import TokenShards

# How steps run on a GPU: kernel by kernel, or as CUDA graphs of these, of fused kernels or of one.
Mode = Literal["eager", "graph", "compiled", "triton", "persistent"]

NETWORK = GPTConfig()
PRECISIONS: list[Precision] = ["float32", "bfloat16", "int8"]
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # a weight
MODES: dict[Mode, Kernels] = {
    "eager": "torch",
    "graph": "torch",
    "triton": "triton",
    "persistent": "persistent",
    "compiled": "compiled",
}
READ = 2**29  # bytes of the read test: more than any cache holds
READ_GPU = 2**31  # likewise: reading them takes long enough not to notice what starting it takes
SPARE_MB = 300  # of the peak: Python, PyTorch and everything that is neither weights nor cache
AT_ONCE = 16  # pictures compared at a time

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One measurement."""

    folder: Path  # of a GPT
    guidance: float
    repeats: int
    device: str
    precision: Precision = "float32"
    count: int = 1  # pictures at once
    mode: Mode = "eager"  # the only one of a CPU


def bench_sample(
    *,
    model: str | Path | None = None,
    network: GPTConfig = NETWORK,
    precisions: list[Precision] | None = None,
    counts: list[int] | None = None,
    modes: list[Mode] | None = None,
    guidance: float = 3.0,
    repeats: int = 2,
    device: str = "cpu",
    tokens: Path | None = None,
    pictures: int = 32,
) -> dict[str, Any]:
    """Measure how fast tokens are sampled, and what fewer bits do to what the GPT predicts.

    Args:
        model: park, a model folder, one of a GPT, or a model of the hub; default: random weights.
        network: sizes of the network with random weights.
        precisions: number formats; default: float32, bfloat16 and int8; on a GPU bfloat16.
        counts: pictures at once; default: 1 and 4; on a GPU 1 and 64.
        modes: how steps run on a GPU; default: eager, graph, triton, persistent and compiled.
        guidance: 1 runs one stream a picture, everything else two.
        repeats: runs of each setting, the best of which counts; the first token's time is that of
            the first run, on a GPU of the first one that has nothing to prepare.
        device: cpu, cuda, …
        tokens: token shards of pictures to compare the formats on; needs a trained model.
        pictures: how many of them.
    """
    if repeats < 1 or pictures < 1 or any(count < 1 for count in counts or []):
        raise ValueError("--counts, --repeats and --pictures must be at least 1")
    if tokens is not None and model is None:
        raise ValueError("--tokens compares predictions of trained weights: give --model, too")
    Sampling(guidance=guidance)
    place = choose_device(device)
    on_cpu = place.type == "cpu"
    precisions = precisions or (PRECISIONS if on_cpu else ["bfloat16"])
    modes = (modes or list(MODES)) if place.type == "cuda" else ["eager"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = find_gpt(model) if model else write_random(network, Path(temporary))
        config = StoredGPT(folder, place).config
        bandwidth = measure_bandwidth(place)
        common = Setting(folder=folder, guidance=guidance, repeats=repeats, device=device)
        settings = [
            replace(common, mode=mode, precision=precision, count=count)
            for mode in modes
            for precision in precisions
            for count in counts or ([1, 4] if on_cpu else [1, 64])
        ]
        results = measure_all(settings, bandwidth, apart=place.type != "cuda")
        agreement = compare_folder(folder, tokens, precisions, pictures) if tokens else None
    return {
        "parameters": count_parameters(config)["all"],
        "bandwidth_gb_per_second": round(bandwidth / 1e9, 1),
        "results": results,
        **({"agreement": agreement} if agreement else {}),
        "tokens": {stream.name: stream.length for stream in config.layout.streams},
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else str(place),
        "threads": torch.get_num_threads(),
    }


def measure_all(
    settings: Sequence[Setting], bandwidth: float, *, apart: bool
) -> list[dict[str, Any]]:
    """Figures of each setting, in turn; `apart`: each in a process of its own."""
    results = []
    for setting in settings:
        run = run_apart(measure, setting, bandwidth) if apart else measure(setting, bandwidth)
        results.append(run)
        logger.info("%s", results[-1])
    return results


def find_gpt(model: str | Path) -> Path:
    """The GPT of a model, or the folder itself where it is one of a GPT.

    Raises:
        ModelError: there is no such model.
    """
    folder = find_folder(model)
    return folder / "gpt" if (folder / "gpt").is_dir() else folder


def write_random(config: GPTConfig, folder: Path) -> Path:
    """A GPT folder with the weights that a training starts from."""
    torch.manual_seed(0)
    GPT(config).save_pretrained(folder)
    return folder


def measure_bandwidth(device: torch.device) -> float:
    """Bytes a second that are read of memory, on a CPU by all threads; the best of ten passes."""
    if device.type == "cuda":
        return _measure_card(device)
    numbers = torch.zeros(READ // 4, device=device)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        numbers.sum().item()
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / min(seconds)


def _measure_card(device: torch.device) -> float:
    """The same on a GPU, by its own clock; sums of all numbers and of rows, whichever is faster."""
    numbers = torch.zeros(min(READ_GPU, free_memory(device) // 2) // 2**14, 2**12, device=device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    seconds = []
    for dim in [None, 1] * 10:
        events[0].record()
        for _ in range(4):
            numbers.sum(dim)
        events[1].record()
        events[1].synchronize()
        seconds.append(events[0].elapsed_time(events[1]) / 1000 / 4)
    return numbers.nbytes / min(seconds)


def count_parameters(config: GPTConfig) -> dict[str, int]:
    """Parameters: all, what every step multiplies by on average, and what sampling stores of each.

    A step reads the blocks and the head of its stream; the text head is never read.
    """
    sizes = {name: x.numel() for name, x in build_unfilled(GPT, config).state_dict().items()}
    blocks = sum(size for name, size in sizes.items() if name.startswith("blocks."))
    heads = {stream: sizes[f"heads.{stream.name}.weight"] for stream in config.layout.streams[1:]}
    sampled = sum(stream.length for stream in heads)
    head = sum(stream.length * size for stream, size in heads.items()) // sampled
    return {
        "all": sum(sizes.values()),
        "step": blocks + head,
        "matrices": blocks + sum(heads.values()),
        "embeddings": sum(size for name, size in sizes.items() if name.startswith("embeddings.")),
    }


def measure(setting: Setting, bandwidth: float) -> dict[str, Any]:
    """Speed and memory of one setting; what runs in a fresh process on a CPU."""
    device = choose_device(setting.device)
    if device.type == "cuda":  # leave nothing of the setting before
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    stored = StoredGPT(setting.folder, device)
    decoder = make_decoder(stored, setting.precision)
    prepared = {}
    if isinstance(decoder, CUDADecoder):
        graphs = setting.mode != "eager"
        decoder = CUDADecoder(decoder.gpt, graphs=graphs, kernels=MODES[setting.mode])
        first_run, _ = time_run(decoder, setting, seed=0)
    runs = [time_run(decoder, setting, seed=seed) for seed in range(setting.repeats)]
    sampled = decoder.layout.scene.length + decoder.layout.image.length
    seconds = min(total for total, _ in runs)
    if isinstance(decoder, CUDADecoder):
        prepared = {
            "mode": setting.mode,
            "prepare_seconds": round(first_run - seconds, 2),
        }
    size = count_bytes(setting, stored.config, decoder.dtype)
    return {
        "precision": setting.precision,
        "count": setting.count,
        "guidance": setting.guidance,
        **prepared,
        **({"steps": decoder.mode} if isinstance(decoder, CPUDecoder | CUDADecoder) else {}),
        "tokens_per_second": round(setting.count * sampled / seconds, 1),
        "first_token_seconds": round(runs[0][1], 3),
        "bytes_per_token": size["step"] // setting.count,
        "bandwidth_share": round(size["step"] * sampled / seconds / bandwidth, 3),
        "peak_mb": round(peak_mb(device), 1),
        "peak_limit_mb": round((1.2 * size["weights"] + size["cache"]) / 2**20 + SPARE_MB, 1),
        "weights_mb": round(size["weights"] / 2**20, 1),
        "cache_mb": round(size["cache"] / 2**20, 1),
    }


def count_bytes(setting: Setting, config: GPTConfig, cache_dtype: torch.dtype) -> dict[str, int]:
    """Bytes that a step reads of the matrices, those of all weights, and of the whole cache."""
    parameters = count_parameters(config)
    each = BYTES[setting.precision]
    table = 4 if setting.precision == "float32" else 2  # bytes of a number of the embeddings
    rows = setting.count * (1 if setting.guidance == 1 else 2)
    elements = 2 * config.layers * rows * config.layout.length * config.width
    return {
        "step": each * parameters["step"],
        "weights": each * parameters["matrices"] + table * parameters["embeddings"],
        "cache": elements * torch.finfo(cache_dtype).bits // 8,
    }


def time_run(decoder: Decoder, setting: Setting, *, seed: int) -> tuple[float, float]:
    """Seconds for all tokens, and for the first one; captions of full length, all different."""
    layout = decoder.layout
    times: list[float] = []
    generator = torch.Generator().manual_seed(seed)
    shape = (setting.count, layout.text.length)
    text_BT = torch.randint(1, layout.text.vocabulary, shape, generator=generator)
    sampling = Sampling(guidance=setting.guidance)
    wait = torch.cuda.synchronize if decoder.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()

    def report(*_: Tensor) -> None:
        if not times:
            wait()
            times.append(time.perf_counter())

    generate(
        decoder,
        text_BT,
        seeds=range(setting.count),
        scene=sampling,
        image=sampling,
        on_progress=report,
    )
    wait()
    return time.perf_counter() - start, times[0] - start


def compare_folder(
    folder: Path, tokens: Path, precisions: Sequence[Precision], pictures: int
) -> dict[str, Any]:
    """`compare` for each number format below float32, over the first pictures of token shards."""
    shards = TokenShards(tokens)
    gpt = GPT.from_pretrained(folder)
    rows = [shards[i] for i in range(min(pictures, len(shards)))]
    text, scene, image = (
        torch.from_numpy(np.stack(stream).astype(np.int64))
        for stream in zip(*((texts[0], *others) for texts, *others in rows), strict=True)
    )
    gpt.layout.pack(text, scene, image)
    return {
        precision: compare(gpt, make_decoder(gpt, precision), text, scene, image)
        for precision in precisions
        if precision != "float32"
    }


@torch.inference_mode()
def compare(
    gpt: GPT, decoder: Decoder, text_BT: Tensor, scene_BT: Tensor, image_BT: Tensor
) -> dict[str, dict[str, float]]:
    """How far a decoder's predictions are from the GPT's, for given sequences, per stream.

    The decoder reads them token by token, as it samples. `argmax`: share of positions with the same
    likeliest token; `logits`: mean distance; `perplexity`: relative change.
    """
    results: dict[str, list[Tensor]] = {"scene": [], "image": []}
    for first in range(0, len(text_BT), AT_ONCE):
        rows = slice(first, first + AT_ONCE)
        tokens = Streams(text_BT[rows], scene_BT[rows], image_BT[rows])
        exact, rounded = gpt(*tokens), predict(decoder, tokens)
        for name, entries in results.items():
            a_BTV, b_BTV = getattr(exact, name), getattr(rounded, name)
            targets = getattr(tokens, name).flatten()
            losses = [
                F.cross_entropy(x.flatten(0, 1), targets, reduction="none").double()
                for x in (a_BTV, b_BTV)
            ]
            same = (a_BTV.argmax(-1) == b_BTV.argmax(-1)).flatten().double()
            away = (a_BTV - b_BTV).abs().mean(-1).flatten().double()
            entries.append(torch.stack([same, away, losses[1] - losses[0]]))
    figures = {}
    for name, entries in results.items():
        same, away, change = torch.cat(entries, dim=1).mean(1)
        figures[name] = {
            "argmax": round(same.item(), 4),
            "logits": round(away.item(), 4),
            "perplexity": round(change.expm1().item(), 5),
        }
    return figures


def predict(decoder: Decoder, tokens: Streams) -> Streams:
    """Logits of given scene and image tokens, computed one position after the other."""
    layout = decoder.layout
    sequence_BT = layout.pack(*tokens)
    cache = decoder.new_cache(len(sequence_BT))
    state = decoder.extend(sequence_BT[:, : layout.scene.start], cache=cache, start=0)
    logits: dict[str, list[Tensor]] = {"scene": [], "image": []}
    for position in range(layout.scene.start, layout.length):
        stream = layout.stream_at(position)
        logits[stream.name].append(decoder.head(state, stream).float())
        if position + 1 < layout.length:
            piece_BT = sequence_BT[:, position : position + 1]
            state = decoder.extend(piece_BT, cache=cache, start=position)
    stacked = (torch.stack(entries, dim=1) for entries in logits.values())
    return Streams(torch.empty(0), *stacked)
