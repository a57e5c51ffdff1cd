"""`mas sample`: a caption, and a scene if there is one, to a folder of pictures.

In: caption or file of captions, scene file, model. Out: 0000.png …, 0000.scene.png …, grid.png and
samples.json. The caption and the settings also stand in the text chunks of every PNG. The same
command writes the same PNGs; a command that fails leaves nothing behind.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin
from tqdm import tqdm

import mas
from mas.filter import Sampling, by_stream
from mas.model import Generation, MakeAScene, Progress
from mas.model_folder import ModelError, find_folder
from mas.precision import Precision
from mas.scene import VOID, SceneMap, read_scene
from mas.sheet import contact_sheet
from mas.storage import write_json

SAMPLES = "samples.json"
SHEET = "grid.png"
WRITING = ".writing."  # prefix of the hidden folder that a run fills first
OWN_FILE = re.compile(r"\d{4,}(\.scene)?\.png|grid\.png|samples\.json")
SMALLEST_CELL, LARGEST_CELL = 128, 256  # pixels of a picture in the contact sheet


def sample(
    caption: str | None = None,
    *,
    output: Path,
    scene: Path | None = None,
    fill_void: bool = False,
    prompts: Path | None = None,
    model: str = "park",
    count: int = 4,
    guidance: float | None = None,
    temperature: float | None = None,
    top_k: float | None = None,
    top_p: float | None = None,
    scene_sampling: dict[str, float] | None = None,
    image_sampling: dict[str, float] | None = None,
    seed: int = 0,
    batch: int = 8,
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
        prompts: text file with one caption a line, instead of a caption.
        model: park, a model folder, or a model of the Hugging Face hub.
        count: pictures a caption; picture i has the seed `seed` + i.
        guidance: how much more the caption counts; 1 = as it is, 3-5 = stronger (default: the
            model's, as for the next three).
        temperature: below 1 likelier tokens, above 1 wilder ones, 0 = always the likeliest.
        top_k: keep the k likeliest tokens; below 1 a share of the vocabulary (0.5 = top half).
        top_p: keep the likeliest tokens that together have this probability.
        scene_sampling: the four settings above for the scene only, such as '{"top_p": 0.9}'.
        image_sampling: the same for the picture only.
        seed: of the first picture; the same seed gives the same picture.
        batch: pictures sampled at a time; less needs less memory and changes no picture.
        device: auto, cpu, cuda, …
        precision: of the GPT; auto takes what is best on the device.
    """
    captions = read_captions(caption, prompts, empty_is_fine=scene is not None)
    common = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    by_stream(Sampling(), common, scene=scene_sampling or {}, image=image_sampling or {})
    for name, value in (("count", count), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} is {value}, use 1 or more")
    if fill_void and scene is None:
        raise ValueError("--fill-void fills the void of a scene: give one with --scene")
    layout = None if scene is None else read_square_scene(scene)
    find_folder(model)
    with writing(output) as folder:
        network = MakeAScene.from_pretrained(model, device=device, precision=precision)
        with tqdm(desc="sample", unit=" tokens", disable=None) as bar:
            result = network.generate(
                captions,
                scene=layout,
                scene_free=layout.labels == VOID if layout is not None and fill_void else None,
                count=count,
                guidance=guidance,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                scene_sampling=scene_sampling,
                image_sampling=image_sampling,
                seed=seed,
                batch=batch,
                on_progress=lambda progress: advance(bar, progress),
            )
        write_result(
            folder,
            result,
            model={"name": model, "sha256": network.sha256},
            machine={"device": str(network.device), "precision": network.precision},
        )
    speed = f"{result.seconds:.1f} s, {result.tokens_per_second:.0f} tokens/s"
    plural = "" if len(result.images) == 1 else "s"
    print(f"{output}: {len(result.images)} picture{plural}, {speed}")


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
        lines = prompts.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompts}: not a UTF-8 text file ({error.reason})") from error
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise ValueError(f"{prompts}: holds no caption; write one a line")
    return captions


