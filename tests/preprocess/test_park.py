"""The park command: deterministic shards, safe folders, clear refusals."""

import json

import numpy as np
import pytest
from PIL import Image, ImageChops

from mas.scene import COCO_CATEGORY_IDS, VOID, from_coco
from mas.shards import ShardError, expand_shards, read_captions, read_shard
from preprocess.park import SETTINGS_FILE, park
from preprocess.park_pen import _hard_light
from preprocess.park_truth import picture

from park_record import decode  # isort: skip


def read_all(folder):
    return [s for path in expand_shards(str(folder)) for s in read_shard(path)]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_same_seed_gives_the_same_bytes_whatever_the_number_of_workers(tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        park(output=str(tmp_path / name), count=34, size=32, shard_size=20, workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert list(contents(tmp_path / "one")) == ["00000.tar", "00001.tar", SETTINGS_FILE]


def test_no_bar_is_drawn_into_a_log(tmp_path, capsys):
    park(output=str(tmp_path / "out"), count=1, size=32, workers=1)
    assert not capsys.readouterr().err


def test_another_seed_gives_other_pictures():
    assert picture(0, 5, size=32)["jpg"] != picture(1, 5, size=32)["jpg"]


def test_hard_light_is_that_of_pillow_for_every_colour_and_light():
    colour, light = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    expected = ImageChops.hard_light(Image.fromarray(colour), Image.fromarray(light))
    assert np.array_equal(_hard_light(colour[None], light)[0], np.asarray(expected))


def test_a_picture_depends_on_neither_count_nor_shard_size(tmp_path):
    park(output=str(tmp_path / "a"), count=7, size=32, shard_size=3)
    park(output=str(tmp_path / "b"), count=5, size=32)
    first, second = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    assert [s.key for s in first] == [f"{i:09d}" for i in range(7)]
    assert first[:5] == second


def test_size_changes_the_pixels_and_nothing_that_is_told():
    for index in range(6):
        small, large = (json.loads(picture(2, index, size=s)["json"]) for s in (64, 160))
        assert small["captions"] == large["captions"]
        for record in (small, large):
            for thing in record["park"]["things"]:
                thing.pop("box"), thing.pop("pixels")
            record["park"].pop("faces")
        assert small["park"] == large["park"]


def test_running_again_completes_what_is_missing_and_touches_nothing_else(tmp_path):
    def run():
        park(output=str(tmp_path), count=6, size=32, shard_size=2)

    run()
    before = contents(tmp_path)
    kept = (tmp_path / "00000.tar").stat().st_mtime_ns
    (tmp_path / "00001.tar").rename(tmp_path / ".00001.tar.0a1b2c3d.tmp")  # killed while it wrote
    run()
    assert contents(tmp_path) == before
    assert (tmp_path / "00000.tar").stat().st_mtime_ns == kept


def test_shards_of_other_settings_are_not_mixed(tmp_path):
    park(output=str(tmp_path), count=2, size=32)
    before = contents(tmp_path)
    with pytest.raises(ShardError, match=r"another seed; choose another --output"):
        park(output=str(tmp_path), count=2, size=32, seed=9)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["00000.tar", "thesis.tex"])
def test_a_folder_with_something_else_is_left_alone(tmp_path, name):
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(ShardError, match=rf"holds something else \({name}\)"):
        park(output=str(tmp_path), count=2, size=32)
    assert contents(tmp_path) == {name: b"precious"}


def test_a_run_killed_while_it_claimed_the_folder_can_be_repeated(tmp_path):
    (tmp_path / ".park.json.0a1b2c3d.tmp").write_bytes(b"{")
    park(output=str(tmp_path), count=1, size=32)
    assert (tmp_path / "00000.tar").is_file()


def test_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ShardError, match="is a file"):
        park(output=str(tmp_path / "file"), count=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "--count must be at least 1, got 0"),
        ({"count": 1, "size": 31}, "--size must be 32 to 1024 pixels, got 31"),
        ({"count": 1, "size": 4096}, "--size must be 32 to 1024"),
        ({"count": 1, "shard_size": 0}, "--shard-size must be at least 1"),
        ({"count": 1, "held_out": "never"}, "--held-out is one of exclude, only, include"),
        ({"count": 1, "workers": 0}, "--workers must be at least 1"),
    ],
)
def test_bad_arguments_are_named_and_write_nothing(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        park(output=str(tmp_path / "out"), **arguments)
    assert not (tmp_path / "out").exists()


def test_files_of_a_picture_are_what_annotation_segmenters_read(tmp_path):
    park(output=str(tmp_path), count=3, size=48)
    for sample in read_all(tmp_path):
        assert list(sample.files) == [
            "jpg", "txt", "json", "panoptic.png", "segments.json", "human.png", "landmarks.json",
        ]  # fmt: skip
        captions = read_captions(sample)
        assert len(captions) == 3
        assert sample.files["txt"].decode() == captions[0]


def test_every_pixel_belongs_to_a_segment_at_every_size():
    for size in (32, 64, 100, 256):
        for index in range(4):
            record = decode(picture(4, index, size=size))
            assert record.image.size == (size, size)
            segments = from_coco(record.ids_rgb, record.segments_info)
            assert segments.labels.shape == (size, size)
            assert not (segments.labels == VOID).any()
            assert {s["category_id"] for s in record.segments_info} <= set(COCO_CATEGORY_IDS)
            assert all(thing["pixels"] > 0 for thing in record.truth["things"])
