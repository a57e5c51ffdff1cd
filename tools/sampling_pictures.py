"""The pictures of docs/sampling.md: one figure a knob, all made by one model.

    python tools/sampling_pictures.py --model park

In: a model, and a few pictures of the park world it has not seen, which this script draws itself.
Out: docs/pictures/sampling/*.jpg. The same model on the same machine makes the same files. Cost:
about 100 pictures.
"""

import argparse
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from plain_errors import run_tool
from tqdm import tqdm

from mas import MakeAScene, SceneMap
from mas.candidates import candidate_seed
from mas.judge import describe_scenes
from mas.scene import CLASS_NAMES
from mas.shards import expand_shards, read_shard
from mas.sheet import contact_sheet
from mas.text import names_side

OUTPUT = Path(__file__).parent.parent / "docs/pictures/sampling"
CAPTION = "two dogs and a red ball in the park"
OVERVIEW = (
    "the elephant is walking around in the park",
    "a blue car on the street at night",
    "two sheep on the farm in the morning",
    "a woman with a yellow umbrella on the beach",
    "a giraffe in the snow",
    "a pink elephant in the mountains at sunset",
)
SWEPT = ("two dogs and a red ball in the park", "a woman with a yellow umbrella on the beach")
CHOSEN = (
    "two birds on the farm in the morning",
    "a white dog to the left of a red car on the street",
)
APART = "a dog in the park"
DRAWN = 4  # candidates of a caption
CELL = 128  # pixels
LARGEST = 150_000  # bytes of a file
UNSEEN = 4711  # seed of a park world that no training uses
SHOWN = 2  # seed of the overview, the best of six
FREE = (150, 150, 150)  # what is left to the model, in the figures
CHANGES = {"dog": "sheep", "cat": "dog", "horse": "cow", "cow": "horse", "sheep": "dog"}
GROUNDS = ("grass-merged", "snow", "sand", "road", "dirt-merged", "pavement-merged")


@dataclass(frozen=True)
class Given:
    """A picture of the park world: what somebody could bring along."""

    caption: str
    scene: SceneMap
    photo: Image.Image


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pictures of docs/sampling.md.")
    parser.add_argument("--model", default="park", help="park, a model folder or a hub id")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the figures")
    parser.add_argument("--only", choices=FIGURES, help="make one figure only")
    options = parser.parse_args()
    model = MakeAScene.from_pretrained(options.model)
    given = bring_along(model.vqseg.config.size)
    options.output.mkdir(parents=True, exist_ok=True)
    names = [options.only] if options.only else list(FIGURES)
    needed = {"candidates": model.judge, "refined": model.refiner}  # what a figure needs
    names = [name for name in names if needed.get(name, model) is not None]
    for name in tqdm(names, desc="figures"):
        save(FIGURES[name](model, given), options.output / f"{name}.jpg")


def bring_along(size: int) -> Given:
    """The first unseen picture with an animal that the figures know how to exchange."""
    with tempfile.TemporaryDirectory() as folder:
        park, scenes = f"{folder}/park", f"{folder}/scenes"
        sizes = [f"--photo.size={size}", f"--photo.decode_side={size}", "--executor=serial"]
        config = Path(__file__).parent.parent / "configs/preprocess/park.yaml"
        for command in (
            ["park", "--count=100", f"--size={size}", f"--seed={UNSEEN}", f"--output={park}"],
            ["preprocess", f"--config={config}", f"--input={park}", f"--output={scenes}", *sizes],
        ):
            words = [sys.executable, "-m", "mas", *command]
            result = subprocess.run(words, capture_output=True, text=True)
            if result.returncode:
                raise SystemExit(result.stderr)
        for sample in read_shard(expand_shards(scenes)[0]):
            scene = SceneMap.from_png(io.BytesIO(sample.files["scene.png"]))
            if len({CLASS_NAMES[i] for i in np.unique(scene.labels)} & set(CHANGES)) == 1:
                photo = Image.open(io.BytesIO(sample.files["jpg"])).convert("RGB")
                return Given(sample.files["txt"].decode(), scene, photo)
    raise SystemExit("no picture of the park world suits the figures")


def overview(model: MakeAScene, given: Given) -> Image.Image:
    """Six captions, the scenes predicted for them, the pictures of these scenes."""
    out = model.generate(OVERVIEW, seed=SHOWN)
    scenes = [colours(scene) for scene in out.scenes]
    return contact_sheet([OVERVIEW, scenes, out.images], cell=CELL)


