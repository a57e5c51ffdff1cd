import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from photo_world import (
    DOG,
    GRASS,
    PERSON,
    SKY,
    blocks,
    colour_of,
    decode,
    encode,
    panoptic_files,
    photo_sample,
    write_photos,
)
from PIL import Image
from test_landmarks import face

from mas.scene import (
    CLASS_NAMES,
    COCO_CATEGORY_IDS,
    FACE_IDS,
    HUMAN_IDS,
    VOID,
    SceneError,
    SceneMap,
    Segments,
    find_edges,
)
from mas.shards import Sample, read_shard
from preprocess.inputs import find_jobs
from preprocess.photo import EXIF_ORIENTATION, PhotoConfig
from preprocess.rejects import Reject
from preprocess.segment import FaceConfig, HumanConfig, PanopticConfig
from preprocess.worker import SceneConfig, SceneWorker, map_ordered

CONFIG = SceneConfig(
    photo=PhotoConfig(size=48, decode_side=64, min_side=16),
    human=HumanConfig(source="none"),
    face=FaceConfig(source="none"),
    max_caption_bytes=200,
)


def label(tmp_path, samples, config=CONFIG, **options):
    """Runs the worker on one shard: samples, rejects, stats."""
    tmp_path.mkdir(exist_ok=True)
    (job,) = find_jobs(write_photos(tmp_path / "00000.tar", samples))
    (tmp_path / "out").mkdir(exist_ok=True)
    worker = SceneWorker(config, str(tmp_path / "out"), **options)
    stats = worker(job, lambda count: None)
    lines = (tmp_path / "out" / "00000.rejects.jsonl").read_text().splitlines()
    samples = list(read_shard(str(tmp_path / "out" / "00000.tar")))
    return samples, [json.loads(line) for line in lines], stats


def scene_of(sample):
    return SceneMap.from_png(io.BytesIO(sample.files["scene.png"]))


def inner(scene):
    """Pixels two away from any edge, where JPEG and resampling leave the colour alone."""
    edges = scene.edges | find_edges(scene.labels[::-1, ::-1])[::-1, ::-1]
    for _ in range(2):
        edges = edges | np.roll(edges, 1, 0) | np.roll(edges, -1, 0)
        edges = edges | np.roll(edges, 1, 1) | np.roll(edges, -1, 1)
    return ~edges


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (64, 64), (301, 197), (197, 301)])
@pytest.mark.parametrize("turned", [False, True])
def test_scene_and_photo_show_the_same_square(tmp_path, size, turned):
    ids, categories = blocks(*size, labels=(DOG, GRASS, PERSON), seed=3)
    photo = Image.fromarray(colour_of(ids))
    exif = Image.Exif()
    if turned:  # the camera lay on its side; annotations are of the upright photo
        photo, exif[EXIF_ORIENTATION] = photo.transpose(Image.Transpose.ROTATE_90), 6
    files = {"jpg": encode(photo, exif=exif), "txt": b"a", **panoptic_files(ids, categories)}
    (sample,), _, _ = label(tmp_path, [Sample("x", files)])
    scene, photo = scene_of(sample), decode(sample.files["jpg"])
    assert photo.shape == (48, 48, 3) and scene.size == (48, 48)
    by_label = {COCO_CATEGORY_IDS.index(c): colour_of(i).astype(int) for i, c in categories.items()}
    seen = 0
    for number, colour in by_label.items():
        pixels = photo[(scene.labels == number) & inner(scene)]
        seen += len(pixels)
        assert np.abs(pixels.astype(int) - colour).max(initial=0) < 40, CLASS_NAMES[number]
    assert seen > 800


def test_annotations_of_another_resolution_fit(tmp_path):
    ids, categories = blocks(96, 64, seed=5)
    files = {"jpg": encode(Image.fromarray(colour_of(ids)))}
    half = {**files, "txt": b"a", **panoptic_files(ids[::2, ::2], categories)}
    full = {**files, "txt": b"a", **panoptic_files(ids, categories)}
    (one, other), _, _ = label(tmp_path, [Sample("a", half), Sample("b", full)])
    assert (scene_of(one).labels == scene_of(other).labels).mean() > 0.9


def test_instances_of_one_class_are_parted_by_an_edge(tmp_path):
    ids = np.ones((64, 64), np.uint32)
    ids[:, 32:] = 2
    files = panoptic_files(ids, {1: COCO_CATEGORY_IDS[DOG], 2: COCO_CATEGORY_IDS[DOG]})
    jpeg = encode(Image.fromarray(colour_of(ids)))
    (sample,), _, _ = label(tmp_path, [Sample("x", {"jpg": jpeg, "txt": b"two dogs", **files})])
    scene = scene_of(sample)
    assert (scene.labels == DOG).all() and scene.edges[:, 23].all() and scene.edges.sum() == 48


