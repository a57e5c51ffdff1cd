import dataclasses
import hashlib
import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

import mas.model
import mas.model_folder
from mas import MakeAScene
from mas.filter import Sampling
from mas.gpt import GPT
from mas.model_folder import FILES, ModelError
from mas.precision import StoredGPT, choose_device, choose_precision
from mas.scene import VOID, SceneError, SceneMap
from mas.storage import StoredTensors
from mas.text import Tokenizer
from mas.vqgan import VQGAN
from mas.vqseg import VQSEG

CAPTION = "a giraffe in the park"


def make_scene(size=32):
    labels = np.full((size, size), 119, np.uint8)
    labels[size // 2 :] = 125
    labels[size // 4 : 3 * size // 4, size // 4 : size // 2] = 23
    return SceneMap.from_labels(labels)


def pixels(generation):
    return [np.asarray(image) for image in generation.images]


def same(a, b):
    pictures = zip(pixels(a), pixels(b), strict=True)
    return a.scenes == b.scenes and all(np.array_equal(x, y) for x, y in pictures)


def test_a_caption_gives_pictures_with_their_scenes(tiny_model):
    out = tiny_model.generate(CAPTION, count=3, seed=5)
    assert [image.size for image in out.images] == [(32, 32)] * 3
    assert [scene.size for scene in out.scenes] == [(32, 32)] * 3
    assert out.captions == [CAPTION] * 3 and out.seeds == [5, 6, 7]
    assert [stream.shape for stream in out.tokens] == [(3, 12), (3, 16), (3, 16)]
    assert out.seconds > 0 and out.tokens_per_second > 0
    assert len({image.tobytes() for image in out.images}) == 3


def test_saved_and_loaded_models_give_identical_samples(tiny_model, tiny_folder):
    loaded = MakeAScene.from_pretrained(tiny_folder, device="cpu", precision="float32")
    assert same(
        tiny_model.generate(CAPTION, count=2, seed=1), loaded.generate(CAPTION, count=2, seed=1)
    )
    assert loaded.sampling == tiny_model.sampling
    assert loaded.sha256 and tiny_model.sha256 is None


def test_each_picture_depends_on_its_caption_and_seed_alone(tiny_model):
    captions = ["two dogs", CAPTION]
    together = tiny_model.generate(captions, count=4, seed=3, batch=3)
    for c, caption in enumerate(captions):
        for i in range(4):
            alone = tiny_model.generate(caption, seed=3 + i)
            index = 4 * c + i
            assert np.array_equal(pixels(alone)[0], pixels(together)[index])
            assert alone.scenes[0] == together.scenes[index]


def test_a_given_scene_is_kept_and_steers_the_picture(tiny_model):
    scene = make_scene()
    out = tiny_model.generate(CAPTION, scene=scene, count=2)
    assert out.scenes == [scene, scene]
    expected = tiny_model.encode_scene(scene)
    assert torch.equal(out.tokens.scene, expected.repeat(2, 1))
    other = SceneMap.from_labels(np.full((32, 32), 40, np.uint8))
    assert not np.array_equal(pixels(out)[0], pixels(tiny_model.generate(CAPTION, scene=other))[0])


def test_a_scene_of_another_size_is_resized_and_a_wide_one_refused(tiny_model):
    out = tiny_model.generate(CAPTION, scene=make_scene(128))
    assert out.scenes[0].size == (32, 32)
    assert np.array_equal(out.scenes[0].labels, make_scene(32).labels)
    wide = SceneMap.from_labels(np.zeros((32, 48), np.uint8))
    with pytest.raises(SceneError, match=r"must be square.*48x32"):
        tiny_model.generate(CAPTION, scene=wide)


def test_a_scene_alone_is_enough_and_guidance_then_changes_nothing(tiny_model):
    a = tiny_model.generate("", scene=make_scene(), guidance=1.0)
    b = tiny_model.generate("", scene=make_scene(), guidance=5.0)
    assert same(a, b)


def test_a_partial_scene_keeps_the_given_cells_and_predicts_the_rest(tiny_model):
    scene = make_scene()
    free = np.zeros((32, 32), np.bool_)
    free[8:24, 16] = True  # one column of pixels frees the cells it crosses
    out = tiny_model.generate(CAPTION, scene=scene, scene_free=free, count=6)
    cells = np.zeros((4, 4), np.bool_)
    cells[1:3, 2] = True
    kept = torch.from_numpy(~cells.ravel())
    expected = tiny_model.encode_scene(scene)
    assert torch.equal(out.tokens.scene[:, kept], expected[:, kept].repeat(6, 1))
    assert len({tuple(row) for row in out.tokens.scene[:, ~kept].tolist()}) > 1
    everything = np.ones((32, 32), np.bool_)
    assert same(
        tiny_model.generate(CAPTION, scene=scene, scene_free=everything),
        tiny_model.generate(CAPTION),
    )


@pytest.mark.parametrize("size", [4, 30, 101])
def test_a_free_part_of_a_scene_of_any_size_is_predicted(tiny_model, size):
    scene = make_scene().resized(size)
    free = np.zeros((size, size), np.bool_)
    free[-1, -1] = True  # lies in the last cell
    out = tiny_model.generate(CAPTION, scene=scene, scene_free=free, count=6)
    given = tiny_model.encode_scene(scene)
    assert (out.tokens.scene[:, :-1] == given[:, :-1]).all()
    assert (out.tokens.scene[:, -1] != given[:, -1]).any()


def test_part_of_a_picture_can_be_given(tiny_model):
    image = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    free = np.zeros((32, 32), np.bool_)
    free[16:] = True
    out = tiny_model.generate(CAPTION, image=image, image_free=free, count=2)
    expected = tiny_model.encode_image(image)
    assert torch.equal(out.tokens.image[:, :8], expected[:, :8].repeat(2, 1))
    assert not torch.equal(out.tokens.image[0], out.tokens.image[1])


def test_settings_reach_the_stream_they_are_meant_for(tiny_model):
    plain = tiny_model.generate(CAPTION, seed=2)
    greedy = tiny_model.generate(CAPTION, seed=2, image_sampling={"temperature": 0})
    assert torch.equal(plain.tokens.scene, greedy.tokens.scene)
    assert not torch.equal(plain.tokens.image, greedy.tokens.image)
    again = tiny_model.generate(CAPTION, seed=2, temperature=0)
    assert torch.equal(again.tokens.scene, tiny_model.generate(CAPTION, top_k=1).tokens.scene)
    assert greedy.settings["image"]["temperature"] == 0
    assert greedy.settings["scene"] == dataclasses.asdict(Sampling())


def test_the_model_brings_its_own_defaults(parts, tmp_path):
    MakeAScene(**parts, sampling=Sampling(guidance=2.5, top_p=0.9)).save_pretrained(tmp_path / "m")
    model = MakeAScene.from_pretrained(tmp_path / "m", device="cpu")
    settings = model.generate(CAPTION, temperature=0.5).settings
    expected = {"guidance": 2.5, "temperature": 0.5, "top_k": None, "top_p": 0.9}
    assert settings == {"scene": expected, "image": expected}


def test_progress_shows_the_scene_first_then_the_picture_row_by_row(tiny_model):
    seen = []

    def watch(progress):
        scenes, images = progress.scenes(), progress.images()
        seen.append((progress.first, progress.done, scenes is not None, images is not None))
        if images is not None and progress.done % 32 == 24:  # two of four rows
            bottom = np.asarray(images[0])[16:]
            assert (bottom == 128).all() and not (np.asarray(images[0])[:16] == 128).all()

    out = tiny_model.generate(CAPTION, count=3, batch=1, on_progress=watch)
    assert [done for _, done, _, _ in seen] == list(range(1, 3 * 32 + 1))
    assert [first for first, *_ in seen] == [0] * 32 + [1] * 32 + [2] * 32
    assert [scene for _, _, scene, _ in seen] == ([False] * 15 + [True] * 17) * 3
    assert [image for *_, image in seen] == ([False] * 19 + [True] * 13) * 3
    last = []
    tiny_model.generate(CAPTION, on_progress=lambda p: p.done == p.total and last.append(p))
    assert last[0].scenes() == out.scenes[:1]
    assert np.array_equal(np.asarray(last[0].images()[0]), pixels(out)[0])


def test_progress_says_when_there_is_something_new_to_show(tiny_model):
    news = []

    def watch(progress):
        assert (progress.scenes() is None) == (progress.done <= 15)
        news.append((progress.done, progress.new_scene, progress.new_rows, progress.rows))

    tiny_model.generate(CAPTION, on_progress=watch)
    assert [done for done, new_scene, _, _ in news if new_scene] == [16]
    assert [(done, rows) for done, _, new, rows in news if new] == [
        (20, 1),
        (24, 2),
        (28, 3),
        (32, 4),
    ]
    assert {new for _, _, new, _ in news} == {0, 1}


def test_progress_shows_at_once_what_was_given(tiny_model):
    free = np.zeros((32, 32), np.bool_)
    free[16:] = True
    image = Image.new("RGB", (32, 32), "red")
    news = []
    tiny_model.generate(
        CAPTION,
        scene=make_scene(),
        image=image,
        image_free=free,
        on_progress=lambda p: news.append((p.new_scene, p.new_rows)),
    )
    row = [(False, 0)] * 3 + [(False, 1)]
    assert news == [(True, 2), *row[1:], *row]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_sampling_never_holds_the_whole_float32_network(tiny_folder, precision, monkeypatch):
    def refuse(folder):
        raise AssertionError("the whole network was read")

    with monkeypatch.context() as patch:
        patch.setattr(GPT, "from_pretrained", refuse)
        model = MakeAScene.from_pretrained(tiny_folder, device="cpu", precision=precision)
        assert len(model.generate(CAPTION, count=2).images) == 2
    assert model.gpt.dtype == torch.float32 and model.gpt is model.gpt


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"caption": "  "}, "caption is empty"),
        ({"caption": []}, "no caption"),
        ({"count": 0}, "count is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": -2}, "guidance is -2"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"scene_sampling": {"topp": 0.5}}, "scene_sampling knows guidance.*not topp"),
        ({"scene_free": np.ones((32, 32), np.bool_)}, "give the scene too"),
        ({"image_free": np.ones((32, 32), np.bool_)}, "give both or neither"),
        ({"scene": make_scene(), "scene_free": np.ones((3, 3), np.bool_)}, "4 pixels a side"),
        ({"scene": make_scene(), "scene_free": np.ones((32, 32))}, "square bool array"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(tiny_model, request_, message):
    with pytest.raises(ValueError, match=message) as refusal:
        tiny_model.generate(**{"caption": CAPTION, **request_})
    assert "\n" not in str(refusal.value)


def test_a_batch_too_large_for_the_memory_says_which_one_fits(tiny_model, monkeypatch):
    row = 2 * 2 * tiny_model.gpt.layout.length * 32 * 4  # bytes: keys and values, layers, float32
    spare = 300 * 2**20
    monkeypatch.setattr(mas.precision, "free_memory", lambda device: spare + 2 * row * 5)
    with pytest.raises(ModelError, match=r"8 pictures at a time.*5 do: use batch 5"):
        tiny_model.generate(CAPTION, count=9)
    assert len(tiny_model.generate(CAPTION, count=9, batch=5).images) == 9
    monkeypatch.setattr(mas.precision, "free_memory", lambda device: 0)
    with pytest.raises(ModelError, match="not even one"):
        tiny_model.generate(CAPTION)


def test_running_out_of_memory_all_the_same_is_one_line(tiny_model, monkeypatch):
    errors = [
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        ValueError("another error"),
        RuntimeError("another error"),
    ]

    def fail(*arguments, **options):
        raise errors.pop(0)

    monkeypatch.setattr(mas.model, "generate", fail)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"ran out with 6 pictures at a time: try batch 3$"):
            tiny_model.generate(CAPTION, count=6)
    with pytest.raises(ModelError, match="use a smaller model"):
        tiny_model.generate(CAPTION)
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind, match="another error"):
            tiny_model.generate(CAPTION)


