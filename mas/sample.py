"""`mas sample`: a caption, and a scene if there is one, to a folder of pictures.

In: caption or file of captions, scene file, picture to complete, model. Out: 0000.png …,
0000.scene.png …, grid.png and samples.json. The caption and the settings also stand in the text
chunks of every PNG. The same command writes the same PNGs; a command that fails leaves nothing of
its own behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, PngImagePlugin
from tqdm import tqdm

import mas
from mas.filter import StreamSampling, by_stream
from mas.model import Generation, MakeAScene
from mas.model_folder import ModelError, find_folder
from mas.precision import Precision
from mas.progress import Progress
from mas.rerank import CLIP, Clip, check_rerank
from mas.rerank import rerank as rerank_pictures
from mas.scene import MAX_PIXELS, VOID, SceneMap, read_scene
from mas.sheet import contact_sheet
from mas.storage import write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SAMPLES = "samples.json"
SHEET = "grid.png"
OPAQUE = 255  # alpha of a pixel that is given
WRITING = ".writing."  # prefix of the hidden folder that a run fills first
LOCK = f"{WRITING}lock"  # file in the output folder that a run holds as long as it lasts
OWN_FILE = re.compile(r"\d{4,}(\.scene)?\.png|grid\.png|samples\.json")
SMALLEST_CELL, LARGEST_CELL = 128, 256  # pixels of a picture in the contact sheet
MOST_ROWS = 400  # of it; larger ones are more than Pillow opens without a warning


def sample(
    caption: str | None = None,
    *,
    output: Path,
    scene: Path | None = None,
    fill_void: bool = False,
    image: Path | None = None,
    prompts: Path | None = None,
    model: str = "park",
    count: int = 4,
    rerank: Literal["clip"] | None = None,
    keep: int | None = None,
    clip: str = CLIP,
    guidance: float | None = None,
    temperature: float | None = None,
    top_k: float | None = None,
    top_p: float | None = None,
    scene_sampling: dict[str, float] | None = None,
    image_sampling: dict[str, float] | None = None,
    scene_candidates: int | None = None,
    refine: bool = True,
    seed: int = 0,
    batch: int = 16,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Generates pictures from a caption, a scene, or both.

    Args:
        caption: what to paint; may be left out where a scene is given.
        output: folder for the pictures: new, empty, or written by this command before.
        scene: layout to follow, square: scene PNG, grey PNG of ids, image in palette colours, or
            COCO panoptic PNG with its JSON beside it.
        fill_void: the model invents what is void (black, transparent) in the scene.
        image: square PNG or WebP of which a part is given: the model paints what is transparent.
        prompts: text file with one caption a line, instead of a caption.
        model: park, a model folder, or a model of the Hugging Face hub.
        count: pictures a caption; picture i has the seed `seed` + i.
        rerank: clip: order the pictures of each caption by how well they fit it.
        keep: with rerank: write only the best so many of the `count` pictures a caption.
        clip: which CLIP: a folder, or a hub id that was downloaded before; needs the extra eval.
        guidance: how much more the caption counts; 1 = as it is, 3-5 = stronger (default: the
            model's, which may differ for scene and picture; as for the next three).
        temperature: below 1 likelier tokens, above 1 wilder ones, 0 = always the likeliest.
        top_k: keep the k likeliest tokens; below 1 a share of the vocabulary (0.5 = top half).
        top_p: keep the likeliest tokens that together have this probability.
        scene_sampling: the four settings above for the scene only, such as '{"top_p": 0.9}'.
        image_sampling: the same for the picture only.
        scene_candidates: scenes drawn for a picture, of which the model's judge keeps the one that
            fits the caption best; 1 = no choice (default: the model's).
        refine: correct pictures by their scenes where the model has a refiner; false leaves them as
            the VQ-GAN decodes them.
        seed: of the first picture; the same seed gives the same picture.
        batch: pictures sampled at a time; less needs less memory and changes no picture.
        device: auto, cpu, cuda, …
        precision: of the GPT; auto takes what is best on the device.
    """
    captions = read_captions(caption, prompts, empty_is_fine=bool(scene or image))
    knobs: dict[str, Any] = {
        "count": count,
        "guidance": guidance,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "scene_sampling": scene_sampling,
        "image_sampling": image_sampling,
        "scene_candidates": scene_candidates,
        "refine": refine,
        "seed": seed,
        "batch": batch,
    }
    check_knobs(knobs)
    check_choice(captions, rerank, count=count, keep=keep)
    given = read_given(scene, image, fill_void=fill_void)
    find_folder(model)
    with writing(output) as folder:
        judge = None if rerank is None else Clip.from_pretrained(clip, device=device)
        network = MakeAScene.from_pretrained(model, device=device, precision=precision)
        result = paint(network, captions, given, knobs)
        about = describe_model(network, model)
        dropped = None
        if judge is not None:
            result, dropped = rerank_pictures(result, judge, keep=keep)
            about["rerank"] = {"by": rerank, "model": clip, "keep": keep or count}
        write_result(folder, result, about=about, dropped=dropped)
    speed = f"{result.seconds:.1f} s, {result.tokens_per_second:.0f} tokens/s"
    plural = "" if len(result.images) == 1 else "s"
    print(f"{output}: {len(result.images)} picture{plural}, {speed}")


