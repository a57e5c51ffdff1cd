"""Samples rejected for a passing reason get another try; everything else stays as it is."""

import json
from functools import partial

import numpy as np
import pytest
from photo_world import photo_sample, tar_bytes, write_photos
from PIL import Image

import preprocess.run
from mas.scene import SceneError
from mas.shards import ShardError, read_shard
from preprocess.photo import PhotoConfig
from preprocess.rejects import PASSING, Reject
from preprocess.run import PreprocessConfig
from preprocess.run import preprocess as run_preprocess
from preprocess.segment import FaceConfig, HumanConfig, PanopticConfig
from preprocess.worker import SceneWorker, match

KEYS = [[f"{shard}{photo}" for photo in range(7)] for shard in range(3)]
LATE = ("02", "05", "13")  # photos whose annotations come late


class World:
    """Three shards; COCO annotations of all photos but three; one photo is broken for good."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "in").mkdir()
        (folder / "panoptic").mkdir()
        annotations, self.late = [], {}
        for shard, keys in enumerate(KEYS):
            samples = [photo_sample(key, seed=int(key)) for key in keys]
            for sample in samples:
                png = sample.files.pop("panoptic.png")
                info = json.loads(sample.files.pop("segments.json"))["segments_info"]
                name = f"{sample.key}.png"
                annotations.append(
                    {"image_id": int(sample.key), "file_name": name, "segments_info": info}
                )
                if sample.key in LATE:
                    self.late[name] = png
                else:
                    (folder / "panoptic" / name).write_bytes(png)
            if shard < 2:
                samples[1].files["jpg"] = b""
            write_photos(folder / "in" / f"{shard:05d}.tar", samples)
        (folder / "panoptic.json").write_text(json.dumps({"annotations": annotations}))

    def annotate_the_rest(self):
        for name, png in self.late.items():
            (self.folder / "panoptic" / name).write_bytes(png)

    def run(self, name="out", **options):
        self.output = self.folder / name
        return run_preprocess(
            PreprocessConfig(
                input=str(self.folder / "in"),
                output=str(self.output),
                photo=PhotoConfig(size=48, min_side=16),
                panoptic=PanopticConfig(
                    source="coco-annotations",
                    json=str(self.folder / "panoptic.json"),
                    folder=str(self.folder / "panoptic"),
                ),
                human=HumanConfig(source="none"),
                face=FaceConfig(source="none"),
                executor="serial",
                batch_size=3,
                **options,
            )
        )

    def rejects(self):
        lines = [
            json.loads(line)
            for path in sorted(self.output.glob("*.rejects.jsonl"))
            for line in path.read_text().splitlines()
        ]
        return [(line["key"], line["reason"]) for line in lines]

    def times(self):
        return {path.name: path.stat().st_mtime_ns for path in self.output.glob("0*")}

    def counts(self):
        fields = ("photos_in", "photos_out", "rejected", "classes", "people", "void", "input")
        stats = [json.loads(path.read_text()) for path in sorted(self.output.glob("*.stats.json"))]
        return [{field: content[field] for field in fields} for content in stats]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.mark.parametrize("threads", [0, 2])
def test_only_what_may_have_passed_is_tried_again(world, monkeypatch, capsys, threads):
    assert world.run(threads=threads) == 0
    assert "3 of them may be mended" in capsys.readouterr().out
    broken = [("01", "unknown_format"), ("11", "unknown_format")]
    assert sorted(world.rejects()) == sorted([*broken, *((k, "no_annotation") for k in LATE)])
    before = world.times()

    world.annotate_the_rest()
    assert world.run(threads=threads) == 0 and world.times() == before  # not without being asked
    asked = []

    class Watched(SceneWorker):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            segment = self.panoptic
            self.panoptic = lambda photos: [asked.append(p.key) for p in photos] and segment(photos)

    monkeypatch.setattr(preprocess.run, "SceneWorker", Watched)
    assert world.run(threads=threads, retry_rejected=True) == 0
    assert sorted(asked) == sorted(LATE)
    assert world.rejects() == broken
    assert {n: t for n, t in world.times().items() if n.startswith("00002")} == {
        n: t for n, t in before.items() if n.startswith("00002")
    }
    found, counts = tar_bytes(world.output), world.counts()
    monkeypatch.undo()
    assert world.run("whole") == 0
    assert found == tar_bytes(world.output) and counts == world.counts()


def test_what_is_still_missing_is_rejected_again(world):
    world.run()
    before, counts = tar_bytes(world.output), world.counts()
    assert world.run(retry_rejected=True) == 0
    assert tar_bytes(world.output) == before and world.counts() == counts


@pytest.mark.parametrize("moment", ["rejects", "stats"])
def test_another_try_that_is_cut_is_made_whole_by_the_next_run(world, monkeypatch, moment):
    world.run()
    world.annotate_the_rest()

    def cut(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "rejects":
            patch.setattr("preprocess.worker.write_file", cut)
        else:
            patch.setattr("preprocess.tally.Tally.stats", cut)
        with pytest.raises(KeyboardInterrupt):
            world.run(retry_rejected=True)
    assert world.run() == 0 and world.run(retry_rejected=True) == 0
    found, counts = tar_bytes(world.output), world.counts()
    world.run("whole")
    assert found == tar_bytes(world.output) and counts == world.counts()


def test_a_photo_that_a_network_could_not_use_gets_another_try(world, monkeypatch):
    class Failing(SceneWorker):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.panoptic = partial(self.refuse, self.panoptic)

        def refuse(self, segment, photos):
            if any(photo.key == "24" for photo in photos):
                raise SceneError("out of luck")
            return segment(photos)

    world.annotate_the_rest()
    monkeypatch.setattr(preprocess.run, "SceneWorker", Failing)
    world.run()
    assert ("24", "not_segmented") in world.rejects()
    monkeypatch.undo()
    world.run(retry_rejected=True)
    assert "24" not in dict(world.rejects())
    assert "24" in [s.key for s in read_shard(str(world.output / "00002.tar"))]


def test_an_input_that_has_lost_samples_is_no_second_try():
    samples = [photo_sample(key) for key in "abc"]
    with pytest.raises(ShardError, match="b is in the earlier shard"):
        list(match([samples[0], samples[2]], iter(samples)))


def test_passing_reasons_do_not_lie_in_the_sample_itself():
    assert set(PASSING) == {Reject.NO_PHOTO, Reject.NO_ANNOTATION, Reject.NOT_SEGMENTED}


def test_the_histogram_shows_each_class_in_its_colour(world):
    from mas.scene import CLASS_NAMES, PALETTE

    world.run()
    totals = json.loads((world.output / "summary.json").read_text())
    image = np.asarray(Image.open(world.output / "classes.png").convert("RGB"))
    found = {tuple(colour) for colour in image.reshape(-1, 3).tolist()}
    shown = {name for i, name in enumerate(CLASS_NAMES) if tuple(PALETTE[i].tolist()) in found}
    assert shown == set(totals["classes"])