def test_auto_takes_int8_for_large_networks_on_a_cpu(tiny_model, monkeypatch):
    assert choose_precision(tiny_model.gpt, "auto") == "float32"
    monkeypatch.setattr(mas.precision, "LARGE", 1000)
    assert choose_precision(tiny_model.gpt, "auto") == "int8"


def test_auto_reads_no_weights_of_a_stored_gpt(tiny_model, tiny_folder, monkeypatch):
    def fail(tensors, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(StoredTensors, "__getitem__", fail)
    stored = StoredGPT(tiny_folder / "gpt", torch.device("cpu"))
    parameters = sum(parameter.numel() for parameter in tiny_model.gpt.parameters())
    assert stored.tensors.numbers == parameters
    for largest, precision in ((parameters, "int8"), (parameters + 1, "float32")):
        monkeypatch.setattr(mas.precision, "LARGE", largest)
        assert choose_precision(stored, "auto") == precision


def test_devices_and_precisions_that_do_not_exist_are_refused(tiny_model):
    with pytest.raises(ValueError, match="device 'gpu9'"):
        choose_device("gpu9")
    with pytest.raises(ValueError, match="device 'meta'"):
        choose_device("meta")
    with pytest.raises(ValueError, match="precision is 'float8'"):
        choose_precision(tiny_model.gpt, "float8")


def other_part(parts, name):
    """The part `name`, changed so that it no longer fits the GPT."""
    if name == "vocabulary":
        return {"tokenizer": Tokenizer.fit(["a dog"] * 3, vocab_size=258, length=12)}
    if name == "length":
        return {"tokenizer": Tokenizer.fit(["two brown dogs"] * 40, vocab_size=300, length=10)}
    part, field, value = {
        "scene codes": ("vqseg", "codes", 25),
        "scene grid": ("vqseg", "grid", 8),
        "image codes": ("vqgan", "codes", 21),
        "image grid": ("vqgan", "size", 64),
    }[name]
    changes = {field: value} | ({"size": 64} if name == "scene grid" else {})
    network = parts[part]
    return {part: type(network)(dataclasses.replace(network.config, **changes))}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vocabulary", "tokenizer and GPT.*vocabulary 258 against 300"),
        ("length", "tokenizer and GPT.*"),
        ("scene codes", "VQ-SEG and GPT.*codes 25 against 24"),
        ("scene grid", "VQ-SEG and GPT.*grid 8 against 4"),
        ("image codes", "VQ-GAN and GPT.*codes 21 against 20"),
        ("image grid", "VQ-GAN and GPT.*grid 8 against 4"),
    ],
)
def test_parts_that_do_not_fit_together_are_named(parts, name, message):
    with pytest.raises(ModelError, match=message):
        MakeAScene(**{**parts, **other_part(parts, name)})


