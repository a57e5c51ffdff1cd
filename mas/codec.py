"""Scenes and pictures to tokens and back: what a model does around its GPT.

In: scene maps and pictures as people know them, or their tokens. Out: the other. Everything is
decoded one at a time, so that no result depends on the batch around it.
Axes: T tokens, H W pixels, C colours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from mas.model_folder import ModelError
from mas.refiner import Refiner
from mas.request import GivenScene, warn_of_loss
from mas.scene import SceneMap
from mas.sequence import FREE
from mas.vqgan import VQGAN
from mas.vqseg import VQSEG


class Codec:
    """VQ-SEG, VQ-GAN and refiner; `mas.model.MakeAScene` is one."""

    device: torch.device
    vqseg: VQSEG
    vqgan: VQGAN
    refiner: Refiner | None

    def encode_scene(self, scene: SceneMap) -> Tensor:
        """Scene tokens, long 1 T on the CPU; the scene is resized to the model's size."""
        scene = scene.resized(self.vqseg.config.size)
        labels_1HW = torch.from_numpy(scene.labels.copy())[None].to(self.device)
        edges_1HW = torch.from_numpy(scene.edges.copy())[None].to(self.device)
        return self.vqseg.encode(labels_1HW, edges_1HW).cpu()

    def encode_given(self, given: GivenScene) -> Tensor:
        """Scene tokens, long 1 T on the CPU, of a scene of which a part may be the model's.

        Of the ways to fill that part the one is taken by which the rest comes through best.
        """
        tokens_N1T = [self.encode_scene(filled) for filled in given.fillings()]
        shown = self.decode_scenes(torch.cat(tokens_N1T))
        kept = [given.share_kept(scene) for scene in shown]
        best = kept.index(max(kept))
        warn_of_loss(given, shown[best])
        return tokens_N1T[best]

    def encode_mirrored(self, scenes: Sequence[SceneMap]) -> Tensor:
        """Tokens of the mirror images of scenes, long B T on the CPU."""
        return torch.cat([self.encode_scene(scene.mirrored()) for scene in scenes])

    def encode_image(self, image: Image.Image) -> Tensor:
        """Image tokens, long 1 T on the CPU; the picture is resized to the model's size."""
        if image.width != image.height:
            raise ModelError(f"a picture must be square, this one is {image.width}x{image.height}")
        size = self.vqgan.config.size
        resized = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
        pixels_HWC = torch.from_numpy(np.array(resized)).to(self.device)
        image_1CHW = rearrange(pixels_HWC.float() / 255, "h w c -> 1 c h w")
        return self.vqgan.encode(image_1CHW).cpu()

    @torch.inference_mode()
    def decode_scenes(self, tokens_BT: Tensor) -> list[SceneMap]:
        """Scenes of scene tokens, one at a time so that none depends on the batch around it."""
        scenes = []
        for tokens_1T in tokens_BT.to(self.device).split(1):
            labels_1HW, edges_1HW = self.vqseg.decode(tokens_1T)
            scenes.append(SceneMap(labels_1HW[0].cpu().numpy(), edges_1HW[0].cpu().numpy()))
        return scenes

    @torch.inference_mode()
    def decode_images(
        self,
        tokens_BT: Tensor,
        *,
        scenes: Sequence[SceneMap] | None = None,
        kept_T: Tensor | None = None,
    ) -> list[Image.Image]:
        """Pictures of image tokens, one at a time; rounded where the CPU gains by it.

        Args:
            tokens_BT: long.
            scenes: one a picture, square, by which a refiner corrects it; without them none does.
            kept_T: bool, the cells of all pictures that stay as they are decoded.

        Raises:
            ValueError: tokens that the VQ-GAN does not have.
            SceneError: a scene that is not square.
        """
        images = []
        kept_HW = None if kept_T is None else self._enlarge(kept_T.to(self.device))
        for index, tokens_1T in enumerate(tokens_BT.to(self.device).split(1)):
            image_1CHW = self.vqgan.decode(tokens_1T, precision="auto")
            if self.refiner is not None and scenes is not None:
                refined_1CHW = self.refiner.refine(image_1CHW, scenes[index])
                if kept_HW is not None:
                    refined_1CHW = torch.where(kept_HW, image_1CHW, refined_1CHW)
                image_1CHW = refined_1CHW
            pixels_1CHW = (image_1CHW * 255).round().to(torch.uint8)
            images.append(Image.fromarray(rearrange(pixels_1CHW, "1 c h w -> h w c").cpu().numpy()))
        return images

    def decode_preview(
        self,
        scene_BT: Tensor,
        image_BT: Tensor,
        *,
        scene: SceneMap | None,
        kept_T: Tensor | None,
        refine: bool = True,
    ) -> list[Image.Image]:
        """Pictures of both streams' tokens, refined once their scenes are complete.

        Args:
            scene_BT: long, `FREE` where nothing is drawn yet.
            image_BT: long.
            scene: that all of them follow; None: the one of their tokens.
            kept_T: as for `decode_images`.
            refine: whether that is wanted at all.
        """
        wanted = refine and self.refiner is not None
        if not wanted or (scene is None and (scene_BT == FREE).any()):
            return self.decode_images(image_BT)
        scenes = self.decode_scenes(scene_BT) if scene is None else [scene] * len(image_BT)
        return self.decode_images(image_BT, scenes=scenes, kept_T=kept_T)

    def _enlarge(self, cells_T: Tensor) -> Tensor:
        """One number a cell to one a pixel, H W."""
        cells_hw = rearrange(cells_T, "(h w) -> h w", h=self.vqgan.config.grid)
        side = self.vqgan.config.size // self.vqgan.config.grid
        return cells_hw.repeat_interleave(side, 0).repeat_interleave(side, 1)
