"""The three real networks in one worker, through the command, on random weights.

The weights are random except where they must be told what to answer: that each region is a person,
that each pixel of a crop is clothes, that a face fills the photo. So what comes out is known.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from photo_world import tar_bytes, write_photos

from mas.scene import CLASS_NAMES, FACE_IDS, HUMAN_IDS, SceneMap
from mas.shards import Sample, read_shard
from preprocess.bench import make_sample
from preprocess.schp import SCHP

ROOT = Path(__file__).parent.parent.parent
ZOO = "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml"
CLOTHES = 5  # LIP id
SIZE = 96

pytestmark = [pytest.mark.detectron2, pytest.mark.slow]


def save_panoptic(path):
    """Anchors become boxes as they are, each box a person, whose mask fills it."""
    from detectron2 import model_zoo
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(ZOO))
    cfg.MODEL.DEVICE = "cpu"
    state = {name: tensor.numpy() for name, tensor in build_model(cfg).state_dict().items()}
    heads = ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_head.predictor")
    for head in ("proposal_generator.rpn_head.anchor_deltas", *(f"roi_heads.{h}" for h in heads)):
        state[f"{head}.weight"][:] = 0
    state["roi_heads.box_predictor.cls_score.bias"][0] = 20
    state["roi_heads.mask_head.predictor.bias"][0] = 20
    path.write_bytes(pickle.dumps({"model": state, "__author__": "nobody"}, protocol=4))


def save_human(path):
    """Every pixel of every crop is clothes."""
    state = {f"module.{name}": tensor for name, tensor in SCHP().state_dict().items()}
    state["module.fushion.3.weight"] *= 0
    state["module.fushion.3.bias"] = torch.eye(20)[CLOTHES]
    torch.save({"epoch": 1, "state_dict": state}, path)


def save_faces(folder):
    """The detector's coarsest level sees a face in each of its anchors, the others nothing."""
    from face_alignment.detection.sfd.net_s3fd import s3fd
    from face_alignment.models import FAN

    folder.mkdir(parents=True)
    torch.save(FAN(4).state_dict(), folder / "2DFAN4-11f355bf06.pth.tar")
    state = s3fd().state_dict()
    for name in [name for name in state if "_mbox_" in name]:
        state[name][:] = 0
        if name.endswith("conf.bias"):
            state[name][-1] = 20 if name.startswith("conv7_2") else -20
    torch.save(state, folder / "s3fd-619a316812.pth")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Weights, photos without annotations and a config that names them."""
    pytest.importorskip("detectron2", reason="see docs/segmenters.md")
    pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    save_panoptic(folder / "panoptic.pkl")
    save_human(folder / "human.pth")
    save_faces(folder / "weights/face/checkpoints")
    samples = [make_sample(number) for number in range(3)]
    plain = [Sample(s.key, {e: s.files[e] for e in ("jpg", "txt", "json")}) for s in samples]
    write_photos(folder / "00000.tar", plain)
    config = {
        "photo": {"size": SIZE, "decode_side": 128},
        "panoptic": {
            "source": "detectron2",
            "options": {"weights": str(folder / "panoptic.pkl"), "short_side": 128},
        },
        "human": {
            "source": "schp",
            "options": {"weights": str(folder / "human.pth"), "max_people": 2},
        },
        "face": {"source": "face-alignment", "options": {}},
        "batch_size": 2,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    yield folder
    for path in [*folder.rglob("*.p*th*"), *folder.rglob("*.pkl")]:
        path.unlink()


def run(world, output, *options):
    command = [sys.executable, "-m", "mas", "preprocess", "--config", str(world / "config.yaml")]
    command += ["--input", str(world / "00000.tar"), "--output", str(output), *options]
    environment = {**os.environ, "MAS_WEIGHTS": str(world / "weights"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def labelled(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("labelled") / "out"
    return output, run(world, output, "--workers", "1", "--threads", "2")


def test_what_the_three_networks_say_is_what_the_scene_shows(labelled):
    output, printed = labelled
    assert "3 photos in, 3 out, none rejected" in printed
    samples = list(read_shard(str(output / "00000.tar")))
    assert [sample.key for sample in samples] == [make_sample(n).key for n in range(3)]
    clothes = CLASS_NAMES.index("upper-clothes")
    shown = set()
    for sample in samples:
        (output / "scene.png").write_bytes(sample.files["scene.png"])
        labels = SceneMap.from_png(output / "scene.png").labels
        assert labels.shape == (SIZE, SIZE)
        shown |= set(np.unique(labels).tolist())
    assert shown & set(HUMAN_IDS) == {clothes}
    assert shown & set(FACE_IDS)
    assert json.loads(samples[0].files["json"])["scene"]["people"] >= 1
    stats = json.loads((output / "00000.stats.json").read_text())
    assert min(stats["seconds"][stage] for stage in ("panoptic", "human", "faces")) > 0
    assert stats["people"] >= 3


def test_helpers_and_ray_do_not_change_a_byte(world, labelled, tmp_path):
    run(world, tmp_path / "out", "--executor", "serial", "--threads", "0")
    assert tar_bytes(tmp_path / "out") == tar_bytes(labelled[0])
