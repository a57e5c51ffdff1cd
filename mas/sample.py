"""`mas sample`: a caption, and a scene if there is one, to a folder of pictures.

In: caption or file of captions, scene file, picture to complete, model. Out: 0000.png …,
0000.scene.png …, grid.png and samples.json. The caption and the settings also stand in the text
chunks of every PNG. The same command writes the same PNGs, also when it was interrupted: it goes on
after the last stretch that was finished.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

import mas
from mas.filter import StreamSampling, by_stream
from mas.model import MakeAScene
from mas.model_folder import ModelError, find_folder
from mas.picture_file import why_no_picture
from mas.precision import Precision
from mas.progress import Progress
from mas.request import Generation, check_seed
from mas.rerank import CLIP, Clip, check_rerank
from mas.rerank import rerank as rerank_pictures
from mas.sample_folder import Run, writing
from mas.scene import MAX_PIXELS, VOID, SceneMap, read_scene
from mas.scene_files import FEWER_PIXELS, upright

OPAQUE = 255  # alpha of a pixel that is given
STRETCH = 8  # batches, at most, that are painted before their pictures are kept


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
    negative_prompt: str = "",
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
        keep: with rerank: how many of the `count` pictures of a caption are written, the best.
        clip: which CLIP: a folder, or a hub id that was downloaded before; needs the extra eval.
        negative_prompt: what not to paint: guidance moves away from it.
        guidance: how much more the caption counts; 1 = as it is, 3-5 = stronger (default: the
            model's, which may differ for scene and picture; as for the next three).
        temperature: below 1 likelier tokens, above 1 wilder ones, 0 = always the likeliest.
        top_k: keep the k likeliest tokens; below 1 a share of the vocabulary (0.5 = top half).
        top_p: keep the likeliest tokens that together have this probability.
        scene_sampling: the four settings above for the scene only: --scene-sampling.top-p 0.9, or
            all at once as '{"top_p": 0.9}'.
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
        "negative_prompt": negative_prompt,
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
    with writing(output) as run:
        judge = None if rerank is None else Clip.from_pretrained(clip, device=device)
        network = MakeAScene.from_pretrained(model, device=device, precision=precision)
        about = describe_model(network, model)
        if judge is not None:
            about["rerank"] = {"by": rerank, "model": clip, "keep": keep or count}
        run.begin(captions=captions, **decisive(knobs, given, judge), **about)
        whole = judge is not None
        painting = paint(network, captions, given, knobs, first=run.sampled, whole=whole)
        with closing(painting):
            write_pictures(run, painting, about=about, judge=judge, keep=keep)
        done = run.finish(about=about)
    plural = "" if run.written == 1 else "s"
    speed = f"{done['seconds']:.1f} s, {done['tokens_per_second']:.0f} tokens/s"
    print(f"{output}: {run.written} picture{plural}, {speed}")


@dataclass(frozen=True, kw_only=True)
class Given:
    """A file of which a part is given, and what was read of it."""

    path: Path
    content: SceneMap | Image.Image  # square
    free_HW: np.ndarray | None  # bool: what the model fills; None: nothing

    @property
    def digest(self) -> str:
        """Of what is given, whatever file it came from."""
        if isinstance(self.content, SceneMap):
            parts = [self.content.labels, self.content.edges]
        else:
            parts = [np.asarray(self.content)]
        parts += [] if self.free_HW is None else [self.free_HW]
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

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


def decisive(
    knobs: dict[str, Any], given: dict[Literal["scene", "image"], Given], judge: Clip | None
) -> dict[str, Any]:
    """What decides about pictures besides their captions and the model."""
    what = {name: value for name, value in knobs.items() if name != "batch"}
    what |= {f"given_{name}": some.digest for name, some in given.items()}
    if judge is not None:
        what["clip"] = judge.digest
    return what | {"version": mas.__version__}


def write_pictures(
    run: Run,
    painting: Iterator[Generation],
    *,
    about: dict[str, Any],
    judge: Clip | None,
    keep: int | None,
) -> None:
    """Writes pictures as they are painted; of each caption the best where there is a judge."""
    for result in painting:
        dropped = None
        if judge is not None:
            result, dropped = rerank_pictures(result, judge, keep=keep)
        run.add(result, about=about, dropped=dropped)
        del result, dropped  # before the next ones are painted


def paint(
    network: MakeAScene,
    captions: list[str],
    given: dict[Literal["scene", "image"], Given],
    knobs: dict[str, Any],
    *,
    first: int = 0,
    whole: bool = False,
) -> Generator[Generation, None, None]:
    """Pictures of all captions, a stretch at a time, under a progress bar.

    Args:
        network: the model.
        captions: what to paint.
        given: what is given besides.
        knobs: arguments of `MakeAScene.generate`.
        first: pictures that are there already.
        whole: whether all pictures of a caption are to come together.
    """
    conditions: dict[str, Any] = {}
    for name, tokenizer in (("scene", network.vqseg), ("image", network.vqgan)):
        if name in given:
            given[name].check_side(tokenizer.config.grid)
            conditions |= {name: given[name].content, f"{name}_free": given[name].free_HW}
    total = len(captions) * knobs["count"]
    with said_once(), tqdm(desc="sample", unit=" tokens", disable=None) as bar:
        texts = [*captions, *filter(None, [knobs["negative_prompt"]])]
        network.tokenizer.encode(texts)  # says of all that are too long, not of some
        while first < total:
            part = next_stretch(captions, knobs, first=first, whole=whole)
            tell = partial(advance, bar, first=first, pictures=part.pictures, total=total)
            options = conditions | knobs | {"seed": part.seed, "count": part.count}
            yield network.generate(part.captions, **options, on_progress=tell)
            first += part.pictures


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """All pictures of some captions, or some of one; they are painted and then kept together."""

    captions: list[str]
    seed: int  # of the first picture of each
    count: int  # pictures of each

    @property
    def pictures(self) -> int:
        return len(self.captions) * self.count


def next_stretch(captions: list[str], knobs: dict[str, Any], *, first: int, whole: bool) -> Stretch:
    """A few batches of pictures from number `first` on; more only where a caption's stay whole."""
    count, seed, batch = knobs["count"], knobs["seed"], knobs["batch"]
    caption, done = divmod(first, count)
    most = STRETCH * batch
    if done or (count > most and not whole):
        chosen, left = captions[caption : caption + 1], min(count - done, most)
        return Stretch(captions=chosen, seed=seed + done, count=left)
    # Of as many captions as leave the least of the last batch empty.
    many = max(range(1, max(1, most // count) + 1), key=lambda n: (-(-n * count % batch) / n, n))
    return Stretch(captions=captions[caption : caption + many], seed=seed, count=count)


@contextmanager
def said_once() -> Iterator[None]:
    """Every stretch would warn of the same things: only the first may."""
    once, loggers = Once(), [logging.getLogger(name) for name in ("mas.text", "mas.request")]
    for logger in loggers:
        logger.addFilter(once)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(once)


class Once(logging.Filter):
    """Passes the first message of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = record.msg not in self.said
        self.said.add(record.msg)
        return new


def advance(bar: tqdm, progress: Progress, *, first: int, pictures: int, total: int) -> None:
    """Moves the bar of a whole run by what a stretch of it tells.

    Args:
        bar: counts the tokens of all pictures.
        progress: of the stretch.
        first: pictures before it.
        pictures: of its own.
        total: of the run.
    """
    each = progress.total // pictures
    if bar.total is None:
        bar.initial = bar.n = bar.last_print_n = first * each  # else its speed counts them
        bar.total = total * each
    bar.update(first * each + progress.done - bar.n)


def check_knobs(knobs: dict[str, Any]) -> None:
    """Refuses what no model can do, before one is loaded; ValueError names the flag."""
    common = {name: knobs[name] for name in ("guidance", "temperature", "top_k", "top_p")}
    own = {stream: knobs[f"{stream}_sampling"] or {} for stream in ("scene", "image")}
    by_stream(StreamSampling(), common, **own)
    for name in ("count", "batch", "scene_candidates"):
        value = knobs[name]
        if value is not None and value < 1:
            raise ValueError(f"{name.replace('_', '-')} is {value}, use 1 or more")
    check_seed(knobs["seed"], pictures=knobs["count"])


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
        # A BOM may begin it. Ends of lines are read as one sign, and no other sign ends a line.
        lines = prompts.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompts}: not a UTF-8 text file ({error.reason})") from error
    captions = [" ".join(line.split()) for line in lines if line.strip()]
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
    """A picture of which a part is given, upright by EXIF, and where it is not: bool H W.

    Raises:
        ValueError: no readable square PNG or WebP with a transparent part; names the file.
    """
    try:
        image = Image.open(path, formats=["PNG", "WEBP"])
        if image.width * image.height > MAX_PIXELS:
            size = f"{image.width}x{image.height}"
            raise ModelError(f"{path}: {size} is too large, {FEWER_PIXELS}")
        bands_HWC = np.asarray(upright(image).convert("RGBA"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except ModelError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        why = why_no_picture(path, error, wanted="PNG or WebP")
        raise ValueError(f"{path}: {why}") from error
    if image.width != image.height:
        raise ValueError(
            f"{path}: a picture must be square, this one is {image.width}x{image.height}; crop it"
        )
    free_HW = bands_HWC[..., 3] < OPAQUE
    if not free_HW.any():
        raise ValueError(f"{path}: nothing is left to paint; make the part to paint transparent")
    return Image.fromarray(bands_HWC[..., :3].copy()), free_HW


def describe_model(network: MakeAScene, name: str) -> dict[str, Any]:
    """What samples.json says of model and machine."""
    return {
        "model": {"name": name, "sha256": network.sha256},
        "device": str(network.device),
        "precision": network.precision,
    }
