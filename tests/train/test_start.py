"""Fine-tuning starts from the weights of another run, and says where that cannot be."""

import csv
import dataclasses
import json
import shutil

import pytest
import torch

from mas.gpt import GPT, GPTConfig
from mas.reader import Reader, ReaderConfig
from mas.rounding import narrow, widen
from mas.storage import StorageError, save_network
from mas.vqgan import VQGAN, VQGANConfig
from mas.vqseg import VQSEG, VQSEGConfig
from train.cli import train
from train.start import check_tokens, start_from

SEG = VQSEGConfig(
    size=16, grid=4, codes=16, code_width=4, width=8, groups=4, patch=2, features=8, embedding=4
)
GAN = VQGANConfig(
    size=16, codes=32, code_width=4, features=8, width=8, groups=4, multipliers=(1, 1), attention=()
)
GPT_SIZES = GPTConfig(
    layers=2, width=32, heads=2, text_vocabulary=30, scene_vocabulary=8, image_vocabulary=8,
    text_length=4, scene_grid=2, image_grid=2,
)  # fmt: skip
READER = ReaderConfig(
    size=16, width=8, multipliers=(1, 2), groups=4, features=8, times=("day", "night")
)


def build(network_class, config, seed=0):
    torch.manual_seed(seed)
    network = network_class(config).eval()
    for parameter in network.parameters():
        parameter.detach().add_(0.1 * torch.randn_like(parameter))  # no layer is zero
    return network


def scenes(side, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 157, (3, side, side), dtype=torch.uint8, generator=generator)
    return labels, torch.rand(labels.shape, generator=generator) < 0.3


def enlarge(x_BHW, times=2):
    return x_BHW.repeat_interleave(times, 1).repeat_interleave(times, 2)


@pytest.mark.parametrize(
    ("network_class", "config", "changes"),
    [
        (VQSEG, SEG, {"size": 32, "restart": 0.0, "grid": 8}),
        (VQGAN, GAN, {"size": 32, "restart": 0.0}),
        (GPT, GPT_SIZES, {"dropout": 0.1}),
        (Reader, READER, {"size": 32}),
    ],
)
def test_a_network_whose_tensors_are_the_same_gets_the_same_weights(
    network_class, config, changes, tmp_path
):
    trained = build(network_class, config)
    trained.save_pretrained(tmp_path)
    network = build(network_class, dataclasses.replace(config, **changes), seed=1)
    start_from(network, tmp_path)
    assert network.config == dataclasses.replace(config, **changes)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name
    assert any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("weights", ["float16", "int8"])
@pytest.mark.parametrize(("network_class", "config"), [(GPT, GPT_SIZES), (Reader, READER)])
def test_weights_of_fewer_bits_become_float32(network_class, config, weights, tmp_path):
    trained = build(network_class, config)
    save_network(trained, tmp_path, weights=weights)
    network = build(network_class, config, seed=1)
    start_from(network, tmp_path)
    expected = widen(narrow(trained.state_dict(), weights))
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("hidden", [0, 12])
def test_larger_patches_see_enlarged_scenes_as_the_trained_network_sees_them(hidden, tmp_path):
    config = dataclasses.replace(SEG, hidden=hidden)
    trained = build(VQSEG, config)
    trained.save_pretrained(tmp_path)
    network = build(VQSEG, dataclasses.replace(config, size=32, patch=4), seed=1)
    start_from(network, tmp_path)
    labels, edges = scenes(16)
    tokens = trained.encode(labels, edges)
    assert tokens.unique().numel() > 3
    assert torch.equal(network.encode(enlarge(labels), enlarge(edges)), tokens)
    logits = trained.decode_logits(tokens)
    torch.testing.assert_close(
        network.decode_logits(tokens), logits.repeat_interleave(2, 2).repeat_interleave(2, 3)
    )


