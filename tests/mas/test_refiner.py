"""The refiner corrects a picture by its scene: shapes, start, storage, and its place in a model."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mas.__main__ import main
from mas.model import MakeAScene
from mas.model_folder import REFINER, ModelError, list_files
from mas.refiner import Refiner, RefinerConfig
from mas.scene import CLASSES, VOID, SceneMap

SIZE = 32
CAPTION = "a giraffe in the park"


def build(*, size=SIZE, trained=True):
    torch.manual_seed(0)
    network = Refiner(RefinerConfig(size=size, width=8, groups=4, features=8, label_width=4))
    if trained:
        with torch.no_grad():
            network.correction.weight.normal_(std=0.2)
    return network.eval()


def draw(seed=0, size=SIZE):
    rng = np.random.default_rng(seed)
    labels = np.full((size, size), 125, np.uint8)
    x, y = rng.integers(0, size // 2, 2)
    labels[y : y + size // 3, x : x + size // 3] = rng.integers(CLASSES)
    return SceneMap.from_labels(labels)


def planes(*scenes):
    return (
        torch.from_numpy(np.stack([scene.labels for scene in scenes])),
        torch.from_numpy(np.stack([scene.edges for scene in scenes])),
    )


def image(count=1, seed=0):
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def test_the_default_refiner_is_small():
    with torch.device("meta"):
        network = Refiner(RefinerConfig())
    assert sum(p.numel() for p in network.parameters()) < 0.15e6


def test_a_fresh_refiner_changes_nothing():
    image_BCHW = image(2)
    assert torch.equal(build(trained=False)(image_BCHW, *planes(draw(0), draw(1))), image_BCHW)


def test_it_sees_labels_edges_and_picture_and_nobody_elses():
    network, labels_BHW, edges_BHW = build(), *planes(draw(0), draw(1))
    image_BCHW = image(2)
    refined_BCHW = network(image_BCHW, labels_BHW, edges_BHW)
    alone_BCHW = network(image_BCHW[1:], labels_BHW[1:], edges_BHW[1:])
    torch.testing.assert_close(alone_BCHW, refined_BCHW[1:], rtol=0, atol=1e-5)
    others = (
        (image_BCHW, labels_BHW.flip(0), edges_BHW),
        (image_BCHW, labels_BHW, ~edges_BHW),
        (image_BCHW.flip(0), labels_BHW, edges_BHW),
    )
    for other in others:
        assert (network(*other) - refined_BCHW).abs().max() > 1e-3


def test_void_is_a_class_of_its_own():
    network = build()
    labels_1HW, edges_1HW = planes(SceneMap.from_labels(np.full((SIZE, SIZE), VOID, np.uint8)))
    void = network(image(), labels_1HW, edges_1HW)
    with torch.no_grad():
        network.labels.weight[:CLASSES] += 1  # nobody looks there
    assert torch.equal(network(image(), labels_1HW, edges_1HW), void)
    with torch.no_grad():
        network.labels.weight[CLASSES] += 1
    assert not torch.equal(network(image(), labels_1HW, edges_1HW), void)


def test_refining_takes_scenes_of_any_size_and_stays_in_range():
    network = build()
    bright_1CHW = torch.ones(1, 3, SIZE, SIZE)
    refined_1CHW = network.refine(bright_1CHW, draw(size=64))
    assert refined_1CHW.shape == bright_1CHW.shape
    assert refined_1CHW.min() >= 0 and refined_1CHW.max() <= 1
    same_1CHW = network(bright_1CHW, *planes(draw(size=64).resized(SIZE))).clamp(0, 1)
    assert torch.equal(refined_1CHW, same_1CHW)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (((1, 3, 16, 16), (1, 16, 16), (1, 16, 16)), "pictures of B x 3 x 32 x 32, got 1 x 3 x 16"),
        (((1, 3, 32, 32), (1, 16, 32), (1, 32, 32)), "labels of 1 x 32 x 32, got 1 x 16 x 32"),
        (((2, 3, 32, 32), (2, 32, 32), (1, 32, 32)), "edges of 2 x 32 x 32, got 1 x 32 x 32"),
    ],
)
def test_other_sizes_are_refused_by_name(sizes, message):
    image_shape, labels_shape, edges_shape = sizes
    labels_BHW = torch.zeros(labels_shape, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        build()(torch.rand(image_shape), labels_BHW, torch.zeros(edges_shape, dtype=torch.bool))


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="label_width must be at least 1, got 0"):
        RefinerConfig(label_width=0)
    with pytest.raises(ValueError, match="size 30 must be a multiple of 4"):
        RefinerConfig(size=30)


def test_a_refiner_survives_storage_and_broken_weights_are_refused(tmp_path):
    network = build()
    network.save_pretrained(tmp_path / "r")
    again = Refiner.from_pretrained(tmp_path / "r")
    scene = planes(draw())
    assert again.config == network.config
    assert torch.equal(again(image(), *scene), network(image(), *scene))
    with torch.no_grad():
        network.stem.weight[0] = torch.nan
    network.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"broken.*stem\.weight"):
        Refiner.from_pretrained(tmp_path / "broken")


@pytest.fixture(scope="module")
def refined_model(tiny_model):
    names = ("tokenizer", "vqseg", "vqgan", "gpt")
    return MakeAScene(**{name: getattr(tiny_model, name) for name in names}, refiner=build())


@pytest.fixture(scope="module")
def refined_folder(refined_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refined") / "model"
    refined_model.save_pretrained(folder)
    return folder


def test_a_model_refines_by_the_scene_it_has_drawn(refined_model, tiny_model):
    plain = tiny_model.generate(CAPTION, count=2, seed=3)
    refined = refined_model.generate(CAPTION, count=2, seed=3)
    assert refined.scenes == plain.scenes and torch.equal(refined.tokens.image, plain.tokens.image)
    assert refined.images != plain.images
    for index, scene in enumerate(refined.scenes):
        tokens_1T = refined.tokens.image[index : index + 1]
        decoded_1CHW = refined_model.vqgan.decode(tokens_1T, precision="auto")
        expected_1CHW = (refined_model.refiner.refine(decoded_1CHW, scene) * 255).round()
        found_HWC = np.asarray(refined.images[index]).astype(np.float32)
        np.testing.assert_array_equal(found_HWC, expected_1CHW[0].permute(1, 2, 0).numpy())
    off = refined_model.generate(CAPTION, count=2, seed=3, refine=False)
    assert off.images == plain.images
    said = [result.settings["image"].get("refined") for result in (plain, refined, off)]
    assert said == [None, True, False]


def test_a_model_refines_by_the_scene_it_is_given(refined_model):
    one, other = (refined_model.generate("", scene=draw(seed), seed=3) for seed in (0, 1))
    again = refined_model.generate("", scene=draw(0), seed=3)
    assert again.images == one.images != other.images


@pytest.mark.parametrize("scene", [None, draw()])
@pytest.mark.parametrize("refine", [True, False])
def test_the_last_preview_is_the_picture(refined_model, refine, scene):
    seen = []

    def watch(progress):
        if progress.done == progress.total:
            seen.extend(progress.images())

    out = refined_model.generate(CAPTION, scene=scene, count=2, refine=refine, on_progress=watch)
    assert seen == out.images


@pytest.mark.parametrize("scene", [None, draw()])
def test_what_is_given_of_a_picture_is_not_refined(refined_model, scene):
    half = np.zeros((SIZE, SIZE), np.bool_)
    half[:, SIZE // 2 :] = True
    given = Image.fromarray(np.full((SIZE, SIZE, 3), 90, np.uint8))
    seen = []

    def watch(progress):
        if progress.done == progress.total:
            seen.extend(progress.images())

    options = {"scene": scene, "image": given, "image_free": half, "seed": 2}
    refined = refined_model.generate(CAPTION, **options, on_progress=watch)
    plain = refined_model.generate(CAPTION, **options, refine=False)
    differs = (np.asarray(refined.images[0]) != np.asarray(plain.images[0])).any(-1)
    assert not differs[~half].any() and differs[half].mean() > 0.5
    assert seen == refined.images


def test_a_preview_before_its_scene_is_as_decoded(refined_model, tiny_model):
    half = np.zeros((SIZE, SIZE), np.bool_)
    half[SIZE // 2 :] = True
    given = Image.fromarray(np.full((SIZE, SIZE, 3), 90, np.uint8))
    shown = []
    for model in (refined_model, tiny_model):
        seen = []

        def watch(progress, seen=seen):
            if progress.scenes() is None:
                seen.append(progress.images()[0])

        model.generate(CAPTION, image=given, image_free=half, on_progress=watch)
        shown.append(seen)
    assert shown[0] == shown[1] and len(shown[0]) == 15  # all but the last of 16 scene tokens


def test_a_refiner_of_another_size_is_refused(parts):
    with pytest.raises(ModelError, match="refiner and VQ-GAN do not fit together: 64 pixels"):
        MakeAScene(**parts, refiner=build(size=64))


def test_a_folder_keeps_the_refiner(refined_model, refined_folder, tmp_path):
    index = json.loads((refined_folder / "model_index.json").read_text())
    assert (index["format"], index["extras"]) == (4, [REFINER])
    assert set(index["sha256"]) == set(list_files((REFINER,)))
    assert "scene_candidates" not in index
    loaded = MakeAScene.from_pretrained(refined_folder, device="cpu", precision="float32")
    a, b = (model.generate(CAPTION, seed=6) for model in (refined_model, loaded))
    assert a.images == b.images and a.settings == b.settings
    loaded.refiner = None
    loaded.save_pretrained(tmp_path / "m")
    shutil.copytree(refined_folder, tmp_path / "n")
    loaded.save_pretrained(tmp_path / "n")
    for name in "mn":
        assert not (tmp_path / name / REFINER).exists()
        assert MakeAScene.from_pretrained(tmp_path / name, device="cpu").refiner is None


@pytest.mark.parametrize("extras", [["refiner", "upscaler"], "refiner", None, [{}]])
def test_parts_that_nobody_knows_are_refused(refined_folder, tmp_path, extras):
    copied = shutil.copytree(refined_folder, tmp_path / "copy")
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps(index | {"extras": extras}))
    with pytest.raises(ModelError, match="names no extras that this version knows"):
        MakeAScene.from_pretrained(copied)


def test_the_command_refines_unless_told_otherwise(refined_folder, tmp_path):
    words = ["sample", CAPTION, "--model", str(refined_folder), "--count", "1", "--device", "cpu"]
    for name, more in (("on", []), ("off", ["--refine", "false"])):
        assert main([*words, "--output", str(tmp_path / name), *more]) == 0
        said = json.loads((tmp_path / name / "samples.json").read_text())
        assert said["settings"]["image"]["refined"] == (name == "on")
    pictures = [(tmp_path / name / "0000.png").read_bytes() for name in ("on", "off")]
    assert pictures[0] != pictures[1]
