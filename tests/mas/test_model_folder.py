import dataclasses
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors import SafetensorError

import mas.model_folder
from mas import MakeAScene
from mas.filter import Sampling, StreamSampling
from mas.gpt import GPT
from mas.model_folder import EXTRAS, ModelError, list_files
from mas.rounding import narrow, widen
from mas.text import Tokenizer
from mas.vqgan import VQGAN
from mas.vqseg import VQSEG

CAPTION = "a giraffe in the park"
REFUSED = OSError("Client error '401'")


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
    assert files == {"model_index.json", "README.md", *list_files()}
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


@pytest.mark.parametrize("weights", ["float32", "float16", "int8"])
def test_only_a_tokenizer_that_had_int8_weights_is_stored_in_int8(parts, tmp_path, weights):
    rounded = widen(narrow(parts["vqseg"].state_dict(), "int8"))
    parts["vqseg"].load_state_dict(rounded)
    MakeAScene(**parts).save_pretrained(tmp_path / "m", weights=weights)
    formats = json.loads((tmp_path / "m/model_index.json").read_text())["weights"]
    finer = "float16" if weights == "int8" else weights
    assert formats == {"vqseg": weights, "vqgan": finer, "gpt": weights}
    if weights == "int8":
        loaded = VQSEG.from_pretrained(tmp_path / "m/vqseg").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in rounded.items())


def test_a_card_in_another_encoding_keeps_no_model_from_being_read(copied):
    (copied / "README.md").write_bytes("# Modèle".encode("latin-1"))
    assert MakeAScene.from_pretrained(copied, device="cpu").card == "# Mod\ufffdle"


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


def test_a_model_that_cannot_be_exchanged_stays(tiny_folder, tiny_model, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    original = Path.rename

    def rename(self, target):
        if self.name == "new":
            raise KeyboardInterrupt
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        tiny_model.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", [*list_files(), "README.md", "model_index.json"])
def test_a_missing_part_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(ModelError, match=name):
        MakeAScene.from_pretrained(copied)


@pytest.mark.parametrize("name", list_files())
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


def test_the_index_keeps_one_sampling_for_both_streams_or_one_for_each(copied):
    file = copied / "model_index.json"
    index = json.loads(file.read_text())
    assert index["format"] == 1
    index["sampling"] = {"guidance": 2.0}
    file.write_text(json.dumps(index))
    both = MakeAScene.from_pretrained(copied, device="cpu").sampling
    assert both.scene == both.image == Sampling(guidance=2)
    index["sampling"] = each = {"scene": {"guidance": 2.0}, "image": {"top_p": 0.5}}
    file.write_text(json.dumps(index | {"format": 2}))
    model = MakeAScene.from_pretrained(copied, device="cpu")
    own = StreamSampling(scene=Sampling(guidance=2.0), image=Sampling(top_p=0.5))
    assert model.sampling == own
    model.card = None
    model.save_pretrained(copied)
    assert json.loads(file.read_text())["format"] == 2
    assert json.loads(file.read_text())["sampling"] == dataclasses.asdict(own)
    assert json.dumps(dataclasses.asdict(own)) in (copied / "README.md").read_text()
    for sampling, message in (
        ({"guidance": 2.0}, "needs a sampling for scene and image"),
        ({"scene": {}}, "needs a sampling for scene and image"),
        (each | {"text": {}}, "needs a sampling for scene and image"),
        (each | {"scene": {"wildness": 3}}, "wildness"),
        (each | {"image": 3}, "expected a JSON object"),
    ):
        file.write_text(json.dumps(index | {"format": 2, "sampling": sampling}))
        with pytest.raises(ValueError, match=message):
            MakeAScene.from_pretrained(copied)
    file.write_text(json.dumps(index))  # format 1 knows no streams
    with pytest.raises(ValueError, match="unknown config keys"):
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
        asked.append((name, {*list_files(EXTRAS)} <= set(allow_patterns)))
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
    loaded = MakeAScene.from_pretrained(uploaded["me/park"], device="cpu", precision="float32")
    images = [model.generate(CAPTION).images[0] for model in (loaded, tiny_model)]
    assert np.array_equal(*map(np.asarray, images))


def full(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on d… (os error 28)")


def full_too(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("place", "fail", "named"),
    [
        ("mas.storage.save_file", full, "model/vqseg/model.safetensors"),
        ("mas.model_folder.write_json", full_too, "model"),
    ],
)
def test_a_full_disk_is_told_by_names_that_people_know(
    tiny_model, tmp_path, monkeypatch, place, fail, named
):
    monkeypatch.setattr(place, fail)
    with pytest.raises(OSError, match="No space left on device") as caught:
        tiny_model.save_pretrained(tmp_path / "model")
    assert caught.value.filename == str(tmp_path / named) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (ConnectionError("[Errno 7] no\nmore"), r"\(\[Errno 7\] no\); try again when"),
        (ValueError("Repo id must be"), r"\(Repo id must be\); use a name of the form owner/name"),
        (REFUSED, r"\(Client error '401'\); log in with hf auth"),
    ],
)
def test_an_upload_that_fails_says_what_to_do(tiny_model, monkeypatch, raised, message):
    def create(repo_id, **_):
        raise raised

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(create_repo=create))
    monkeypatch.setattr(REFUSED, "response", "of the hub", raising=False)
    with pytest.raises(ModelError, match=f"me/park: not uploaded to the hub {message}"):
        tiny_model.push_to_hub("me/park")