@pytest.mark.parametrize("changes", [{"blocks": 2}, {"hidden": 24}, {"blocks": 3, "hidden": 8}])
def test_a_grown_network_starts_as_the_trained_one_and_learns_with_all_of_itself(changes, tmp_path):
    trained = build(VQSEG, SEG)
    trained.save_pretrained(tmp_path)
    torch.manual_seed(1)
    network = VQSEG(dataclasses.replace(SEG, **changes))
    start_from(network, tmp_path)
    labels, edges = scenes(16)
    tokens = trained.encode(labels, edges)
    assert torch.equal(network.eval().encode(labels, edges), tokens)
    torch.testing.assert_close(network.decode_logits(tokens), trained.decode_logits(tokens))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimiser = torch.optim.SGD(network.train().parameters(), lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        network.loss(labels, edges).total.backward()
        optimiser.step()
    new = before.keys() - trained.state_dict().keys()
    weights = [name for name in new if name.endswith("weight") and "norm" not in name]
    assert weights and all(not torch.equal(network.state_dict()[n], before[n]) for n in weights)


def test_a_gpt_that_was_stored_for_sampling_gets_a_new_text_head(tmp_path):
    trained = build(GPT, GPT_SIZES)
    trained.without_text_head().save_pretrained(tmp_path)
    network = build(GPT, GPT_SIZES, seed=1)
    before = network.heads["text"].weight.clone()
    start_from(network, tmp_path)
    for name, tensor in network.state_dict().items():
        expected = before if name == "heads.text.weight" else trained.state_dict()[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize(
    ("network_class", "config", "changes", "words"),
    [
        (VQSEG, SEG, {"size": 8, "patch": 1}, "patch is 2, not 1; set model.network"),
        (VQSEG, SEG, {"codes": 8, "code_width": 8}, "code_width is 4, not 8, codes is 16, not 8"),
        (VQSEG, SEG, {"quantizer": "cosine"}, "quantizer is nearest, not cosine"),
        (VQSEG, dataclasses.replace(SEG, blocks=2), {"blocks": 1}, "blocks is 2, not 1"),
        (VQSEG, dataclasses.replace(SEG, hidden=8), {"hidden": 9}, "hidden is 8, not 9"),
        (VQGAN, GAN, {"quantizer": "cosine"}, "quantizer is nearest, not cosine"),
        (VQGAN, GAN, {"patch": 2}, "patch is 1, not 2"),
        (VQGAN, GAN, {"width": 16}, "width is 8, not 16"),
        (GPT, GPT_SIZES, {"heads": 4, "dropout": 0.1}, "heads is 2, not 4; set model.network"),
        (GPT, GPT_SIZES, {"layers": 3, "scene_grid": 4}, "layers is 2, not 3, scene_grid is 2"),
        (GPT, GPT_SIZES, {"gated": True, "rotary": True}, "gated is False, not True, rotary"),
        (Reader, READER, {"patch": 4}, "patch is 2, not 4"),
        (Reader, READER, {"times": ("night", "day")}, "times is .'day', 'night'., not"),
    ],
)
def test_another_network_is_refused_by_its_keys(network_class, config, changes, words, tmp_path):
    build(network_class, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"holds another network: {words}"):
        start_from(build(network_class, dataclasses.replace(config, **changes)), tmp_path)


def test_a_folder_without_a_network_is_named(tmp_path):
    mend = r"model\.init_from: .*config\.json: no such file; .*--model\.init_from null"
    with pytest.raises(StorageError, match=mend):
        start_from(build(VQSEG, SEG), tmp_path)
    build(VQSEG, SEG).save_pretrained(tmp_path)
    with pytest.raises(
        StorageError, match=r"config\.json: this is a VQ-SEG; give the folder of a VQ-GAN"
    ):
        start_from(build(VQGAN, GAN), tmp_path)


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.write_bytes(b"weights")
    with pytest.raises(StorageError, match=r"last\.ckpt is a file: name the folder of the run"):
        start_from(build(VQSEG, SEG), checkpoint)


def test_of_a_whole_model_the_part_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"a whole model: start from its part {tmp_path}/vqgan"):
        start_from(build(VQGAN, GAN), tmp_path)
    reader = Reader(ReaderConfig(size=32, width=8, multipliers=(1,), groups=4, features=8))
    with pytest.raises(StorageError, match=r"config\.json: no such file"):  # no model holds one
        start_from(reader, tmp_path)


def test_a_gpt_knows_only_the_tokens_it_was_trained_on(tmp_path, caplog):
    manifest = {stream: {"sha256": stream} for stream in ("text", "scene", "image")}
    check_tokens(manifest, tmp_path, instead="stop")
    assert "has no tokens.json" in caplog.text
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps(manifest))
    caplog.clear()
    check_tokens(manifest, tmp_path, instead="stop")
    assert not caplog.text
    for streams in (("scene",), ("text", "image")):
        other = manifest | {stream: {"sha256": "other"} for stream in streams}
        with pytest.raises(ValueError, match=f"tokenizer of {' and '.join(streams)} is another"):
            check_tokens(other, tmp_path, instead="stop")
    for content in ("[]", "{}", '{"text": 3}'):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"tokens\.json does not name the tokenizers"):
            check_tokens(manifest, tmp_path, instead="stop")


