"""Published VQ-GAN checkpoints become a `vqgan/` folder: the command `mas import-vqgan`.

In: minDALL-E's stage 1 (the published tarball, or the file in it), taming's f16 and gumbel f8,
LlamaGen's VQ-16. Out: config.json + model.safetensors, and from the tarball minDALL-E's BPE as
tokenizer.json. Nothing is unpickled but tensors, unless the user says so; sizes are read off the
tensors; what the file has too much or too little is named.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from mas.errors import asked_for, why_unread
from mas.storage import UNREADABLE, StorageError, check_tensors
from mas.text import Tokenizer
from mas.vqgan import VQGAN, QuantizerName, VQGANConfig

FormatName = Literal["mindalle", "taming", "taming-gumbel", "llamagen"]

MINDALLE_MD5 = "57b008f02ceaa02b779c8b7463143315"  # of 1.3B.tar.gz, and part of its address
MINDALLE_MEMBER = "1.3B/stage1_last.ckpt"
MINDALLE_BPE = ("1.3B/tokenizer/bpe-16k-vocab.json", "1.3B/tokenizer/bpe-16k-merges.txt")
TOKENIZER = "tokenizer.json"
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")


class _Format(NamedTuple):
    containers: tuple[str, ...]  # keys of the file that may hold the weights; the first one wins
    names: tuple[tuple[str, str], ...]  # (our name, published name) as regular expressions
    quantizer: QuantizerName


# How names are published, applied in this order to ours.
_COMMON = (
    (r"\.norm_([12])\.", r".norm\1."),
    (r"\.conv_([12])\.", r".conv\1."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.query\.", ".q."),
    (r"\.key\.", ".k."),
    (r"\.value\.", ".v."),
    (r"\.out\.", ".proj_out."),
    (r"coder\.stem\.", "coder.conv_in."),
    (r"coder\.norm\.", "coder.norm_out."),
    (r"coder\.head\.", "coder.conv_out."),
    (r"^pre_quant\.", "quant_conv."),
    (r"^post_quant\.", "post_quant_conv."),
    (r"^quantizer\.codebook$", "quantize.embedding.weight"),
    (r"\.attentions\.", ".attn."),
)
_TAMING = (
    *_COMMON,
    (r"\.middle\.0\.", ".mid.block_1."),
    (r"\.middle\.1\.", ".mid.attn_1."),
    (r"\.middle\.2\.", ".mid.block_2."),
    (r"^encoder\.levels\.", "encoder.down."),
    (r"^decoder\.levels\.", "decoder.up."),  # counted from the finest: see _published_name
    (r"\.blocks\.", ".block."),
    (r"\.down\.(\d+)\.resample\.", r".down.\1.downsample."),
    (r"\.up\.(\d+)\.resample\.", r".up.\1.upsample."),
)
_GUMBEL = (
    (r"^quantizer\.codebook$", "quantize.embed.weight"),
    (r"^quantizer\.logits\.", "quantize.proj."),
    *_TAMING,
)
_LLAMAGEN = (
    *_COMMON,
    (r"\.middle\.", ".mid."),
    (r"\.levels\.", ".conv_blocks."),
    (r"\.blocks\.", ".res."),
    (r"^encoder(.*)\.resample\.", r"encoder\1.downsample."),
    (r"^decoder(.*)\.resample\.", r"decoder\1.upsample."),
)
_FORMATS: Mapping[FormatName, _Format] = {
    "mindalle": _Format(("state_dict",), _TAMING, "nearest"),
    "taming": _Format(("state_dict",), _TAMING, "nearest"),
    "taming-gumbel": _Format(("state_dict",), _GUMBEL, "gumbel"),
    "llamagen": _Format(("ema", "model", "state_dict"), _LLAMAGEN, "cosine"),
}
# Ours alone: how often codes occur in training, how hot Gumbel samples are.
_OWN_BUFFERS = ("quantizer.usage", "quantizer.temperature")
# What checkpoints carry beside the network: training losses, averaged weights, usage statistics.
_EXTRA = re.compile(r"^loss\.|^discriminator\.|^model_ema\.|^quantize\.codebook_used$")


class _Noted:
    """Stands for a class that a checkpoint names; its objects hold nothing."""

    def __init__(self, *state: Any) -> None:
        """Whatever a file gives it is dropped."""

    def __setstate__(self, state: Any) -> None:
        """Likewise."""


# Lightning of 2021 noted the states of its callbacks by their classes. Nothing of them is needed:
# the names are read and neither imported nor run.
_NOTED: list[Any] = [
    (_Noted, f"pytorch_lightning.callbacks.{name}")
    for name in ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping")
]


class CheckpointError(ValueError):
    """A checkpoint that is not what it was said to be; the message names the mend."""


def import_vqgan(
    checkpoint: str,
    *,
    format: FormatName,
    output: str,
    size: int = 256,
    md5: str = MINDALLE_MD5,
    trust_pickle: bool = False,
) -> None:
    """Converts a published VQ-GAN checkpoint to a vqgan folder.

    Args:
        checkpoint: the downloaded file; for minDALL-E also the whole 1.3B.tar.gz, read in place,
            whose BPE becomes tokenizer.json.
        format: who published it.
        output: folder to write; new or empty.
        size: pixels a side of the pictures it will be used for.
        md5: expected MD5 of a minDALL-E tarball; "any" for one that was packed anew.
        trust_pickle: also load files that hold more than tensors, which runs code from the file.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{output}: already there and not an empty folder; name a new one")
    path = Path(checkpoint)
    members = _read_tarball(path, md5=md5)
    network, ignored = _convert(path, members, format=format, size=size, trust_pickle=trust_pickle)
    bpe = [members[name] for name in MINDALLE_BPE if name in members]
    tokenizer = Tokenizer.from_mindalle(*bpe) if len(bpe) == len(MINDALLE_BPE) else None
    network.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER)
    config = network.config
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(
        f"{output}: {parameters:,} parameters, {config.codes} codes of {config.code_width}, "
        f"{config.size} px -> {config.grid} x {config.grid} tokens"
    )
    print(f"config: {asdict(config)}")
    if tokenizer is not None:
        print(f"{folder / TOKENIZER}: {tokenizer.vocab_size} entries, {tokenizer.length} tokens")
    elif members:
        print(f"no tokenizer: {path} lacks {' or '.join(MINDALLE_BPE)}")
    for group, count in _groups(ignored).items():
        print(f"ignored: {group} ({count} tensors)")