def test_the_folder_holds_what_it_should_and_describes_itself(tiny_folder):
    files = {str(p.relative_to(tiny_folder)) for p in tiny_folder.rglob("*") if p.is_file()}
    assert files == {"model_index.json", "README.md", *FILES}
    index = json.loads((tiny_folder / "model_index.json").read_text())
    assert index["format"] == 1
    assert index["sizes"]["text"] == {"vocabulary": 300, "length": 12}
    assert index["sizes"]["scene"] == {"vocabulary": 24, "grid": 4, "pixels": 32}
    assert index["sizes"]["image"] == {"vocabulary": 20, "grid": 4, "pixels": 32}
    assert index["sampling"] == dataclasses.asdict(Sampling())
    assert index["weights"] == dict.fromkeys(("vqseg", "vqgan", "gpt"), "float32")
    card = (tiny_folder / "README.md").read_text()
    assert [line for line in card.splitlines() if line.startswith("## ")] == [
        "## Data",
        "## Licences",
        "## Numbers",
        "## Limits",
    ]
    for name, digest in index["sha256"].items():
        assert hashlib.sha256((tiny_folder / name).read_bytes()).hexdigest() == digest
    assert GPT.from_pretrained(tiny_folder / "gpt").config.layers == 2
    assert VQSEG.from_pretrained(tiny_folder / "vqseg").config.codes == 24
    assert VQGAN.from_pretrained(tiny_folder / "vqgan").config.codes == 20


