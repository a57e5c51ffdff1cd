"""What a library has raised, as words for a message of ours."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank; its kind where there is none."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