def read_square_scene(path: Path) -> SceneMap:
    scene = read_scene(path)
    if scene.size[0] != scene.size[1]:
        width, height = scene.size
        raise ValueError(f"{path}: a scene must be square, this one is {width}x{height}; crop it")
    return scene


def advance(bar: tqdm, progress: Progress) -> None:
    bar.total = progress.total
    bar.update(progress.done - bar.n)


@contextmanager
def writing(output: Path) -> Iterator[Path]:
    """Hands out a hidden folder; what lies in it replaces the samples in `output` at the end.

    Raises:
        ModelError: `output` is a file or holds anything that is not of this command.
        OSError: `output` cannot be written.
    """
    existed = output.exists()
    if existed and not output.is_dir():
        raise ModelError(f"{output}: is a file; choose a folder")
    old = sorted(output.iterdir()) if existed else []
    killed = [path for path in old if path.name.startswith(WRITING)]  # left by a run that was
    old = [path for path in old if path not in killed]
    foreign = [path.name for path in old if not OWN_FILE.fullmatch(path.name)]
    if foreign or (old and not killed and not (output / SAMPLES).is_file()):
        name = foreign[0] if foreign else old[0].name
        raise ModelError(f"{output}: holds something else ({name}); choose a new folder")
    made = [path for path in (output, *output.parents) if not path.exists()]
    output.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=output, prefix=WRITING) as temporary:
            yield Path(temporary)
            for path in killed:
                shutil.rmtree(path)
            for path in old:
                path.unlink()
            for path in sorted(Path(temporary).iterdir()):
                path.replace(output / path.name)
    except BaseException:
        if made:
            shutil.rmtree(made[-1])
        raise


def write_result(
    folder: Path, result: Generation, *, model: dict[str, Any], machine: dict[str, str]
) -> None:
    """Writes pictures, scenes, contact sheet and samples.json."""
    origin = {"settings": result.settings, "model": model["sha256"]}
    pictures = []
    for i, (image, scene) in enumerate(zip(result.images, result.scenes, strict=True)):
        about = {"caption": result.captions[i], "seed": result.seeds[i]}
        image.save(folder / f"{i:04}.png", pnginfo=png_text(about | origin))
        scene.to_png(folder / f"{i:04}.scene.png")
        pictures.append({"image": f"{i:04}.png", "scene": f"{i:04}.scene.png", **about})
    captions = list(dict.fromkeys(result.captions))
    about = {"caption": "; ".join(captions), "seed": result.seeds[0]}
    draw_sheet(result).save(folder / SHEET, pnginfo=png_text(about | origin))
    write_json(
        folder / SAMPLES,
        {
            "caption": captions[0] if len(captions) == 1 else captions,
            "seed": result.seeds[0],
            "settings": result.settings,
            "model": model,
            **machine,
            "version": mas.__version__,
            "seconds": round(result.seconds, 3),
            "tokens_per_second": round(result.tokens_per_second, 1),
            "pictures": pictures,
        },
    )


def draw_sheet(result: Generation) -> Image.Image:
    """One row a picture: caption, scene in palette colours with edges, picture."""
    cell = min(max(result.images[0].width, SMALLEST_CELL), LARGEST_CELL)
    rows = [
        (f"{caption or '(no caption)'}\n\nseed {seed}", scene.to_rgb(edges=True), image)
        for caption, seed, scene, image in zip(
            result.captions, result.seeds, result.scenes, result.images, strict=True
        )
    ]
    return contact_sheet(rows, cell=cell, header=("caption", "scene", "picture"))


def png_text(content: dict[str, Any]) -> PngImagePlugin.PngInfo:
    """Text chunks: texts as they are, everything else as JSON; nothing that varies by run."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in content.items():
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        chunks.add_itxt(key, text)
    return chunks