def test_void_stays_void(tmp_path):
    ids = np.zeros((64, 64), np.uint32)
    ids[:, 16:] = 1
    files = panoptic_files(ids, {1: COCO_CATEGORY_IDS[SKY]})
    jpeg = encode(Image.fromarray(colour_of(ids)))
    (sample,), _, _ = label(tmp_path, [Sample("x", {"jpg": jpeg, "txt": b"sky", **files})])
    assert (scene_of(sample).labels[:, :12] == VOID).all()
    assert json.loads(sample.files["json"])["scene"]["void"] == 0.25


def test_a_json_is_never_written_larger_than_it_is_read(tmp_path, monkeypatch):
    """Escapes double Korean, spaces lengthen lists, and the scene is added to all of it."""
    monkeypatch.setattr("mas.shards.MAX_JSON_BYTES", 2000)
    fields = {
        "latin": {"caption": "a dog", "note": "x" * 1600},
        "korean": {"caption": "개와 공 \ud800", "note": "공" * 500},
        "list": {"n": [1] * 900},
    }
    content = {
        key: json.dumps(value, ensure_ascii=key == "latin", separators=(",", ":"))
        for key, value in fields.items()
    }
    samples = [
        photo_sample(key, json=text.encode("utf-8", "backslashreplace"))
        for key, text in content.items()
    ]
    assert all(len(sample.files["json"]) < 1900 for sample in samples)
    written, (reject,), stats = label(tmp_path, samples)
    assert [sample.key for sample in written] == ["latin", "korean"]
    for sample in written:
        found = json.loads(sample.files["json"])
        assert found.pop("scene")["classes"] and found == fields[sample.key]
    assert written[0].files["json"].isascii()
    assert (reject["key"], reject["reason"]) == ("list", "member_too_large")
    assert "the JSON to be written has" in reject["detail"]
    assert stats["photos_out"] == 2 and stats["rejected"] == {"member_too_large": 1}
    assert max(counts["photos"] for counts in stats["classes"].values()) == 2


def test_captions_and_fields_come_through_untouched(tmp_path):
    fields = {"url": "http://x", "captions": ["ein Hund", "犬"], "n": 1.5, "deep": {"a": [None]}}
    samples = [
        photo_sample("a", json=json.dumps(fields).encode(), txt=b" ein Hund\n"),
        photo_sample("b", json=None, txt="犬".encode()),
        photo_sample("c", json=b'{"captions": ["only here"]}', txt=None),
    ]
    (a, b, c), rejects, _ = label(tmp_path, samples)
    written = json.loads(a.files["json"])
    assert written.keys() - fields.keys() == {"scene"}
    assert {k: written[k] for k in fields} == fields
    captions = [sample.files["txt"].decode() for sample in (a, b, c)]
    assert captions == ["ein Hund", "犬", "only here"] and not rejects
    summary = written["scene"]
    assert summary["classes"] == scene_of(a).histogram() and summary["people"] == 1


def test_keys_and_their_order_are_kept(tmp_path):
    keys = ["00000/3", "9", "a", "0", "B"]
    samples, _, _ = label(tmp_path, [photo_sample(key) for key in keys], batch_size=2)
    assert [sample.key for sample in samples] == keys
    assert list(samples[0].files) == ["jpg", "scene.png", "txt", "json"]