def load_published(
    checkpoint: str | Path,
    *,
    format: FormatName,
    size: int = 256,
    md5: str = MINDALLE_MD5,
    trust_pickle: bool = False,
) -> tuple[VQGAN, list[str]]:
    """The network of a published checkpoint, in evaluation mode, and the names it left out.

    Raises:
        CheckpointError: an unreadable or truncated file, another format, more than tensors in it,
            tensors that are missing, unknown, of the wrong shape or not finite; by name.
    """
    path = Path(checkpoint)
    members = _read_tarball(path, md5=md5)
    return _convert(path, members, format=format, size=size, trust_pickle=trust_pickle)


def _convert(
    path: Path,
    members: Mapping[str, bytes],
    *,
    format: FormatName,
    size: int,
    trust_pickle: bool,
) -> tuple[VQGAN, list[str]]:
    """`load_published` of a file, or of the members of a tarball at `path`."""
    if format not in _FORMATS:
        raise CheckpointError(f"format {format!r}: use one of {', '.join(_FORMATS)}")
    source = io.BytesIO(members[MINDALLE_MEMBER]) if members else path
    content = _load(path, source, trust_pickle=trust_pickle)
    tensors, ignored = _select(content, path, format)
    try:
        config = _read_config(tensors, path, format, size)
        with torch.device("meta"):
            network = VQGAN(config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    expected = network.state_dict()
    names = {
        ours: _published_name(ours, format, len(config.multipliers))
        for ours in expected
        if ours not in _OWN_BUFFERS
    }
    try:
        check_tensors({names[ours]: expected[ours] for ours in names}, tensors, path)
    except StorageError as error:
        raise CheckpointError(str(error)) from error
    broken = [name for name, x in tensors.items() if not x.float().isfinite().all()]
    if broken:
        raise CheckpointError(f"{path}: NaN or infinite values in {_some(broken)}")
    weights = {ours: tensors[name].float() for ours, name in names.items()}
    if config.quantizer == "gumbel":
        weights["quantizer.temperature"] = torch.ones(())
    else:
        weights["quantizer.usage"] = torch.full((config.codes,), 1 / config.codes)
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False), ignored


