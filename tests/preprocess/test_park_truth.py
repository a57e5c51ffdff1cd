"""What KEY.json says about a park picture is what its pixels show."""

from collections import Counter

import numpy as np
import pytest

from mas.scene import COCO_CATEGORY_IDS, PANOPTIC_CLASSES, THINGS, from_coco, merge
from preprocess.park_colours import COLOURS
from preprocess.park_people import FACE
from preprocess.park_truth import picture

from park_record import decode  # isort: skip

ACHROMATIC = ("black", "white", "grey")


@pytest.fixture(scope="module")
def records():
    return [decode(picture(11, index)) for index in range(150)]


def things(records):
    return [(record, thing) for record in records for thing in record.truth["things"]]


def test_things_are_the_thing_segments_with_their_boxes_and_pixels(records):
    for record in records:
        classes = {
            s["id"]: PANOPTIC_CLASSES[COCO_CATEGORY_IDS.index(s["category_id"])]
            for s in record.segments_info
        }
        present = set(np.unique(record.ids).tolist())
        assert present == set(classes)
        shown = {i: c for i, c in classes.items() if PANOPTIC_CLASSES.index(c) < THINGS}
        assert shown == {t["id"]: t["class"] for t in record.truth["things"]}
        assert record.truth["counts"] == dict(Counter(shown.values()))
        for thing in record.truth["things"]:
            rows, columns = np.nonzero(record.ids == thing["id"])
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert thing["box"] == box
            assert thing["pixels"] == len(rows)


def test_stuff_of_one_class_is_one_segment(records):
    for record in records:
        categories = Counter(s["category_id"] for s in record.segments_info)
        stuff = {COCO_CATEGORY_IDS[i] for i in range(THINGS, len(PANOPTIC_CLASSES))}
        assert all(n == 1 for category, n in categories.items() if category in stuff)


def test_things_are_large_enough_to_be_seen(records):
    for record, thing in things(records):
        x0, y0, x1, y1 = thing["box"]
        assert max(x1 - x0, y1 - y0) >= 0.08 * record.image.width
        assert thing["pixels"] >= 40


def lab(rgb):
    """OKLab (Ottosson 2020) with lightness at 0.6, so that shading matters less than hue."""
    linear = np.asarray(rgb, float) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    lms = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(lms) @ np.array(
        [
            [0.2104542553 * 0.6, 1.9779984951, 0.0259040371],
            [0.7936177850 * 0.6, -2.4285922050, 0.7827717662],
            [-0.0040720468 * 0.6, 0.4505937099, -0.8086757660],
        ]
    )


def colour_shares(pixels, light):
    """Share of the pixels nearest to each named colour, the light of the hour taken out."""
    names = list(COLOURS)
    bare = np.minimum(pixels / np.array(light), 255)
    distance = ((lab(bare)[:, None] - lab([COLOURS[n] for n in names])) ** 2).sum(-1)
    return dict(zip(names, np.bincount(distance.argmin(1), minlength=len(names)), strict=True))


def test_the_named_colour_is_the_colour_of_the_pixels(records):
    first, seen = 0, 0
    for record, thing in things(records):
        name = thing["colour"]
        if name is None or thing["pixels"] < 150:
            continue
        pixels = record.pixels[record.ids == thing["id"]]
        counts = colour_shares(pixels, record.truth["light"])
        share = counts[name] / len(pixels)
        assert share > 0.15, (record.captions[0], thing["class"], name, counts)
        rivals = {n: c for n, c in counts.items() if name in ACHROMATIC or n not in ACHROMATIC}
        first += max(rivals, key=rivals.get) == name
        seen += 1
    assert seen > 100
    assert first / seen > 0.9


def test_relations_hold_between_the_visible_boxes(records):
    seen = Counter()
    for record in records:
        found = {t["id"]: t for t in record.truth["things"]}
        for first, relation, second in record.truth["relations"]:
            a, b = found[first]["box"], found[second]["box"]
            middle_a, middle_b = (a[0] + a[2]) / 2, (b[0] + b[2]) / 2
            shared = min(a[2], b[2]) - max(a[0], b[0])
            size = record.image.width
            seen[relation] += 1
            if relation == "left of":
                assert middle_a < middle_b
            elif relation == "right of":
                assert middle_a > middle_b
            elif relation == "behind":
                assert a[3] < b[3] and shared > 0
            elif relation == "in front of":
                assert a[3] > b[3] and shared > 0
            elif relation == "next to":
                assert -0.1 * size < shared
            else:
                assert relation == "holds"
                assert found[first]["class"] == "person"
                assert found[second]["class"] in ("umbrella", "kite")
    assert set(seen) == {"left of", "right of", "behind", "in front of", "next to", "holds"}
    assert seen["left of"] == seen["right of"]
    assert seen["behind"] == seen["in front of"]


