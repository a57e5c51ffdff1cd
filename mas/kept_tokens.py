"""Tokens that an evaluation has sampled, kept on the disk until its report is written.

In: tokens, a batch at a time, and all that decides about them. Out: the same tokens, for the same
batch of a later run: one that was stopped, and begun again, samples only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mas.sequence import Streams
from mas.shards import write_file

logger = logging.getLogger(__name__)


class KeptTokens:
    """A folder of batches, each under a hash of what it was sampled from.

    Args:
        folder: made with the first batch.
        about: what all batches depend on: model, precision, …; plain values.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, about

    def find(self, what: Mapping[str, Any]) -> Streams | None:
        """A batch's tokens, long B T; None where there are none, or none that are whole.

        Args:
            what: all that the batch depends on; plain values and tensors.
        """
        try:
            streams = load_file(self._path(what))
        except (OSError, SafetensorError):
            return None
        return Streams(*(streams[name].long() for name in Streams._fields))

    def keep(self, what: Mapping[str, Any], tokens: Streams) -> None:
        """Writes a batch; from then on it is not lost."""
        self.folder.mkdir(exist_ok=True)
        streams = {name: x.cpu().int().contiguous() for name, x in tokens._asdict().items()}
        write_file(str(self._path(what)), save(streams))

    def _path(self, what: Mapping[str, Any]) -> Path:
        words = json.dumps({**self.about, **what}, sort_keys=True, default=_list)
        return self.folder / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.safetensors"


@contextmanager
def keeping(folder: Path, about: Mapping[str, Any]) -> Iterator[KeptTokens]:
    """Hands out a `KeptTokens` whose folder is there until what it is for has succeeded."""
    try:
        yield KeptTokens(folder, about)
    except BaseException:
        if folder.exists():
            logger.warning("%s: what was sampled is kept; the same command goes on", folder)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _list(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no plain value")
