import json

import numpy as np
import pytest
from photo_world import DOG, GRASS, PERSON, SKY, blocks, encode, panoptic_files, photo_sample
from PIL import Image

from mas.scene import COCO_CATEGORY_IDS, VOID
from mas.shards import Sample
from preprocess.rejects import Reject, RejectError
from preprocess.segment import (
    CocoPanoptic,
    FaceConfig,
    HumanConfig,
    PanopticConfig,
    Photo,
    ShardFace,
    ShardHuman,
    ShardPanoptic,
    check_sources,
    decode_panoptic,
)


def photo_of(sample, shape=(64, 96), original=None):
    return Photo(sample.key, np.zeros((*shape, 3), np.uint8), sample, original)


def write_coco(folder, samples, *, digits=12):
    """COCO's panoptic JSON and folder for samples with panoptic files; ids 1, 2, …"""
    (folder / "png").mkdir()
    annotations = []
    for number, sample in enumerate(samples, start=1):
        name = f"{number:0{digits}d}.png"
        (folder / "png" / name).write_bytes(sample.files["panoptic.png"])
        info = json.loads(sample.files["segments.json"])["segments_info"]
        annotations.append({"image_id": number, "file_name": name, "segments_info": info})
    (folder / "panoptic.json").write_text(json.dumps({"annotations": annotations}))
    return CocoPanoptic(str(folder / "panoptic.json"), folder=str(folder / "png"))


def test_coco_ids_become_labels_instances_and_void():
    ids = np.array([[0, 0, 300, 300], [70000, 70000, 5, 5]], np.uint32)
    categories = {300: 1, 70000: 18, 5: 187}  # person, dog, sky-other-merged
    files = panoptic_files(ids, categories)
    info = json.loads(files["segments.json"])["segments_info"]
    labels, instances = decode_panoptic(files["panoptic.png"], info)
    assert labels.tolist() == [[VOID, VOID, PERSON, PERSON], [DOG, DOG, SKY, SKY]]
    assert np.array_equal(instances, ids) and instances.dtype == np.int32


def test_runs_of_pixels_decode_like_single_pixels():
    random = np.random.default_rng(0)
    ids = random.integers(0, 9, (40, 50)).astype(np.uint32) * 257
    categories = {i * 257: COCO_CATEGORY_IDS[i * 3] for i in range(1, 9)}
    files = panoptic_files(ids, categories)
    info = json.loads(files["segments.json"])["segments_info"]
    labels, instances = decode_panoptic(files["panoptic.png"], info)
    assert np.array_equal(instances, ids)
    assert np.array_equal(labels, np.where(ids == 0, VOID, ids // 257 * 3))


def test_coco_annotations_are_found_by_key_and_by_image_id(tmp_path):
    samples = [photo_sample("x", seed=1), photo_sample("y", seed=2)]
    coco = write_coco(tmp_path, samples)
    by_key = Sample("000000000002", {})
    by_id = Sample("some-other-key", {"json": b'{"image_id": 1}'})
    found = coco([photo_of(by_key), photo_of(by_id)])
    wanted = ShardPanoptic()([photo_of(samples[1]), photo_of(samples[0])])
    for one, other in zip(found, wanted, strict=True):
        assert np.array_equal(one.labels, other.labels)
        assert np.array_equal(one.instances, other.instances)


def test_a_photo_without_coco_annotation_is_rejected(tmp_path):
    coco = write_coco(tmp_path, [photo_sample("x")])
    for sample in (Sample("9", {}), Sample("9", {"json": b"{"}), Sample("9", {"json": b"[1]"})):
        with pytest.raises(RejectError) as error:
            coco([photo_of(sample)])
        assert error.value.reason is Reject.NO_ANNOTATION
    (tmp_path / "png" / "000000000001.png").unlink()
    with pytest.raises(RejectError) as error:
        coco([photo_of(Sample("000000000001", {}))])
    assert error.value.reason is Reject.NO_ANNOTATION


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"panoptic.png": None}, Reject.NO_ANNOTATION),
        ({"segments.json": None}, Reject.NO_ANNOTATION),
        ({"segments.json": b"{}"}, Reject.BAD_ANNOTATION),
        ({"segments.json": b'{"segments_info": [{}]}'}, Reject.BAD_ANNOTATION),
        ({"segments.json": b'{"segments_info": []}'}, Reject.BAD_ANNOTATION),
        ({"segments.json": b'{"segments_info": [{"id": 1, "category_id": 12}]}'}, None),
        ({"panoptic.png": b"\x89PNG\r\n\x1a\nbroken"}, Reject.BAD_ANNOTATION),
        ({"panoptic.png": encode(Image.new("RGB", (9, 9)))}, Reject.BAD_ANNOTATION),  # a JPEG
    ],
)
def test_a_bad_panoptic_annotation_is_rejected(files, reason):
    with pytest.raises(RejectError) as error:
        ShardPanoptic()([photo_of(photo_sample("x", **files))])
    assert error.value.reason is (reason or Reject.BAD_ANNOTATION)


