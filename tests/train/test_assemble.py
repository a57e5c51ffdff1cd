"""From captions to a vocabulary, from run folders to a model folder."""

import json
import shutil

import pytest
import torch

from mas.__main__ import main
from mas.filter import Sampling
from mas.gpt import GPT, GPTConfig
from mas.judge import JudgeConfig, SceneJudge
from mas.model import MakeAScene
from mas.rounding import narrow, widen
from mas.storage import file_hash
from mas.text import Tokenizer
from mas.vqgan import VQGAN, VQGANConfig
from mas.vqseg import VQSEG, VQSEGConfig
from train.assemble import assemble
from train.bpe import fit_bpe
from train.cli import train


@pytest.fixture(scope="module")
def parts(scene_shards, network_sizes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    fit_bpe(
        input=str(scene_shards),
        output=str(folder / "text/tokenizer.json"),
        vocab_size=300,
        length=8,
    )
    changed = {"scene_grid": 4, "image_grid": 4, "text_vocabulary": _vocabulary(folder)}
    sizes = {**network_sizes, "gpt": network_sizes["gpt"] | changed}
    for name, network, config in (
        ("vqseg", VQSEG, VQSEGConfig),
        ("vqgan", VQGAN, VQGANConfig),
        ("gpt", GPT, GPTConfig),
    ):
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes[name].items()}
        network(config(**values)).save_pretrained(folder / name)
    manifest = {
        "text": {"sha256": file_hash(folder / "text/tokenizer.json")},
        "scene": {"sha256": file_hash(folder / "vqseg/model.safetensors")},
        "image": {"sha256": file_hash(folder / "vqgan/model.safetensors")},
    }
    (folder / "gpt/tokens.json").write_text(json.dumps(manifest))
    return folder


def _vocabulary(folder):
    return Tokenizer.from_file(folder / "text/tokenizer.json").vocab_size


def arguments(parts, **changed):
    names = {"tokenizer": "text/tokenizer.json", "vqseg": "vqseg", "vqgan": "vqgan", "gpt": "gpt"}
    return {k: str(parts / v) for k, v in names.items()} | changed


def test_the_vocabulary_is_fitted_on_all_captions(parts, capsys):
    tokenizer = Tokenizer.from_file(parts / "text/tokenizer.json")
    assert tokenizer.length == 8 and 257 <= tokenizer.vocab_size <= 300
    tokens = tokenizer.encode(["a dog on the grass"])
    assert (tokens != 0).sum() <= 5  # words of the captions became single tokens


def test_captions_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        fit_bpe(input=str(tmp_path / "empty"), output=str(tmp_path / "t.json"))
    assert not (tmp_path / "t.json").exists()


def test_assembled_parts_generate(parts, tmp_path):
    assemble(**arguments(parts), output=str(tmp_path / "model"), guidance=5, top_p=0.9)
    model = MakeAScene.from_pretrained(tmp_path / "model", device="cpu")
    assert model.sampling.scene == model.sampling.image == Sampling(guidance=5, top_p=0.9)
    result = model.generate("a dog on the grass", seed=1)
    assert result.images[0].size == (32, 32)
    assert result.scenes[0].size == (32, 32)


def test_a_judge_goes_with_the_model_and_chooses(parts, tmp_path):
    torch.manual_seed(0)
    sizes = {"text_length": 8, "width": 16, "heads": 2, "hidden": 16}
    for name, vocabulary in (("judge", _vocabulary(parts)), ("other", 512)):
        network = SceneJudge(JudgeConfig(text_vocabulary=vocabulary, **sizes))
        network.save_pretrained(tmp_path / name)
    output, folders = str(tmp_path / "model"), arguments(parts, judge=str(tmp_path / "judge"))
    words = ["assemble", "--output", output, "--scene-candidates", "3"]
    assert main([*words, *(word for k, v in folders.items() for word in (f"--{k}", v))]) == 0
    model = MakeAScene.from_pretrained(output, device="cpu")
    assert model.scene_candidates == 3
    result = model.generate("a dog on the grass", seed=1)
    assert result.settings["scene"]["candidates"] == 3 and result.images[0].size == (32, 32)
    with pytest.raises(ValueError, match="judge and GPT do not fit together: vocabulary 512"):
        assemble(**arguments(parts, judge=str(tmp_path / "other")), output=output)
    assemble(**arguments(parts), output=output)  # four candidates are for models that can choose
    assert MakeAScene.from_pretrained(output, device="cpu").scene_candidates == 1


