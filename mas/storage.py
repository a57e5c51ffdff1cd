"""Weights travel with their config: a network's folder is config.json + model.safetensors.

In: a network with a `.config` dataclass, or such a folder. Out: the folder, or the network in
evaluation mode. On the disk weights may have fewer bits (mas/rounding.py, mas/packing.py). Files
are written under a temporary name and renamed, so a folder never holds half a file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import types
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from mas.packing import SHAPE, pack, read_shape, unpack
from mas.rounding import SCALE, Weights, narrow, widen
from mas.shard_files import replacing_path, write_file

# What reading a damaged file of tensors raises, one of safetensors or of PyTorch.
UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, SafetensorError, zipfile.BadZipFile)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

# Which network a config is of: the first whose key it has.
KINDS = {
    "grid": "VQ-SEG",
    "codes": "VQ-GAN",
    "image_vocabulary": "GPT",
    "times": "reader",
    "text_layers": "judge",
    "label_width": "refiner",
}

SPARE_NUMBERS = 2**20  # that a network may make beside twice those which are stored
LEAST_NUMBERS = 256  # that a tensor is counted as, for what is around it
MAKERS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
FILLS = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.zero_, torch.Tensor.fill_)

Network = TypeVar("Network", bound=nn.Module)


class StorageError(ValueError):
    """A folder that does not hold what it should; the message names the file and the mend."""


class _Unfilled(TorchFunctionMode):
    """Leaves out start values: parameters stay as they are allocated, their memory untouched.

    No more than `most` numbers are allocated: a config can ask for any amount in a few letters.
    """

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most, self.made = most, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if function in MAKERS:
            self.made += max(_count(*args, **kwargs), LEAST_NUMBERS)
            if self.made > self.most:
                raise StorageError("describes a far larger network than the one that is stored")
        if function in (torch.rand, torch.randn):
            return torch.empty(*args, **kwargs)
        if function in FILLS and isinstance(args[0], nn.Parameter):
            return args[0]
        if getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _count(size: Any = (), *more: Any, **_: Any) -> int:
    """Numbers of a tensor, by the arguments of the function that makes it."""
    return math.prod(size if isinstance(size, tuple | list) else (size, *more))


def save_network(
    network: nn.Module,
    folder: str | Path,
    *,
    weights: Weights = "float32",
    packed: bool = False,
) -> None:
    """Writes `network.config` and the state dict (contiguous, on the CPU) into `folder`.

    Args:
        network: with a frozen dataclass `.config`.
        folder: is made where it does not exist.
        weights: number format on the disk; what is loaded again is float32, rounded to it.
        packed: int8 numbers in fewer bytes, which changes none of them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = network.config
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    tensors = narrow(tensors, weights)
    tensors = pack(tensors) if packed else tensors
    with replacing_path(str(folder / WEIGHTS_FILE)) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise _disk_error(error, folder / WEIGHTS_FILE) from error
        os.chmod(temporary, 0o644)  # safetensors lets only its owner read it
    # A key that came later is not written while it says what was so before: older versions read on.
    defaults = {f.name: f.default for f in dataclasses.fields(config) if f.metadata.get("later")}
    values = dataclasses.asdict(config)
    write_json(
        folder / CONFIG_FILE,
        {k: v for k, v in values.items() if k not in defaults or v != defaults[k]},
    )


