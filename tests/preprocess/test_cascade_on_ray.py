"""One Ray actor holds all three networks and decodes and encodes beside them."""

import json
import os
import socket
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from photo_world import PERSON, photo_sample, tar_bytes, write_photos
from ray import cloudpickle

import preprocess.run
import preprocess.worker
from mas.scene import Segments
from preprocess.photo import PhotoConfig
from preprocess.ray_executor import _count_workers as count_workers
from preprocess.ray_executor import _Head as Head
from preprocess.ray_executor import _warn_of_idle_gpus as warn_of_idle_gpus
from preprocess.run import ExecutorConfig
from preprocess.worker import SceneWorker

BATCH, PHOTOS = 4, 16
DEADLINE = 20.0  # seconds; only a test that fails takes them


class WatchedWorker(SceneWorker):
    """Stub networks; notes which process and thread does what, and waits for the helpers' work."""

    def __init__(self, notes, *arguments, **options):
        super().__init__(*arguments, **options)
        self.notes = Path(notes)
        self.calls, self.decoded, self.encoded = [], threading.Event(), threading.Event()
        self.panoptic, self.human, self.face = self.find, self.parse, self.find_faces
        decode, encode = preprocess.worker.decode, preprocess.worker.encode_jpeg
        self.counts = {"decode": 0, "encode": 0}
        preprocess.worker.decode = partial(self.watch, "decode", decode)
        preprocess.worker.encode_jpeg = partial(self.watch, "encode", encode)

    def watch(self, stage, function, *arguments):
        result = function(*arguments)
        self.note(stage)
        self.counts[stage] += 1
        if stage == "decode" and self.counts[stage] > BATCH:
            self.decoded.set()
        if stage == "encode":
            self.encoded.set()
        return result

    def note(self, stage):
        self.calls.append((stage, os.getpid(), threading.get_ident()))

    def find(self, photos):
        first = not any(stage == "panoptic" for stage, *_ in self.calls)
        self.note("panoptic")
        # within the first call a photo of the next batch is decoded; within the last one a photo
        # of an earlier batch is encoded
        assert self.threads == 0 or not first or self.decoded.wait(DEADLINE)
        if photos[-1].key == f"{PHOTOS - 1:02d}":
            assert self.threads == 0 or self.encoded.wait(DEADLINE)
        return [Segments(np.full((64, 96), PERSON, np.uint8), np.ones((64, 96), np.int32))] * len(
            photos
        )

    def parse(self, photos, segments):
        self.note("human")
        return [np.full((64, 96), 2, np.uint8)] * len(photos)

    def find_faces(self, photos, segments):
        self.note("face")
        (self.notes / "calls.json").write_text(json.dumps(self.calls))
        return [[]] * len(photos)


@pytest.mark.parametrize("threads", [0, 2])
def test_one_actor_holds_all_networks_and_works_beside_them(
    local_ray, tmp_path, monkeypatch, threads
):
    cloudpickle.register_pickle_by_value(__import__(__name__))
    write_photos(tmp_path / "00000.tar", [photo_sample(f"{i:02d}", seed=i) for i in range(PHOTOS)])
    monkeypatch.setattr(preprocess.run, "SceneWorker", partial(WatchedWorker, str(tmp_path)))
    status = preprocess.run.preprocess(
        preprocess.run.PreprocessConfig(
            input=str(tmp_path / "00000.tar"),
            output=str(tmp_path / "out"),
            photo=PhotoConfig(size=48, min_side=16),
            workers=1,
            batch_size=BATCH,
            threads=threads,
        )
    )
    assert status == 0 and len(tar_bytes(tmp_path / "out")) == 1
    calls = json.loads((tmp_path / "calls.json").read_text())
    by_stage = {}
    for stage, process, thread in calls:
        by_stage.setdefault(stage, set()).add((process, thread))
    networks = by_stage["panoptic"] | by_stage["human"] | by_stage["face"]
    assert len(networks) == 1 and {process for process, _ in networks} != {os.getpid()}
    helpers = by_stage["decode"] | by_stage["encode"]
    if threads:
        assert not helpers & networks and len(helpers) <= threads
    else:
        assert helpers == networks
    assert sum(stage == "panoptic" for stage, *_ in calls) == PHOTOS // BATCH


@pytest.mark.parametrize(
    ("options", "resources", "wanted"),
    [
        ({}, {"CPU": 8.0}, 8),
        ({"workers": 3}, {"CPU": 8.0}, 3),
        ({"gpus_per_worker": 0.5}, {"CPU": 64.0, "GPU": 4.0}, 8),
        ({"gpus_per_worker": 0.25}, {"CPU": 4.0, "GPU": 2.0}, 4),
        ({"gpus_per_worker": 1.0, "workers": 6, "address": "auto"}, {"CPU": 2.0}, 6),
        ({"gpus_per_worker": 1.0, "workers": 6}, {"CPU": 6.0, "GPU": 1.0}, 6),
    ],
)
def test_as_many_workers_as_cpus_and_gpus_hold(options, resources, wanted):
    assert count_workers(ExecutorConfig(**options), resources) == wanted


@pytest.mark.parametrize(
    ("options", "resources", "warned"),
    [
        ({"networks": True}, {"GPU": 2.0}, True),
        ({"networks": True}, {}, False),
        ({"networks": True, "gpus_per_worker": 0.5}, {"GPU": 2.0}, False),
        ({"networks": False}, {"GPU": 2.0}, False),
    ],
)
def test_gpus_that_nobody_uses_are_told_of(caplog, options, resources, warned):
    warn_of_idle_gpus(ExecutorConfig(**options), resources)
    assert ["--gpus-per-worker" in message for message in caplog.messages] == [True] * warned


@pytest.mark.parametrize(
    ("options", "mend"),
    [
        ({}, "leave it out"),
        ({"workers": 1}, "leave it out"),  # nobody brings a GPU to a Ray of its own: it would wait
        ({"address": "auto"}, "leave it out, or give --workers where an autoscaler will bring"),
    ],
)
def test_gpus_that_are_not_there_are_named(options, mend):
    with pytest.raises(ValueError, match=f"Ray sees 0 GPUs; {mend}"):
        count_workers(ExecutorConfig(gpus_per_worker=0.5, **options), {"CPU": 8.0})


def test_a_head_node_that_goes_is_told_of_once(caplog):
    server = socket.create_server(("127.0.0.1", 0))
    head = Head(f"127.0.0.1:{server.getsockname()[1]}")
    head.next_look = 0.0
    head.look()
    assert not caplog.messages
    server.close()
    for _ in range(3):
        head.next_look = 0.0
        head.look()
    (told,) = caplog.messages
    assert head.address in told and "does not answer" in told and "give it again" in told