def test_int8_leaves_the_text_head_out_and_changes_no_sample(tiny_model, tmp_path):
    for weights in ("int8", "float32"):
        tiny_model.save_pretrained(tmp_path / weights, weights=weights)
    stored = {
        weights: GPT.from_pretrained(tmp_path / weights / "gpt") for weights in ("int8", "float32")
    }
    assert [gpt.config.text_head for gpt in stored.values()] == [False, True]
    index = json.loads((tmp_path / "int8/model_index.json").read_text())
    assert (index["format"], index["extras"]) == (5, [])  # which older versions refuse by name
    assert index["sizes"]["parameters"]["gpt"] == sum(
        p.numel() for p in stored["int8"].parameters()
    )
    kept = (tmp_path / "float32/gpt/config.json").read_text()
    assert "text_head" not in kept  # so that older versions read it
    model = MakeAScene.from_pretrained(tmp_path / "int8", device="cpu")
    model.save_pretrained(tmp_path / "again")  # from what has none
    again = MakeAScene.from_pretrained(tmp_path / "again", device="cpu")
    a, b = (one.generate("a giraffe in the park", seed=2) for one in (model, again))
    assert a.images == b.images and not again.gpt.config.text_head


def test_a_model_remembers_which_classes_it_learned(parts, tiny_model, tmp_path):
    MakeAScene(**parts, classes=("dog", "sea")).save_pretrained(tmp_path / "model")
    index = tmp_path / "model/model_index.json"
    content = json.loads(index.read_text())
    assert content["classes"] == ["dog", "sea"]
    assert MakeAScene.from_pretrained(tmp_path / "model").classes == ("dog", "sea")
    tiny_model.save_pretrained(tmp_path / "unknown")  # says nothing, as older models do
    assert "classes" not in json.loads((tmp_path / "unknown/model_index.json").read_text())
    assert MakeAScene.from_pretrained(tmp_path / "unknown").classes == ()
    for wrong, message in (
        (["dog", "dragon"], "'dragon' is no class"),
        ([3], "3 is no class"),
        ("dog", "its list of classes is damaged"),
    ):
        index.write_text(json.dumps(content | {"classes": wrong}))
        with pytest.raises(ModelError, match=rf"model_index\.json: {message}.*assemble again"):
            MakeAScene.from_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="'dragon' is no class"):
        MakeAScene(**parts, classes=("dragon",))
