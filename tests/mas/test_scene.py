"""Label space, scene map, merging rules, and every form in which a person may hand in a scene."""

import io
import json
import logging

import numpy as np
import pytest
from PIL import Image

from mas.scene import (
    CHANNELS,
    CLASS_NAMES,
    CLASSES,
    COCO_CATEGORY_IDS,
    EDGE_CHANNEL,
    FACE_CLASSES,
    FACE_IDS,
    HUMAN_CLASSES,
    HUMAN_IDS,
    PALETTE,
    PANOPTIC_CLASSES,
    PERSON,
    THINGS,
    VOID,
    SceneError,
    SceneMap,
    Segments,
    find_edges,
    from_coco,
    merge,
    nearest,
    read_scene,
    snap_colours,
)

GRASS = CLASS_NAMES.index("grass-merged")
DOG = CLASS_NAMES.index("dog")
HAT, FACE = 1, 13  # LIP ids
EYES = 2  # face part


def segments(labels, instances=None):
    labels = np.array(labels, np.uint8)
    return Segments(labels, np.array(labels if instances is None else instances, np.int32))


def random_scene(seed=0, size=16):
    rng = np.random.default_rng(seed)
    labels = rng.choice([*range(CLASSES), VOID], (size, size)).astype(np.uint8)
    return SceneMap(labels, rng.random((size, size)) < 0.3)


def test_the_label_space_is_the_documented_one():
    assert (len(PANOPTIC_CLASSES), len(HUMAN_CLASSES), len(FACE_CLASSES)) == (133, 19, 5)
    assert (CLASSES, EDGE_CHANNEL, CHANNELS) == (157, 157, 158)
    assert (HUMAN_IDS[0], HUMAN_IDS[-1], FACE_IDS[0], FACE_IDS[-1]) == (133, 151, 152, 156)
    assert CLASS_NAMES[PERSON] == "person" and CLASS_NAMES[THINGS - 1] == "toothbrush"
    assert CLASS_NAMES[132 + HAT] == "hat" and CLASS_NAMES[132 + FACE] == "face"
    assert len(set(PANOPTIC_CLASSES)) == 133


def test_coco_categories_ascend_and_skip_what_coco_skips():
    assert len(COCO_CATEGORY_IDS) == 133
    assert list(COCO_CATEGORY_IDS) == sorted(COCO_CATEGORY_IDS)
    assert COCO_CATEGORY_IDS[PANOPTIC_CLASSES.index("toothbrush")] == 90
    assert COCO_CATEGORY_IDS[PANOPTIC_CLASSES.index("banner")] == 92
    assert COCO_CATEGORY_IDS[PANOPTIC_CLASSES.index("sky-other-merged")] == 187
    assert COCO_CATEGORY_IDS[PANOPTIC_CLASSES.index("zebra")] == 24


def test_palette_colours_are_distinguishable():
    colours = PALETTE[:CLASSES].astype(int)
    distance = np.sqrt(((colours[:, None] - colours[None]) ** 2).sum(-1))
    distance[np.diag_indices(CLASSES)] = np.inf
    assert distance.min() >= 20
    assert np.sqrt((colours**2).sum(-1)).min() >= 20  # void's black stays apart


@pytest.mark.parametrize("seed", range(3))
def test_png_round_trip(seed):
    scene, file = random_scene(seed), io.BytesIO()
    scene.to_png(file)
    file.seek(0)
    assert Image.open(file).mode == "LA"
    file.seek(0)
    assert SceneMap.from_png(file) == scene


def test_rule_1_human_background_is_never_painted():
    scene = merge(panoptic=segments([[PERSON, PERSON]]), human=np.array([[0, HAT]], np.uint8))
    assert scene.labels.tolist() == [[PERSON, 132 + HAT]]


