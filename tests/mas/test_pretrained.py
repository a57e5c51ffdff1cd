"""Published checkpoints: what loads, what is refused, and by which words."""

import hashlib
import io
import json
import os
import sys
import tarfile

import pytest
import pytorch_lightning
import torch
from published import TINY, published_shapes, rule_state
from safetensors.torch import save_file

from mas import pretrained
from mas.__main__ import main
from mas.pretrained import (
    MINDALLE_BPE,
    MINDALLE_MD5,
    MINDALLE_MEMBER,
    CheckpointError,
    import_vqgan,
    load_published,
    read_members,
)
from mas.text import PAD, Tokenizer
from mas.vqgan import VQGAN, VQGANConfig

SMALL = dict(
    size=32, codes=24, code_width=8, features=16, width=32, multipliers=(1, 2), restart=0.0
)
CONFIGS = {
    "mindalle": VQGANConfig(**SMALL, attention=(1,)),
    "taming": VQGANConfig(**SMALL, attention=(1,), blocks=1),
    "taming-gumbel": VQGANConfig(**SMALL, attention=(1,), quantizer="gumbel"),
    "llamagen": VQGANConfig(**SMALL, attention=(1,), quantizer="cosine"),
}


class Callback:
    """Stands for the training objects that Lightning pickles into its checkpoints."""


def state_of(format):
    return rule_state(published_shapes(CONFIGS[format], format), {})


