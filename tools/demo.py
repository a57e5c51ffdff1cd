"""`make demo` and `make demo-model`: the pipeline on a little data, then a trained model paints.

In: nothing but the model. Out: OUTPUT/index.html. Every step is a command of `mas`; a finished step
is not run again as long as its command is the same.
"""

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from demo_page import Card, Demo, Picture, Step, sample_cards, shard_cards
from PIL import Image, ImageDraw

from mas.model import MakeAScene
from mas.model_folder import INDEX, ModelError, find_folder
from mas.scene import CLASS_NAMES, PALETTE, SceneMap
from mas.shards import TokenShards, expand_shards, read_shard
from mas.storage import read_json

INTRO = (
    "A sentence goes in. The model first decides which thing is where: the scene. Then it paints "
    "the picture. Whoever draws the scene decides the layout."
)
CAPTIONS = (
    "the elephant is walking around in the park",
    "two brown dogs and a red ball on the beach at sunset",
    "a woman with a yellow umbrella on the beach",
    "a blue car on the street at night",
    "three sheep on the farm in the morning",
    "a giraffe in the snow",
)
OTHER_WORDS = (
    "a grey elephant {} on a sunny day",
    "a pink elephant {} at sunset",
    "a blue elephant {} at night",
)
WHERE = {
    "park": "in the park", "beach": "on the beach", "street": "on the street",
    "snow": "in the snow", "mountains": "in the mountains", "farm": "on the farm",
}  # fmt: skip
SEEDS_OF = "an orange cat and a green bench in the park"
DRAWN = "a red bus and a white dog on the street at sunset"
ELEPHANT = "elephant"
SIDE = 256  # pixels of what is drawn by hand


