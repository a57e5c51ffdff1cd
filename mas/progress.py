"""What a generation shows while it runs: the scene once it is predicted, the picture row by row.

In: the sequences so far. Out: scenes and partial pictures, decoded only when somebody asks; whoever
shows them asks when there is something new.
Axes: B pictures, T tokens, H W grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from mas.scene import SceneMap
from mas.sequence import FREE, Layout

UNPAINTED = "grey"


@dataclass(frozen=True, kw_only=True)
class Decoders:
    """Tokens to scenes and pictures."""

    scenes: Callable[[Tensor], list[SceneMap]]
    images: Callable[[Tensor, Tensor], list[Image.Image]]  # of tokens of scenes and pictures


@dataclass(frozen=True, kw_only=True, eq=False)
class Progress:
    """The state of a generation after a step."""

    first: int  # index of the first picture of the batch at work
    done: int  # tokens sampled, of all pictures
    total: int  # tokens to sample
    scene_BT: Tensor  # scene tokens of the batch, FREE where not yet sampled
    image_BT: Tensor  # likewise image tokens
    grid: int  # image tokens a side
    rows: int  # rows of image tokens that are complete in every picture, from the top
    new_scene: bool  # this step completed the scenes, or they were given
    new_rows: int  # rows this step completed, those given in advance included
    decoders: Decoders

    def scenes(self) -> list[SceneMap] | None:
        """The scenes of the batch; None until all of them are complete."""
        if (self.scene_BT == FREE).any():
            return None
        return self.decoders.scenes(self.scene_BT)

    def images(self) -> list[Image.Image] | None:
        """The pictures of the batch down to the last complete row of tokens, grey below.

        None until there is such a row. Each call decodes: ask only when there is something new.
        """
        rows = self.rows
        if rows == 0:
            return None
        tokens_BHW = rearrange(self.image_BT, "b (h w) -> b h w", h=self.grid)
        # The network needs a full grid: the rows to come repeat the last one and are greyed after.
        filled_BHW = tokens_BHW.clone()
        filled_BHW[:, rows:] = tokens_BHW[:, rows - 1 : rows]
        filled_BT = rearrange(filled_BHW, "b h w -> b (h w)")
        pictures = self.decoders.images(self.scene_BT, filled_BT)
        for picture in pictures:
            top = rows * picture.height // self.grid
            picture.paste(UNPAINTED, (0, top, picture.width, picture.height))
        return pictures


@dataclass
class Tally:
    """Tokens of a whole call, counted by the reporters of all its batches."""

    total: int  # to sample
    done: int = 0  # sampled


class Reporter:
    """Turns the steps of one batch into `Progress` for the caller."""

    def __init__(
        self,
        tell: Callable[[Progress], None],
        layout: Layout,
        decoders: Decoders,
        *,
        first: int,
        tally: Tally,
    ) -> None:
        self.tell, self.layout, self.decoders = tell, layout, decoders
        self.first, self.tally = first, tally
        self.scene_shown, self.rows_shown = False, 0
        self.left_BT: Tensor | None = None  # what is given, FREE where nothing is filled yet
        self.places: Iterator[int] = iter(())

    def __call__(self, given_BT: Tensor, tokens_BT: Tensor) -> None:
        # Each step fills the next position that is free anywhere. Looking at the tokens would tell
        # the same, but wait for the device that computes them.
        if self.left_BT is None:
            self.left_BT = given_BT.cpu().clone()
            self.places = iter((self.left_BT == FREE).any(0).nonzero()[:, 0].tolist())
        place_B = self.left_BT[:, next(self.places)]
        self.tally.done += int((place_B == FREE).sum())
        place_B.clamp_(min=0)
        _, scene_BT, image_BT = self.layout.unpack(tokens_BT)
        _, scene_left_BT, image_left_BT = self.layout.unpack(self.left_BT)
        grid = self.layout.image_grid
        rows = complete_rows(image_left_BT, grid)
        scene_complete = not (scene_left_BT == FREE).any()
        self.tell(
            Progress(
                first=self.first,
                done=self.tally.done,
                total=self.tally.total,
                scene_BT=scene_BT,
                image_BT=image_BT,
                grid=grid,
                rows=rows,
                new_scene=scene_complete and not self.scene_shown,
                new_rows=rows - self.rows_shown,
                decoders=self.decoders,
            )
        )
        self.scene_shown, self.rows_shown = scene_complete, rows


def hide(progress: Progress) -> Progress:
    """The same count while nothing is settled yet: candidates are no results."""
    return replace(
        progress,
        scene_BT=torch.full_like(progress.scene_BT, FREE),
        image_BT=torch.full_like(progress.image_BT, FREE),
        rows=0,
        new_scene=False,
        new_rows=0,
    )


def complete_rows(image_BT: Tensor, grid: int) -> int:
    """Rows of image tokens, from the top, that are complete in every picture."""
    tokens_BHW = rearrange(image_BT, "b (h w) -> b h w", h=grid)
    return int((tokens_BHW != FREE).all(2).all(0).long().cumprod(0).sum())