@dataclass(frozen=True, kw_only=True)
class Given:
    """A file of which a part is given, and what was read of it."""

    path: Path
    content: SceneMap | Image.Image  # square
    free_HW: np.ndarray | None  # bool: what the model fills; None: nothing

    def check_side(self, grid: int) -> None:
        """Refuses what is too small to say which tokens of a `grid` x `grid` are given."""
        side = grid if self.free_HW is None else len(self.free_HW)
        if side < grid:
            raise ValueError(
                f"{self.path}: {side}x{side} pixels are too few, use {grid}x{grid} or more"
            )


def read_given(
    scene: Path | None, image: Path | None, *, fill_void: bool
) -> dict[Literal["scene", "image"], Given]:
    """What is given besides captions, by the stream that it is of.

    Raises:
        ValueError: a file that does not hold it, or void to fill in no scene.
    """
    given: dict[Literal["scene", "image"], Given] = {}
    if fill_void and scene is None:
        raise ValueError("--fill-void fills the void of a scene: give one with --scene")
    if scene is not None:
        layout = read_square_scene(scene)
        free_HW = layout.labels == VOID if fill_void else None
        given["scene"] = Given(path=scene, content=layout, free_HW=free_HW)
    if image is not None:
        picture, free_HW = read_picture(image)
        given["image"] = Given(path=image, content=picture, free_HW=free_HW)
    return given


def paint(
    network: MakeAScene,
    captions: list[str],
    given: dict[Literal["scene", "image"], Given],
    knobs: dict[str, Any],
) -> Generation:
    """Pictures of all captions, under a progress bar; `knobs` are arguments of `generate`."""
    conditions: dict[str, Any] = {}
    for name, tokenizer in (("scene", network.vqseg), ("image", network.vqgan)):
        if name in given:
            given[name].check_side(tokenizer.config.grid)
            conditions |= {name: given[name].content, f"{name}_free": given[name].free_HW}
    with tqdm(desc="sample", unit=" tokens", disable=None) as bar:
        return network.generate(
            captions, **conditions, **knobs, on_progress=lambda progress: advance(bar, progress)
        )


def check_knobs(knobs: dict[str, Any]) -> None:
    """Refuses what no model can do, before one is loaded; ValueError names the flag."""
    common = {name: knobs[name] for name in ("guidance", "temperature", "top_k", "top_p")}
    own = {stream: knobs[f"{stream}_sampling"] or {} for stream in ("scene", "image")}
    by_stream(StreamSampling(), common, **own)
    for name in ("count", "batch", "scene_candidates"):
        value = knobs[name]
        if value is not None and value < 1:
            raise ValueError(f"{name.replace('_', '-')} is {value}, use 1 or more")