@pytest.fixture
def checkpoint(tmp_path):
    def write(content):
        torch.save(content, tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt"

    return write


@pytest.mark.parametrize("format", CONFIGS)
def test_imported_saved_and_loaded_networks_give_equal_pictures(format, checkpoint, tmp_path):
    container = "model" if format == "llamagen" else "state_dict"
    path = checkpoint({container: state_of(format)})
    network, _ = load_published(path, format=format, size=32)
    assert network.config == CONFIGS[format]
    import_vqgan(str(path), format=format, output=str(tmp_path / "vqgan"), size=32)
    again = VQGAN.from_pretrained(tmp_path / "vqgan")
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = network.encode(pictures)
    assert tokens.unique().numel() > 3
    assert torch.equal(tokens, again.encode(pictures))
    assert torch.equal(network.decode(tokens), again.decode(tokens))


def test_training_leftovers_are_listed_and_ignored(checkpoint, tmp_path, capsys):
    state = state_of("taming")
    state["loss.discriminator.main.0.weight"] = torch.zeros(3)
    state["loss.discriminator.main.0.bias"] = torch.zeros(3)
    path = checkpoint({"state_dict": state, "global_step": 7})
    import_vqgan(str(path), format="taming", output=str(tmp_path / "out"), size=32)
    assert "ignored: loss.discriminator (2 tensors)" in capsys.readouterr().out


def test_averaged_weights_beside_the_trained_ones_are_listed_and_ignored(checkpoint):
    state = state_of("taming")
    averaged = {f"model_ema.{name.replace('.', '')}": x + 1 for name, x in state.items()}
    path = checkpoint({"state_dict": {**state, **averaged, "model_ema.decay": torch.tensor(0.9)}})
    network, ignored = load_published(path, format="taming", size=32)
    assert {*ignored} == {*averaged, "model_ema.decay"}
    assert torch.equal(network.encoder.stem.weight, state["encoder.conv_in.weight"])


@pytest.mark.parametrize("format", ["taming", "llamagen"])
def test_tensors_alone_load_whatever_file_holds_them(format, checkpoint, tmp_path):
    state = state_of(format)
    container = "model" if format == "llamagen" else "state_dict"
    expected, _ = load_published(checkpoint({container: state}), format=format, size=32)
    torch.save(state, tmp_path / "bare.pt")
    save_file({name: x.contiguous() for name, x in state.items()}, tmp_path / "bare.safetensors")
    for name in ("bare.pt", "bare.safetensors"):
        network, ignored = load_published(tmp_path / name, format=format, size=32)
        assert torch.equal(network.encoder.stem.weight, expected.encoder.stem.weight)
        assert ignored == []


def test_a_cut_safetensors_file_is_named(tmp_path):
    save_file({"encoder.conv_in.weight": torch.ones(99)}, tmp_path / "a.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-9])
    with pytest.raises(
        CheckpointError, match=r"cut\.safetensors: no PyTorch checkpoint, or a trunc"
    ):
        load_published(tmp_path / "cut.safetensors", format="taming")


def test_a_tensor_whose_name_is_a_number_is_refused_by_it(checkpoint):
    path = checkpoint({"state_dict": {**state_of("taming"), 3: torch.ones(1)}})
    with pytest.raises(CheckpointError, match="1 unexpected tensors: 3"):
        load_published(path, format="taming", size=32)


class Made:
    """Is unpickled by calling `function` with `arguments`."""

    def __init__(self, function, *arguments, state=None):
        self.call = function, arguments, state

    def __reduce__(self):
        return self.call


def test_a_program_in_a_checkpoint_is_named_and_not_run(checkpoint, tmp_path):
    path = checkpoint({"state_dict": {}, "callback": Made(os.system, f"touch {tmp_path}/ran")})
    with pytest.raises(CheckpointError, match=r"holds more than tensors \((posix|nt)\.system\)"):
        load_published(path, format="taming")
    assert not (tmp_path / "ran").exists()


def test_a_prefix_of_an_enclosing_model_is_dropped(checkpoint):
    state = {f"first_stage_model.{name}": x for name, x in state_of("taming").items()}
    state["model.diffusion.weight"] = torch.zeros(2)
    network, ignored = load_published(checkpoint({"state_dict": state}), format="taming", size=32)
    assert network.config == CONFIGS["taming"] and ignored == ["model.diffusion.weight"]


def test_half_precision_weights_become_float32(checkpoint):
    state = {name: tensor.half() for name, tensor in state_of("llamagen").items()}
    network, _ = load_published(checkpoint({"ema": state}), format="llamagen", size=32)
    assert {x.dtype for x in network.state_dict().values()} == {torch.float32}


def damaged(change):
    state = state_of("taming")
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("decoder.conv_out.bias"), "1 missing tensors: decoder.conv_out.bias"),
        (lambda s: s.pop("encoder.mid.attn_1.q.weight"), "encoder.mid.attn_1.q.weight"),
        (
            lambda s: s.update({"quant_conv.bias": torch.zeros(5)}),
            r"quant_conv.bias \(5,\) instead",
        ),
        (lambda s: s.update({"encoder.extra.weight": torch.zeros(5)}), "encoder.extra.weight"),
        (lambda s: s["decoder.norm_out.bias"].fill_(torch.nan), "NaN.*decoder.norm_out.bias"),
        (lambda s: s.pop("quantize.embedding.weight"), "missing tensor quantize.embedding.weight"),
        *(
            (lambda s, x=x: s.update({"encoder.conv_in.weight": x}), words)
            for x, words in (
                (torch.tensor(1.0), r"encoder.conv_in.weight has the shape \(\)"),
                (torch.zeros(0, 3, 3, 3), r"encoder.conv_in.weight has the shape \(0, 3, 3, 3\)"),
                (torch.ones(32, 3, 3, 3).to_sparse(), "no numbers in encoder.conv_in.weight"),
                (torch.ones(32, 3, 3, 3, device="meta"), "no numbers in encoder.conv_in.weight"),
            )
        ),
    ],
)
def test_damaged_tensors_are_refused_by_name(change, words, checkpoint):
    path = checkpoint({"state_dict": damaged(change)})
    with pytest.raises(CheckpointError, match=words):
        load_published(path, format="taming", size=32)


@pytest.mark.parametrize(
    ("said", "held"),
    [
        (said, held)
        for said in CONFIGS
        for held in ("taming", "taming-gumbel", "llamagen")
        if held not in (said, {"mindalle": "taming"}.get(said))
    ],
)
def test_another_format_is_named(said, held, checkpoint):
    path = checkpoint({"state_dict": state_of(held), "model": state_of(held)})
    with pytest.raises(CheckpointError, match=f"use --format {held}"):
        load_published(path, format=said, size=32)


def test_a_checkpoint_of_something_else_is_refused(checkpoint):
    with pytest.raises(CheckpointError, match=r"keeps its weights in state_dict.*has weights"):
        load_published(checkpoint({"weights": {}}), format="taming")
    with pytest.raises(CheckpointError, match=r"no tensor encoder.conv_in.weight.*fc.bias"):
        load_published(checkpoint({"state_dict": {"fc.bias": torch.zeros(2)}}), format="taming")
    with pytest.raises(CheckpointError, match="expected a dictionary, found list"):
        load_published(checkpoint([1, 2]), format="taming")