def test_human_parts_come_from_the_shard():
    parts = np.arange(20, dtype=np.uint8).reshape(4, 5)
    sample = Sample("x", {"human.png": encode(Image.fromarray(parts), "PNG")})
    (found,) = ShardHuman()([photo_of(sample)], [])
    assert np.array_equal(found, parts)
    for image in (Image.fromarray(parts + 1), Image.new("RGB", (4, 5))):
        with pytest.raises(RejectError) as error:
            ShardHuman()([photo_of(Sample("x", {"human.png": encode(image, "PNG")}))], [])
        assert error.value.reason is Reject.BAD_ANNOTATION


def test_landmarks_follow_a_photo_that_was_decoded_reduced():
    points = np.random.default_rng(0).uniform(0, 60, (2, 68, 2))
    sample = Sample("x", {"landmarks.json": json.dumps(points.tolist()).encode()})
    whole, half = (
        ShardFace()([photo_of(sample, shape, (96, 64))], [])[0] for shape in ((64, 96), (32, 48))
    )
    assert np.allclose(whole, points) and np.allclose(half, points / 2)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[[[1, 2]]]",
        b'[["a"]]',
        b"null",
        json.dumps([[[1, 2]] * 67 + [[1, float("nan")]]]).encode(),
        json.dumps([[[1, 2]] * 67 + [[1, 1e9]]]).encode(),
    ],
)
def test_bad_landmarks_are_rejected(content):
    with pytest.raises(RejectError) as error:
        ShardFace()([photo_of(Sample("x", {"landmarks.json": content}))], [])
    assert error.value.reason is Reject.BAD_ANNOTATION


def test_no_face_is_an_empty_list():
    assert ShardFace()([photo_of(Sample("x", {"landmarks.json": b"[]"}))], []) == [[]]


@pytest.mark.parametrize(
    ("panoptic", "human", "face", "words"),
    [
        ({"source": "coco-annotations"}, {}, {}, "--panoptic.json"),
        ({"source": "coco-annotations", "json": "a", "folder": "no-such"}, {}, {}, "no-such"),
        ({"options": {"score": 0.5}}, {}, {}, "takes no options"),
        ({"source": "mask2former", "options": {"scor": 0.5}}, {}, {}, "'scor': use .* score,"),
        ({}, {"source": "schp", "options": {"margins": 1}}, {}, "margins"),
        ({}, {}, {"source": "face-alignment", "options": {"detectors": "x"}}, "detectors"),
    ],
)
def test_settings_that_cannot_work_are_named_before_a_worker_starts(panoptic, human, face, words):
    with pytest.raises(ValueError, match=words):
        check_sources(PanopticConfig(**panoptic), HumanConfig(**human), FaceConfig(**face))


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(
        __import__("preprocess.segment").segment.NETWORKS,
        "mask2former",
        ("preprocess.not_there", "A", "B"),
    )
    with pytest.raises(OSError, match=r"mini-make-a-scene\[preprocess\]"):
        check_sources(PanopticConfig(source="mask2former"), HumanConfig(), FaceConfig())


def test_blocks_of_the_test_world_show_what_the_tests_need():
    ids, categories = blocks(96, 64)
    assert {COCO_CATEGORY_IDS.index(categories[i]) for i in np.unique(ids)} >= {SKY, DOG, GRASS}