def test_rule_2_one_label_a_pixel_face_over_human_over_panoptic():
    scene = merge(
        panoptic=segments([[PERSON, PERSON, PERSON]]),
        human=np.array([[0, FACE, FACE]], np.uint8),
        face=np.array([[0, 0, EYES]], np.uint8),
    )
    assert scene.labels.tolist() == [[PERSON, 132 + FACE, 151 + EYES]]


def test_rule_3_without_a_person_human_and_face_maps_are_dropped():
    parts = np.array([[HAT, HAT]], np.uint8)
    scene = merge(panoptic=segments([[GRASS, VOID]]), human=parts, face=np.array([[1, 1]], "u1"))
    assert scene.labels.tolist() == [[GRASS, VOID]]


def test_parts_stay_within_person_and_void_pixels():
    panoptic = segments([[PERSON, GRASS, DOG, VOID]])
    parts = np.full((1, 4), HAT, np.uint8)
    assert merge(panoptic=panoptic, human=parts).labels.tolist() == [[133, GRASS, DOG, 133]]


def test_no_edge_runs_through_a_part_where_its_person_ends_and_void_begins():
    labels = [[PERSON, PERSON, VOID, VOID, PERSON, PERSON]]
    panoptic = segments(labels, [[1, 1, 0, 0, 2, 2]])
    scene = merge(panoptic=panoptic, human=np.full((1, 6), HAT, np.uint8))
    assert scene.edges.tolist() == [[False, False, True, False, False, False]]


def test_merge_refuses_part_maps_that_do_not_fit():
    with pytest.raises(SceneError, match="part map"):
        merge(panoptic=segments([[PERSON]]), human=np.array([[20]], np.uint8))
    with pytest.raises(SceneError, match="part map"):
        merge(panoptic=segments([[PERSON]]), face=np.zeros((2, 2), np.uint8))


PERSONS = Segments(np.zeros((2, 3), np.uint8), np.zeros((2, 3), np.int32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"panoptic": tuple(PERSONS)}, "panoptic must be Segments.*got tuple"),
        ({"panoptic": Segments([[0]], [[0]])}, "labels must be a uint8 array of H x W, got list"),
        (
            {"panoptic": PERSONS._replace(instances=np.zeros((3, 2), np.int32))},
            r"got int32 \(3, 2\)",
        ),
        (
            {"panoptic": PERSONS._replace(instances=None)},
            "instances must be integers.*got NoneType",
        ),
        ({"panoptic": PERSONS, "human": np.ones((2, 3))}, "human part map must be.*got float64"),
        ({"panoptic": PERSONS, "face": [[0] * 3] * 2}, "face part map must be integers.*got list"),
        ({"panoptic": PERSONS, "face": np.full((2, 3), -1)}, "ids 0-5, got -1 to -1"),
    ],
)
def test_merge_says_what_it_was_given_instead_of_maps(arguments, message):
    with pytest.raises(SceneError, match=message):
        merge(**arguments)


@pytest.mark.parametrize("instances", [np.ones((3, 2), int), np.ones((2, 3)), [[1] * 3] * 2, 5])
def test_instances_that_do_not_fit_are_refused(instances):
    with pytest.raises(SceneError, match=r"instances must be integers of \(2, 3\) like labels"):
        SceneMap.from_labels(np.zeros((2, 3), np.uint8), instances)


@pytest.mark.parametrize("size", [0, -1, 2.5, "8", None])
def test_scenes_have_no_such_size(size):
    with pytest.raises(SceneError, match=r"size is .*, use a whole number of 1 or more"):
        random_scene().resized(size)


def test_merge_leaves_its_inputs_alone():
    panoptic = segments([[PERSON, PERSON]])
    merge(panoptic=panoptic, human=np.array([[HAT, HAT]], np.uint8))
    assert panoptic.labels.tolist() == [[PERSON, PERSON]]


def test_edges_separate_classes_and_instances():
    labels = np.full((3, 4), DOG, np.uint8)
    instances = np.array([[1, 1, 2, 2]] * 3, np.int32)
    assert not find_edges(labels).any()
    assert find_edges(labels, instances).tolist() == [[False, True, False, False]] * 3