def _load(path: Path, source: Path | io.BytesIO, *, trust_pickle: bool) -> Any:
    """What the file unpickles to: tensors in plain containers, unless pickles are trusted."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_NOTED):
            return torch.load(source, map_location="cpu", weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        name = asked_for(error)
        if name is None:
            raise CheckpointError(f"{path}: no PyTorch checkpoint, or a truncated one") from error
        raise CheckpointError(
            f"{path}: holds more than tensors ({name}); loading that runs code from the "
            "file. If you trust where it comes from, add --trust-pickle"
        ) from error
    except (ModuleNotFoundError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: pickles objects of a package that is not installed here ({error})"
        ) from error
    except UNREADABLE as error:
        raise CheckpointError(
            f"{path}: no PyTorch checkpoint, or a truncated one; download it again "
            f"({why_unread(error)})"
        ) from error


def _read_tarball(path: Path, *, md5: str) -> dict[str, bytes]:
    """The checkpoint and, if it is there, the BPE of a tarball; nothing of other files."""
    if not path.name.endswith(TAR_ENDINGS):
        return {}
    members = read_members(path, (MINDALLE_MEMBER, *MINDALLE_BPE), md5=md5)
    if MINDALLE_MEMBER not in members:
        raise CheckpointError(f"{path}: has no member {MINDALLE_MEMBER}")
    return members


class _Passing:
    """A file on its way into tarfile: counts its bytes and takes their MD5."""

    def __init__(self, file: BinaryIO, bar: tqdm[NoReturn]) -> None:
        self.file, self.bar = file, bar
        self.digest = hashlib.md5(usedforsecurity=False)

    def read(self, size: int = -1) -> bytes:
        block = self.file.read(size)
        self.digest.update(block)
        self.bar.update(len(block))
        return block


def read_members(path: str | Path, wanted: Container[str], *, md5: str = "any") -> dict[str, bytes]:
    """Contents of those `wanted` files that a tarball has; read once, nothing is unpacked to disk.

    Args:
        path: the tarball, compressed or not.
        wanted: names of its members.
        md5: what the whole file must have, checked before anything is returned; or "any".

    Raises:
        CheckpointError: no such file, another MD5, or a broken tarball.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    found: dict[str, bytes] = {}
    broken = None
    size = path.stat().st_size
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=None, delay=1)
    with bar, open(path, "rb") as file:
        passing = _Passing(file, bar)
        try:
            with tarfile.open(fileobj=passing, mode="r|*") as archive:  # type: ignore[call-overload]
                for member in archive:
                    name = member.name.removeprefix("./")
                    if member.isfile() and name in wanted:
                        content = archive.extractfile(member)
                        assert content is not None
                        found[name] = content.read()
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            broken = error
        while passing.read(2**20):
            pass
    digest = passing.digest.hexdigest()
    if md5 not in ("any", digest):
        raise CheckpointError(
            f"{path}: MD5 is {digest}, not {md5}; download it again (or name its MD5 with --md5)"
        )
    if broken is not None:
        raise CheckpointError(f"{path}: broken tarball; download it again ({broken})") from broken
    return found


