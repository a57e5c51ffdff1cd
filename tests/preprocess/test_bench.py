import json

import pytest
from photo_world import make_shards, photo_sample, write_photos

from mas.shards import read_shard
from preprocess.bench import (
    StubNetwork,
    bench_preprocess,
    make_sample,
    measure_overhead,
    write_shards,
)
from preprocess.bench import _read as read_samples
from preprocess.photo import PhotoConfig
from preprocess.segment import FaceConfig, HumanConfig
from preprocess.worker import SceneConfig

PROMISED = {
    "photos_per_second_per_core",
    "workers",
    "network_overhead",
    "stage_seconds",
    "worker_peak_mb",
    "scene_png_bytes",
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("preprocess.bench.DISTINCT", 4)
    monkeypatch.setattr("preprocess.bench.NETWORK_PHOTOS", 16)


def test_the_figures_have_the_promised_names_and_fit_each_other(tmp_path, local_ray, quick):
    shards = make_shards(tmp_path / "in", shards=2, photos=5)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    figures = bench_preprocess(
        input=str(shards),
        photos=25,
        photo=PhotoConfig(size=48, min_side=16),
        human=HumanConfig(source="none"),
        face=FaceConfig(source="none"),
        network_ms=1.0,
    )
    assert json.loads(json.dumps(figures)).keys() >= PROMISED
    assert figures["photos"] == 25 and figures["workers"].keys() == {"1", "2"}
    stages = figures["stage_seconds"]
    assert {"decode", "panoptic", "merge", "encode"} <= stages.keys() and "human" not in stages
    assert 0 < sum(stages.values()) <= 1.05 / figures["photos_per_second_per_core"]
    assert 20 < figures["scene_png_bytes"] < 2000
    assert 30 < figures["worker_peak_mb"] < 2000
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_the_overhead_is_what_comes_on_top_of_the_networks(tmp_path, quick, monkeypatch):
    (tmp_path / "real").mkdir()
    assert measure_overhead(SceneConfig(), str(tmp_path / "real"), seconds=0.001, threads=0) > 0

    def claim_hours(self, photos, segments=None):
        self.busy += 10_000.0
        return [self.answer] * len(photos)

    monkeypatch.setattr(StubNetwork, "__call__", claim_hours)
    (tmp_path / "claimed").mkdir()
    claimed = measure_overhead(SceneConfig(), str(tmp_path / "claimed"), seconds=1.0, threads=2)
    assert -1 < claimed < -0.99


def test_shards_that_are_full_are_stored_once(tmp_path):
    write_shards(str(tmp_path / "in"), [photo_sample(key) for key in "abc"], photos=8)
    paths = sorted((tmp_path / "in").iterdir())
    assert [len(list(read_shard(str(path)))) for path in paths] == [3, 3, 2]
    assert [path.stat().st_nlink for path in paths] == [2, 2, 1]


def test_generated_photos_are_like_those_of_coco():
    sample = make_sample(0)
    assert make_sample.__wrapped__(0) == sample != make_sample(1)
    assert 100_000 < len(sample.files["jpg"]) < 300_000
    assert 3_000 < len(sample.files["panoptic.png"]) < 20_000


def test_photos_that_are_all_rejected_cannot_be_measured_with(tmp_path, quick):
    write_photos(tmp_path / "00000.tar", [photo_sample("a", jpg=b"")])
    with pytest.raises(ValueError, match="unknown_format"):
        bench_preprocess(input=str(tmp_path / "00000.tar"), photos=1)


def test_shards_without_a_sample_are_named(tmp_path):
    write_photos(tmp_path / "00000.tar", [])
    with pytest.raises(ValueError, match=r"00000\.tar: there is not one sample in it"):
        bench_preprocess(input=str(tmp_path / "00000.tar"), photos=1)


def test_no_more_photos_are_read_than_are_measured_with(tmp_path):
    """Those of an input may not fit into the memory."""
    shards = make_shards(tmp_path / "in", shards=3, photos=2)
    (shards / "00002.tar").write_bytes(b"is not opened")
    assert [sample.key for sample in read_samples(str(shards), 3)] == [
        "000000000",
        "000000001",
        "000010000",
    ]
