"""The demonstrations: which commands they run, what they draw, and the page they write."""

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mas.__main__ import COMMANDS, build_parser, load
from mas.model_folder import ModelError
from mas.scene import CLASS_NAMES, SceneMap, read_scene
from mas.shards import Sample, ShardWriter

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

import demo  # noqa: E402
import demo_page  # noqa: E402
import demo_train  # noqa: E402

ELEPHANT, GRASS, SKY, TREE = (
    CLASS_NAMES.index(name)
    for name in ("elephant", "grass-merged", "sky-other-merged", "tree-merged")
)


def make_scene():
    labels = np.full((32, 32), SKY, np.uint8)
    labels[14:] = GRASS
    labels[8:20, 26:30] = TREE
    labels[10:24, 3:13] = ELEPHANT
    return SceneMap.from_labels(labels)


def write_scenes(folder, *truths):
    """Scene shards of one picture for each list of (class, side)."""
    folder.mkdir()
    png, jpg = io.BytesIO(), io.BytesIO()
    make_scene().to_png(png)
    Image.new("RGB", (32, 32)).save(jpg, "JPEG")
    with ShardWriter(str(folder / "00000.tar")) as writer:
        for number, (place, things) in enumerate(truths):
            park = {"place": place, "things": [{"class": c, "side": s} for c, s in things]}
            files = {"jpg": jpg.getvalue(), "scene.png": png.getvalue(), "txt": b"a caption"}
            files["json"] = json.dumps({"park": park}).encode()
            writer.write(Sample(f"{number:05}", files))
    return folder


def check_command(words):
    """Parses a step's command as the shell would, without running it."""
    name = words[0]
    assert name in COMMANDS
    if name != "train":
        build_parser(name, load(name)).parse_args(words[1:])


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    return str(folder)


def test_every_command_of_the_demo_can_be_parsed(tmp_path, model):
    pictures = write_scenes(tmp_path / "scenes", ("farm", [("elephant", "left")]))
    steps = demo.pipeline_steps(tmp_path, model=model, size=32, count=9)
    steps += demo.sampling_steps(tmp_path, pictures, model=model)
    for step in steps:
        check_command(step.command)
    assert len({step.output for step in steps}) == len(steps)
    for path in (tmp_path / "given").glob("*.png"):
        assert read_scene(path).size in ((32, 32), (demo.SIDE, demo.SIDE))
    words = (tmp_path / "given/words.txt").read_text().splitlines()
    assert len(words) == 3 and all("on the farm" in text for text in words)


@pytest.mark.parametrize("photos", [False, True])
def test_every_command_of_the_training_demo_can_be_parsed(photos, tmp_path):
    words = ["--output", str(tmp_path)]
    if photos:
        (tmp_path / "panoptic_train.json").touch()
        words += ["--photos", str(tmp_path)]
    options = demo_train.parse(words)
    source = (demo_train.photo_source if photos else demo_train.park_source)(tmp_path, options)
    shards = write_scenes(tmp_path / "shards", ("park", []))
    steps = [*source, *demo_train.training_steps(tmp_path / "park-scenes", options)]
    for step in [*steps, *demo_train.sampling_steps(shards, options)]:
        check_command(step.command)


def test_the_drawing_is_in_palette_colours(tmp_path, caplog):
    demo.draw_street().save(tmp_path / "drawn.png")
    classes = read_scene(tmp_path / "drawn.png").histogram()
    assert {"bus", "dog", "road"} <= classes.keys() and len(classes) == 6
    assert not caplog.records  # nothing had to be snapped


def test_the_elephant_moves_and_what_it_hid_goes_on():
    before = make_scene()
    after = demo.move_elephant(before)
    elephant = before.labels == ELEPHANT
    assert np.array_equal(after.labels == ELEPHANT, elephant[:, ::-1])
    assert (after.labels[10:14, 3:13] == SKY).all() and (after.labels[14:24, 3:13] == GRASS).all()
    assert np.array_equal(after.edges, SceneMap.from_labels(after.labels).edges)
    again = demo.move_elephant(after)
    assert np.array_equal(again.labels == ELEPHANT, elephant)


def test_the_loneliest_elephant_is_taken(tmp_path):
    crowd = [("elephant", "left"), ("dog", "right")]
    scenes = write_scenes(
        tmp_path / "scenes",
        ("park", [("elephant", "middle")]),
        ("park", crowd),
        ("beach", [("elephant", "right")]),
        ("farm", [("elephant", "left"), ("elephant", "right")]),
    )
    assert demo.find_elephant(scenes)[1] == "beach"
    none = write_scenes(tmp_path / "none", ("park", [("dog", "left")]))
    with pytest.raises(ModelError, match="no picture has one elephant at its side; use a larger"):
        demo.find_elephant(none)


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"demo: .*nowhere: no such model folder"):
        demo.main(["--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """Two steps whose commands only note that they ran, and the list of what ran."""
    ran = []

    class Result:
        returncode = 0

    def run(words):
        ran.append(words[3:])
        Path(words[-1]).mkdir(parents=True, exist_ok=True)
        return Result

    monkeypatch.setattr(demo_page.subprocess, "run", run)

    def make(*names):
        page = demo_page.Demo(tmp_path)
        picture = demo_page.Picture("seen", Image.new("RGB", (4, 4), "red"))
        for name in names:
            page.run(
                demo_page.Step(
                    title=f"step <{name}>",
                    text="what it is for",
                    command=["park", "--output", str(tmp_path / name)],
                    cards=lambda: [demo_page.Card("a card", [picture, picture])],
                    pictures=lambda: [picture],
                )
            )
        return page, [words[-1].rpartition("/")[2] for words in ran]

    return make


def test_a_finished_step_is_not_run_again_until_one_before_it_changes(steps):
    assert steps("a", "b")[1] == ["a", "b"]
    assert steps("a", "b")[1] == ["a", "b"]
    assert steps("a", "b", "c")[1] == ["a", "b", "c"]
    assert steps("x", "b", "c")[1] == ["a", "b", "c", "x", "b", "c"]


def test_the_page_is_one_file_with_everything_in_it(steps):
    page, _ = steps("a", "b")
    hero = [demo_page.Card("on top", [demo_page.Picture("", Image.new("RGB", (4, 4)))])]
    html = page.write_page("A title", "what this is", hero).read_text("utf-8")
    assert html.index("on top") < html.index("step &lt;a&gt;") < html.index("step &lt;b&gt;")
    assert html.count("a card</p>") == 2 and "mas park --output" in html
    sources = re.findall(r'<img src="(.{22})', html)
    assert len(sources) == 1 + 2 * 3
    assert all(source == "data:image/png;base64," for source in sources)
    assert "http" not in html and "2 commands" in html