def test_tuning_leaves_tokens_alone_and_remembers_the_classes(
    parts, scene_shards, tmp_path, capsys
):
    output = str(tmp_path / "model")
    assemble(**arguments(parts), output=output, tune=str(scene_shards), tune_count=6)
    assert "VQ-SEG tuned: mean IoU" in capsys.readouterr().out
    model = MakeAScene.from_pretrained(output, device="cpu")
    assert model.classes == ("dog", "sky-other-merged", "grass-merged")
    assert model.vqseg.token_hash() == VQSEG.from_pretrained(parts / "vqseg").token_hash()
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"--tune-count must be at least 1, got {wrong}"):
            assemble(**arguments(parts), output=output, tune=str(scene_shards), tune_count=wrong)


def test_classes_are_remembered_without_tuning(parts, scene_shards, tmp_path):
    output = tmp_path / "model"
    assemble(**arguments(parts), output=str(output), classes=str(scene_shards), tune_count=6)
    model = MakeAScene.from_pretrained(output, device="cpu")
    assert model.classes == ("dog", "sky-other-merged", "grass-merged")
    before = VQSEG.from_pretrained(parts / "vqseg").state_dict()
    assert all(torch.equal(x, before[name]) for name, x in model.vqseg.state_dict().items())


def test_what_is_not_said_of_one_stream_is_as_for_both(parts, tmp_path):
    output = str(tmp_path / "model")
    words = ["assemble", "--output", output, "--guidance", "4", "--scene-sampling.guidance", "2"]
    words += ["--image-sampling.top_p", "0.95", "--temperature", "0.9"]
    words += [word for k, v in arguments(parts).items() for word in (f"--{k}", v)]
    assert main(words) == 0
    sampling = MakeAScene.from_pretrained(output, device="cpu").sampling
    assert sampling.scene == Sampling(guidance=2, temperature=0.9)
    assert sampling.image == Sampling(guidance=4, temperature=0.9, top_p=0.95)
    with pytest.raises(ValueError, match=r"scene_sampling knows guidance.*not topp"):
        assemble(**arguments(parts), output=output, scene_sampling={"topp": 0.5})
    with pytest.raises(ValueError, match="guidance is -1"):
        assemble(**arguments(parts), output=output, image_sampling={"guidance": -1})


@pytest.mark.parametrize("weights", ["float16", "int8"])
def test_smaller_weights_load_as_what_they_were_rounded_to(parts, tmp_path, weights):
    sizes = {}
    for name in ("float32", weights):
        assemble(**arguments(parts), output=str(tmp_path / name), weights=name)
        sizes[name] = sum(p.stat().st_size for p in (tmp_path / name).rglob("model.safetensors"))
    assert sizes[weights] < 0.56 * sizes["float32"]
    index = json.loads((tmp_path / weights / "model_index.json").read_text())
    assert index["weights"] == {"vqseg": "float16", "vqgan": "float16", "gpt": weights}
    whole = MakeAScene.from_pretrained(tmp_path / "float32", device="cpu")
    small = MakeAScene.from_pretrained(tmp_path / weights, device="cpu")
    for part, format_ in index["weights"].items():
        expected = widen(narrow(getattr(whole, part).state_dict(), format_))
        for name, tensor in getattr(small, part).state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    assert small.generate("a dog on the grass").images[0].size == (32, 32)


def test_tokenizers_trained_with_int8_weights_make_the_same_tokens_in_the_model(
    parts, words, tmp_path
):
    settings = dict(trainer__max_steps=2, checkpoints__weights="int8", pictures__count=0)
    for stage in ("vqseg", "vqgan"):
        assert train(words(stage, stage, **settings)) == 0
    shutil.copytree(parts / "gpt", tmp_path / "gpt")
    manifest = json.loads((tmp_path / "gpt/tokens.json").read_text())
    for stream, stage in (("scene", "vqseg"), ("image", "vqgan")):
        manifest[stream]["sha256"] = file_hash(tmp_path / stage / "model.safetensors")
    (tmp_path / "gpt/tokens.json").write_text(json.dumps(manifest))
    folders = {name: str(tmp_path / name) for name in ("vqseg", "vqgan", "gpt")}
    assemble(**arguments(parts, **folders), output=str(tmp_path / "model"), weights="int8")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    assert index["weights"] == dict.fromkeys(("vqseg", "vqgan", "gpt"), "int8")

    generator = torch.Generator().manual_seed(0)
    image_BCHW = torch.rand(4, 3, 32, 32, generator=generator)
    labels_BHW = torch.randint(0, 157, (4, 32, 32), generator=generator, dtype=torch.uint8)
    inputs = {"vqseg": (labels_BHW, labels_BHW > 80), "vqgan": (image_BCHW,)}
    model = MakeAScene.from_pretrained(tmp_path / "model", device="cpu")
    for name, network in (("vqseg", VQSEG), ("vqgan", VQGAN)):
        trained, shipped = network.from_pretrained(tmp_path / name), getattr(model, name)
        for key, tensor in trained.state_dict().items():
            assert torch.equal(shipped.state_dict()[key], tensor), key
        assert torch.equal(*(x.encode(*inputs[name]) for x in (trained, shipped)))