def read_captions(caption: str | None, prompts: Path | None, *, empty_is_fine: bool) -> list[str]:
    """The captions to paint.

    Raises:
        ValueError: none, two sources, or a file that is no UTF-8 text with captions.
    """
    if prompts is None:
        text = " ".join((caption or "").split())
        if not text and not empty_is_fine:
            raise ValueError("the caption is empty: say what to paint, or give a --scene")
        return [text]
    if caption is not None:
        raise ValueError("give a caption or --prompts, not both")
    try:
        lines = prompts.read_text("utf-8-sig").splitlines()  # a BOM may begin it
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompts}: not a UTF-8 text file ({error.reason})") from error
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise ValueError(f"{prompts}: holds no caption; write one a line")
    return captions


def check_choice(captions: list[str], rerank: str | None, *, count: int, keep: int | None) -> None:
    if rerank is not None:
        check_rerank(captions, count=count, keep=keep)
    elif keep is not None:
        raise ValueError("--keep keeps the best by --rerank: give that too, or a smaller --count")


def read_square_scene(path: Path) -> SceneMap:
    scene = read_scene(path)
    if scene.size[0] != scene.size[1]:
        width, height = scene.size
        raise ValueError(f"{path}: a scene must be square, this one is {width}x{height}; crop it")
    return scene