@pytest.mark.parametrize("name", ["ModelCheckpoint", "EarlyStopping"])
def test_callbacks_that_lightning_noted_are_passed_over_without_it(
    name, checkpoint, tmp_path, monkeypatch
):
    noted = {getattr(pytorch_lightning.callbacks, name): {"best_model_score": torch.ones(())}}
    path = checkpoint({"epoch": 5, "callbacks": noted, "state_dict": state_of("taming")})
    for module in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.setitem(sys.modules, module, None)  # as where only `mas` is installed
    words = ["import-vqgan", str(path), "--format", "taming", "--size", "32"]
    assert main([*words, "--output", str(tmp_path / "vqgan")]) == 0
    assert VQGAN.from_pretrained(tmp_path / "vqgan").config == CONFIGS["taming"]


def test_an_object_of_a_noted_class_is_read_as_nothing(checkpoint):
    callback = pytorch_lightning.callbacks.ModelCheckpoint
    noted = Made(callback, "a", 3, state={"monitor": "loss", "__setstate__": "what comes next"})
    path = checkpoint({"state_dict": state_of("taming"), "callbacks": noted})
    network, _ = load_published(path, format="taming", size=32)
    assert network.config == CONFIGS["taming"]
    assert vars(pretrained._load(path, path, trust_pickle=False)["callbacks"]) == {}


def test_pickled_objects_are_refused_unless_trusted(checkpoint):
    path = checkpoint({"state_dict": state_of("taming"), "callbacks": Callback()})
    with pytest.raises(CheckpointError, match=r"Callback.*--trust-pickle"):
        load_published(path, format="taming", size=32)
    network, _ = load_published(path, format="taming", size=32, trust_pickle=True)
    assert network.config == CONFIGS["taming"]


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.98])
def test_a_truncated_file_is_named(kept, checkpoint):
    path = checkpoint({"state_dict": state_of("taming")})
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=r"last.ckpt: no PyTorch checkpoint, or a truncated"):
        load_published(path, format="taming", size=32)


def test_a_size_that_the_levels_do_not_divide_is_refused(checkpoint):
    with pytest.raises(CheckpointError, match="size 33 must be a multiple of 2"):
        load_published(checkpoint({"state_dict": state_of("taming")}), format="taming", size=33)


def bpe_files():
    """A vocabulary and merges in the form of minDALL-E's."""
    pieces = ["[PAD]", "[UNK]", *"adogt", *(c + "</w>" for c in "adogt"), "do", "dog</w>"]
    vocab = json.dumps({piece: i for i, piece in enumerate(pieces)}).encode()
    return vocab, b"#version: 0.2\nd o\ndo g</w>\n"