def test_a_card_goes_with_the_model_and_must_say_something(parts, tmp_path):
    (tmp_path / "card.md").write_text("# Park\n40,000 drawn pictures.\n", "utf-8")
    options = {"output": str(tmp_path / "model"), "card": tmp_path / "card.md"}
    assemble(**arguments(parts), **options)
    assert (tmp_path / "model/README.md").read_text("utf-8").startswith("# Park\n40,000")
    for content, message in ((b" \n", "card is empty"), (b"\xff\xfe", "not a UTF-8")):
        (tmp_path / "card.md").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            assemble(**arguments(parts), **options)
    assert (tmp_path / "model/README.md").read_text("utf-8").startswith("# Park")


@pytest.mark.parametrize("part", ["tokenizer", "vqseg", "vqgan"])
def test_parts_of_another_training_are_named(part, parts, tmp_path):
    other = tmp_path / "other"
    if part == "tokenizer":
        Tokenizer.fit(["another caption"], vocab_size=300, length=8).save(other)
    else:
        network = {"vqseg": VQSEG, "vqgan": VQGAN}[part].from_pretrained(parts / part)
        with torch.no_grad():
            next(network.parameters()).add_(1)
        network.save_pretrained(other)
    with pytest.raises(ValueError, match=r"other.* is not what the \w+ tokens of .*gpt were"):
        assemble(**arguments(parts, **{part: str(other)}), output=str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("content", ["[]", "{}", '{"text": 3}'])
def test_a_damaged_record_of_tokenizers_is_named(parts, tmp_path, content):
    shutil.copytree(parts / "gpt", tmp_path / "gpt")
    (tmp_path / "gpt/tokens.json").write_text(content)
    with pytest.raises(ValueError, match=r"gpt/tokens\.json .* is damaged"):
        assemble(**arguments(parts, gpt=str(tmp_path / "gpt")), output=str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_a_judge_and_a_refiner_of_other_tokenizers_are_refused(parts, words, tmp_path, caplog):
    (tmp_path / "text").mkdir()
    tokenizer = tmp_path / "text/tokenizer.json"
    shutil.copy(parts / "text/tokenizer.json", tokenizer)
    files = {"judge": tokenizer, "refiner": parts / "vqgan/model.safetensors"}
    settings = {
        "judge": {
            "data.tokenizer": tokenizer,
            "model.network.text_vocabulary": _vocabulary(parts),
        },
        "refiner": {"model.vqgan": parts / "vqgan"},
    }
    trained = {}
    for stage, file in files.items():
        stream = {"judge": "text", "refiner": "image"}[stage]
        command = words(stage, stage, **settings[stage], **{"trainer.max_steps": 1})
        assert train(command) == 0
        record = tmp_path / stage / "tokens.json"
        assert json.loads(record.read_text()) == {stream: {"sha256": file_hash(file)}}
        trained[stage] = str(tmp_path / stage)
    output = str(tmp_path / "model")
    assemble(**arguments(parts, **trained), output=output)
    assert "cannot be checked" not in caplog.text

    for stage in files:
        record = tmp_path / stage / "tokens.json"
        noted = record.read_text()
        record.write_text(noted.replace('"sha256": "', '"sha256": "0'))
        again = f"is not what the {stage} in .* was trained with: give that one, or train the"
        with pytest.raises(ValueError, match=again):
            assemble(**arguments(parts, **{stage: trained[stage]}), output=output)
        more = words(stage, stage, **settings[stage], **{"trainer.max_steps": 2})
        with pytest.raises(ValueError, match=rf"give that one, or train a new {stage}"):
            train([*more, "--ckpt_path=last"])
        record.write_text("[]")
        with pytest.raises(ValueError, match=r"tokens\.json names no .* is damaged; remove it"):
            assemble(**arguments(parts, **{stage: trained[stage]}), output=output)
        record.unlink()
        assemble(**arguments(parts, **{stage: trained[stage]}), output=output)
        assert f"checked whether its {stage} was trained with" in caplog.text
