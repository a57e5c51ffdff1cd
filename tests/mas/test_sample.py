import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

import mas.request
import mas.sample
from mas.fill import fill_free
from mas.filter import Sampling, StreamSampling
from mas.model import MakeAScene
from mas.model_folder import write_folder
from mas.sample_folder import MOST_ROWS, draw_sheet
from mas.scene import COCO_CATEGORY_IDS, SceneMap
from mas.vqgan import VQGAN

CAPTION = "two dogs on a bench"


def scene(size=32, void=False):
    labels = np.full((size, size), 119, np.uint8)
    labels[size // 2 :] = 255 if void else 125
    return SceneMap.from_labels(labels)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_writes_pictures_scenes_sheet_and_a_description(run, tmp_path, tiny_folder):
    status, out, err = run(CAPTION, "--count", "3", "--seed", "4", "--output", "out")
    assert (status, err) == (0, "")
    assert out.startswith("out: 3 pictures, ")
    names = {"grid.png", "samples.json"}
    names |= {f"{i:04}{kind}.png" for i in range(3) for kind in ("", ".scene")}
    assert set(files(tmp_path / "out")) == names
    description = json.loads((tmp_path / "out/samples.json").read_text())
    assert description["caption"] == CAPTION and description["seed"] == 4
    assert description["settings"]["image"] == {
        "guidance": 3.0,
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
    }
    chosen = MakeAScene.from_pretrained(tiny_folder, device="cpu").precision
    assert (description["device"], description["precision"]) == ("cpu", chosen)
    assert len(description["model"]["sha256"]) == 64 and description["seconds"] > 0
    assert [picture["seed"] for picture in description["pictures"]] == [4, 5, 6]
    for picture in description["pictures"]:
        assert Image.open(tmp_path / "out" / picture["image"]).size == (32, 32)
        assert SceneMap.from_png(tmp_path / "out" / picture["scene"]).size == (32, 32)


def test_a_sheet_of_many_pictures_can_be_opened(tmp_path):
    """Of a thousand it was larger than Pillow opens, of ten thousand than many a memory."""
    Image.new("RGB", (256, 256), "red").save(tmp_path / "0000.png")
    scene().to_png(tmp_path / "0000.scene.png")
    one = {"caption": CAPTION, "seed": 0, "image": "0000.png", "scene": "0000.scene.png"}
    sheet = draw_sheet(tmp_path, [one] * 1000)
    assert sheet.width * sheet.height < Image.MAX_IMAGE_PIXELS
    assert sheet == draw_sheet(tmp_path, [one] * MOST_ROWS)


def test_caption_and_settings_stand_in_the_png(run, tmp_path):
    caption = 'слон 🐘 und \\ "quotes"'
    assert run(caption, "--count=1", "--guidance=2", "--output", "out")[0] == 0
    text = Image.open(tmp_path / "out/0000.png").text
    assert text["caption"] == caption and text["seed"] == "0"
    assert json.loads(text["settings"])["image"]["guidance"] == 2
    assert len(text["model"]) == 64
    assert Image.open(tmp_path / "out/grid.png").text["caption"] == caption


def test_a_negative_prompt_is_written_down(run, tmp_path):
    assert run(CAPTION, "--count=1", "--output", "plain")[0] == 0
    assert run(CAPTION, "--count=1", "--negative-prompt", "a cat", "--output", "out")[0] == 0
    assert files(tmp_path / "out")["0000.png"] != files(tmp_path / "plain")["0000.png"]
    assert Image.open(tmp_path / "out/0000.png").text["negative_prompt"] == "a cat"
    pictures = [
        json.loads((tmp_path / name / "samples.json").read_text())["pictures"][0]
        for name in ("out", "plain")
    ]
    assert pictures[0]["negative_prompt"] == "a cat" and "negative_prompt" not in pictures[1]


def test_what_each_stream_was_sampled_with_is_written_down(run, tmp_path, tiny_folder):
    model = MakeAScene.from_pretrained(tiny_folder, device="cpu")
    model.sampling = StreamSampling(scene=Sampling(guidance=1.5), image=Sampling(guidance=4))
    model.save_pretrained(tmp_path / "own")
    for words, expected in (
        ((), (1.5, 4)),
        (("--guidance", "2"), (2, 2)),
        (("--guidance", "2", "--image-sampling.guidance", "3"), (2, 3)),
    ):
        status, _, err = run(
            CAPTION, "--count=1", "--output", "out", *words, model=tmp_path / "own"
        )
        assert status == 0, err
        written = json.loads((tmp_path / "out/samples.json").read_text())["settings"]
        assert (written["scene"]["guidance"], written["image"]["guidance"]) == expected
        assert json.loads(Image.open(tmp_path / "out/0000.png").text["settings"]) == written


def test_the_same_command_writes_the_same_pngs_also_over_the_old_ones(run, tmp_path):
    assert run(CAPTION, "--count=3", "--output", "a")[0] == 0
    first = files(tmp_path / "a")
    assert run(CAPTION, "--count=2", "--output", "a")[0] == 0
    assert run(CAPTION, "--count=2", "--output", "b")[0] == 0
    again, other = files(tmp_path / "a"), files(tmp_path / "b")
    assert set(again) == set(other) == set(first) - {"0002.png", "0002.scene.png"}
    for name in other:
        if name.endswith(".png"):
            assert again[name] == other[name]
    assert first["0001.png"] == again["0001.png"]
    assert run(CAPTION, "--count=2", "--seed=9", "--output", "b")[0] == 0
    assert files(tmp_path / "b")["0000.png"] != again["0000.png"]


def write_scene(layout, form):
    """Writes scene.png in one of the forms a person may hand in."""
    if form == "la":
        layout.to_png("scene.png")
    elif form == "grey":
        Image.fromarray(layout.labels).save("scene.png")
    elif form == "palette":
        layout.to_rgb().save("scene.png")
    elif form == "drawn":  # colours a little beside the palette's
        shades = np.asarray(layout.to_rgb()).astype(int)
        Image.fromarray(np.clip(shades + 3, 0, 255).astype(np.uint8)).save("scene.png")
    else:
        assert form == "coco"
        ids = layout.labels.astype(np.int32) + 1000  # red + 256 green + 65536 blue
        colours = np.stack([ids % 256, ids // 256, ids * 0], axis=-1)
        Image.fromarray(colours.astype(np.uint8)).save("scene.png")
        segments = [
            {"id": int(label) + 1000, "category_id": COCO_CATEGORY_IDS[label]}
            for label in np.unique(layout.labels)
        ]
        Path("scene.json").write_text(json.dumps({"segments_info": segments}))


@pytest.mark.parametrize("form", ["la", "grey", "palette", "drawn", "coco"])
def test_a_scene_in_any_form_and_size_is_followed(run, tmp_path, form):
    write_scene(scene(64), form)
    assert run(CAPTION, "--scene", "scene.png", "--count=1", "--output", "out")[0] == 0
    written = SceneMap.from_png(tmp_path / "out/0000.scene.png")
    assert np.array_equal(written.labels, scene(32).labels)


def test_a_scene_needs_no_caption_and_its_void_can_be_filled(run, tmp_path):
    scene(32, void=True).to_png("scene.png")
    assert run("--scene", "scene.png", "--count=1", "--output", "kept")[0] == 0
    kept = SceneMap.from_png(tmp_path / "kept/0000.scene.png")
    assert (kept.labels[16:] == 255).all()
    flags = ("--scene", "scene.png", "--fill-void", "--count=6", "--output", "filled")
    assert run(*flags)[0] == 0
    filled = {(tmp_path / f"filled/{i:04}.scene.png").read_bytes() for i in range(6)}
    assert len(filled) > 1


def test_captions_come_from_a_file_one_a_line(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\n\n  two cats \n", "utf-8")
    assert run("--prompts", "prompts.txt", "--count=2", "--output", "out")[0] == 0
    description = json.loads((tmp_path / "out/samples.json").read_text())
    assert description["caption"] == ["a dog", "two cats"]
    assert [p["caption"] for p in description["pictures"]] == ["a dog"] * 2 + ["two cats"] * 2
    assert run("two cats", "--count=1", "--output", "alone")[0] == 0
    a, b = (Image.open(tmp_path / n) for n in ("alone/0000.png", "out/0002.png"))
    assert np.array_equal(np.asarray(a), np.asarray(b))


def test_a_file_of_captions_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\ntwo cats\n", "utf-8-sig")
    captions = mas.sample.read_captions(None, tmp_path / "prompts.txt", empty_is_fine=False)
    assert captions == ["a dog", "two cats"]


def test_only_ends_of_lines_part_captions_and_white_space_is_one_space(tmp_path):
    text = "a\u2028dog\r\ntwo\x0b\x0c cats\rone\x85\t  cow\na  sheep"
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    captions = mas.sample.read_captions(None, tmp_path / "prompts.txt", empty_is_fine=False)
    assert captions == ["a dog", "two cats", "one cow", "a sheep"]


def test_a_config_file_may_hold_the_caption_and_the_command_line_replaces_it(run, tmp_path):
    (tmp_path / "dog.yaml").write_text("caption: a dog\noutput: out\ncount: 1\n")
    for more, caption in (((), "a dog"), (("a cat",), "a cat")):
        assert run("--config", "dog.yaml", *more)[0] == 0
        assert json.loads((tmp_path / "out/samples.json").read_text())["caption"] == caption


def drawn(size=32):
    """A picture whose lower half is transparent."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[size // 2 :, :, 3] = 0
    return Image.fromarray(pixels)


@pytest.mark.parametrize("caption", [(CAPTION,), ()])
def test_a_picture_is_completed_where_it_is_transparent(run, tmp_path, tiny_model, caption):
    drawn().save("half.png")
    flags = ("--image", "half.png", "--count=3", "--precision=float32", "--output", "out")
    assert run(*caption, *flags)[0] == 0
    upper = drawn().convert("RGB")
    free = np.zeros((32, 32), np.bool_)
    free[16:] = True
    expected = tiny_model.generate(*caption, image=upper, image_free=free, count=3)
    for i, image in enumerate(expected.images):
        written = np.asarray(Image.open(tmp_path / f"out/{i:04}.png"))
        assert np.array_equal(written, np.asarray(image))
    given = tiny_model.encode_image(fill_free(upper, free))
    assert (expected.tokens.image[:, :8] == given[:, :8]).all()


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_a_picture_stands_upright_by_its_exif(tmp_path, form):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be seen a quarter turn clockwise
    lying = drawn().transpose(Image.Transpose.ROTATE_90)
    lying.save(tmp_path / "half", form, exif=exif, lossless=True)
    picture, free = mas.sample.read_picture(tmp_path / "half")
    assert free[16:].all() and not free[:16].any()
    upper = np.asarray(drawn().convert("RGB"))[:16]
    assert np.array_equal(np.asarray(picture)[:16], upper)


def test_the_best_candidates_are_written_in_the_order_of_their_scores(run, tmp_path, clip_folder):
    (tmp_path / "prompts.txt").write_text("a dog\ntwo cats\n")
    flags = ("--prompts", "prompts.txt", "--count=4", "--seed=3", "--clip", str(clip_folder))
    status, out, err = run(*flags, "--rerank=clip", "--keep=2", "--output", "best")
    assert (status, err) == (0, "") and out.startswith("best: 4 pictures")
    assert {f"{i:04}.png" for i in range(5)} & set(files(tmp_path / "best")) == {
        f"{i:04}.png" for i in range(4)
    }
    content = json.loads((tmp_path / "best/samples.json").read_text())
    assert content["rerank"] == {"by": "clip", "model": str(clip_folder), "keep": 2}
    assert content["seed"] == 3
    for caption in ("a dog", "two cats"):
        kept = [p for p in content["pictures"] if p["caption"] == caption]
        dropped = [p for p in content["dropped"] if p["caption"] == caption]
        scores = [p["score"] for p in kept + dropped]
        assert scores == sorted(scores, reverse=True) and len(set(scores)) == 4
        assert sorted(p["seed"] for p in kept + dropped) == [3, 4, 5, 6]
    assert run("--prompts", "prompts.txt", "--count=4", "--seed=3", "--output", "all")[0] == 0
    for picture in content["pictures"]:
        i = picture["seed"] - 3 + 4 * (picture["caption"] == "two cats")
        best, same = (
            Image.open(tmp_path / n) for n in (f"best/{picture['image']}", f"all/{i:04}.png")
        )
        assert np.array_equal(np.asarray(best), np.asarray(same))
        assert float(best.text["score"]) == picture["score"]


def test_reranking_alone_keeps_every_picture(run, tmp_path, clip_folder):
    flags = ("--rerank=clip", "--clip", str(clip_folder), "--count=3", "--output", "out")
    assert run(CAPTION, *flags)[0] == 0
    content = json.loads((tmp_path / "out/samples.json").read_text())
    assert len(content["pictures"]) == 3 and content["dropped"] == []


def test_another_process_and_batch_write_the_same_bytes(run, tmp_path, tiny_folder):
    flags = [CAPTION, "--count=3", "--seed=2"]
    assert run(*flags, "--output", "a")[0] == 0
    options = ["--model", str(tiny_folder), "--device=cpu", "--batch=1", "--output", "b"]
    subprocess.run([sys.executable, "-m", "mas", "sample", *flags, *options], check=True)
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert set(a) == set(b)
    assert all(a[name] == b[name] for name in a if name.endswith(".png"))


def test_the_progress_bar_counts_tokens(run, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    status, _, err = run(CAPTION, "--count=2", "--output", "out")
    assert status == 0 and "64/64" in err and "tokens/s]" in err


@pytest.mark.parametrize("dashed", ["--scene-sampling.top_p", "--scene-sampling.top-p"])
def test_settings_for_one_stream_only(run, tmp_path, dashed):
    flags = ("--image_sampling", '{"temperature": 0}', dashed, "0.5")
    assert run(CAPTION, *flags, "--count=1", "--output", "out")[0] == 0
    settings = json.loads((tmp_path / "out/samples.json").read_text())["settings"]
    assert settings["image"]["temperature"] == 0 and settings["scene"]["temperature"] == 1
    assert settings["scene"]["top_p"] == 0.5 and settings["image"]["top_p"] is None


def prepare_bad_input():
    drawn().save("half.png")
    SceneMap.from_labels(np.zeros((32, 48), np.uint8)).to_png("wide.png")
    Image.new("RGBA", (32, 48)).save("wide-picture.png")
    Image.new("RGB", (32, 32)).save("whole.png")
    Image.new("RGBA", (2, 2)).save("tiny.png")
    words = PngImagePlugin.PngInfo()
    words.add_text("said", "x" * 2**21, zip=True)  # more than Pillow unpacks
    drawn().save("words.png", pnginfo=words)
    for name in ("photo.jpg", "photo.png"):
        Image.new("RGB", (32, 32)).save(name, "JPEG")
    with open("empty.txt", "w") as file:
        file.write("\n \n")
    with open("binary.txt", "wb") as file:
        file.write(b"\xff\xfe\x00")
    with open("file", "w") as file:
        file.write("x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "caption is empty"),
        (["  "], "caption is empty"),
        ([CAPTION, "--guidance", ".nan"], "guidance is nan"),
        ([CAPTION, "--guidance", "-1"], "guidance is -1"),
        ([CAPTION, "--top-p", "0"], "top_p is 0"),
        ([CAPTION, "--top-k", "0"], "top_k is 0"),
        ([CAPTION, "--temperature", "-1"], "temperature is -1"),
        ([CAPTION, "--count", "0"], "count is 0"),
        ([CAPTION, "--batch", "0"], "batch is 0"),
        ([CAPTION, "--seed", "-1"], "seed is -1"),
        ([CAPTION, "--scene", "wide.png"], "wide.png: a scene must be square"),
        ([CAPTION, "--scene", "none.png"], "none.png: no such file"),
        ([CAPTION, "--scene", "file"], "not a readable PNG"),
        ([CAPTION, "--scene", "photo.jpg"], "photo.jpg: is a JPEG; what is taken is a PNG: save"),
        ([CAPTION, "--image", "photo.png"], "photo.png: is a JPEG; what is taken is a PNG or WebP"),
        ([CAPTION, "--fill-void"], "give one with --scene"),
        ([CAPTION, "--image", "wide-picture.png"], "a picture must be square, this one is 32x48"),
        ([CAPTION, "--image", "whole.png"], "whole.png: nothing is left to paint"),
        ([CAPTION, "--image", "none.png"], "none.png: no such file"),
        ([CAPTION, "--image", "tiny.png"], "tiny.png: 2x2 pixels are too few, use 4x4 or more"),
        ([CAPTION, "--scene", "tiny.png", "--fill-void"], "tiny.png: 2x2 pixels are too few"),
        ([CAPTION, "--image", "file"], "not a readable PNG or WebP"),
        ([CAPTION, "--image", "words.png"], "words.png: not a readable PNG or WebP"),
        ([CAPTION, "--keep", "2"], "--keep keeps the best by --rerank"),
        ([CAPTION, "--rerank", "clip", "--keep", "5"], "keep is 5, use 1 to 4"),
        ([CAPTION, "--rerank", "clip", "--keep", "0"], "keep is 0, use 1 to 4"),
        (["--image", "half.png", "--rerank", "clip"], "compares pictures with their caption"),
        ([CAPTION, "--rerank", "clip", "--clip", "no/such/clip"], "no such folder with a CLIP"),
        ([CAPTION, "--prompts", "empty.txt"], "not both"),
        (["--prompts", "empty.txt"], "holds no caption"),
        (["--prompts", "binary.txt"], "not a UTF-8"),
        (["--prompts", "none.txt"], "none.txt"),
        ([CAPTION, "--image_sampling", '{"topp": 1}'], "not topp"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run, tmp_path, arguments, message):
    prepare_bad_input()
    status, out, err = run(*arguments, "--output", "out")
    assert status == 1 and out == ""
    assert err.count("\n") == 1 and err.startswith("mas: error: ") and message in err
    assert not (tmp_path / "out").exists()


def test_unusable_models_and_devices_are_one_line_and_leave_nothing(run, tmp_path, tiny_folder):
    broken = shutil.copytree(tiny_folder, tmp_path / "broken")
    (broken / "vqgan/model.safetensors").unlink()
    for options, message in (
        ({"model": "nowhere"}, "no such model folder"),
        ({"model": broken}, "vqgan/model.safetensors is missing"),
        ({"device": "gpu9"}, "device 'gpu9'"),
    ):
        status, _, err = run(CAPTION, "--output", "out", **options)
        assert status == 1 and err.count("\n") == 1 and message in err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["output", "scene", "prompts"])
def test_an_empty_name_is_not_the_current_folder(run, tmp_path, option):
    said = f"--{option}: empty, name a file or folder (see mas sample --help)"
    message = f"mas sample: error: {said}\n"
    options = {"output": "out"} | {option: ""}
    words = [f"--{name}={value}" for name, value in options.items()]
    assert run(CAPTION, *words) == (2, "", message)
    (tmp_path / "a.yaml").write_text(json.dumps(options))
    assert run(CAPTION, "--config", "a.yaml") == (2, "", message)
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


def test_an_empty_name_is_no_model(run, tmp_path):
    status, _, err = run(CAPTION, "--output", "out", model="")
    assert status == 1 and "the name of the model is empty: use a folder" in err
    assert not list(tmp_path.iterdir())


def test_parts_that_do_not_fit_are_one_line(run, tmp_path, parts):
    config = dataclasses.replace(parts["vqgan"].config, codes=21)
    networks = {"vqseg": parts["vqseg"], "vqgan": VQGAN(config), "gpt": parts["gpt"]}
    write_folder(
        tmp_path / "mixed",
        tokenizer=parts["tokenizer"],
        networks=networks,
        sampling=StreamSampling(),
        card=None,
    )
    status, out, err = run(CAPTION, "--output", "out", model=tmp_path / "mixed")
    assert (status, out) == (1, "") and err == (
        "mas: error: VQ-GAN and GPT do not fit together: number of codes 21 against 20; "
        "use the parts that were trained together\n"
    )
    assert not (tmp_path / "out").exists()


def test_too_little_memory_names_the_batch_that_fits(run, tmp_path, monkeypatch):
    monkeypatch.setattr(MakeAScene, "pictures_that_fit", lambda _: 5)
    status, _, err = run(CAPTION, "--count=8", "--output", "out")
    assert status == 1 and not (tmp_path / "out").exists()
    assert err == (
        "mas: error: 8 pictures at a time do not fit into the memory, 5 do: use batch 5\n"
    )
    assert run(CAPTION, "--count=8", "--batch=5", "--output", "out")[0] == 0


def test_wrong_flags_exit_with_2(run):
    assert run(CAPTION, "--output", "out", "--precision", "float8")[0] == 2
    assert run(CAPTION, "--output", "out", "--guidance", "nan")[0] == 2
    assert run(CAPTION, "--output", "out", "--rerank", "taste")[0] == 2
    assert run(CAPTION)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--count", "two"), "--count: 'two' is not a whole number (see mas sample --help)"),
        (("--guidance", "nan"), "--guidance: 'nan' is not a number ("),
        (("--top-k", "[1]"), "--top-k: '[1]' is not a number ("),
        (("--scene-sampling", "5"), "--scene-sampling: '5' is not of the form '{name: value}' ("),
        (("--scene-sampling.top_p", "x"), "--scene-sampling: 'top_p=x' is not a number ("),
        (("--config", "no.yaml"), "--config: File does not exist: "),
    ],
)
def test_wrong_values_are_told_in_plain_words(run, tmp_path, arguments, message):
    status, _, err = run(CAPTION, "--output", "out", *arguments)
    assert status == 2 and err.count("\n") == 1 and message in err
    status, _, err = run(CAPTION)
    assert (status, err) == (
        2,
        "mas sample: error: --output must be given (see mas sample --help)\n",
    )
    assert not list(tmp_path.iterdir())