def _disk_error(error: SafetensorError, path: Path) -> OSError:
    """What safetensors covers with an error of its own."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found is None:
        return OSError(f"{path}: cannot be written ({error})")
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path))


def load_network(
    network_class: type[Network], config_class: type[Any], folder: str | Path
) -> Network:
    """Builds `network_class(config_class(**config.json))` and loads its weights, float32, eval.

    Raises:
        StorageError: another network; a missing file; an unknown, missing or illegal config key;
            a missing, unexpected or misshaped tensor; each by name.
    """
    folder = Path(folder)
    source, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
    if inside and not source.exists():
        raise StorageError(
            f"{source}: no such file; there are networks inside, in {', '.join(inside)}: give one "
            "of these folders"
        )
    config = parse_config(config_class, read_json(source), source)
    if not weights_file.is_file():
        raise StorageError(f"{weights_file}: no such file; {folder} is no complete model folder")
    try:
        tensors = widen(unpack(load_file(weights_file)))
    except (SafetensorError, OSError, ValueError) as error:
        raise StorageError(f"{weights_file}: not a readable safetensors file ({error})") from error
    network = build_unfilled(
        network_class, config, stored=sum(x.numel() for x in tensors.values()), folder=folder
    )
    check_tensors(network.state_dict(), tensors, weights_file)
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of a network's folder, float32, read one by one: nothing is kept or mapped.

    Raises:
        StorageError: as `load_network`, about the names and shapes of all tensors at once.
    """

    def __init__(self, folder: str | Path, network_class: type[nn.Module], config: Any) -> None:
        """`network_class(config)` tells which tensors there must be."""
        self.file = Path(folder) / WEIGHTS_FILE
        if not self.file.is_file():
            raise StorageError(f"{self.file}: no such file; {folder} is no complete model folder")
        with self._open() as file:
            self.stored = set(file.keys())
            beside = {name + end for name in self.stored for end in (SCALE, SHAPE)}
            shapes = {
                name: file.get_slice(name).get_shape() for name in sorted(self.stored - beside)
            }
            for name in shapes:
                if name + SHAPE in self.stored:
                    size, shape = math.prod(shapes[name]), file.get_tensor(name + SHAPE)
                    shapes[name] = read_shape(name, shape, size=size)
            kinds = {
                name: _kind(file.get_slice(name).get_dtype(), scaled=name + SCALE in self.stored)
                for name in shapes
            }
        self.shapes = shapes
        network = build_unfilled(network_class, config, stored=self.numbers, folder=folder)
        found = {
            name: torch.empty(shape, device="meta", dtype=kinds[name])
            for name, shape in shapes.items()
        }
        check_tensors(network.state_dict(), found, self.file)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        # Opened anew each time: an open file keeps all that was read from it in memory.
        with self._open() as file:
            names = {name, name + SCALE, name + SHAPE} & self.stored
            return widen(unpack({n: file.get_tensor(n) for n in names}))[name].clone()

    @property
    def numbers(self) -> int:
        """How many numbers all tensors hold together; reads none of them."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.file, framework="pt") as file:
                yield file
        except (SafetensorError, OSError, ValueError) as error:
            message = f"{self.file}: not a readable safetensors file ({error})"
            raise StorageError(message) from error


def _kind(stored: str, *, scaled: bool) -> torch.dtype:
    """float32 for numbers that are read as such, else a type of whole numbers."""
    return torch.float32 if scaled or stored.startswith(("F", "BF")) else torch.int64


def build_unfilled(
    network_class: Callable[[Any], Network],
    config: Any,
    *,
    stored: int | None = None,
    folder: str | Path = "",
) -> Network:
    """A network whose tensors `load_state_dict(…, assign=True)` shall replace.

    Args:
        network_class: what is built,
        config: by this,
        stored: if its weights hold so many numbers; one of far more is refused before it takes the
            memory.
        folder: of both, for messages.

    Not on the meta device: random functions there import torch's compiler, which takes longer than
    everything else about loading; and tables that are no part of the state would stay empty.
    """
    with _Unfilled(math.inf if stored is None else 2 * stored + SPARE_NUMBERS):
        try:
            return network_class(config)
        except StorageError as error:
            raise StorageError(f"{Path(folder, CONFIG_FILE)}: {error}; get it anew") from None


def parse_config(config_class: type[Any], values: Any, source: str | Path) -> Any:
    """`config_class(**values)`, refusing other networks, unknown and missing keys, other types.

    JSON lists become tuples, so that frozen configs stay hashable.
    """
    if not isinstance(values, dict):
        raise StorageError(f"{source}: expected a JSON object, got {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    found, wanted = kind_of(values), kind_of(fields)
    if found and wanted and found != wanted:
        raise StorageError(f"{source}: this is a {found}; give the folder of a {wanted}")
    unknown = sorted(values.keys() - fields.keys())
    if unknown:
        raise StorageError(f"{source}: unknown config keys {unknown}; known are {sorted(fields)}")
    required = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - values.keys())
    if missing:
        raise StorageError(f"{source}: missing config keys {missing}")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name, hint in get_type_hints(config_class).items():
        if name in given and not _is_of(given[name], hint):
            wanted = hint.__name__ if isinstance(hint, type) else hint
            raise StorageError(f"{source}: {name} is {values[name]!r}, but must be {wanted}")
    try:
        return config_class(**given)
    except (TypeError, ValueError) as error:
        raise StorageError(f"{source}: {error}") from error


def kind_of(keys: Collection[str]) -> str | None:
    """Which network has a config of these keys, by KINDS; None where none of them tells."""
    return next((kind for key, kind in KINDS.items() if key in keys), None)


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON fits the annotation of a config field."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is_of(value, choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:  # tuple[X, ...]
        return isinstance(value, tuple) and all(_is_of(v, get_args(hint)[0]) for v in value)
    if get_origin(hint) is Literal:
        return isinstance(value, str)  # the config names the legal ones
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint


def check_tensors(
    expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], source: str | Path
) -> None:
    """Raises StorageError when names, shapes or kinds differ, naming up to five of each.

    Of kinds there are two, floating point and others.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshaped = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    strange = [
        name
        for name, tensor in expected.items()
        if name in found and found[name].is_floating_point() != tensor.is_floating_point()
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
        for kind, names in (
            ("missing tensors", missing),
            ("unexpected tensors", unexpected),
            ("tensors of the wrong shape", misshaped),
            ("tensors of the wrong kind of number", strange),
        )
        if names
    ]
    if problems:
        raise StorageError(f"{source}: {'; '.join(problems)}")


def file_hash(path: str | Path) -> str:
    """Sha256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | Path) -> Any:
    """Content of a JSON file; StorageError when it is missing or no JSON."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise StorageError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path}: not a readable JSON file ({error})") from error


def write_json(path: str | Path, content: Any) -> None:
    """Writes readable JSON atomically."""
    write_file(str(path), (json.dumps(content, indent=2) + "\n").encode())
