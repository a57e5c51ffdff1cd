"""Checkpoints of published segmenters, read so that nothing in them can run code.

In: a file that a stranger may have made: of PyTorch, or a pickle of NumPy's arrays (.pkl). Out:
plain containers with tensors or `Numbers` in them. Of NumPy's own constructors none is called: with
a forged type they read from any address.
"""

from __future__ import annotations

import errno
import pickle
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from mas.errors import why_unread
from preprocess.weights import WeightsError

# What reading a damaged file raises, of PyTorch or of `NumberUnpickler`.
UNREADABLE = (
    *(pickle.UnpicklingError, OSError, RuntimeError, EOFError),
    *(ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(OverflowError, MemoryError, SyntaxError),  # of lengths and types that cannot be
)
GONE = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT}  # of a disk or a mount
NUMBERS = "biuf"  # kinds of types that are read: truth values, whole numbers, floating point


def read_checkpoint(path: Path, *, wanted: str) -> Any:
    """What a checkpoint holds; runs no code from it.

    Args:
        path: of a pickle where it ends in .pkl, else of a file of PyTorch.
        wanted: what it should be, for messages.

    Raises:
        WeightsError: it cannot be read, or holds more than numbers in plain containers.
        OSError: the disk or the mount that it lies on is gone.
    """
    try:
        if path.suffix == ".pkl":
            with open(path, "rb") as file:
                return NumberUnpickler(file).load()
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        if is_of_machine(error):
            raise
        raise WeightsError(f"{path}: not {wanted} ({why_unread(error)})") from error


def is_of_machine(error: Exception) -> bool:
    """Whether a GPU or a mount is why weights cannot be loaded, and may be back; not their file."""
    if isinstance(error, OSError):
        return error.errno in GONE
    return isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError))


class NumberType:
    """A type of numbers as a pickle describes it."""

    def __init__(self, code: str, *_: object) -> None:
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in NUMBERS:
            raise pickle.UnpicklingError(f"it holds {code!r} where numbers are expected")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class Numbers:
    """An array as a pickle describes it."""

    values: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, content = state
        self.fill(content, kind, shape, "F" if fortran else "C")

    def fill(self, content: Any, kind: NumberType, shape: Any, order: Any = "C") -> Numbers:
        """Takes the bytes for numbers of this kind; ValueError where they do not fit the shape."""
        content = content.encode("latin1") if isinstance(content, str) else content
        values = np.frombuffer(content, kind.dtype).reshape(shape, order=order)
        self.values = values.astype(kind.dtype.newbyteorder("="))
        return self


STAND_INS: dict[str, Any] = {  # by what NumPy's pickles call for
    "ndarray": Numbers,
    "dtype": NumberType,
    "_reconstruct": lambda *_: Numbers(),
    "scalar": lambda kind, content: Numbers().fill(content, kind, ()),
    "_frombuffer": lambda content, kind, shape, order: Numbers().fill(content, kind, shape, order),
    "encode": lambda text, _: text.encode("latin1"),
    "bytes": lambda: b"",  # of an array without numbers
}

PACKAGES = ("numpy", "_codecs", "builtins", "__builtin__")


class NumberUnpickler(pickle.Unpickler):
    """Unpickles arrays of numbers in plain containers, and nothing else."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin1")  # also what Python 2 wrote

    def find_class(self, module: str, name: str) -> Any:
        """What stands in for a function or class of NumPy; UnpicklingError for all others."""
        if name not in STAND_INS or module.split(".")[0] not in PACKAGES:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was not expected")
        return STAND_INS[name]