def _select(content: Any, path: Path, format: FormatName) -> tuple[dict[str, Tensor], list[str]]:
    """The network's tensors under their published names without prefix, and the rest's names."""
    containers = _FORMATS[format].containers
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a dictionary, found {type(content).__name__}")
    first = "encoder.conv_in.weight"
    held = next((content[key] for key in containers if key in content), None)
    if held is None and first in content:  # saved without a container
        held = content
    if not isinstance(held, Mapping):
        raise CheckpointError(
            f"{path}: a {format} checkpoint keeps its weights in {' or '.join(containers)}; this "
            f"file has {_some([str(key) for key in content])}"
        )
    held = {str(name): tensor for name, tensor in held.items()}
    prefixes = [name.removesuffix(first) for name in held if name.endswith(first)]
    if not prefixes:
        raise CheckpointError(
            f"{path}: no tensor {first}, so this is no VQ-GAN; it has {_some(list(held))}"
        )
    prefix = min(prefixes, key=len)
    tensors, ignored = {}, []
    for name, tensor in held.items():
        bare = name.removeprefix(prefix)
        if not name.startswith(prefix) or _EXTRA.match(bare) or not isinstance(tensor, Tensor):
            ignored.append(name)
        else:
            tensors[bare] = tensor
    _check_format(tensors, path, format)
    empty = [name for name, x in tensors.items() if x.layout != torch.strided or x.is_meta]
    if empty:
        raise CheckpointError(f"{path}: no numbers in {_some(empty)}, or not all of them")
    return tensors, ignored


def _check_format(tensors: Mapping[str, Tensor], path: Path, format: FormatName) -> None:
    if any(name.startswith("encoder.conv_blocks.") for name in tensors):
        found = "llamagen"
    elif "quantize.proj.weight" in tensors:
        found = "taming-gumbel"
    else:
        found = "taming"
    if found != format and not (found == "taming" and format == "mindalle"):
        raise CheckpointError(
            f"{path}: has the tensor names of a {found} checkpoint; use --format {found}"
        )


def _read_config(
    tensors: Mapping[str, Tensor], path: Path, format: FormatName, size: int
) -> VQGANConfig:
    """Sizes of the network, read off the shapes of its tensors."""

    def shape(ours: str) -> tuple[int, ...]:
        name = _published_name(ours, format)
        if name not in tensors:
            raise CheckpointError(f"missing tensor {name}")
        found = tuple(tensors[name].shape)
        if len(found) != (2 if ours == "quantizer.codebook" else 4) or 0 in found:
            raise CheckpointError(f"tensor {name} has the shape {found}")
        return found

    def count(pattern: str) -> int:
        number = 0
        while _published_name(pattern.format(number), format) in tensors:
            number += 1
        return number

    levels = count("encoder.levels.{}.blocks.0.conv_1.weight")
    blocks = [f"encoder.levels.{level}.blocks.0.conv_1.weight" for level in range(levels)]
    width = shape("encoder.stem.weight")[0]
    codes, code_width = shape("quantizer.codebook")
    return VQGANConfig(
        size=size,
        codes=codes,
        code_width=code_width,
        quantizer=_FORMATS[format].quantizer,
        features=shape("encoder.head.weight")[0],
        width=width,
        multipliers=tuple(shape(block)[0] // width for block in blocks),
        blocks=count("encoder.levels.0.blocks.{}.conv_1.weight"),
        attention=tuple(
            level
            for level in range(levels)
            if count(f"encoder.levels.{level}.attentions.{{}}.query.weight")
        ),
        restart=0.0,  # codes that are rare in a fine-tuning set keep their meaning
    )


def _published_name(ours: str, format: FormatName, levels: int = 0) -> str:
    """How `format` calls our tensor; taming counts the decoder's levels from the finest."""
    if format != "llamagen":
        ours = re.sub(
            r"^(decoder\.levels\.)(\d+)", lambda m: f"{m[1]}{levels - 1 - int(m[2])}", ours
        )
    for pattern, published in _FORMATS[format].names:
        ours = re.sub(pattern, published, ours)
    return ours


def _groups(names: Iterable[str]) -> dict[str, int]:
    """Tensor counts by the first two parts of the names."""
    return Counter(".".join(name.split(".")[:2]) for name in names)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