def pipeline_steps(output: Path, *, model: str, size: int, count: int) -> list[Step]:
    """Nothing → photo shards → scene shards → token shards, with the model's tokenizers."""
    folder = find_folder(model)
    shards, scenes, tokens = (output / name for name in ("park", "scenes", "tokens"))
    return [
        Step(
            title="A world to learn from",
            text="The park world draws pictures, captions and exact annotations by itself: data "
            "that needs no download. The model has seen none of these.",
            command=["park", "--output", str(shards), "--count", str(count), "--seed", "4242",
                     "--size", str(size), "--shard-size", str(-(-count // 2))],
            cards=lambda: shard_cards(shards, 4),
        ),
        Step(
            title="Photos become scenes",
            text="On Ray, shard by shard: what every pixel shows (133 classes), the parts of "
            "people and of faces, merged into one scene map with edges between things.",
            command=["preprocess", "--config", "configs/preprocess/park.yaml",
                     "--photo.size", str(size), "--workers", "2",
                     "--input", str(shards), "--output", str(scenes)],
            cards=lambda: shard_cards(scenes, 2),
        ),
        Step(
            title="Everything becomes tokens",
            text="A caption, its scene and its picture become three short rows of numbers, which "
            "are all that the model ever sees. Turned back, they show what survives.",
            command=["tokenize", "--input", str(scenes), "--output", str(tokens),
                     "--vqseg", str(folder / "vqseg"), "--vqgan", str(folder / "vqgan"),
                     "--tokenizer", str(folder / "tokenizer.json")],
            cards=lambda: token_cards(scenes, tokens, model, 2),
        ),
    ]  # fmt: skip


def token_cards(scenes: Path, tokens: Path, model: str, count: int) -> list[Card]:
    """The first pictures of a shard, and what their tokens decode to."""
    network = MakeAScene.from_pretrained(model)
    cards = []
    for i, sample in zip(range(count), read_shard(expand_shards(str(scenes))[0]), strict=False):
        _, scene_T, image_T = TokenShards(tokens)[i]
        scene_1T, image_1T = (torch.from_numpy(np.int64(row))[None] for row in (scene_T, image_T))
        after = network.decode_scenes(scene_1T)[0], network.decode_images(image_1T)[0]
        pictures = [
            Picture("picture", Image.open(io.BytesIO(sample.files["jpg"]))),
            Picture(f"from {len(scene_T)} scene tokens", after[0].to_rgb(edges=True)),
            Picture(f"from {len(image_T)} image tokens", after[1]),
        ]
        numbers = " ".join(map(str, scene_T[:12].tolist()))
        cards.append(Card(f"{sample.files['txt'].decode()} → {numbers} …", pictures))
    return cards


def sampling_steps(output: Path, scenes: Path, *, model: str) -> list[Step]:
    """Captions alone, a drawn scene, the same scene in other words, an edited one, many seeds."""
    given = output / "given"
    given.mkdir(exist_ok=True)
    draw_street().save(given / "drawn.png")
    (given / "captions.txt").write_text("\n".join(CAPTIONS) + "\n", "utf-8")
    scene, place = find_elephant(scenes)
    scene.to_png(given / "elephant.png")
    move_elephant(scene).to_png(given / "moved.png")
    words = [text.format(WHERE[place]) for text in OTHER_WORDS]
    (given / "words.txt").write_text("\n".join(words) + "\n", "utf-8")

    def paint(name: str, *arguments: str) -> list[str]:
        return ["sample", *arguments, "--model", model, "--output", str(output / "samples" / name)]

    def cards(name: str, *, scenes: bool = True) -> list[Card]:
        return sample_cards(output / "samples" / name, scenes=scenes)

    drawn = Card("what was drawn", [Picture("palette colours", given / "drawn.png")])
    return [
        Step(
            title="Only a sentence",
            text="The model predicts the scene, then paints it.",
            command=paint("captions", "--prompts", str(given / "captions.txt"), "--count", "1",
                          "--seed", "4"),
            cards=lambda: cards("captions"),
        ),
        Step(
            title="A sentence and a drawing",
            text="Someone drew rectangles and circles in palette colours; the pictures keep them "
            "where they are.",
            command=paint("drawn", DRAWN, "--scene", str(given / "drawn.png"), "--count", "3",
                          "--seed", "1"),
            cards=lambda: [drawn, *cards("drawn", scenes=False)],
        ),
        Step(
            title="The same scene in other words",
            text="One scene the model has never seen, three sentences. The layout stays, colour "
            "and hour follow the words.",
            command=paint("words", "--prompts", str(given / "words.txt"), "--scene",
                          str(given / "elephant.png"), "--count", "1", "--seed", "1"),
            cards=lambda: [given_card("the given scene", given / "elephant.png"),
                           *cards("words", scenes=False)],
        ),
        Step(
            title="The elephant moves",
            text="The same scene with the elephant on its other side: only the scene was edited, "
            "sentence and seeds stay.",
            command=paint("moved", words[0], "--scene", str(given / "moved.png"), "--count", "3",
                          "--seed", "1"),
            cards=lambda: [given_card("the edited scene", given / "moved.png"),
                           *cards("moved", scenes=False)],
        ),
        Step(
            title="One sentence, many pictures",
            text="Each seed is another picture of the same sentence; the same seed is always the "
            "same picture.",
            command=paint("seeds", SEEDS_OF, "--count", "6", "--seed", "1"),
            cards=lambda: cards("seeds"),
        ),
    ]  # fmt: skip


def given_card(words: str, path: Path) -> Card:
    return Card(words, [Picture("scene", SceneMap.from_png(path).to_rgb(edges=True))])


def find_elephant(scenes: Path) -> tuple[SceneMap, str]:
    """The scene with an elephant at one side and as little else as there is, and its place.

    Raises:
        ModelError: no scene has one.
    """
    best: tuple[tuple[int, bool], SceneMap, str] | None = None
    for path in expand_shards(str(scenes)):
        for sample in read_shard(path):
            park = json.loads(sample.files["json"])["park"]
            elephants = [thing for thing in park["things"] if thing["class"] == ELEPHANT]
            if len(elephants) != 1 or elephants[0]["side"] == "middle":
                continue
            score = (len(park["things"]), park["place"] != "park")
            if best is None or score < best[0]:
                scene = SceneMap.from_png(io.BytesIO(sample.files["scene.png"]))
                best = score, scene, park["place"]
    if best is None:
        raise ModelError(f"{scenes}: no picture has one elephant at its side; use a larger --count")
    return best[1:]


def move_elephant(scene: SceneMap) -> SceneMap:
    """The elephant mirrored to the other side; where it was, the row's nearest label goes on."""
    elephant_HW = scene.labels == CLASS_NAMES.index(ELEPHANT)
    labels = scene.labels.copy()
    columns = np.arange(labels.shape[1])
    for row, hidden in zip(labels, elephant_HW, strict=True):
        if hidden.all():
            continue  # nothing of the row is known; the mirrored elephant fills it too
        known = columns[~hidden]
        nearest = known[np.abs(columns[:, None] - known).argmin(1)]
        row[hidden] = row[nearest[hidden]]
    labels[elephant_HW[:, ::-1]] = CLASS_NAMES.index(ELEPHANT)
    return SceneMap.from_labels(labels)


def draw_street() -> Image.Image:
    """A bus and a dog on a street, as somebody would draw them in palette colours."""

    def colour(name: str) -> tuple[int, ...]:
        return tuple(PALETTE[CLASS_NAMES.index(name)].tolist())

    image = Image.new("RGB", (SIDE, SIDE), colour("sky-other-merged"))
    draw = ImageDraw.Draw(image)
    for left, top, right in ((0, 40, 70), (70, 62, 150), (150, 30, 214), (214, 56, SIDE)):
        draw.rectangle([left, top, right, 130], fill=colour("building-other-merged"))
    draw.rectangle([0, 120, SIDE, 144], fill=colour("pavement-merged"))
    draw.rectangle([0, 144, SIDE, 214], fill=colour("road"))
    draw.rectangle([0, 214, SIDE, SIDE], fill=colour("pavement-merged"))
    draw.rounded_rectangle([24, 88, 150, 160], radius=10, fill=colour("bus"))
    for x in (50, 124):
        draw.ellipse([x - 13, 147, x + 13, 173], fill=colour("bus"))
    draw.ellipse([178, 196, 226, 220], fill=colour("dog"))
    draw.ellipse([214, 182, 240, 206], fill=colour("dog"))
    for x in (184, 196, 210, 220):
        draw.rectangle([x - 3, 212, x + 3, 236], fill=colour("dog"))
    draw.polygon([(182, 204), (166, 190), (180, 212)], fill=colour("dog"))
    return image


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to fill")
    parser.add_argument("--model", default="park", help="park or a model folder")
    parser.add_argument("--count", type=int, default=120, help="pictures of the park world")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        size = read_json(find_folder(options.model) / INDEX)["sizes"]["scene"]["pixels"]
        options.output.mkdir(parents=True, exist_ok=True)
        demo = Demo(options.output)
        for step in pipeline_steps(
            options.output, model=options.model, size=size, count=options.count
        ):
            demo.run(step)
        scenes = options.output / "scenes"
        for step in sampling_steps(options.output, scenes, model=options.model):
            demo.run(step)
        hero = sample_cards(options.output / "samples" / "captions")[:3]
        page = demo.write_page("mini Make-A-Scene", INTRO, hero)
    except (ValueError, OSError) as error:
        raise SystemExit(f"demo: {error}") from error
    print(f"\nOpen {page}")


if __name__ == "__main__":
    main()