def read_picture(path: Path) -> tuple[Image.Image, np.ndarray]:
    """A picture of which a part is given, and where it is not: bool H W.

    Raises:
        ValueError: no readable square PNG or WebP with a transparent part; names the file.
    """
    try:
        image = Image.open(path, formats=["PNG", "WEBP"])
        if image.width * image.height > MAX_PIXELS:
            raise ModelError(f"{path}: {image.width}x{image.height} is too large")
        bands_HWC = np.asarray(image.convert("RGBA"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except ModelError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable PNG or WebP ({error})") from error
    if image.width != image.height:
        raise ValueError(
            f"{path}: a picture must be square, this one is {image.width}x{image.height}; crop it"
        )
    free_HW = bands_HWC[..., 3] < OPAQUE
    if not free_HW.any():
        raise ValueError(f"{path}: nothing is left to paint; make the part to paint transparent")
    return Image.fromarray(bands_HWC[..., :3].copy()), free_HW


def advance(bar: tqdm, progress: Progress) -> None:
    bar.total = progress.total
    bar.update(progress.done - bar.n)


@contextmanager
def writing(output: Path) -> Iterator[Path]:
    """Hands out a hidden folder; what lies in it replaces the samples in `output` at the end.

    A run that fails takes this folder with it, and those made for it that nobody else uses.

    Raises:
        ModelError: `output` is a file, holds anything that is not of this command, or is being
            written by another run.
        OSError: `output` cannot be written.
    """
    check_output(output)
    made = [path for path in (output, *output.parents) if not path.exists()]
    output.mkdir(parents=True, exist_ok=True)
    try:
        with alone(output), tempfile.TemporaryDirectory(dir=output, prefix=WRITING) as temporary:
            yield Path(temporary)
            replace_samples(output, Path(temporary))
    except BaseException:
        with suppress(OSError):  # others have put something there
            for path in made:
                path.rmdir()
        raise


def check_output(output: Path) -> None:
    """Refuses a folder in which there is anything that `mas sample` did not write."""
    if not output.exists():
        return
    if not output.is_dir():
        raise ModelError(f"{output}: is a file; choose a folder")
    names = sorted(path.name for path in output.iterdir())
    others = [name for name in names if not name.startswith(WRITING)]
    foreign = [name for name in others if not OWN_FILE.fullmatch(name)]
    half_written = len(others) < len(names)  # by a run that was killed
    if foreign or (others and not half_written and SAMPLES not in others):
        name = foreign[0] if foreign else others[0]
        raise ModelError(f"{output}: holds something else ({name}); choose a new folder")


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Keeps other runs out of a folder; what hidden ones lie there then was left by killed runs.

    Without locks, as on Windows, nobody is kept out.
    """
    if fcntl is None:
        yield
        return
    path = output / LOCK
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.fstat(file.fileno()).st_nlink > 0  # else its run has ended this moment
        except BlockingIOError:
            free = False
        except OSError:  # a file system without locks
            free = True
        if not free:
            raise ModelError(f"{output}: another run is writing there; choose another folder")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def replace_samples(output: Path, finished: Path) -> None:
    """Clears away older samples and what killed runs left, then moves the finished ones there."""
    for path in sorted(output.iterdir()):
        if path.name.startswith(WRITING) and path.name != finished.name and path.is_dir():
            shutil.rmtree(path)
        elif OWN_FILE.fullmatch(path.name):
            path.unlink()
    for path in sorted(finished.iterdir()):
        path.replace(output / path.name)


def write_result(
    folder: Path,
    result: Generation,
    *,
    about: dict[str, Any],
    dropped: Generation | None = None,
) -> None:
    """Writes pictures, scenes, contact sheet and samples.json.

    Args:
        folder: is empty.
        result: the pictures to write.
        about: what samples.json says of model and machine.
        dropped: candidates of which only seed and score are noted.
    """
    origin = {"settings": result.settings, "model": about["model"]["sha256"]}
    pictures = []
    for i, (image, scene) in enumerate(zip(result.images, result.scenes, strict=True)):
        files = {"image": f"{i:04}.png", "scene": f"{i:04}.scene.png"}
        image.save(folder / files["image"], pnginfo=png_text(describe(result, i) | origin))
        scene.to_png(folder / files["scene"])
        pictures.append(files | describe(result, i))
    captions = list(dict.fromkeys(result.captions))
    first_seed = min(result.seeds + (dropped.seeds if dropped else []))
    text = png_text({"caption": "; ".join(captions), "seed": first_seed} | origin)
    draw_sheet(result).save(folder / SHEET, pnginfo=text)
    content = {
        "caption": captions[0] if len(captions) == 1 else captions,
        "seed": first_seed,
        "settings": result.settings,
        **about,
        "version": mas.__version__,
        "seconds": round(result.seconds, 3),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "pictures": pictures,
    }
    if dropped is not None:
        content["dropped"] = [describe(dropped, i) for i in range(len(dropped.images))]
    write_json(folder / SAMPLES, content)


def describe_model(network: MakeAScene, name: str) -> dict[str, Any]:
    """What samples.json says of model and machine."""
    return {
        "model": {"name": name, "sha256": network.sha256},
        "device": str(network.device),
        "precision": network.precision,
    }


def describe(result: Generation, i: int) -> dict[str, Any]:
    """What picture i was made from, and its score where there is one."""
    about: dict[str, Any] = {"caption": result.captions[i], "seed": result.seeds[i]}
    return about if result.scores is None else about | {"score": round(result.scores[i], 5)}


def draw_sheet(result: Generation) -> Image.Image:
    """A row a picture, of the first: caption, scene in palette colours with edges, picture."""
    cell = min(max(result.images[0].width, SMALLEST_CELL), LARGEST_CELL)
    rows = []
    shown = zip(result.images[:MOST_ROWS], result.scenes[:MOST_ROWS], strict=True)
    for i, (image, scene) in enumerate(shown):
        text = f"{result.captions[i] or '(no caption)'}\n\nseed {result.seeds[i]}"
        if result.scores is not None:
            text += f"\nscore {result.scores[i]:.3f}"
        rows.append((text, scene.to_rgb(edges=True), image))
    return contact_sheet(rows, cell=cell, header=("caption", "scene", "picture"))


def png_text(content: dict[str, Any]) -> PngImagePlugin.PngInfo:
    """Text chunks: texts as they are, everything else as JSON; nothing that varies by run."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in content.items():
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        chunks.add_itxt(key, text)
    return chunks
