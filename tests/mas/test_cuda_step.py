"""mas/step.cu on a CPU: step_emulator.h runs every one of its threads."""

import bisect
import ctypes
import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mas.cuda_blocks import epsilon_of
from mas.cuda_decoder import CUDADecoder
from mas.cuda_step import Processors, Step, sizes
from mas.gpt import GPT, GPTConfig
from tests.mas.test_cuda_decoder import CONFIG as SMALL
from tests.mas.test_cuda_decoder import build

HERE = Path(__file__).parent
WIDE = {"layers": 2, "width": 64, "heads": 2}
CONFIG = dataclasses.replace(SMALL, **WIDE)
RAGGED = {"width": 96, "heads": 3, "gated": True}  # nothing divides by 7 programs
ALL = {"qk_norm": True, "gated": True, "rotary": True}
FLAGS = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC"]
EPSILONS = (1e-5, 1.1920928955078125e-07)
HOPPER = Processors(132, 232448, copy_engine=True)
AMPERE = Processors(108, 166912, copy_engine=False)


def test_the_published_size_fits_and_larger_ones_do_not():
    base = sizes(GPTConfig(), rows=2, processors=HOPPER, epsilons=EPSILONS)
    assert (base["PROGRAMS"], base["LENGTH"], base["NORM_EPSILON"]) == (128, 576, "1e-05f")
    assert sizes(GPTConfig(), rows=8, processors=HOPPER, epsilons=EPSILONS) is not None
    assert sizes(GPTConfig(), rows=2, processors=AMPERE, epsilons=EPSILONS) is None
    billion = GPTConfig(layers=24, width=1792, heads=28)
    many = dataclasses.replace(CONFIG, width=1024, heads=32)
    for config, rows, processors in (
        (billion, 2, HOPPER),  # too much of a block for a program
        (GPTConfig(), 2, HOPPER._replace(shared_bytes=101376)),  # too little memory for it
        (CONFIG, 9, HOPPER),  # more rows than the tensor cores take at once
        (many, 8, HOPPER),  # fewer programs than heads of all rows
        (dataclasses.replace(CONFIG, width=96), 2, HOPPER),  # head width 48
        (dataclasses.replace(CONFIG, width=80), 2, HOPPER),  # not whole chunks
        (dataclasses.replace(CONFIG, image_grid=64), 2, HOPPER._replace(number=8)),  # many keys
        (CONFIG, 3, HOPPER._replace(number=7)),  # fewer programs than heads of all rows
        (dataclasses.replace(CONFIG, width=1024, heads=4), 4, HOPPER._replace(number=16)),
    ):
        assert sizes(config, rows=rows, processors=processors, epsilons=EPSILONS) is None
    assert sizes(CONFIG, rows=8, processors=HOPPER, epsilons=EPSILONS) is not None
    assert sizes(many, rows=4, processors=HOPPER, epsilons=EPSILONS) is not None


class Emulated:
    """Stands for a kernel on a GPU."""

    def __init__(self, folder, defines):
        compiler = shutil.which("c++") or pytest.skip("needs a C++ compiler")
        options = [f"-D{name}={value}" for name, value in ({"LATE": 0} | defines).items()]
        library = folder / "step.so"
        subprocess.run(
            [compiler, *FLAGS, *options, "-o", library, HERE / "step_emulator.cpp"], check=True
        )
        loaded = ctypes.CDLL(library)
        self.run = loaded.emulate
        self.scratch_words = ctypes.c_int.in_dll(loaded, "scratch_words").value

    def launch(self, programs, tensors):
        self.run(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors))


@pytest.mark.parametrize(
    ("config", "rows", "device"),
    [
        (GPTConfig(), 2, HOPPER),
        (GPTConfig(), 8, HOPPER),
        (GPTConfig(**ALL), 2, HOPPER),
        (dataclasses.replace(CONFIG, **RAGGED), 2, AMPERE),
    ],
    ids=["base", "base, eight rows", "all", "ragged"],
)
def test_the_least_shared_memory_that_is_taken_for_enough_is_enough(config, rows, device, tmp_path):
    def defines(shared_bytes):
        limited = device._replace(shared_bytes=shared_bytes)
        return sizes(config, rows=rows, processors=limited, epsilons=EPSILONS)

    limit = device.shared_bytes
    least = bisect.bisect_left(range(limit), True, key=lambda n: defines(n) is not None)
    assert least < limit
    Emulated(tmp_path, defines(least))  # does not compile where two slots do not fit


def error(a, b):
    return ((a.float() - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("options", "rows", "programs", "device", "extra"),
    [
        ({}, 2, 4, HOPPER, {"LATE": 1}),
        ({}, 1, 8, HOPPER, {}),
        ({"gated": True}, 3, 8, AMPERE, {"LATE": 1}),
        (ALL, 2, 4, AMPERE, {}),
        (ALL, 8, 16, HOPPER, {"SHARED_LIMIT": 34000}),
        (RAGGED, 2, 7, HOPPER, {"LATE": 1}),
    ],
    ids=["default", "one row", "gated", "all", "eight rows, two slots", "ragged"],
)
@torch.inference_mode()
def test_a_step_is_nearer_to_the_exact_gpt_than_pytorchs(
    options, rows, programs, device, extra, tmp_path, monkeypatch
):
    gpt = build(**WIDE | options).bfloat16()
    exact, decoder = GPT(gpt.config).eval(), CUDADecoder(gpt)
    exact.load_state_dict({name: x.float() for name, x in gpt.state_dict().items()})
    layout = gpt.layout
    sequence_RT = torch.cat(
        [torch.randint(1, s.vocabulary, (rows, s.length)) for s in layout.streams], dim=1
    )
    epsilons = (epsilon_of(decoder.norm), EPSILONS[1])
    device = device._replace(number=max(programs, 8))
    defines = sizes(gpt.config, rows=rows, processors=device, epsilons=epsilons)
    defines |= {"PROGRAMS": programs} | extra
    kernel = Emulated(tmp_path, defines)
    monkeypatch.setattr("mas.cuda_step._compile", lambda *_: kernel)
    caches = [decoder.new_cache(rows), decoder.new_cache(rows)]
    step = Step(
        defines,
        decoder.layers,
        caches[0],
        norm=decoder.norm,
        positions_TD=decoder.positions_TD,
        rotation=decoder.rotation,
    )
    ours, theirs = [], []
    # A few tokens after the caption, whose keys and values the next one needs; and the last.
    for position in (6, 7, 8, layout.length - 1):
        if position not in (7, 8):
            exact_cache = exact.new_cache(rows)
            exact.extend(sequence_RT[:, :position], cache=exact_cache, start=0)
            for cache in caches:
                cache.copy_rows(exact_cache, list(range(rows)), length=position)
        stream, place = layout.stream_at(position), torch.tensor([position])
        tokens_R = sequence_RT[:, position]
        expected = exact.extend(tokens_R[:, None], cache=exact_cache, start=position)
        ours.append(error(step.read(tokens_R, place, decoder.embeddings[stream.name]), expected))
        assert place.item() == position + 1
        place.fill_(position)
        read = decoder.read(tokens_R, place, stream, cache=caches[1], keys=layout.length)
        assert place.item() == position + 1
        theirs.append(error(read, expected))
    assert sum(ours) < sum(theirs) and max(ours) < 0.02
    assert step.counts.tolist() == [len(ours) * programs] * 2
