"""detectron2's panoptic segmentation: the 133 ids, true batches, colour order, checkpoints."""

import importlib.util
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mas.scene import CLASS_NAMES, PANOPTIC_CLASSES, VOID
from mas.shards import Sample
from preprocess import panoptic
from preprocess.batching import fitted_size
from preprocess.panoptic import (
    Detectron2Config,
    Detectron2Panoptic,
    from_detectron2,
    load_detectron2,
    read_state,
)
from preprocess.segment import Photo
from preprocess.weights import WeightsError

RED = np.full((96, 128, 3), (255, 0, 0), np.uint8)
ZOO = "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml"


def photos(*images):
    return [Photo(str(i), image, Sample(str(i), {})) for i, image in enumerate(images)]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_things_and_stuff_of_detectron2_become_the_133_ids():
    ids = np.array([[1, 1, 2, 3], [4, 5, 6, 0]], np.int32)
    info = [
        {"id": 1, "isthing": True, "category_id": 0, "score": 0.9},
        {"id": 2, "isthing": True, "category_id": 79, "score": 0.8},
        {"id": 3, "isthing": False, "category_id": 1, "area": 9},
        {"id": 4, "isthing": False, "category_id": 53, "area": 9},
        {"id": 5, "isthing": False, "category_id": 40, "area": 9},
        {"id": 6, "isthing": False, "category_id": 0, "area": 9},
    ]
    labels, instances = from_detectron2(ids, info)
    names = [[CLASS_NAMES[i] if i != VOID else "void" for i in row] for row in labels]
    assert names == [
        ["person", "person", "toothbrush", "banner"],
        ["rug-merged", "sky-other-merged", "void", "void"],
    ]
    assert labels.dtype == np.uint8 and instances.dtype == np.int32
    assert instances.tolist() == [[1, 1, 2, 3], [4, 5, 0, 0]]


def test_two_people_keep_their_instance_ids():
    info = [{"id": i, "isthing": True, "category_id": 0} for i in (1, 2)]
    labels, instances = from_detectron2(np.array([[1, 2]]), info)
    assert labels.tolist() == [[0, 0]] and instances.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ({"id": 1, "isthing": True, "category_id": 80}, "things of category 80"),
        ({"id": 1, "isthing": False, "category_id": 54}, "stuff of category 54"),
        ({"id": 2, "isthing": True, "category_id": 0}, r"segment ids \[1\]"),
    ],
)
def test_output_that_is_not_cocos_is_refused(segment, message):
    with pytest.raises(ValueError, match=message):
        from_detectron2(np.array([[1]]), [segment])