def test_a_gpt_goes_on_with_its_tokens_and_refuses_others(words, token_shards, tmp_path):
    settings = dict(pictures__count=0, trainer__max_steps=2, ema_decay=0)
    assert train(words("gpt", "first", **settings)) == 0
    start = {"model__init_from": tmp_path / "first", "model__network.dropout": 0.2}
    start["model__optimiser.learning_rate"] = 1e-30
    assert train(words("gpt", "second", **settings, **start, model__compile=True)) == 0
    first, second = (GPT.from_pretrained(tmp_path / name) for name in ("first", "second"))
    for name, tensor in second.state_dict().items():
        torch.testing.assert_close(tensor, first.state_dict()[name], rtol=0, atol=1e-20, msg=name)
    file = tmp_path / "first/tokens.json"
    manifest = json.loads(file.read_text())
    manifest["image"]["sha256"] = "other"
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="the tokenizer of image is another one"):
        train(words("gpt", "third", **settings, **start))


def test_a_gpt_that_goes_on_refuses_other_tokens(words, token_shards, tmp_path):
    tokens = tmp_path / "tokens"
    shutil.copytree(token_shards, tokens)
    settings = dict(pictures__count=0, data__input=tokens)
    assert train(words("gpt", trainer__max_steps=1, **settings)) == 0
    manifest = json.loads((tokens / "manifest.json").read_text())
    manifest["scene"]["sha256"] = "other"
    (tokens / "manifest.json").write_text(json.dumps(manifest))
    before = (tmp_path / "run/tokens.json").read_bytes()
    message = r"the tokenizer of scene is another one; .* or train a new GPT in another folder"
    with pytest.raises(ValueError, match=message):
        train([*words("gpt", trainer__max_steps=2, **settings), "--ckpt_path=auto"])
    assert (tmp_path / "run/tokens.json").read_bytes() == before


@pytest.mark.parametrize("stage", ["vqseg", "vqgan", "gpt"])
def test_a_run_from_a_run_goes_on_where_that_one_was(stage, words, tmp_path):
    settings = dict(pictures__count=0, trainer__val_check_interval=30, ema_decay=0)
    assert train(words(stage, "first", trainer__max_steps=30, **settings)) == 0
    second = words(
        stage,
        "second",
        trainer__max_steps=2,
        model__init_from=tmp_path / "first",
        **settings | {"trainer__val_check_interval": 1},
    )
    assert train(second) == 0

    def losses(folder, column):
        with open(tmp_path / folder / "metrics.csv", newline="") as file:
            return [float(row[column]) for row in csv.DictReader(file) if row[column]]

    first = losses("first", "train/loss")[0]
    start = losses("second", "train/loss")[0]
    assert start < 0.95 * first
    assert losses("second", "validation/loss")[0] == pytest.approx(
        losses("first", "validation/loss")[-1], rel=0.1
    )