def pack(path, members, *, prefix=""):
    """A tarball whose other members stand before, between and after the wanted ones."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for number, (name, content) in enumerate(members.items()):
            for entry, data in ((f"1.3B/other{number}", bytes(5000)), (name, content)):
                info = tarfile.TarInfo(prefix + entry)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        archive.addfile(tarfile.TarInfo(f"{prefix}1.3B/stage2_last.ckpt"))
    return path


@pytest.fixture
def members(checkpoint):
    path = checkpoint({"state_dict": state_of("mindalle")})
    content = path.read_bytes()
    path.unlink()
    return dict(zip((MINDALLE_MEMBER, *MINDALLE_BPE), (content, *bpe_files()), strict=True))


@pytest.fixture
def tarball(members, tmp_path):
    return pack(tmp_path / "1.3B.tar.gz", members)


def test_the_tarball_is_read_in_place_after_its_md5(tarball):
    md5 = hashlib.md5(tarball.read_bytes()).hexdigest()
    network, _ = load_published(tarball, format="mindalle", size=32, md5=md5)
    assert network.config == CONFIGS["mindalle"]
    assert list(tarball.parent.iterdir()) == [tarball]
    with pytest.raises(CheckpointError, match=f"MD5 is {md5}, not {MINDALLE_MD5}"):
        load_published(tarball, format="mindalle", size=32)


def test_nothing_is_unpickled_before_the_md5_is_right(tarball, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("unpickled"))
    with pytest.raises(CheckpointError, match="MD5 is"):
        load_published(tarball, format="mindalle", size=32, trust_pickle=True)


@pytest.mark.parametrize(("name", "prefix"), [("1.3B.tar.gz", ""), ("mine.tar", "./")])
def test_importing_the_tarball_also_imports_its_bpe(name, prefix, members, tmp_path, capsys):
    path = pack(tmp_path / name, members, prefix=prefix)
    words = ["import-vqgan", str(path), "--format", "mindalle", "--size", "32", "--md5", "any"]
    assert main([*words, "--output", str(tmp_path / "vqgan")]) == 0
    assert sorted(x.name for x in tmp_path.iterdir()) == sorted([name, "vqgan"])
    written = sorted(x.name for x in (tmp_path / "vqgan").iterdir())
    assert written == ["config.json", "model.safetensors", "tokenizer.json"]
    assert VQGAN.from_pretrained(tmp_path / "vqgan").config == CONFIGS["mindalle"]
    tokenizer = Tokenizer.from_file(tmp_path / "vqgan/tokenizer.json")
    ids = json.loads(bpe_files()[0])
    expected = [ids[piece] for piece in ("a</w>", "dog</w>", "[UNK]")]
    assert tokenizer.encode(["A dog z"]).tolist() == [expected + [PAD] * 61]
    assert "tokenizer.json: 14 entries, 64 tokens" in capsys.readouterr().out


def test_a_tarball_without_bpe_gives_the_network_alone(members, tmp_path, capsys):
    path = pack(tmp_path / "mine.tar.gz", {MINDALLE_MEMBER: members[MINDALLE_MEMBER]})
    output = str(tmp_path / "vqgan")
    import_vqgan(str(path), format="mindalle", output=output, size=32, md5="any")
    assert "no tokenizer: " in capsys.readouterr().out
    assert not (tmp_path / "vqgan/tokenizer.json").exists()


def test_a_damaged_bpe_is_named_and_nothing_is_written(members, tmp_path):
    path = pack(tmp_path / "mine.tar.gz", members | {MINDALLE_BPE[1]: b"no merges here"})
    output = str(tmp_path / "vqgan")
    with pytest.raises(ValueError, match="not a char-level BPE"):
        import_vqgan(str(path), format="mindalle", output=output, size=32, md5="any")
    assert not (tmp_path / "vqgan").exists()


def test_a_tarball_with_pickled_objects_needs_trust(checkpoint, members, tmp_path, capsys):
    content = {"state_dict": state_of("mindalle"), "callbacks": Callback()}
    members = members | {MINDALLE_MEMBER: checkpoint(content).read_bytes()}
    path = pack(tmp_path / "mine.tar.gz", members)
    words = ["import-vqgan", str(path), "--format", "mindalle", "--size", "32", "--md5", "any"]
    words += ["--output", str(tmp_path / "vqgan")]
    assert main(words) == 1
    assert "add --trust-pickle" in capsys.readouterr().err
    assert main([*words, "--trust-pickle"]) == 0
    assert VQGAN.from_pretrained(tmp_path / "vqgan").config == CONFIGS["mindalle"]


def test_a_broken_tarball_is_named(tarball, tmp_path):
    assert read_members(tarball, ["1.3B/nothing"]) == {}
    with pytest.raises(CheckpointError, match="has no member 1"):
        load_published(pack(tmp_path / "empty.tar", {}), format="mindalle", md5="any")
    with pytest.raises(CheckpointError, match=r"none\.tar: no such file"):
        load_published(tmp_path / "none.tar", format="mindalle")
    for size in (2000, len(tarball.read_bytes()) - 9):
        tarball.write_bytes(tarball.read_bytes()[:size])
        with pytest.raises(CheckpointError, match="broken tarball"):
            load_published(tarball, format="mindalle", size=32, md5="any")


def test_the_command_writes_a_folder_once(checkpoint, tmp_path, capsys):
    path = checkpoint({"state_dict": state_of("taming")})
    words = ["import-vqgan", str(path), "--format", "taming", "--output", str(tmp_path / "vqgan")]
    assert main([*words, "--size", "32"]) == 0
    assert sorted(x.name for x in (tmp_path / "vqgan").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert main([*words, "--size", "32"]) == 1
    assert "not an empty folder" in capsys.readouterr().err
    assert main(["import-vqgan", str(tmp_path / "no"), *words[2:-1], str(tmp_path / "b")]) == 1
    assert "no such file" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_the_published_sizes_are_the_defaults():
    config = VQGANConfig()
    assert (config.codes, config.grid, config.size) == (16384, 16, 256)
    with torch.device("meta"):
        parameters = sum(x.numel() for x in VQGAN(config).parameters())
    assert parameters == 76_073_859
    assert VQGANConfig(**TINY).grid == 4