class Stub(torch.nn.Module):
    """Keeps its inputs; calls the left half a person and the right half sky."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, inputs):
        self.seen.append(inputs)
        info = [
            {"id": 1, "isthing": True, "category_id": 0},
            {"id": 2, "isthing": False, "category_id": 40},
        ]
        outputs = []
        for entry in inputs:
            ids = torch.full((entry["height"], entry["width"]), 2, dtype=torch.int32)
            ids[:, : entry["width"] // 2] = 1
            outputs.append({"panoptic_seg": (ids, info)})
        return outputs


def stubbed(monkeypatch, channels="BGR", **options):
    monkeypatch.setattr(panoptic, "load_detectron2", lambda config: (Stub(), channels))
    return Detectron2Panoptic(device="cpu", **options)


@pytest.mark.parametrize(("channels", "pixel"), [("BGR", [0, 0, 255]), ("RGB", [255, 0, 0])])
def test_the_network_receives_the_channel_order_of_its_config(monkeypatch, channels, pixel):
    segmenter = stubbed(monkeypatch, channels, short_side=64)
    segmenter(photos(RED))
    (inputs,) = segmenter.network.seen
    image_CHW = inputs[0]["image"]
    assert image_CHW.shape == (3, 64, 85) and image_CHW.dtype == torch.uint8
    assert (image_CHW.reshape(3, -1).T == torch.tensor(pixel, dtype=torch.uint8)).all()


def test_photos_of_one_batch_reach_the_network_in_one_call(monkeypatch):
    segmenter = stubbed(monkeypatch, short_side=64, batch=8)
    segments = segmenter(photos(RED, noise(90, 120), noise(96, 130)))
    assert [len(inputs) for inputs in segmenter.network.seen] == [3]
    assert [s.labels.shape for s in segments] == [(64, 85), (64, 85), (64, 87)]


def test_results_come_back_in_the_order_of_the_photos(monkeypatch):
    sizes = [(60, 200), (200, 60), (90, 120), (61, 200), (100, 100)]
    segmenter = stubbed(monkeypatch, short_side=30, batch=2)
    segments = segmenter(photos(*(noise(*size) for size in sizes)))
    assert len(segmenter.network.seen) > 1
    for (height, width), found in zip(sizes, segments, strict=True):
        assert found.labels.shape == fitted_size(height, width, short_side=30, max_side=1024)
        assert set(np.unique(found.labels)) == {0, 119}


def test_a_zoo_checkpoint_is_read_and_one_with_code_is_not(tmp_path):
    weights = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    zoo, evil = tmp_path / "zoo.pkl", tmp_path / "evil.pkl"
    zoo.write_bytes(pickle.dumps({"model": weights, "__author__": "zoo"}, protocol=2))
    state = read_state(zoo)
    torch.testing.assert_close(state["a.weight"], torch.arange(6.0).reshape(2, 3))
    evil.write_bytes(pickle.dumps({"model": {"a": Path.home}}))
    with pytest.raises(WeightsError, match=r"evil\.pkl: not a detectron2 .*it asks for builtins\."):
        read_state(evil)
    torch.save({"model": Call(os.mkdir, (str(tmp_path / "made"),))}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"asks for .*mkdir, which would run code") as caught:
        read_state(tmp_path / "evil.pth")
    assert "\n" not in str(caught.value) and not (tmp_path / "made").exists()


@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_of_every_kind_come_out_of_a_pickle_as_numpy_reads_them(tmp_path, protocol):
    arrays = {
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big-endian": np.arange(3, dtype=">i4"),
        "half": np.arange(3, dtype=np.float16),
        "truth": np.array([True, False]),
        "no numbers": np.zeros((0, 4), np.float32),
        "scalar": np.float32(2.5),
    }
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"model": {**arrays, "plain": 3}}, protocol=protocol))
    state = read_state(path)
    assert state.pop("plain") == 3
    for name, tensor in state.items():
        assert np.array_equal(tensor.numpy(), arrays[name]), name
        assert tensor.dtype == torch.as_tensor(arrays[name].astype(arrays[name].dtype.type)).dtype


class Call:
    """Pickles as a call, whose result is given a state."""

    def __init__(self, function, arguments, *state):
        self.call = (function, arguments, *state)

    def __reduce__(self):
        return self.call


FORGED = """
import pickle, sys
import numpy as np
from pathlib import Path
from preprocess.panoptic import read_state
sys.path.insert(0, sys.argv[2])
from test_panoptic import Call
field = {"model": (np.dtype("O"), 0)}
kind = Call(np.dtype, ("V8", False, True), (3, "|", None, ("model",), field, 8, 1, 0))
scalar = pickle.loads(pickle.dumps(np.float32(0))).__reduce__()[0]
Path(sys.argv[1]).write_bytes(pickle.dumps(Call(scalar, (kind, b"A" * 8)), protocol=2))
try:
    read_state(Path(sys.argv[1]))
except OSError as error:
    print(error)
"""


def test_a_forged_type_reads_no_memory(tmp_path):
    """Objects at addresses that the file names: NumPy itself ends the process."""
    path = tmp_path / "forged.pkl"
    command = [sys.executable, "-c", FORGED, str(path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.returncode
    assert f"{path}: not a detectron2 checkpoint" in done.stdout and "numbers" in done.stdout


def test_a_config_that_wants_to_run_code_is_refused(tmp_path, monkeypatch):
    class Config:
        """Reads YAML as fvcore's does; its default is detectron2's."""

        def merge_from_file(self, file, allow_unsafe=True):
            (yaml.unsafe_load if allow_unsafe else yaml.safe_load)(Path(file).read_text())

    for name, parts in (
        ("detectron2", {"model_zoo": None}),
        ("detectron2.config", {"get_cfg": Config}),
        ("detectron2.modeling", {"build_model": None}),
    ):
        module = types.ModuleType(name)
        vars(module).update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("preprocess.panoptic.find_weights", Path)
    file = tmp_path / "evil.yaml"
    file.write_text(f"A: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
    with pytest.raises(WeightsError, match=r"evil\.yaml: not a config of plain values"):
        load_detectron2(Detectron2Config(config_file=str(file)))
    assert not (tmp_path / "made").exists()


def test_a_model_saved_by_detectron2_itself_is_read(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "iteration": 3}, tmp_path / "model.pth")
    assert read_state(tmp_path / "model.pth")["a"].tolist() == [1, 1]


DAMAGED = {
    "nothing": b"",
    "a page": b"<html>",
    "a list": pickle.dumps([1]),
    "no model": pickle.dumps({"a": 1}),
    "bytes without end": b"\x80\x05\x8e" + b"\xff" * 8,
    "more bytes than there is memory": b"\x80\x05\x8e" + (2**60).to_bytes(8, "little"),
    "a type that is no Python": pickle.dumps(Call(np.dtype, ("(,)f4",)), protocol=2),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_files_that_are_no_checkpoints_are_refused_in_one_line(tmp_path, content):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(WeightsError, match=r"x\.pkl: not a detectron2 checkpoint"):
        read_state(tmp_path / "x.pkl")


@pytest.mark.skipif(importlib.util.find_spec("detectron2") is not None, reason="it is installed")
def test_without_detectron2_one_line_says_how_to_install_it():
    with pytest.raises(WeightsError, match="no-build-isolation") as caught:
        Detectron2Panoptic()
    assert "\n" not in str(caught.value)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="short_sides"):
        Detectron2Panoptic(short_sides=3)


@pytest.fixture(scope="module")
def zoo_file(tmp_path_factory):
    """Random weights of the R50 network in the model zoo's form, old buffers included."""
    pytest.importorskip("detectron2", reason="see docs/segmenters.md")
    from detectron2 import model_zoo
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(ZOO))
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    state = {name: tensor.numpy() for name, tensor in build_model(cfg).state_dict().items()}
    state["pixel_mean"] = np.zeros((3, 1, 1), np.float32)
    state["proposal_generator.anchor_generator.cell_anchors.0"] = np.zeros((3, 4), np.float32)
    path = tmp_path_factory.mktemp("detectron2") / "random.pkl"
    path.write_bytes(pickle.dumps({"model": state, "__author__": "nobody"}, protocol=4))
    yield path
    path.unlink()