JPEG = encode(Image.new("RGB", (96, 64)))
BAD = {
    "truncated jpeg": ({"jpg": JPEG[:400]}, Reject.BROKEN_PHOTO),
    "html": ({"jpg": b"<html>"}, Reject.UNKNOWN_FORMAT),
    "no bytes": ({"jpg": b""}, Reject.UNKNOWN_FORMAT),
    "tiny": ({"jpg": encode(Image.new("RGB", (9, 9)))}, Reject.TOO_SMALL),
    "no photo": ({"jpg": None}, Reject.NO_PHOTO),
    "no caption": ({"txt": None}, Reject.NO_CAPTION),
    "blank caption": ({"txt": b" \n"}, Reject.NO_CAPTION),
    "blank captions": ({"json": b'{"captions": [" "]}'}, Reject.NO_CAPTION),
    "long caption": ({"txt": b"x" * 201}, Reject.CAPTION_TOO_LONG),
    "one long caption": ({"json": json.dumps({"captions": ["x" * 201]}).encode()}, None),
    "latin-1 caption": ({"txt": b"caf\xe9"}, Reject.CAPTION_NOT_TEXT),
    "utf-16 caption": ({"txt": "dog".encode("utf-16")}, Reject.CAPTION_NOT_TEXT),
    "NUL in the caption": ({"txt": b"a\0dog"}, Reject.CAPTION_NOT_TEXT),
    "half a surrogate": ({"json": b'{"captions": ["\\ud800"]}'}, Reject.CAPTION_NOT_TEXT),
    "broken json": ({"json": b"{"}, Reject.BAD_JSON),
    "json list": ({"json": b"[]"}, Reject.BAD_JSON),
    "deep json": ({"json": b"[" * 100_000}, Reject.BAD_JSON),
    "captions no list": ({"json": b'{"captions": "dog"}'}, Reject.BAD_JSON),
    "no annotation": ({"panoptic.png": None}, Reject.NO_ANNOTATION),
    "bad annotation": ({"panoptic.png": b"x"}, Reject.BAD_ANNOTATION),
    "another photo's annotation": (panoptic_files(*blocks(64, 96)), Reject.BAD_ANNOTATION),
}


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("threads", [0, 2])
def test_bad_samples_are_counted_and_the_good_ones_around_kept(tmp_path, batch_size, threads):
    samples = []
    for kind, (files, _) in BAD.items():
        samples += [photo_sample(f"good {kind}"), photo_sample(f"bad {kind}", **files)]
    kept, rejects, stats = label(tmp_path, samples, batch_size=batch_size, threads=threads)
    assert [sample.key for sample in kept] == [f"good {kind}" for kind in BAD]
    wanted = [(f"bad {k}", (r or Reject.CAPTION_TOO_LONG).value) for k, (_, r) in BAD.items()]
    assert [(reject["key"], reject["reason"]) for reject in rejects] == wanted
    assert all(reject["detail"] for reject in rejects)
    assert stats["photos_in"] == 2 * len(BAD) and stats["photos_out"] == len(BAD)
    assert sum(stats["rejected"].values()) == len(BAD)


def test_batches_and_threads_do_not_change_a_byte(tmp_path):
    samples = [photo_sample(f"{i}", seed=i, width=96 + 7 * i) for i in range(9)]
    contents = set()
    for number, options in enumerate(
        ({}, {"batch_size": 1}, {"batch_size": 4, "threads": 3}, {"batch_size": 2, "threads": 1})
    ):
        label(tmp_path / str(number), samples, **options)
        contents.add((tmp_path / str(number) / "out" / "00000.tar").read_bytes())
    assert len(contents) == 1


def test_any_photo_format_and_a_wrong_ending_are_read(tmp_path):
    photo = Image.fromarray(colour_of(blocks(96, 64)[0]))
    samples = [
        photo_sample("png", jpg=None, png=encode(photo, "PNG")),
        photo_sample("webp", jpg=None, webp=encode(photo, "WEBP")),
        photo_sample("jpeg", jpg=None, jpeg=encode(photo)),
        photo_sample("wrong", jpg=encode(photo, "PNG")),
    ]
    kept, rejects, _ = label(tmp_path, samples)
    assert len(kept) == 4 and not rejects
    assert all(Image.open(io.BytesIO(s.files["jpg"])).format == "JPEG" for s in kept)


