"""`make demo-train` and `make smoke-photos`: from data to pictures with a tiny model trained here.

In: nothing (the park world), or a folder of real photos in shards with COCO panoptic annotations.
Out: OUTPUT/index.html, which shows for every stage what went in, what came out, how long it took
and the command that did it. A finished step is not run again as long as its command is the same.
"""

import argparse
from pathlib import Path

from demo_page import Demo, Picture, Step, shard_cards
from PIL import Image
from plain_errors import run_tool

from mas.scene import SceneMap
from mas.shards import expand_shards, read_shard
from mas.sheet import contact_sheet

INTRO = (
    "A caption goes in; the model first predicts the scene (which thing is where), then the "
    "picture. Everything on this page was made by the commands it shows, in this order. The "
    "networks are tiny and trained for minutes, so the pictures are rough; look at how they "
    "follow the scene."
)
# A model trained for minutes is unsure: stay near what it believes, and insist on the caption.
SAMPLING = ("--guidance", "5", "--temperature", "0.8", "--top-p", "0.9")
CAPTIONS = (
    "the elephant is walking around in the park",
    "two dogs and a red ball in the park",
    "a woman with a yellow umbrella on the beach at sunset",
    "a blue car on the street at night",
)


def first_scenes(folder: Path, shards: str, count: int) -> list[Path]:
    """Copies the first `count` scene PNGs (and photos) of the shards out, as a person would."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for sample in read_shard(expand_shards(shards)[0]):
        path = folder / f"{sample.key}.scene.png"
        path.write_bytes(sample.files["scene.png"])
        path.with_name(f"{sample.key}.jpg").write_bytes(sample.files["jpg"])
        path.with_name(f"{sample.key}.txt").write_bytes(sample.files["txt"])
        paths.append(path)
        if len(paths) == count:
            return paths
    return paths


def show_training(folder: Path) -> list[Picture]:
    """The last picture sheet of a run folder; the GPT's trainer draws none."""
    sheets = sorted((folder / "pictures").glob("*.png"))[-1:]
    return [Picture(f"held-out pictures after {int(s.stem)} steps", s) for s in sheets]


def park_source(output: Path, options: argparse.Namespace) -> list[Step]:
    """Steps that make scene shards of the park world; the second set is never trained on."""
    steps = []
    for name, title, text, seed, count in (
        ("park", "Draw the park world", "Pictures, captions and exact annotations, drawn by a "
         "program: data that needs no download.", 0, options.count),
        ("unseen", "Draw a few more", "Another seed: scenes no network below has seen.", 1, 8),
    ):  # fmt: skip
        shards, scenes = output / name, output / f"{name}-scenes"
        steps.append(
            Step(
                title=title,
                text=text,
                command=["park", "--output", str(shards), "--count", str(count),
                         "--seed", str(seed), "--size", str(options.size),
                         "--shard-size", "500"],
                cards=lambda shards=shards: shard_cards(shards, 4),
            )
        )  # fmt: skip
        steps.append(
            Step(
                title="Preprocess on Ray",
                text="Photo shards in, scene shards out: panoptic segments, human parts and faces "
                "merged into one scene map.",
                command=["preprocess", "--config", "configs/preprocess/park.yaml",
                         "--photo.size", str(options.size), "--workers", "2",
                         "--input", str(shards), "--output", str(scenes)],
                cards=lambda scenes=scenes: shard_cards(scenes, 2),
            )
        )  # fmt: skip
    return steps


def photo_source(output: Path, options: argparse.Namespace) -> list[Step]:
    """The step that makes scene shards of real photos with COCO panoptic annotations."""
    scenes = output / "park-scenes"
    return [
        Step(
            title="Preprocess on Ray",
            text="Real photos and COCO's panoptic annotations in, scene shards out.",
            command=["preprocess", "--config", "configs/preprocess/coco-sample.yaml",
                     "--panoptic.json", str(options.photos / "panoptic_train.json"),
                     "--panoptic.folder", str(options.photos / "panoptic/train"),
                     "--photo.size", str(options.size), "--workers", "2",
                     "--input", str(options.photos / "train"), "--output", str(scenes)],
            cards=lambda: shard_cards(scenes, 4),
        )
    ]  # fmt: skip


def train_step(stage: str, title: str, text: str, data: Path, options: argparse.Namespace) -> Step:
    folder = options.output / stage
    overrides = []
    if options.steps:
        steps = str(options.steps)
        overrides = ["--trainer.max_steps", steps, "--trainer.val_check_interval", steps]
    if options.photos:
        overrides += ["--data.holdout", "10"]
    if stage == "gpt":
        overrides += ["--model.network.text_vocabulary", str(options.vocab_size)]
    return Step(
        title=title,
        text=text,
        command=["train", stage, "--config", f"configs/tiny/{stage}.yaml",
                 "--data.input", str(data), "--trainer.default_root_dir", str(folder),
                 "--ckpt_path", "auto", *overrides],
        pictures=lambda: show_training(folder),
        curves=folder / "metrics.csv",
    )  # fmt: skip