def ways(model: MakeAScene, given: Given) -> Image.Image:
    """Every way to steer, side by side."""
    half, right = right_half(given.scene.size[0])
    columns = {
        "caption": ("nothing", {"caption": given.caption}),
        "+ scene": (colours(given.scene), {"caption": given.caption, "scene": given.scene}),
        "scene alone": (colours(given.scene), {"caption": "", "scene": given.scene}),
        "+ half a scene": (
            hide(colours(given.scene), half),
            {"caption": given.caption, "scene": given.scene, "scene_free": right},
        ),
        "+ half a picture": (
            hide(given.photo, half),
            {"caption": given.caption, "image": given.photo, "image_free": right},
        ),
    }
    made = [model.generate(**arguments, count=3).images for _, arguments in columns.values()]
    top = [f"given: {given.caption}", *(shown for shown, _ in columns.values())]
    rows = [[f"seed {seed}", *pictures] for seed, pictures in enumerate(zip(*made, strict=True))]
    return contact_sheet([top, *rows], cell=CELL, header=("", *columns))


def edited(model: MakeAScene, given: Given) -> Image.Image:
    """A scene and what becomes of the picture when somebody paints in it."""
    labels = given.scene.labels
    old = next(name for name in CHANGES if (labels == CLASS_NAMES.index(name)).any())
    ground = max(GROUNDS, key=lambda name: int((labels == CLASS_NAMES.index(name)).sum()))
    other = "sand" if ground == "snow" else "snow"
    scenes = {
        "as it is": given.scene,
        "mirrored": SceneMap.from_labels(labels[:, ::-1].copy()),
        f"{old} to {CHANGES[old]}": replaced(given.scene, old, CHANGES[old]),
        f"no {old}": replaced(given.scene, old, ground),
        f"{ground.removesuffix('-merged')} to {other}": replaced(given.scene, ground, other),
    }
    made = [model.generate("", scene=scene, count=3).images for scene in scenes.values()]
    rows = [
        [colours(scene) for scene in scenes.values()],
        *(list(pictures) for pictures in zip(*made, strict=True)),
    ]
    return contact_sheet(rows, cell=CELL, header=list(scenes))


def partial(model: MakeAScene, given: Given) -> Image.Image:
    """One half of a scene is given, the other half is invented four times."""
    half, right = right_half(given.scene.size[0])
    out = model.generate(given.caption, scene=given.scene, scene_free=right, count=4)
    rows = [
        [hide(colours(given.scene), half), *(colours(scene) for scene in out.scenes)],
        [given.caption, *out.images],
    ]
    return contact_sheet(rows, cell=CELL, header=("given", *(f"seed {seed}" for seed in out.seeds)))


def completed(model: MakeAScene, given: Given) -> Image.Image:
    """One half of a picture is given, the other painted four times, without and with its scene."""
    half, right = right_half(given.photo.width)
    rows = []
    for scene in (None, given.scene):
        out = model.generate(
            given.caption, scene=scene, image=given.photo, image_free=right, count=4
        )
        shown = "no scene" if scene is None else colours(scene)
        rows.append([hide(given.photo, half), shown, *out.images])
    seeds = [f"seed {seed}" for seed in out.seeds]
    return contact_sheet(rows, cell=CELL, header=("given picture", "given scene", *seeds))


def seeds(model: MakeAScene, given: Given) -> Image.Image:
    """Six seeds of one caption."""
    out = model.generate(CAPTION, count=6)
    rows = [[CAPTION, *map(colours, out.scenes)], ["", *out.images]]
    return contact_sheet(rows, cell=CELL, header=("", *(f"seed {seed}" for seed in out.seeds)))


def negative(model: MakeAScene, given: Given) -> Image.Image:
    """Pictures of one caption, and of the same seeds away from what some of them show."""
    rows: list[list[Image.Image | str]] = []
    for text in ("", "at night", "at sunset", f"{APART} at night"):
        out = model.generate(APART, count=6, negative_prompt=text)
        rows.append([f"not:\n{text}" if text else APART, *out.images])
    return contact_sheet(rows, cell=CELL, header=("", *(f"seed {seed}" for seed in range(6))))


def candidates(model: MakeAScene, given: Given) -> Image.Image:
    """Four scenes of each caption, what the judge says of them, and their pictures.

    Those of a caption that names a side are followed by their mirror images.
    """
    assert model.judge is not None
    rows: list[list[Image.Image | str]] = []
    for caption in CHOSEN:
        own = [candidate_seed(0, number) for number in range(DRAWN)]
        made = [model.generate(caption, seed=seed, scene_candidates=1) for seed in own]
        if names_side(caption):
            turned = [out.scenes[0].mirrored() for out in made]
            pairs = zip(own, turned, strict=True)
            made += [model.generate(caption, seed=seed, scene=scene) for seed, scene in pairs]
        scenes = model.decode_scenes(torch.cat([out.tokens.scene for out in made]))
        described = torch.from_numpy(describe_scenes(scenes))[None].to(model.device)
        words = model.tokenizer.encode([caption]).to(model.device)
        scores = model.judge(words, described)[0].tolist()
        said = [
            f"{number % DRAWN}: {score:+.1f}{'  kept' if score == max(scores) else ''}"
            for number, score in enumerate(scores)
        ]
        for start in range(0, len(made), DRAWN):
            name = "mirrored, scores" if start else "scores"
            now = slice(start, start + DRAWN)
            rows.append(["" if start else caption, *map(colours, scenes[now])])
            rows.append(["\n".join([name, *said[now]]), *(out.images[0] for out in made[now])])
    return contact_sheet(rows, cell=CELL, header=("", *(f"candidate {k}" for k in range(DRAWN))))


