"""What a library has raised, as words for a message of ours."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT}  # what is read never meets these


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank; its kind where there is none."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def asked_for(error: BaseException) -> str | None:
    """The class or function that PyTorch refused to take from a file, None for other errors.

    `preprocess.checkpoint.NumberUnpickler` refuses in the same words.
    """
    found = re.search(r"GLOBAL (\S+) (?:was not|whose module)", str(error))
    return found and found.group(1)


def why_unread(error: BaseException) -> str:
    """Why a file of weights is not read: what it asks for, else the first sentence of the error."""
    if name := asked_for(error):
        return f"it asks for {name}, which would run code from the file"
    return first_line(error).split(". ")[0]


@contextlib.contextmanager
def naming_full(path: str | Path) -> Iterator[None]:
    """Names what found no room in the error of a full disk: one of a write names no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in FULL:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