def test_face_parts_have_edges():
    face = np.zeros((5, 5), np.uint8)
    face[2, 2] = EYES
    scene = merge(panoptic=segments(np.full((5, 5), PERSON)), face=face)
    assert scene.edges[2, 2] and scene.edges[1, 2] and scene.edges[2, 1]


def test_coco_panoptic_png_keeps_classes_instances_and_void():
    rgb = np.array([[[7, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]], np.uint8)
    info = [
        {"id": 7, "category_id": 18},
        {"id": 256, "category_id": 18},
        {"id": 65536, "category_id": 193},
    ]
    found = from_coco(rgb, info)
    assert found.labels.tolist() == [[DOG, DOG, GRASS, VOID]]
    assert found.instances.tolist() == [[7, 256, 65536, 0]]


def test_coco_errors_name_the_segment_and_the_category():
    rgb = np.array([[[7, 0, 0]]], np.uint8)
    with pytest.raises(SceneError, match="7"):
        from_coco(rgb, [])
    with pytest.raises(SceneError, match="category_id 12 "):
        from_coco(rgb, [{"id": 7, "category_id": 12}])


def test_resizing_keeps_thin_instance_edges():
    labels = np.full((8, 8), DOG, np.uint8)
    edges = np.zeros((8, 8), np.bool_)
    edges[:, 3] = True
    small = SceneMap(labels, edges).resized(4)
    assert small.size == (4, 4)
    assert small.edges.tolist() == [[False, True, False, False]] * 4


@pytest.mark.parametrize("size", [20, 24, 47])
def test_a_smaller_scene_has_the_edges_that_preprocessing_at_its_size_would_find(size):
    labels, instances = np.full((48, 48), GRASS, np.uint8), np.zeros((48, 48), np.int32)
    for number, (top, left) in enumerate([(4, 5), (4, 18), (21, 10), (30, 30)], start=1):
        labels[top : top + 17, left : left + 13] = DOG  # the first three touch
        instances[top : top + 17, left : left + 13] = number
    index = nearest(48, size)
    few = np.ix_(index, index)
    expected = SceneMap.from_labels(labels[few], instances[few])
    assert (expected.edges & ~find_edges(expected.labels)).any()  # between the dogs
    found = SceneMap.from_labels(labels, instances).resized(size)
    assert np.array_equal(found.labels, expected.labels)
    assert (found.edges != expected.edges).sum() <= 1  # where an edge between two of them ends


def test_resizing_up_and_down_gives_the_same_labels():
    scene = SceneMap.from_labels(random_scene().labels)
    assert np.array_equal(scene.resized(48).resized(16).labels, scene.labels)


def test_only_square_scenes_are_resized():
    with pytest.raises(SceneError, match="square"):
        SceneMap.from_labels(np.zeros((4, 6), np.uint8)).resized(4)


def test_a_mirrored_scene_exchanges_left_and_right_parts():
    rng = np.random.default_rng(0)
    labels = rng.choice([CLASS_NAMES.index(n) for n in ("left-arm", "right-arm", "dog")], (8, 8))
    scene = SceneMap.from_labels(labels.astype(np.uint8))
    mirrored = scene.mirrored()
    assert np.array_equal(mirrored.edges, find_edges(mirrored.labels))
    names = np.array(CLASS_NAMES)
    expected = {"left-arm": "right-arm", "right-arm": "left-arm", "dog": "dog"}
    assert [expected[n] for n in names[labels[:, ::-1]].ravel()] == list(
        names[mirrored.labels].ravel()
    )


@pytest.mark.parametrize("seed", range(5))
def test_mirrored_twice_is_the_scene_itself(seed):
    scene = SceneMap.from_labels(random_scene(seed).labels)
    assert scene.mirrored() != scene and scene.mirrored().mirrored() == scene
    two_dogs = np.full((6, 12), DOG, np.uint8), np.repeat([[1] * 5 + [2] * 7], 6, axis=0)
    scene = SceneMap.from_labels(*two_dogs)
    assert scene.edges.any() and scene.mirrored().mirrored() == scene


@pytest.mark.parametrize("form", ["grey", "rgb", "rgba", "palette", "opaque-la"])
def test_read_scene_accepts_what_people_draw(tmp_path, form, caplog):
    scene = SceneMap.from_labels(random_scene().labels)
    grey, rgb = Image.fromarray(scene.labels), scene.to_rgb()
    if form == "palette":
        image = grey.copy()
        image.putpalette(PALETTE.ravel().tolist())
    else:
        images = {"grey": grey, "rgb": rgb, "rgba": rgb.convert("RGBA")}
        image = images.get(form, grey.convert("LA"))
    image.save(tmp_path / "a.png")
    with caplog.at_level(logging.WARNING):
        assert read_scene(tmp_path / "a.png") == scene
    assert not caplog.records


def test_transparent_pixels_are_void(tmp_path):
    rgba = np.zeros((1, 2, 4), np.uint8)
    rgba[0, 0] = [*PALETTE[GRASS], 255]
    rgba[0, 1] = [*PALETTE[GRASS], 0]
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert read_scene(tmp_path / "a.png").labels.tolist() == [[GRASS, VOID]]


def test_erased_pixels_of_grey_ids_are_void(tmp_path):
    labels = np.full((4, 4), GRASS, np.uint8)
    labels[:, 2:] = DOG
    alpha = np.full((4, 4), 255, np.uint8)
    alpha[0], alpha[1, 0], alpha[1, 1] = 0, 100, 200
    Image.fromarray(np.stack([labels, alpha], axis=-1)).save(tmp_path / "a.png")
    labels[0] = labels[1, 0] = VOID
    assert read_scene(tmp_path / "a.png") == SceneMap.from_labels(labels)


def test_colours_near_the_palette_snap_silently_others_with_a_warning(tmp_path, caplog):
    near = np.clip(PALETTE[[[GRASS, DOG]]].astype(int) - 2, 0, 255).astype(np.uint8)
    Image.fromarray(near).save(tmp_path / "near.png")
    assert read_scene(tmp_path / "near.png").labels.tolist() == [[GRASS, DOG]]
    assert not caplog.records
    Image.fromarray(np.full((1, 1, 3), (128, 255, 190), np.uint8)).save(tmp_path / "far.png")
    read_scene(tmp_path / "far.png")
    assert "100.0 %" in caplog.text and "needs its JSON beside it" in caplog.text
    half = np.stack([near[0, :1], np.full((1, 3), 90, np.uint8)], axis=1)
    Image.fromarray(half).save(tmp_path / "half.png")
    caplog.clear()
    read_scene(tmp_path / "half.png")
    assert "50.0 %" in caplog.text and "JSON" not in caplog.text


def test_every_colour_snaps_to_the_nearest_of_the_palette():
    rgba = np.random.default_rng(0).integers(0, 256, (80, 90, 4), np.uint8)  # more than one chunk
    rgba[..., 3] |= 128
    ids = [*range(CLASSES), VOID]
    differences = rgba[..., None, :3].astype(int) - PALETTE[ids].astype(int)
    nearest = np.array(ids)[(differences**2).sum(-1).argmin(-1)]
    assert np.array_equal(snap_colours(rgba), nearest)


@pytest.mark.parametrize("name", ["a.json", "a.segments.json", "elsewhere/all.json"])
def test_coco_scene_is_recognised_by_its_json(tmp_path, name):
    rgb = np.array([[[7, 0, 0], [8, 0, 0]]], np.uint8)
    info = [{"id": 7, "category_id": 18}, {"id": 8, "category_id": 18}]
    png = tmp_path / ("a.panoptic.png" if "segments" in name else "a.png")
    Image.fromarray(rgb).save(png)
    content = {"segments_info": info}
    if "elsewhere" in name:
        content = {"annotations": [{"file_name": "b.png"}, {"file_name": "a.png", **content}]}
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(content))
    given = tmp_path / name if "elsewhere" in name else None
    scene = read_scene(png, segments=given)
    assert scene.labels.tolist() == [[DOG, DOG]] and scene.edges.tolist() == [[True, False]]


