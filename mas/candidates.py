"""Several scenes for a caption, of which the judge keeps one: best of N before anything is painted.

In: captions, and scene tokens of which some are free. Out: complete scene tokens. Candidate 0 of a
picture is the scene its seed alone would give; the others have seeds made from it. Where a caption
says left or right, each candidate's mirror image is one more: mirrored, a scene with everything on
the wrong side is as good as any, and costs no sampling.
Axes: B pictures, K candidates of a picture, R candidates of all, T tokens.
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
from mas.sequence import FREE


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
    sided_B: Sequence[bool],
    candidates: int,
    sampling: Sampling,
    batch: int,
    decode: Callable[[Tensor], list[SceneMap]],
    encode_mirrored: Callable[[Sequence[SceneMap]], Tensor],
    negative_1T: Tensor | None = None,
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
        sided_B: whether left and right matter to a picture's caption. Its candidates are joined by
            their mirror images, unless some of its scene is given, which has its side already.
        candidates: scenes drawn for a picture.
        sampling: of the scene tokens.
        batch: sequences at a time.
        decode: of scene tokens, K T, to scenes.
        encode_mirrored: of scenes to the tokens of their mirror images, K T.
        negative_1T: text tokens that guidance moves away from; None: those of the empty caption.
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
            negative_1T=negative_1T,
            scene_only=True,
            on_progress=watch and watch(),
        ).scene
        for start in range(0, len(rows_seeds), batch)
    ]
    groups = list(torch.cat(drawn).split(candidates))  # of K T
    scenes = [decode(group_KT) for group_KT in groups]
    free_B = (scene_BT == FREE).all(1).tolist()
    for i, (sided, free) in enumerate(zip(sided_B, free_B, strict=True)):
        if sided and free:
            mirrored_KT = encode_mirrored(scenes[i])
            groups[i] = torch.cat([groups[i], mirrored_KT.to(groups[i].device)])
            scenes[i] += decode(mirrored_KT)  # as the picture would show them
    best = judge.choose(text_BT.to(groups[0].device), scenes)
    return torch.stack([group_KT[choice] for group_KT, choice in zip(groups, best, strict=True)])