class Recorder:
    """A segmenter that answers from a function and notes whom it was asked about."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    def __call__(self, photos, segments=None):
        self.asked.append([photo.key for photo in photos])
        given = segments or [None] * len(photos)
        return [self.answer(photo, part) for photo, part in zip(photos, given, strict=True)]


def run_cascade(tmp_path, samples, *, human, faces, batch_size=3):
    (job,) = find_jobs(write_photos(tmp_path / "00000.tar", samples))
    worker = SceneWorker(CONFIG, str(tmp_path), batch_size=batch_size)
    worker.output = str(tmp_path / "out")
    (tmp_path / "out").mkdir()
    worker.human, worker.face = human, faces
    worker(job, lambda count: None)
    return list(read_shard(str(tmp_path / "out" / "00000.tar")))


def whole_face(photo, segments):
    height, width = photo.image.shape[:2]
    return [face(centre=(width / 2 + 0.3, height / 2 + 0.3), scale=height / 140)]


def all_hat(photo, segments):
    return np.ones(segments.labels.shape, np.uint8)


def person_everywhere(key, **files):
    ids = np.ones((64, 96), np.uint32)
    annotation = panoptic_files(ids, {1: COCO_CATEGORY_IDS[PERSON]})
    return photo_sample(key, **annotation, **files)


def test_human_and_face_are_asked_only_about_photos_with_a_person(tmp_path):
    samples = [
        person_everywhere("person 0") if i % 4 == 0 else photo_sample(f"none {i}", labels=(DOG,))
        for i in range(3)
    ]
    samples += [photo_sample("none 3", labels=(GRASS,)), person_everywhere("person 4")]
    human, faces = Recorder(all_hat), Recorder(whole_face)
    kept = run_cascade(tmp_path, samples, human=human, faces=faces)
    assert [keys for keys in human.asked if keys] == [["person 0"], ["person 4"]]
    assert human.asked == faces.asked
    for sample in kept:
        found = set(np.unique(scene_of(sample).labels).tolist())
        drawn = found & (set(HUMAN_IDS) | set(FACE_IDS))
        if "person" in sample.key:
            assert drawn == {HUMAN_IDS[0], *FACE_IDS}
        else:
            assert not drawn


def test_a_person_outside_the_square_calls_no_network(tmp_path):
    ids = np.ones((64, 128), np.uint32)
    ids[:, :16] = 2
    files = panoptic_files(ids, {1: COCO_CATEGORY_IDS[SKY], 2: COCO_CATEGORY_IDS[PERSON]})
    human = Recorder(all_hat)
    run_cascade(
        tmp_path, [photo_sample("x", width=128, **files)], human=human, faces=Recorder(whole_face)
    )
    assert not human.asked


def test_landmarks_in_photo_pixels_land_in_the_square(tmp_path):
    sample = person_everywhere("x")
    (kept,) = run_cascade(tmp_path, [sample], human=None, faces=Recorder(whole_face))
    rows, columns = np.nonzero(scene_of(kept).labels == FACE_IDS[2])  # nose
    assert abs(columns.mean() + 0.5 - 24) < 1 and abs(rows.mean() + 0.5 - 24) < 2


def test_a_photo_that_a_network_refuses_is_rejected_alone(tmp_path):
    def refuse(photo, segments):
        if photo.key == "b":
            raise SceneError("no such size")
        return all_hat(photo, segments)

    samples = [person_everywhere(key) for key in "abc"]
    kept = run_cascade(tmp_path, samples, human=Recorder(refuse), faces=None)
    assert [sample.key for sample in kept] == ["a", "c"]
    line = (tmp_path / "out" / "00000.rejects.jsonl").read_text()
    assert json.loads(line) == {"key": "b", "reason": "not_segmented", "detail": "no such size"}


def test_an_error_of_a_network_fails_the_shard_and_leaves_nothing(tmp_path):
    def broken(photo, segments):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run_cascade(tmp_path, [person_everywhere("a")], human=Recorder(broken), faces=None)
    assert not list((tmp_path / "out").iterdir())


def test_annotations_of_people_come_from_the_shard(tmp_path):
    parts = np.full((64, 96), 13, np.uint8)  # LIP face
    landmarks = [face(centre=(48.3, 32.3), scale=0.5).tolist()]
    sample = person_everywhere(
        "x",
        **{
            "human.png": encode(Image.fromarray(parts), "PNG"),
            "landmarks.json": json.dumps(landmarks).encode(),
        },
    )
    config = SceneConfig(photo=CONFIG.photo)
    (kept,), rejects, stats = label(tmp_path, [sample], config)
    assert not rejects
    assert set(np.unique(scene_of(kept).labels)) == {HUMAN_IDS[12], *FACE_IDS}
    assert stats["people"] == 1


def test_an_empty_shard_is_no_error(tmp_path):
    kept, rejects, stats = label(tmp_path, [])
    assert (kept, rejects, stats["photos_in"], stats["photos_out"]) == ([], [], 0, 0)


def test_a_shard_of_bad_samples_alone_is_no_error(tmp_path):
    kept, rejects, stats = label(tmp_path, [photo_sample("x", jpg=b"")])
    assert not kept and len(rejects) == 1 and stats["photos_out"] == 0


def test_the_pipeline_holds_no_more_photos_than_its_window(tmp_path):
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    with ThreadPoolExecutor(2) as pool:
        for result in map_ordered(pool, lambda i: i, items(), 5):
            assert len(taken) <= result + 7
    assert len(taken) == 100


def test_a_segmenter_may_answer_at_any_resolution_of_the_same_aspect(tmp_path):
    def coarse(photo, segments=None):
        return Segments(np.full((32, 48), DOG, np.uint8), np.ones((32, 48), np.int32))

    (job,) = find_jobs(write_photos(tmp_path / "00000.tar", [photo_sample("x")]))
    (tmp_path / "out").mkdir()
    worker = SceneWorker(
        SceneConfig(photo=CONFIG.photo, panoptic=PanopticConfig()), str(tmp_path / "out")
    )
    worker.panoptic = Recorder(coarse)
    worker(job, lambda count: None)
    (sample,) = read_shard(str(tmp_path / "out" / "00000.tar"))
    assert (scene_of(sample).labels == DOG).all()
