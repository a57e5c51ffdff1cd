"""Several scenes for a caption, of which the judge keeps one: best of N before anything is painted.

In: captions, and scene tokens of which some are free. Out: complete scene tokens. Candidate 0 of a
picture is the scene its seed alone would give; the others have seeds made from it.
Axes: B pictures, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mas.filter import Sampling
from mas.generate import Decoder, Report, generate
from mas.judge import SceneJudge
from mas.scene import SceneMap


def candidate_seed(seed: int, number: int) -> int:
    """Seed of a picture's candidate `number`; the picture's own for number 0."""
    if number == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits, as seeds have


def choose_scenes(
    decoder: Decoder,
    judge: SceneJudge,
    text_BT: Tensor,
    scene_BT: Tensor,
    *,
    seeds: Sequence[int],
    candidates: int,
    sampling: Sampling,
    batch: int,
    decode: Callable[[Tensor], list[SceneMap]],
    watch: Callable[[], Report] | None = None,
) -> Tensor:
    """The scene tokens, long B T, of the candidate that fits its caption best.

    Picture i depends on row i and seed i alone.

    Args:
        decoder: the GPT.
        judge: on the decoder's device.
        text_BT: text tokens.
        scene_BT: given scene tokens, `FREE` where the GPT shall choose.
        seeds: one a picture.
        candidates: scenes a picture.
        sampling: of the scene tokens.
        batch: sequences at a time.
        decode: of scene tokens to scenes.
        watch: makes what is called after every step of a batch.
    """
    rows_text, rows_scene = (x.repeat_interleave(candidates, dim=0) for x in (text_BT, scene_BT))
    rows_seeds = [candidate_seed(seed, number) for seed in seeds for number in range(candidates)]
    drawn = [
        generate(
            decoder,
            rows_text[start : start + batch],
            seeds=rows_seeds[start : start + batch],
            scene_BT=rows_scene[start : start + batch],
            scene=sampling,
            image=sampling,
            scene_only=True,
            on_progress=watch and watch(),
        ).scene
        for start in range(0, len(rows_seeds), batch)
    ]
    drawn_RT = torch.cat(drawn)
    scenes = decode(drawn_RT)
    groups = [scenes[i : i + candidates] for i in range(0, len(scenes), candidates)]
    best = judge.choose(text_BT.to(drawn_RT.device), groups)
    return drawn_RT[[i * candidates + choice for i, choice in enumerate(best)]]