def training_steps(scenes: Path, options: argparse.Namespace) -> list[Step]:
    """Scene shards → tokenizers → tokens → GPT → model folder."""
    output = options.output
    parts = [word for name in ("vqseg", "vqgan") for word in (f"--{name}", str(output / name))]
    tokenizer = ["--tokenizer", str(output / "tokenizer.json")]
    return [
        Step(
            title="Inspect",
            text="What the scene shards look like, and which classes they hold.",
            command=["inspect", str(scenes), "--output", str(output / "inspect.png"),
                     "--count", "6"],
            pictures=lambda: [Picture("", output / "inspect.png")],
        ),
        Step(
            title="Fit the text tokenizer",
            text="Byte-level BPE on every caption of the shards.",
            command=["fit-bpe", "--input", str(scenes), "--length", "32",
                     "--vocab-size", str(options.vocab_size),
                     "--output", str(output / "tokenizer.json")],
        ),
        train_step("vqseg", "Train VQ-SEG", "Scene maps ↔ a few discrete tokens: which thing is "
                   "where, and the edges.", scenes, options),
        train_step("vqgan", "Train the VQ-GAN", "Pictures ↔ tokens. The full system uses a "
                   "published one.", scenes, options),
        Step(
            title="Tokenize",
            text="Every caption, scene and picture becomes tokens: plain .npy files.",
            command=["tokenize", "--input", str(scenes), "--output", str(output / "tokens"),
                     *parts, *tokenizer],
        ),
        train_step("gpt", "Train the GPT", "One transformer over [text | scene | image]: it "
                   "predicts the scene, then the picture.", output / "tokens", options),
        Step(
            title="Assemble",
            text="Tokenizers and GPT become one model folder.",
            command=["assemble", *tokenizer, *parts, "--gpt", str(output / "gpt"), *SAMPLING,
                     "--output", str(output / "model")],
        ),
    ]  # fmt: skip


def sampling_steps(scenes: Path, options: argparse.Namespace) -> list[Step]:
    """Captions alone, captions with scenes nobody trained on, the same scene in other words."""
    model = ["--model", str(options.output / "model")]
    samples = options.output / "samples"
    steps = [
        Step(
            title="Sample: a caption",
            text="Only a sentence goes in: the model predicts the scene, then paints it.",
            command=["sample", caption, *model, "--count", "4", "--seed", "1",
                     "--output", str(samples / f"caption-{i}")],
            pictures=lambda i=i: [Picture("", samples / f"caption-{i}" / "grid.png")],
        )
        for i, caption in enumerate(options.captions)
    ]  # fmt: skip
    for i, scene in enumerate(first_scenes(options.output / "given", str(scenes), 3)):
        photo = scene.with_name(scene.name.replace(".scene.png", ".jpg"))
        caption = scene.with_name(scene.name.replace(".scene.png", ".txt")).read_text().strip()
        folder = samples / f"scene-{i}"
        steps.append(
            Step(
                title="Sample: a caption and a scene",
                text="The scene is given: the pictures keep its layout.",
                command=["sample", caption, "--scene", str(scene), *model, "--count", "4",
                         "--seed", "1", "--output", str(folder)],
                pictures=lambda photo=photo, scene=scene, folder=folder: [
                    Picture("", given_and_made(photo, scene, folder))
                ],
            )
        )  # fmt: skip
    return steps


def given_and_made(photo: Path, scene: Path, folder: Path) -> Image.Image:
    """The scene that was given, the picture it comes from, and what the model painted."""
    made = sorted(p for p in folder.glob("0*.png") if ".scene" not in p.name)
    row = [SceneMap.from_png(scene).to_rgb(edges=True), *map(Image.open, [photo, *made])]
    header = ["given scene", "where it comes from", *(f"painted {i + 1}" for i in range(len(made)))]
    return contact_sheet([row], cell=144, header=header)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to fill")
    parser.add_argument("--count", type=int, default=4000, help="pictures of the park world")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--photos", type=Path, help="folder of real photos in the form of COCO")
    parser.add_argument("--steps", type=int, help="optimiser steps of each training")
    options = parser.parse_args(arguments)
    options.captions, options.vocab_size = CAPTIONS, 512
    if options.photos:
        if not (options.photos / "panoptic_train.json").is_file():
            parser.error(f"{options.photos} holds no panoptic_train.json (make … DATA=DIR)")
        # A few dozen captions do not fill 512 entries, and nothing needs long training here.
        options.captions, options.vocab_size = CAPTIONS[:1], 300
        options.steps = options.steps or 150
    return options


def main() -> None:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    demo = Demo(options.output)
    scenes = options.output / "park-scenes"
    source = (photo_source if options.photos else park_source)(options.output, options)
    for step in [*source, *training_steps(scenes, options)]:
        demo.run(step)
    given = scenes if options.photos else options.output / "unseen-scenes"
    for step in sampling_steps(given, options):
        demo.run(step)
    page = demo.write_page("mini Make-A-Scene, trained here", INTRO)
    print(f"\nOpen {page}")


if __name__ == "__main__":
    run_tool(main)
