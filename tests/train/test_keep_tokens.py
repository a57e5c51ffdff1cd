"""A decoder trained alone: tokens, codes, and every GPT that knows them stay as they are."""

import json

import pytest
import torch

from mas.model_folder import choose_format
from mas.rounding import is_rounded
from mas.storage import WEIGHTS_FILE, file_hash, save_network
from mas.vq import TOKEN_PARTS, token_parts
from mas.vqgan import VQGAN
from mas.vqseg import VQSEG
from train.assemble import check_hashes
from train.cli import train
from train.start import check_tokens

NETWORKS = {"vqseg": VQSEG, "vqgan": VQGAN}
STREAMS = {"vqseg": "scene", "vqgan": "image"}
QUICK = dict(pictures__count=0, trainer__max_steps=4, ema_decay=0.5)


def load(stage, folder):
    return NETWORKS[stage].from_pretrained(folder)


def differing(before, after):
    """Names of the parts with a tensor, buffers included, that is not the same bit for bit."""
    now = after.state_dict()
    changed = [name for name, x in before.state_dict().items() if not torch.equal(x, now[name])]
    return {name.split(".")[0] for name in changed}


@pytest.fixture(params=["vqseg", "vqgan"])
def stage(request):
    return request.param


def run(words, stage, name, **settings):
    assert train(words(stage, name, **QUICK, **settings)) == 0


def test_only_what_decodes_is_trained(stage, words, tmp_path):
    run(words, stage, "first")
    start = {"model__init_from": tmp_path / "first"}
    # All codes would be moved at once, and the averages follow every batch.
    restless = {"model__network.restart": 1.0}
    run(words, stage, "kept", **start, **restless, model__keep_tokens=True)
    run(words, stage, "free", **start, **restless)
    first, kept, free = (load(stage, tmp_path / name) for name in ("first", "kept", "free"))
    parts = {name for name, _ in first.named_children()}
    assert differing(first, kept) == parts - set(TOKEN_PARTS)
    assert differing(first, free) == parts
    assert kept.token_hash() == first.token_hash() != free.token_hash()


def test_zeros_keep_their_signs(stage, words, tmp_path):
    run(words, stage, "first")
    network = load(stage, tmp_path / "first")
    for part in token_parts(network):
        for weight in part.parameters():
            weight.view(-1)[0] = -0.0  # as published weights have some; equal to 0.0, not the same
    network.save_pretrained(tmp_path / "signed")
    run(words, stage, "kept", model__init_from=tmp_path / "signed", model__keep_tokens=True)
    assert load(stage, tmp_path / "kept").token_hash() == network.token_hash()


def test_a_resumed_run_goes_on_keeping_them(stage, words, tmp_path):
    run(words, stage, "first")
    settings = {"model__init_from": tmp_path / "first", "model__keep_tokens": True}
    settings["trainer__val_check_interval"] = 2
    half = {**QUICK, **settings, "trainer__max_steps": 2}
    assert train(words(stage, "cut", **half)) == 0
    before = load(stage, tmp_path / "cut")
    assert train(words(stage, "cut", **QUICK, **settings, ckpt_path="auto")) == 0
    first, after = (load(stage, tmp_path / name) for name in ("first", "cut"))
    assert not differing(first, after) & set(TOKEN_PARTS)
    assert "decoder" in differing(before, after)


def test_whose_tokens_must_be_said(stage, words, tmp_path):
    with pytest.raises(ValueError, match=r"keep_tokens keeps the tokens of model\.init_from"):
        train(words(stage, "alone", **QUICK, model__keep_tokens=True))
    assert not (tmp_path / "alone").exists()


def test_other_sizes_mean_other_tokens(words, tmp_path):
    run(words, "vqseg", "first")
    start = {"model__init_from": tmp_path / "first", "model__keep_tokens": True}
    for name, changes in (
        ("grown", {"model__network.hidden": 4}),
        ("larger", {"model__network.size": 16, "model__network.grid": 2}),
    ):
        with pytest.raises(ValueError, match="the tokens are others than those of"):
            train(words("vqseg", name, **QUICK, **start, **changes))


def test_a_number_format_that_would_round_the_codes_is_refused(stage, words, tmp_path):
    run(words, stage, "exact")
    run(words, stage, "rounded", checkpoints__weights="int8")
    start = {"model__keep_tokens": True, "checkpoints__weights": "int8"}
    with pytest.raises(ValueError, match=r"weights int8 would round what model\.keep_tokens keeps"):
        train(words(stage, "no", **QUICK, **start, model__init_from=tmp_path / "exact"))
    assert not (tmp_path / "no" / WEIGHTS_FILE).exists()
    run(words, stage, "yes", **start, model__init_from=tmp_path / "rounded")
    rounded, kept = (load(stage, tmp_path / name) for name in ("rounded", "yes"))
    assert rounded.token_hash() == kept.token_hash()


def test_an_int8_model_keeps_tokens_made_in_int8_under_a_new_decoder(stage, words, tmp_path):
    run(words, stage, "rounded", checkpoints__weights="int8")
    start = {"model__init_from": tmp_path / "rounded", "model__keep_tokens": True}
    run(words, stage, "new", **start)  # its decoder is in float32
    network = load(stage, tmp_path / "new")
    assert not is_rounded(network.state_dict(), "int8")
    assert choose_format(stage, network, "int8") == "int8"
    save_network(network, tmp_path / "stored", weights="int8")
    stored, rounded = (load(stage, tmp_path / name) for name in ("stored", "rounded"))
    assert stored.token_hash() == rounded.token_hash()


def test_a_gpt_goes_together_with_every_decoder_of_its_tokens(words, tmp_path):
    manifest = {"text": {"sha256": "t"}}
    for stage, stream in STREAMS.items():
        run(words, stage, stage)
        start = {"model__init_from": tmp_path / stage}
        run(words, stage, f"kept-{stage}", **start, model__keep_tokens=True)
        run(words, stage, f"free-{stage}", **start)
        digest = load(stage, tmp_path / stage).token_hash()
        manifest[stream] = {"sha256": "of a file", "tokens_sha256": digest}
    (tmp_path / "tokenizer.json").write_text("{}")
    manifest["text"]["sha256"] = file_hash(tmp_path / "tokenizer.json")

    def check(**changed):
        folders = {name: str(tmp_path / changed.get(name, name)) for name in STREAMS}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        check_hashes(
            tmp_path / "manifest.json", tokenizer=str(tmp_path / "tokenizer.json"), **folders
        )

    check()
    check(vqseg="kept-vqseg", vqgan="kept-vqgan")
    for stage, stream in STREAMS.items():
        with pytest.raises(ValueError, match=rf"free-{stage}.*is not what the {stream} tokens"):
            check(**{stage: f"free-{stage}"})
    # What older versions wrote down is the file alone.
    del manifest["scene"]["tokens_sha256"]
    with pytest.raises(ValueError, match="is not what the scene tokens"):
        check()


def test_tokens_of_a_new_decoder_go_on_training_a_gpt(tmp_path):
    def record(**scene):
        return {"text": {"sha256": "t"}, "image": {"sha256": "i"}, "scene": scene}

    before = record(sha256="old file", tokens_sha256="same")
    (tmp_path / "tokens.json").write_text(json.dumps(before))
    check_tokens(record(sha256="new file", tokens_sha256="same"), tmp_path, instead="stop")
    for other in ({"tokens_sha256": "other"}, {}):
        with pytest.raises(ValueError, match="the tokenizer of scene is another one"):
            check_tokens(record(sha256="new file", **other), tmp_path, instead="stop")
