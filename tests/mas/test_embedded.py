"""What a program around the library may have set up, or may do with models and their results."""

import copy
import dataclasses
import itertools
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mas import MakeAScene, SceneMap
from mas.filter import Sampling
from mas.gpt import GPT

ROOT = Path(__file__).parent.parent.parent
CAPTION = "a giraffe in the park"


@pytest.fixture
def rotary_parts(parts):
    """Parts with a GPT that has all that a newer one has."""
    options = {"rotary": True, "qk_norm": True, "gated": True}
    torch.manual_seed(1)
    return {**parts, "gpt": GPT(dataclasses.replace(parts["gpt"].config, **options))}


def digest(generation):
    tokens = [stream.tolist() for stream in generation.tokens]
    return tokens, [image.tobytes() for image in generation.images]


@pytest.fixture
def default_dtype():
    """Sets the number format that torch takes where none is named."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_another_default_number_format_changes_nothing(
    rotary_parts, precision, dtype, default_dtype
):
    model = MakeAScene(**rotary_parts, precision=precision)
    expected = digest(model.generate(CAPTION, count=2, seed=3))
    default_dtype(dtype)
    again = MakeAScene(**rotary_parts, precision=precision)
    assert digest(model.generate(CAPTION, count=2, seed=3)) == expected
    assert digest(again.generate(CAPTION, count=2, seed=3)) == expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.device("meta"),
        torch.inference_mode,
        torch.enable_grad,
    ],
    ids=["autocast", "default device", "inference mode", "gradients"],
)
def test_what_a_program_has_set_up_around_a_call_changes_nothing(tiny_folder, precision, context):
    model = MakeAScene.from_pretrained(tiny_folder, device="cpu", precision=precision)
    expected = digest(model.generate(CAPTION, seed=3))
    with context():
        assert digest(model.generate(CAPTION, seed=3)) == expected
        again = MakeAScene.from_pretrained(tiny_folder, device="cpu", precision=precision)
    assert digest(again.generate(CAPTION, seed=3)) == expected


def test_sampled_tokens_are_tensors_like_any_other(tiny_model):
    tokens = tiny_model.generate(CAPTION, count=2).tokens
    assert not any(stream.is_inference() for stream in tokens)
    table = torch.nn.Embedding(300, 2)
    sum(table(stream).sum() for stream in tokens).backward()
    tokens.image[0, 0] = 1


def test_generations_and_progress_can_be_compared_and_put_into_sets(tiny_model):
    seen = []
    a, b = (tiny_model.generate(CAPTION, on_progress=seen.append) for _ in range(2))
    assert a == a and a != b and len({a, b}) == 2
    assert seen.index(seen[3]) == 3 and len(set(seen)) == len(seen)


@pytest.mark.parametrize("form", ["read-only", "mirrored"])
def test_arrays_of_any_form_can_be_given(tiny_model, form):
    labels = np.full((32, 32), 119, np.uint8)
    labels[20:, :7] = 23
    free = np.zeros((32, 32), np.bool_)
    free[:, 16:] = True
    picture = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)

    def ask(labels, free, picture):
        scene = SceneMap(labels, free)  # any edges will do
        given = {"image": Image.fromarray(picture), "image_free": free}
        requests = [{"scene": scene}, {"scene": scene, "scene_free": free}, given]
        return [digest(tiny_model.generate(CAPTION, **request)) for request in requests]

    arrays = [labels, free, picture]
    if form == "read-only":
        given = [x.copy() for x in arrays]
        for x in given:
            x.setflags(write=False)
    else:
        given = [x[:, ::-1].copy()[:, ::-1] for x in arrays]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask(*given) == ask(*arrays)


LABELS = np.zeros((32, 32), np.uint8)
SCENE = SceneMap.from_labels(LABELS)
FREE_HW = LABELS > -1
IMAGE = Image.new("RGB", (32, 32))


@pytest.mark.parametrize("free_HW", [None, ~FREE_HW, FREE_HW])
def test_scenes_of_a_result_are_nobody_elses(tiny_model, free_HW):
    scene = SceneMap(LABELS.copy(), LABELS > 0)
    out = tiny_model.generate(CAPTION, scene=scene, scene_free=free_HW, count=2)
    scenes = [scene, *out.scenes]
    for one, other in itertools.combinations(scenes, 2):
        assert not np.shares_memory(one.labels, other.labels)
        assert not np.shares_memory(one.edges, other.edges)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"caption": None}, "caption holds None, use a text"),
        ({"caption": b"a dog"}, "caption holds 97, use a text"),
        ({"caption": ["a dog", 5]}, "caption holds 5, use a text"),
        ({"count": 1.5}, "count is 1.5, use a whole number"),
        ({"count": "2"}, "count is '2', use a whole number"),
        ({"count": 2**64}, r"seed is 0 for \d+ pictures, use a number"),
        ({"count": 10**8}, "100000000 pictures are too many for one call: use 100000 or fewer"),
        ({"caption": ["a", "b"], "count": 50_001}, "100002 pictures are too many for one call"),
        ({"batch": 2.0}, "batch is 2.0, use a whole number"),
        ({"seed": 1.5}, "seed is 1.5, use a whole number"),
        ({"seed": None}, "seed is None, use a whole number"),
        ({"scene_candidates": float("nan")}, "scene_candidates is nan, use a whole number"),
        ({"guidance": "3"}, "guidance is '3', use a number"),
        ({"temperature": [1]}, r"temperature is \[1\], use a number"),
        ({"top_k": torch.tensor(0.5)}, r"top_k is tensor\(0.5000\), use a number"),
        ({"top_p": 1j}, "top_p is 1j, use a number"),
        ({"scene_sampling": {"guidance": None}}, "guidance is None, use a number"),
        ({"scene_sampling": "top_p"}, "scene_sampling is 'top_p', use a mapping"),
        ({"image_sampling": Sampling()}, r"image_sampling is Sampling\(.*use a mapping"),
        ({"image_sampling": {1: 2}}, "image_sampling knows guidance.*, not 1"),
        ({"scene": "scene.png"}, "scene is of type str, use a SceneMap: mas.scene.read_scene"),
        ({"scene": LABELS}, "scene is of type ndarray, use a SceneMap"),
        ({"scene": SCENE, "scene_free": [[True]]}, "scene_free must be a NumPy.*not a list"),
        ({"scene": SCENE, "scene_free": torch.ones(32, 32) > 0}, "scene_free.*not a Tensor"),
        ({"image": LABELS, "image_free": FREE_HW}, "image is of type ndarray, use a Pillow image"),
        ({"image": "a.png", "image_free": FREE_HW}, "image is of type str, use a Pillow image"),
        ({"image": IMAGE.convert("F"), "image_free": FREE_HW}, "image has mode F, use one in col"),
        ({"image": Image.new("RGB", (0, 0)), "image_free": FREE_HW}, "square, this one is 0x0"),
        ({"image": IMAGE, "image_free": FREE_HW.tolist()}, "image_free must be a NumPy.*a list"),
        ({"on_progress": 3}, "on_progress is 3, use a function"),
        ({"refine": "false"}, "refine is 'false', use True or False"),
        ({"refine": None}, "refine is None, use True or False"),
        ({"refine": 1}, "refine is 1, use True or False"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(tiny_model, request_, message):
    with pytest.raises(ValueError, match=message):
        tiny_model.generate(**{"caption": CAPTION, **request_})


@pytest.mark.parametrize(
    "make",
    [
        lambda: SceneMap.from_labels([[1, 2], [3, 4]]),
        lambda: SceneMap.from_labels(LABELS[0]),
        lambda: SceneMap.from_labels(torch.zeros(4, 4, dtype=torch.uint8)),
        lambda: SceneMap.from_labels(IMAGE),
        lambda: SceneMap(LABELS, None),
        lambda: SceneMap(LABELS, torch.zeros(32, 32) > 0),
    ],
)
def test_scenes_are_made_of_arrays_only(make):
    with pytest.raises(ValueError, match=r"must be .* got (list|uint8|Tensor|Image|NoneType)"):
        make()


@pytest.mark.parametrize("name", [None, 5, b"park", ["park"]])
def test_a_model_has_a_name_or_a_folder(name):
    with pytest.raises(ValueError, match="use a folder, a hub id or park"):
        MakeAScene.from_pretrained(name)


def test_a_model_says_which_of_its_own_values_are_of_another_kind(parts, tmp_path):
    with pytest.raises(ValueError, match="sampling is of type dict, use a Sampling"):
        MakeAScene(**parts, sampling={"guidance": 2})
    with pytest.raises(ValueError, match="scene_candidates is '2', use a whole number"):
        MakeAScene(**parts, scene_candidates="2")
    with pytest.raises(ValueError, match=r"card is of type .*Path, use its text"):
        MakeAScene(**parts).save_pretrained(tmp_path / "model", card=Path("README.md"))
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_are_numbers(parts, tmp_path):
    sampling = Sampling(guidance=np.float32(1.5), top_k=np.int64(7), top_p=np.float64(0.5))
    MakeAScene(**parts, sampling=sampling).save_pretrained(tmp_path / "model")
    model = MakeAScene.from_pretrained(tmp_path / "model", device="cpu")
    assert model.sampling.scene == Sampling(guidance=1.5, top_k=7, top_p=0.5)
    out = model.generate(CAPTION, count=np.int64(2), batch=np.uint8(1), temperature=np.float32(0.5))
    assert len(out.images) == 2
    assert json.loads(json.dumps(out.settings))["image"]["temperature"] == 0.5


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_models_can_be_pickled_and_copied(parts, tiny_folder, precision, stored):
    if stored:
        model = MakeAScene.from_pretrained(tiny_folder, device="cpu", precision=precision)
    else:
        model = MakeAScene(**parts, precision=precision)
    expected = digest(model.generate(CAPTION, count=2, seed=3))
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model)):
        assert digest(other.generate(CAPTION, count=2, seed=3)) == expected
        assert other.precision == precision and other.sha256 == model.sha256
    assert digest(model.generate(CAPTION, count=2, seed=3)) == expected


def test_sampling_leaves_random_numbers_of_the_program_alone(tiny_model):
    torch.manual_seed(11)
    np.random.seed(11)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    tiny_model.generate(CAPTION, count=2, seed=3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_several_calls_of_one_model_may_run_at_once(tiny_folder, precision):
    model = MakeAScene.from_pretrained(tiny_folder, device="cpu", precision=precision)
    expected = [digest(model.generate(CAPTION, count=2, seed=seed)) for seed in range(4)]
    inner = []

    def watch(progress):
        if progress.done == 10:
            inner.append(digest(model.generate(CAPTION, count=2)))

    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(model.generate, CAPTION, count=2, seed=seed, on_progress=watch)
            for seed in range(4)
        ]
        assert [digest(call.result()) for call in calls] == expected
    assert inner == expected[:1] * 4


def sample_in_a_worker(model, seed):
    return digest(model.generate(CAPTION, seed=seed))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_sample_what_their_parent_does(tiny_folder, precision, method):
    model = MakeAScene.from_pretrained(tiny_folder, device="cpu", precision=precision)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = [digest(model.generate(CAPTION, seed=seed)) for seed in range(2)]
        one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}  # docs/sampling.md
        with multiprocessing.get_context(method).Pool(2, **one_thread) as pool:
            found = pool.starmap_async(sample_in_a_worker, [(model, seed) for seed in range(2)])
            assert found.get(timeout=60) == expected
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_call_that_was_broken_off_leaves_nothing_behind(tiny_folder, precision, error):
    model = MakeAScene.from_pretrained(tiny_folder, device="cpu", precision=precision)
    expected = digest(model.generate(CAPTION, count=2, seed=3))

    def watch(progress):
        if progress.done == 20:
            raise error

    with pytest.raises(error):
        model.generate(CAPTION, count=2, seed=3, on_progress=watch)
    assert digest(model.generate(CAPTION, count=2, seed=3)) == expected


def test_a_model_of_a_relative_folder_is_read_wherever_the_program_goes(tiny_folder, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    model = MakeAScene.from_pretrained(tiny_folder.name, device="cpu")
    monkeypatch.chdir("/")
    assert digest(pickle.loads(pickle.dumps(model)).generate(CAPTION)) == digest(
        model.generate(CAPTION)
    )
    assert model.gpt.config.layers == 2


@pytest.mark.parametrize("read", [lambda model: model.gpt, copy.deepcopy])
def test_a_folder_that_holds_another_model_by_now_is_not_read_for_this_one(parts, tmp_path, read):
    MakeAScene(**parts).save_pretrained(tmp_path / "model")
    model = MakeAScene.from_pretrained(tmp_path / "model", device="cpu")
    assert read(model) is not None
    model = MakeAScene.from_pretrained(tmp_path / "model", device="cpu")
    other = {**parts, "gpt": GPT(parts["gpt"].config)}
    MakeAScene(**other).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds another model by now: load it again"):
        read(model)


CLIENT = """
from mas import Generation, MakeAScene, Progress, SceneMap
from mas.scene import VOID, read_scene

def watch(progress: Progress) -> None:
    images = progress.images()
    if progress.new_rows and images is not None:
        images[0].save("preview.png")

model = MakeAScene.from_pretrained("park", device="cpu", precision="int8")
scene: SceneMap = read_scene("scene.png")
out: Generation = model.generate(
    ["a dog"], scene=scene, scene_free=scene.labels == VOID, top_p=0.9, on_progress=watch
)
out.images[0].save(f"{out.seeds[0]}.png")
"""
WRONG = """
model.generate("a dog", scene="scene.png")
model.generate("a dog", colour="red")
model.generate("a dog", on_progress=len)
MakeAScene.from_pretrained("park", precision="float8")
"""


@pytest.mark.slow
def test_programs_that_use_the_library_are_checked_by_its_types(tmp_path):
    (tmp_path / "client.py").write_text(CLIENT + WRONG)
    command = [sys.executable, "-m", "mypy", "--strict", "client.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = [line for line in result.stdout.splitlines() if ": error:" in line]
    first = CLIENT.count("\n") + 2
    assert [int(line.split(":")[1]) for line in found] == [*range(first, first + 4)], result
