"""Which form a scene file has: what alpha and transparency say of ids."""

import numpy as np
import pytest
from PIL import ExifTags, Image

from mas.scene import CLASS_NAMES, VOID, SceneMap, read_scene

GRASS = CLASS_NAMES.index("grass-merged")
DOG = CLASS_NAMES.index("dog")
SIZE = 24


def halves():
    """Grass on the left, a dog on the right."""
    return np.repeat([[GRASS] * (SIZE // 2) + [DOG] * (SIZE // 2)], SIZE, axis=0).astype(np.uint8)


def random_labels(ids, seed=0):
    return np.random.default_rng(seed).choice(ids, (SIZE, SIZE)).astype(np.uint8)


def things(count):
    """Numbers of upright stripes."""
    return np.repeat([np.arange(SIZE) * count // SIZE], SIZE, axis=0)


def crowd():
    """Numbers of things of 3 x 3 pixels."""
    return np.kron(np.arange(64).reshape(8, 8), np.ones((3, 3), np.int32))


def write(path, labels, alpha):
    Image.fromarray(np.stack([labels, alpha.astype(np.uint8)], axis=-1)).save(path)


@pytest.mark.parametrize(
    "scene",
    [
        SceneMap.from_labels(random_labels([*range(157), VOID])),  # nearly all of it edges
        SceneMap.from_labels(random_labels([DOG, GRASS], seed=1)),
        SceneMap.from_labels(halves()),
        SceneMap.from_labels(halves(), things(5)),
        SceneMap.from_labels(np.full((SIZE, SIZE), DOG, np.uint8), things(8)),
        SceneMap.from_labels(np.full((SIZE, SIZE), DOG, np.uint8), crowd()),
        SceneMap.from_labels(np.full((SIZE, SIZE), DOG, np.uint8)),
        SceneMap.from_labels(np.full((SIZE, SIZE), VOID, np.uint8)),
        SceneMap(random_labels([DOG, GRASS]), np.zeros((SIZE, SIZE), np.bool_)),
    ],
)
def test_a_scene_that_was_written_is_read_as_it_was(tmp_path, scene):
    scene.to_png(tmp_path / "a.png")
    assert read_scene(tmp_path / "a.png") == scene


@pytest.mark.parametrize("below", ["ids", "nothing", "one id"])
@pytest.mark.parametrize("drawn", ["corner", "disc", "all but a hole"])
def test_transparent_ids_are_void_however_much_of_them_there_is(tmp_path, below, drawn):
    y, x = np.indices((SIZE, SIZE))
    disc = (y - 10) ** 2 + (x - 6) ** 2
    opaque = {
        "corner": (y < 12) & (x < 18),  # no change of label is on its right or lower side
        "disc": disc < 25,
        "all but a hole": disc >= 25,  # which cuts no change of label
    }[drawn]
    labels = np.full((SIZE, SIZE), DOG, np.uint8) if below == "one id" else halves()
    stored = np.where(opaque, labels, 0) if below == "nothing" else labels
    write(tmp_path / "a.png", stored.astype(np.uint8), opaque * 255)
    expected = np.where(opaque, labels, VOID).astype(np.uint8)
    assert read_scene(tmp_path / "a.png") == SceneMap.from_labels(expected)


def test_half_transparent_ids_are_transparent_and_no_edges(tmp_path):
    alpha = np.zeros((SIZE, SIZE))
    alpha[3:6], alpha[6] = 255, 100
    write(tmp_path / "a.png", np.full((SIZE, SIZE), DOG, np.uint8), alpha)
    labels = np.full((SIZE, SIZE), VOID, np.uint8)
    labels[3:6] = DOG
    assert read_scene(tmp_path / "a.png") == SceneMap.from_labels(labels)


@pytest.mark.parametrize("grey", [DOG, 200])  # 200 is no id
def test_a_grey_that_the_file_calls_transparent_is_void(tmp_path, grey):
    labels = halves()
    labels[labels == DOG] = grey
    Image.fromarray(labels).save(tmp_path / "a.png", transparency=grey)
    labels[labels == grey] = VOID
    assert read_scene(tmp_path / "a.png") == SceneMap.from_labels(labels)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_scene_stands_upright_by_its_exif(tmp_path):
    scene, exif = SceneMap.from_labels(halves()), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be seen a quarter turn clockwise
    image = Image.fromarray(np.rot90(scene.labels).copy())
    image.save(tmp_path / "a.png", exif=exif)
    assert read_scene(tmp_path / "a.png") == scene
    image.save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_scene(tmp_path / "a.png") == SceneMap.from_labels(np.rot90(scene.labels))


def test_blobs_that_a_network_takes_for_edges_are_no_drawing(tmp_path):
    labels = np.full((64, 64), 125, np.uint8)
    labels[20:50, 10:50] = 16
    scene = SceneMap.from_labels(labels)
    edges = scene.edges.copy()
    edges[30:36, 20:30] = True
    SceneMap(labels, edges).to_png(tmp_path / "x.png")
    assert read_scene(tmp_path / "x.png") == SceneMap(labels, edges)
