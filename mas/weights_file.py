"""Networks that are not ours, as users bring them: one file of tensors, or of a whole network.

In: a .safetensors file or a PyTorch file (.pth, .pt) of which nothing but tensors is unpickled; or
a network saved with its graph, by torch.export (.pt2) or as TorchScript, which is a program. Out:
tensors by name, or the frozen network. What is wrong is said in one line that names the file and
its source.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mas.errors import why_unread
from mas.storage import UNREADABLE, StorageError, check_tensors


class WeightsError(ValueError):
    """A weights file that cannot be used; the message names it and where to get a good one."""


def check_file(path: str | Path, *, source: str) -> None:
    """Raises WeightsError where there is no such file."""
    if not Path(path).is_file():
        raise WeightsError(f"{path}: no such file; get it from {source}")


def read_tensors(path: str | Path, *, source: str) -> dict[str, Tensor]:
    """Tensors of a file by name, on the CPU; `source` says in errors where to get it.

    Raises:
        WeightsError: no such file, one that is damaged, or one that holds more than tensors.
    """
    path = Path(path)
    check_file(path, source=source)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *UNREADABLE) as error:
        raise WeightsError(
            f"{path}: not a readable file of tensors ({why_unread(error)}); get it from {source}"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not tensors by name")
    return {str(name): x for name, x in content.items() if isinstance(x, Tensor)}


def pick_tensors(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    path: str | Path,
    source: str,
) -> dict[str, Tensor]:
    """The `expected` ones among the tensors of `path`, float32; others are left out.

    Raises:
        WeightsError: one is missing, misshaped or not finite; by name.
    """
    found = {name: tensors[name] for name in expected if name in tensors}
    try:
        check_tensors(expected, found, path)
    except StorageError as error:
        raise WeightsError(f"{error}; get the file from {source}") from error
    broken = [name for name, x in found.items() if not x.isfinite().all()]
    if broken:
        raise WeightsError(f"{path}: NaN or infinite values in {', '.join(broken[:5])}")
    return {name: x.float() if x.is_floating_point() else x for name, x in found.items()}


def load_graph(path: str | Path, *, source: str) -> nn.Module:
    """A network saved with its graph: torch.export's .pt2, else TorchScript; frozen, on the CPU.

    Such a file is a program: reading it may write files or run code.

    Raises:
        WeightsError: no such file, or another one.
    """
    path = Path(path)
    check_file(path, source=source)
    try:
        if path.suffix == ".pt2":
            network = torch.export.load(path).module()
        else:
            network = torch.jit.load(str(path), map_location="cpu").eval()
    except Exception as error:  # of damaged files both readers raise whatever they stumble over
        raise WeightsError(
            f"{path}: neither TorchScript nor, by the name .pt2, a network of torch.export "
            f"({why_unread(error)}); give {source}"
        ) from error
    for parameter in network.parameters():
        parameter.requires_grad_(False)  # of the network as a whole TorchScript refuses it
    return network