def test_the_json_of_a_scene_may_begin_with_a_byte_order_mark(tmp_path):
    Image.fromarray(np.array([[[7, 0, 0]]], np.uint8)).save(tmp_path / "a.png")
    content = json.dumps({"segments_info": [{"id": 7, "category_id": 18}]})
    (tmp_path / "a.json").write_text(content, "utf-8-sig")
    assert read_scene(tmp_path / "a.png").labels.tolist() == [[DOG]]


def test_bad_scene_files_are_named_with_the_mend(tmp_path):
    def save(image, name):
        image.save(tmp_path / name)
        return tmp_path / name

    unknown = save(Image.fromarray(np.full((2, 2), 200, np.uint8)), "unknown.png")
    with pytest.raises(SceneError, match=r"unknown\.png: unknown class ids \[200\]"):
        read_scene(unknown)
    with pytest.raises(SceneError, match="mode I;16"):
        read_scene(save(Image.new("I;16", (2, 2)), "deep.png"))
    with pytest.raises(SceneError, match="mode LA, this one RGB"):
        SceneMap.from_png(save(Image.new("RGB", (2, 2)), "rgb.png"))
    with pytest.raises(SceneError, match="alpha"):
        SceneMap.from_png(save(Image.new("LA", (2, 2), (3, 7)), "alpha.png"))
    with pytest.raises(SceneError, match="no such file"):
        read_scene(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("<html>")
    with pytest.raises(SceneError, match="not a readable PNG"):
        read_scene(tmp_path / "text.png")
    (tmp_path / "broken.json").write_text('{"segments_info"')
    with pytest.raises(SceneError, match="not a readable JSON"):
        read_scene(save(Image.new("RGB", (2, 2)), "broken.png"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["segments_info"], r"a\.json: not in COCO's panoptic form"),
        ({"annotations": 5, "note": "segments_info"}, r"a\.json: not in COCO's panoptic form"),
        ({"annotations": [1], "note": "segments_info"}, r"a\.json: not in COCO's panoptic form"),
        ({"annotations": [], "note": "segments_info"}, r"no annotation with file_name 'a\.png'"),
        ({"segments_info": None}, r"a\.png with a\.json: segments_info must list"),
        ({"segments_info": ["a"]}, r"a\.png with a\.json: segments_info must list"),
        ({"segments_info": [{"id": 7}]}, r"a\.png with a\.json: segments_info must list"),
        ({"segments_info": [{"id": [7], "category_id": 18}]}, "segments_info must list"),
        ({"segments_info": [{"id": 7, "category_id": 12}]}, r"a\.json: category_id 12 "),
        ({"segments_info": []}, r"a\.png with a\.json: segment ids \[7\]"),
    ],
)
def test_a_json_that_does_not_describe_the_scene_is_named(tmp_path, content, message):
    Image.fromarray(np.array([[[7, 0, 0]]], np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(SceneError, match=message):
        read_scene(tmp_path / "a.png")


def test_scene_maps_refuse_arrays_of_the_wrong_kind():
    with pytest.raises(SceneError, match="uint8"):
        SceneMap(np.zeros((2, 2), np.int64), np.zeros((2, 2), np.bool_))
    with pytest.raises(SceneError, match="bool"):
        SceneMap(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.bool_))


def test_histogram_and_void_fraction_add_up():
    scene = SceneMap.from_labels(np.array([[DOG, DOG, GRASS, VOID]], np.uint8))
    assert scene.histogram() == {"dog": 2, "grass-merged": 1}
    assert scene.void_fraction() == 0.25