def test_saving_twice_gives_the_same_folder_and_keeps_the_card(tiny_folder, tmp_path):
    model = MakeAScene.from_pretrained(tiny_folder)
    model.save_pretrained(tmp_path / "m", card="# my card")
    again = MakeAScene.from_pretrained(tmp_path / "m")
    assert again.sha256 == model.sha256 and again.card == "# my card"
    again.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "README.md").read_text() == "# my card"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_folder_with_something_else_is_left_alone(tiny_model, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ModelError, match="something else"):
        tiny_model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_model_folder_that_holds_something_else_too_is_left_alone(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "thesis.tex").write_text("precious")
    with pytest.raises(ModelError, match=r"something else than a model \(thesis.tex\)"):
        tiny_model.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "thesis.tex").read_text() == "precious"
    with pytest.raises(ModelError, match="is a file"):
        tiny_model.save_pretrained(tmp_path / "m" / "thesis.tex")


def test_the_current_folder_is_not_pulled_away(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".", tmp_path):
        with pytest.raises(ModelError, match="name one inside it"):
            tiny_model.save_pretrained(name)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tiny_model):
    with pytest.raises(OSError) as refusal:
        tiny_model.save_pretrained("/proc/model")
    assert refusal.value.filename == "/proc/model"


def test_a_failed_save_leaves_nothing_behind(tiny_model, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(mas.model_folder, "write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny_model.save_pretrained(tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def copied(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "copy")


@pytest.mark.parametrize("name", [*FILES, "README.md", "model_index.json"])
def test_a_missing_part_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(ModelError, match=name):
        MakeAScene.from_pretrained(copied)


@pytest.mark.parametrize("name", FILES)
def test_an_exchanged_or_damaged_part_is_named(copied, name):
    content = bytearray((copied / name).read_bytes())
    content[-2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        MakeAScene.from_pretrained(copied)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": 99}, "not format 1"),
        ([], "not format 1"),
        ({"format": 1}, "hashes is damaged"),
    ],
)
def test_a_damaged_index_is_refused(copied, content, message):
    (copied / "model_index.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message):
        MakeAScene.from_pretrained(copied)


def test_unknown_sampling_defaults_are_refused_by_name(copied):
    index = json.loads((copied / "model_index.json").read_text())
    index["sampling"]["wildness"] = 3
    (copied / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="wildness"):
        MakeAScene.from_pretrained(copied)


def test_a_name_that_is_no_model_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="no such model folder"):
        MakeAScene.from_pretrained(tmp_path / "none")
    with pytest.raises(ModelError, match=r"model_index\.json is missing"):
        MakeAScene.from_pretrained(tmp_path)
    monkeypatch.setattr(mas.model_folder, "SHIPPED", tmp_path)
    with pytest.raises(ModelError, match="ships no park model"):
        MakeAScene.from_pretrained("park")


def test_park_is_the_model_that_ships(tiny_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path / "park")
    monkeypatch.setattr(mas.model_folder, "SHIPPED", tmp_path)
    assert MakeAScene.from_pretrained("park").gpt.config.layers == 2


def test_a_hub_id_is_downloaded_and_what_the_hub_says_is_passed_on(tiny_folder, monkeypatch):
    asked = []

    def download(name, *, allow_patterns):
        asked.append((name, set(FILES) <= set(allow_patterns)))
        if name == "me/absent":
            raise OSError("Repository Not Found\ntraceback")
        return str(tiny_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert MakeAScene.from_pretrained("me/park").gpt.config.layers == 2
    with pytest.raises(ModelError, match=r"me/absent.*Repository Not Found\)"):
        MakeAScene.from_pretrained("me/absent")
    assert asked == [("me/park", True), ("me/absent", True)]


def test_pushing_uploads_a_complete_folder(tiny_model, tmp_path, monkeypatch):
    uploaded = {}

    def create(repo_id, *, private, exist_ok):
        return f"https://hub/{repo_id}"

    def upload(*, repo_id, folder_path, commit_message):
        uploaded[repo_id] = shutil.copytree(folder_path, tmp_path / "uploaded")

    hub = SimpleNamespace(create_repo=create, upload_folder=upload)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    assert tiny_model.push_to_hub("me/park") == "https://hub/me/park"
    loaded = MakeAScene.from_pretrained(uploaded["me/park"], device="cpu")
    assert same(loaded.generate(CAPTION), tiny_model.generate(CAPTION))


def test_void_in_a_scene_is_a_label_like_any_other_unless_it_is_freed(tiny_model):
    labels = make_scene().labels.copy()
    labels[:8] = VOID
    scene = SceneMap.from_labels(labels)
    out = tiny_model.generate(CAPTION, scene=scene, count=3)
    assert torch.equal(out.tokens.scene, tiny_model.encode_scene(scene).repeat(3, 1))