def refined(model: MakeAScene, given: Given) -> Image.Image:
    """The pictures of six captions as the VQ-GAN decodes them, and by their scenes."""
    out = model.generate(OVERVIEW, seed=SHOWN)
    decoded = model.decode_images(out.tokens.image)
    rows = [list(map(colours, out.scenes)), decoded, out.images]
    said = ("scene", "as decoded", "refined")
    return contact_sheet([[name, *row] for name, row in zip(said, rows, strict=True)], cell=CELL)


def guidance(model: MakeAScene, given: Given) -> Image.Image:
    values = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0)
    return sweep(model, {f"guidance {value:g}": {"guidance": value} for value in values})


def temperature(model: MakeAScene, given: Given) -> Image.Image:
    values = (0.0, 0.5, 0.8, 1.0, 1.2, 1.5)
    columns = {f"temperature {value:g}": {"temperature": value, "top_p": 1.0} for value in values}
    return sweep(model, columns)


def filters(model: MakeAScene, given: Given) -> Image.Image:
    columns: dict[str, dict[str, Any]] = {
        "everything": {"top_p": 1.0},
        "top-k 0.5 (top half)": {"top_k": 0.5, "top_p": 1.0},
        "top-k 50": {"top_k": 50, "top_p": 1.0},
        "top-k 5": {"top_k": 5, "top_p": 1.0},
        "top-p 0.95": {"top_p": 0.95},
        "top-p 0.7": {"top_p": 0.7},
    }
    return sweep(model, {name: {"temperature": 1.0, **knobs} for name, knobs in columns.items()})


def streaming(model: MakeAScene, given: Given) -> Image.Image:
    """What `on_progress` delivers: the scene, then the picture four times as it grows."""
    grid = model.gpt.layout.image_grid
    shown: dict[str, Image.Image] = {}

    def watch(progress):
        scenes = progress.scenes() if progress.new_scene else None
        if scenes:
            shown[f"{progress.done} tokens: scene"] = colours(scenes[0])
        if progress.new_rows and progress.rows % (grid // 4) == 0:
            shown[f"{progress.done}: {progress.rows} rows"] = progress.images()[0]

    model.generate(CAPTION, on_progress=watch)
    return contact_sheet([list(shown.values())], cell=CELL, header=list(shown))


def sweep(model: MakeAScene, columns: dict[str, dict[str, Any]]) -> Image.Image:
    """The same two captions and seeds under each setting, without choice: scene above picture."""
    made = [model.generate(SWEPT, scene_candidates=1, **knobs) for knobs in columns.values()]
    rows: list[list[Image.Image | str]] = []
    for i, caption in enumerate(SWEPT):
        rows.append([caption, *(colours(out.scenes[i]) for out in made)])
        rows.append(["", *(out.images[i] for out in made)])
    return contact_sheet(rows, cell=CELL, header=("", *columns))


def colours(scene: SceneMap) -> Image.Image:
    return scene.to_rgb(edges=True)


def right_half(side: int) -> tuple[tuple[int, int, int, int], np.ndarray]:
    """The right half of a picture as a box and as a mask."""
    mask_HW = np.zeros((side, side), np.bool_)
    mask_HW[:, side // 2 :] = True
    return (side // 2, 0, side, side), mask_HW


def hide(picture: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    hidden = picture.copy()
    hidden.paste(FREE, box)
    return hidden


def replaced(scene: SceneMap, old: str, new: str) -> SceneMap:
    """Gives every pixel of one class to another."""
    labels = scene.labels.copy()
    labels[labels == CLASS_NAMES.index(old)] = CLASS_NAMES.index(new)
    return SceneMap.from_labels(labels)


def save(figure: Image.Image, path: Path) -> None:
    """Writes a JPEG of at most `LARGEST` bytes, as good as fits."""
    for quality in (92, 88, 84, 80, 75, 70, 60):
        buffer = io.BytesIO()
        figure.save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
        if buffer.tell() <= LARGEST:
            break
    else:
        raise SystemExit(f"{path}: {buffer.tell()} bytes are too many")
    path.write_bytes(buffer.getvalue())


FIGURES: dict[str, Callable[[MakeAScene, Given], Image.Image]] = {
    function.__name__: function
    for function in (
        overview,
        ways,
        edited,
        partial,
        completed,
        seeds,
        negative,
        candidates,
        refined,
        guidance,
        temperature,
        filters,
        streaming,
    )
}


if __name__ == "__main__":
    run_tool(main)
