"""Tokens that an evaluation has sampled, kept on the disk until its report is written.

In: tokens of pictures, and all that decides about them. Out: the same tokens, for a later run that
wants the same picture: one that was stopped, and begun again, samples only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mas.fast_decoder import find_step
from mas.sequence import Streams
from mas.shards import write_file

logger = logging.getLogger(__name__)


class KeptTokens:
    """A folder of pictures' tokens, each under a hash of what they were sampled from.

    Args:
        folder: made with the first picture.
        about: what all pictures depend on: model, precision, …; plain values.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, about
        self.found = 0  # pictures of earlier runs
        self.used: set[Path] = set()  # files of this run, its own and found ones

    def complete(
        self, whats: Sequence[Mapping[str, Any]], sample: Callable[[list[int]], Streams]
    ) -> Streams:
        """Tokens of pictures, long B T on the CPU: those that are kept, and new ones, kept now.

        Args:
            whats: all that each picture depends on; plain values and tensors.
            sample: makes the tokens of those that are wanted, by their places in `whats`.
        """
        rows = {i: found for i, what in enumerate(whats) if (found := self.find(what))}
        missing = [i for i in range(len(whats)) if i not in rows]
        if missing:
            for i, *row in zip(missing, *sample(missing), strict=True):
                rows[i] = Streams(*(stream_T.cpu() for stream_T in row))
                self.keep(whats[i], rows[i])
        ordered = (rows[i] for i in range(len(whats)))
        return Streams(*(torch.stack(stream) for stream in zip(*ordered, strict=True)))

    def find(self, what: Mapping[str, Any]) -> Streams | None:
        """A picture's tokens, long T; None where there are none, or none that are whole."""
        path = self._path(what)
        try:
            streams = load_file(path)
        except (OSError, SafetensorError):
            return None
        self.found += path not in self.used
        self.used.add(path)
        return Streams(*(streams[name].long() for name in Streams._fields))

    def keep(self, what: Mapping[str, Any], tokens: Streams) -> None:
        """Writes a picture's tokens; from then on they are not lost."""
        path = self._path(what)
        streams = {name: x.cpu().int().contiguous() for name, x in tokens._asdict().items()}
        self.folder.mkdir(exist_ok=True)  # the same command, run twice, removes it when it is done
        write_file(str(path), save(streams))
        self.used.add(path)

    def _path(self, what: Mapping[str, Any]) -> Path:
        words = json.dumps({**self.about, **what}, sort_keys=True, default=_list)
        return self.folder / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.safetensors"


@contextmanager
def keeping(folder: Path, about: Mapping[str, Any]) -> Iterator[KeptTokens]:
    """Hands out a `KeptTokens`, whose files go when what they are for has succeeded.

    Those of runs with other settings stay.

    Raises:
        OSError: the folder cannot be made, or takes no files.
    """
    folder.mkdir(exist_ok=True)
    check_writable(folder, wanted=folder)
    kept = KeptTokens(folder, about)
    try:
        yield kept
    except BaseException:
        if kept.used:
            logger.warning(
                "%s: %d pictures are kept; the same command goes on", folder, len(kept.used)
            )
        raise
    else:
        for path in kept.used:
            path.unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # something is there
            folder.rmdir()


def check_writable(folder: Path, *, wanted: Path) -> None:
    """Raises OSError, with the name of what is `wanted`, where a folder takes no files."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(wanted)) from error


def describe_machine(device: torch.device) -> dict[str, str]:
    """What rounds, and so draws other tokens now and then; plain values."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"torch": torch.__version__, "device": card, "step": find_step().state}


def _list(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no plain value")
