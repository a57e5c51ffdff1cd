"""What a machine lacks is named all at once and early; on a cluster it is the workers that look."""

import importlib
import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from photo_world import make_shards, photo_sample, write_photos

from preprocess import panoptic
from preprocess.executor import ExecutorConfig, execute
from preprocess.needs import NeedsError, has_module, lacking_gpu, lacking_modules, require
from preprocess.photo import PhotoConfig
from preprocess.ray_executor import _explain
from preprocess.run import PreprocessConfig, preprocess
from preprocess.runner import Job
from preprocess.segment import FaceConfig, HumanConfig, PanopticConfig, lacks_of_sources
from preprocess.tokens import TokenizeConfig

ROOT = Path(__file__).parent.parent.parent
NETWORKS = {
    "panoptic": PanopticConfig(source="detectron2"),
    "human": HumanConfig(source="schp"),
    "face": FaceConfig(source="face-alignment"),
}
WEIGHTS = {  # file below MAS_WEIGHTS -> what fetches it
    "panoptic_fpn_R_50_3x.pkl": "mas fetch-weights panoptic",
    "exp-schp-201908261155-lip.pth": "mas fetch-weights human",
    "face/checkpoints/2DFAN4-11f355bf06.pth.tar": "mas fetch-weights face",
    "face/checkpoints/s3fd-619a316812.pth": "mas fetch-weights face",
}


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine without weights, detectron2, face-alignment and Ray; the weights folder."""
    monkeypatch.setenv("MAS_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name in ("detectron2", "face_alignment", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
    return tmp_path / "weights"


def run(tmp_path, **options):
    write_photos(tmp_path / "00000.tar", [photo_sample("a")])
    return preprocess(
        PreprocessConfig(
            input=str(tmp_path / "00000.tar"), output=str(tmp_path / "out"), **NETWORKS, **options
        )
    )


def test_everything_that_is_missing_is_named_before_ray_starts(bare, tmp_path):
    with pytest.raises(NeedsError) as caught:  # and not that Ray cannot be imported
        run(tmp_path)
    told = str(caught.value)
    assert told.startswith("7 things are missing: (1) ") and "; (7) " in told and "\n" not in told
    for package in ("ray[data]", "detectron2", "face_alignment"):
        assert f"needs {package}" in told
    assert told.count("pip install 'mini-make-a-scene[preprocess]'") == 2
    assert "--no-build-isolation 'git+https://" in told
    for file, command in WEIGHTS.items():
        assert f"put it at {bare / file}" in told and f"`{command}`" in told


def test_without_ray_a_serial_run_misses_nothing_else(bare, tmp_path):
    with pytest.raises(NeedsError, match=r"^6 things") as caught:
        run(tmp_path, executor="serial")
    assert "ray[data]" not in str(caught.value)


def test_one_thing_is_named_without_a_number(bare, monkeypatch):
    monkeypatch.setattr(panoptic, "lacking_modules", lambda *names, **about: [])
    for file in list(WEIGHTS)[1:]:
        (bare / file).parent.mkdir(parents=True, exist_ok=True)
        (bare / file).touch()
    (lack,) = lacks_of_sources(NETWORKS["panoptic"], NETWORKS["human"], FaceConfig())
    with pytest.raises(NeedsError, match=r"^the weights panoptic_fpn_R_50_3x are missing"):
        require([lack])


def test_weights_in_the_cache_of_torch_are_there(bare, tmp_path):
    folder = tmp_path / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    for file in WEIGHTS:
        if file.startswith("face"):
            (folder / Path(file).name).touch()
    (lack,) = lacks_of_sources(PanopticConfig(), HumanConfig(), NETWORKS["face"])
    assert "face_alignment" in lack


def test_a_device_that_is_not_there_is_among_what_is_missing(bare, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    human = HumanConfig(source="schp", options={"device": "cuda"})
    lacks = lacks_of_sources(PanopticConfig(), human, FaceConfig())
    assert len(lacks) == 2 and "device 'cuda'" in lacks[1]


def test_workers_of_a_cluster_tell_what_their_machine_lacks_all_at_once(
    local_ray, tmp_path, monkeypatch
):
    """The driver is not asked: it may lack what they have."""
    monkeypatch.setenv("MAS_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr("preprocess.run.lacks_of_sources", lambda *_: pytest.fail("asked here"))
    with pytest.raises(OSError) as caught:
        run(tmp_path, address="auto", workers=1)
    told = str(caught.value)
    where = f"no node can work: {socket.gethostname()}: "
    assert told.startswith(where) and " things are missing: (1) " in told
    assert all(str(tmp_path / "weights" / file) in told for file in list(WEIGHTS)[:2])


@pytest.mark.parametrize(
    ("options", "here"),
    [
        ({}, True),
        ({"address": "local"}, True),
        ({"address": "auto"}, False),
        ({"address": "head:6379"}, False),
        ({"address": "auto", "workers": 0}, True),
        ({"address": "auto", "kind": "serial"}, True),
    ],
)
def test_this_machine_is_asked_where_the_workers_are_here(options, here):
    assert ExecutorConfig(**options).here == here


def test_where_nothing_is_left_to_do_nothing_is_needed(tmp_path):
    def work(job, report):
        return {"photos_in": 1, "photos_out": 1}

    def run(lacks):
        jobs = [Job("00000", None, fingerprint="1")]
        config = ExecutorConfig(kind="serial")
        options = {"command": "count", "settings": {}, "config": config, "lacks": lacks}
        return execute(jobs, lambda: work, str(tmp_path / "out"), **options)

    with pytest.raises(NeedsError, match="a GPU"):
        run(lambda: ["a GPU"])
    assert run(lambda: []).done == 1
    assert run(lambda: ["a GPU"]).skipped == 1


def test_a_package_missing_within_a_shard_is_no_fault_of_the_shard(tmp_path):
    def work(job, report):
        raise ImportError("Install s3fs to access S3")

    with pytest.raises(OSError, match=f"{socket.gethostname()}: Install s3fs .* run again"):
        execute(
            [Job("00000", None, fingerprint="1")],
            lambda: work,
            str(tmp_path / "out"),
            command="count",
            settings={},
            config=ExecutorConfig(kind="serial"),
        )
    assert not list((tmp_path / "out").glob("*.error.json"))


@pytest.mark.parametrize("loose", [False, True])
def test_a_machine_that_does_not_see_the_input_says_so(tmp_path, monkeypatch, loose):
    """It would set aside one shard after the other."""
    shards = make_shards(tmp_path / "in", shards=2, photos=1)
    if loose:
        for path in shards.iterdir():
            path.unlink()
        (shards / "a.jpg").write_bytes(b"")
    seen = []

    def keep(*_, lacks, **__):
        seen.append(pickle.loads(pickle.dumps(lacks)))
        raise RuntimeError("enough")

    monkeypatch.setattr("preprocess.run.execute", keep)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="enough"):
        preprocess(PreprocessConfig(input="in", output="out", executor="serial"))
    monkeypatch.chdir("/")  # as a worker elsewhere
    assert seen[0]() == []
    shards.rename(tmp_path / "away")
    missing = shards if loose else shards / "00000.tar"
    assert seen[0]() == [f"the input {missing} is not there: mount it"]


def test_a_gpu_that_pytorch_does_not_see_is_not_taken_for_one(tmp_path, monkeypatch):
    """The networks would run on the CPU, and nothing would tell why it takes so long."""
    shards = make_shards(tmp_path / "in", shards=1, photos=1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("MAS_WEIGHTS", str(tmp_path))
    config = PreprocessConfig(
        input=str(shards),
        output=str(tmp_path / "out"),
        human=HumanConfig(source="schp"),
        face=FaceConfig(source="none"),
        gpus_per_worker=0.5,
    )
    said = r"2 things .* --gpus-per-worker 0\.5, but PyTorch sees no GPU"
    with pytest.raises(NeedsError, match=said):
        preprocess(config)
    assert lacking_gpu(0.0) == []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert lacking_gpu(0.5) == []


class Elsewhere:
    """Can be made here and not on the machine of a worker."""

    def __reduce__(self):
        return importlib.import_module, ("no_such_package",)


def test_workers_without_the_packages_of_the_driver_are_told_of_in_one_line(local_ray, tmp_path):
    with pytest.raises(
        OSError, match=r"^a worker on [\d.]+ cannot .*'no_such_package'\): pip inst"
    ) as caught:
        execute(
            [Job("00000", None, fingerprint="1")],
            Elsewhere(),
            str(tmp_path / "out"),
            command="count",
            settings={},
            config=ExecutorConfig(workers=1),
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ("The actor never ran - it was cancelled before it started running.", "RAY_AUTH_TOKEN"),
        ("The node it was on has died.", r"^Ray has lost the workers: The node it was on has died"),
    ],
)
def test_other_trouble_of_ray_becomes_one_line(last, said):
    told = _explain(RuntimeError(f"The actor died unexpectedly.\n\tclass_name: X\n{last}"))
    assert re.search(said, told) and "\n" not in told


def test_a_folder_that_bears_the_name_of_a_package_is_none(tmp_path, monkeypatch):
    (tmp_path / "detectron3/detectron3").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not has_module("detectron3") and not has_module("no_such_package.part")
    assert has_module("json.decoder")
    told = lacking_modules("detectron3", "json", "absent", user="a test", mend="go without")
    assert told == ["a test needs detectron3 and absent: go without"]


def test_a_store_whose_package_is_missing_is_named_in_one_line(tmp_path):
    class Absent:
        def find_spec(self, name, *_):
            if name.partition(".")[0] == "gcsfs":
                raise ModuleNotFoundError(name)

    shards = str(make_shards(tmp_path / "in", shards=1, photos=1))
    finder = Absent()
    sys.meta_path.insert(0, finder)
    try:
        for input, output in (("gs://bucket/in", str(tmp_path)), (shards, "gs://bucket/out")):
            with pytest.raises(OSError, match=r"^gs://bucket/\w+: .*gcsfs"):
                preprocess(PreprocessConfig(input=input, output=output, executor="serial"))
    finally:
        sys.meta_path.remove(finder)


def test_the_command_ends_with_one_line_and_without_ray(tmp_path):
    shards = make_shards(tmp_path / "in", shards=1, photos=1)
    command = [sys.executable, "-m", "mas", "preprocess", "--human.source", "schp"]
    command += ["--input", str(shards), "--output", str(tmp_path / "out")]
    nowhere = {**os.environ, "MAS_WEIGHTS": str(tmp_path / "weights")}
    done = subprocess.run(command, cwd=ROOT, env=nowhere, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("mas: error: the weights schp-lip are missing: run `mas fetch-weights")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run.json"}


@pytest.mark.parametrize("variable", ["HOME", "TMPDIR"])
def test_a_ray_that_cannot_start_says_what_it_needs(tmp_path, variable):
    """A home that cannot be written to, as in a container; a long path, as batch systems give."""
    shards = make_shards(tmp_path / "in", shards=1, photos=1)
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    where = {"HOME": f"{shards}/00000.tar", "TMPDIR": str(folder)}[variable]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-m", "mas", "preprocess", "--workers", "1", "--human.source"]
    command += ["none", "--face.source", "none", "--input", str(shards)]
    command += ["--output", str(tmp_path / "out")]
    environment[variable] = where
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("mas: error: Ray cannot start: ")
    assert "HOME" in last and "RAY_TMPDIR" in last and "Traceback" not in done.stderr


def test_numbers_that_cannot_be_are_named():
    for name, value in (("batch_size", 0), ("threads", -1), ("workers", -2)):
        with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
            PreprocessConfig(input="a", output="b", photo=PhotoConfig(), **{name: value})
    paths = dict.fromkeys(("vqseg", "vqgan", "tokenizer"), "x")
    for name, value in (("batch_size", 0), ("workers", -2), ("gpus_per_worker", -0.5)):
        with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
            TokenizeConfig(input="a", output="b", **paths, **{name: value})