@pytest.mark.detectron2
def test_the_real_network_is_batched_bgr_and_covers_the_photo(zoo_file):
    segmenter = Detectron2Panoptic(
        weights=str(zoo_file), short_side=96, score=0.0, stuff_area=0, device="cpu"
    )
    seen = []
    segmenter.network.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    segments = segmenter(photos(RED, noise(96, 128)))
    (batch_BCHW,) = seen
    assert len(batch_BCHW) == 2
    mean = torch.tensor([103.53, 116.28, 123.675])
    torch.testing.assert_close(batch_BCHW[0, :, 50, 50], torch.tensor([0.0, 0, 255]) - mean)
    for found in segments:
        assert found.labels.shape == (96, 128)
        assert np.isin(found.labels, [*range(len(PANOPTIC_CLASSES)), VOID]).all()
        assert (found.labels[found.instances == 0] == VOID).all()
        for instance in np.unique(found.instances):
            assert len(np.unique(found.labels[found.instances == instance])) == 1


@pytest.mark.detectron2
def test_the_real_network_says_what_our_mapping_expects(zoo_file):
    """Stuff ids count from 1 and things are flagged, in the installed version too."""
    from detectron2.data import MetadataCatalog

    metadata = MetadataCatalog.get("coco_2017_train_panoptic_separated")
    assert list(metadata.thing_classes) == list(PANOPTIC_CLASSES[:80])
    assert metadata.stuff_classes[0] == "things"
    for category, name in enumerate(metadata.stuff_classes[1:], start=1):
        info = [{"id": 1, "isthing": False, "category_id": category}]
        label = from_detectron2(np.array([[1]]), info).labels[0, 0]
        full = PANOPTIC_CLASSES[label]
        assert name in (full, full.removesuffix("-merged").removesuffix("-other"))


@pytest.mark.detectron2
def test_area_limits_scale_with_the_size(zoo_file):
    limits = []
    for short_side in (240, 480):
        config = Detectron2Config(weights=str(zoo_file), short_side=short_side, device="cpu")
        limits.append(panoptic.load_detectron2(config)[0].combine_stuff_area_thresh)
    assert limits == [1024, 4096]


@pytest.mark.detectron2
def test_weights_that_do_not_fit_the_config_are_refused_by_name(zoo_file, tmp_path):
    state = dict(read_state(zoo_file))

    def refused(state, message):
        torch.save({"model": state}, tmp_path / "other.pth")
        with pytest.raises(WeightsError, match=message):
            Detectron2Panoptic(weights=str(tmp_path / "other.pth"), device="cpu")

    name = "sem_seg_head.predictor.bias"
    refused({k: v for k, v in state.items() if k != name}, f"it lacks {name}")
    refused({**state, "extra": torch.zeros(1)}, "it has unknown extra")
    refused({**state, name: torch.zeros(7)}, f"size mismatch for {name}")


@pytest.mark.detectron2
def test_unknown_configs_are_refused(zoo_file, tmp_path):
    with pytest.raises(WeightsError, match="neither a file nor a config"):
        Detectron2Panoptic(config_file="panoptic.yaml", weights=str(zoo_file))
    (tmp_path / "mask.yaml").write_text("MODEL:\n  META_ARCHITECTURE: GeneralizedRCNN\n")
    with pytest.raises(WeightsError, match="use a PanopticFPN config"):
        Detectron2Panoptic(config_file=str(tmp_path / "mask.yaml"), weights=str(zoo_file))