def test_nearer_things_cover_farther_ones(records):
    """In the overlap of two full boxes the nearer thing's pixels come closest to the viewer."""
    for record in records:
        standing = [
            t for t in record.truth["things"] if t["class"] not in ("boat", "airplane", "kite")
        ]
        standing = [t for t in standing if t["pose"] not in ("flying", "held")]
        feet = [t["foot"] for t in standing]
        assert feet == sorted(feet)


def test_perspective_makes_the_same_thing_larger_when_nearer(records):
    heights = {"near": [], "far": []}
    for record, thing in things(records):
        if thing["class"] in ("dog", "cat", "horse", "elephant", "person") and (
            thing["depth"] in heights and thing["size"] == "normal"
        ):
            _, y0, _, y1 = thing["box"]
            unit = {"dog": 0.56, "cat": 0.46, "horse": 1.05, "elephant": 1.3, "person": 1.0}
            heights[thing["depth"]].append((y1 - y0) / record.image.width / unit[thing["class"]])
    assert len(heights["near"]) > 5 and len(heights["far"]) > 5
    assert np.median(heights["near"]) > 1.5 * np.median(heights["far"])


def test_human_parts_fill_exactly_the_people(records):
    people = 0
    for record in records:
        ids = [t["id"] for t in record.truth["things"] if t["class"] == "person"]
        assert ((record.human > 0) == np.isin(record.ids, ids)).all()
        for i in ids:
            parts = set(np.unique(record.human[record.ids == i]).tolist())
            assert len(parts) >= 4
            people += 1
    assert people > 40


def test_garments_of_the_truth_are_parts_of_the_picture(records):
    parts = {"shirt": 5, "dress": 6, "coat": 7, "skirt": 12, "pants": 9, "shorts": 9}
    parts |= {"cap": 1, "sun hat": 1, "woolly hat": 1}
    for record, thing in things(records):
        shown = set(np.unique(record.human[record.ids == thing["id"]]).tolist())
        if thing["class"] == "person" and thing["pixels"] > 300:
            assert {parts[g] for g in thing["wears"]} <= shown | {9, 12}
            assert any(parts[g] in shown for g in thing["wears"])


def test_landmarks_lie_inside_the_face_part_of_one_person(records):
    faces = 0
    for record in records:
        assert len(record.landmarks) == record.truth["faces"]
        for points in record.landmarks:
            column, row = np.floor(points).astype(int).T
            assert (record.human[row, column] == FACE).all()
            assert len(set(record.ids[row, column].tolist())) == 1
            faces += 1
    assert faces > 25


def test_landmarks_keep_the_order_of_the_68_points(records):
    for points in np.concatenate([r.landmarks for r in records]):
        x, y = points.T
        assert (np.diff(x[:17]) > 0).all()  # jaw, from the picture's left to its right
        assert y[8] == y[:17].max()  # chin
        assert (np.diff(x[17:27]) > 0).all()  # brows
        assert (np.diff(y[27:31]) > 0).all()  # bridge of the nose, downward
        assert (np.diff(x[31:36]) > 0).all()
        for start in (36, 42):  # eyes: outer or inner corner, upper lid, corner, lower lid
            assert x[start] < x[start + 1] < x[start + 2] < x[start + 3]
            assert y[start + 1 : start + 3].max() < y[start + 4 : start + 6].min()
        assert x[36:42].max() < x[42:48].min()
        assert y[17:27].max() < y[36:48].min() + 1
        assert y[27:36].max() < y[48:68].min()
        assert x[48] == x[48:60].min() and x[54] == x[48:60].max()
        assert x[60] == x[60:68].min() and x[64] == x[60:68].max()
        assert y[50:53].max() < y[56:59].min()


def test_scene_maps_have_people_with_parts_and_no_bare_person_pixels(records):
    for record in records[:40]:
        segments = from_coco(record.ids_rgb, record.segments_info)
        scene = merge(panoptic=segments, human=record.human)
        assert "person" not in scene.histogram()
        assert scene.void_fraction() == 0


def test_the_hour_decides_how_bright_a_picture_is(records):
    bright = {}
    for record in records:
        bright.setdefault(record.truth["time"], []).append(record.pixels.mean())
    means = {time: np.mean(values) for time, values in bright.items()}
    assert means["day"] > means["sunset"] > means["night"]
    assert max(bright["night"]) < min(bright["day"])
