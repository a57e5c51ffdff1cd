"""Why a file that a person handed in as a picture is not read, in words for a message."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from PIL import Image

OTHERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # what people have instead
NAMES = {"WEBP": "WebP"}


def why_no_picture(path: str | Path | IO[bytes], error: Exception, *, wanted: str) -> str:
    """Names the format of a good picture of another one, else says that it is not readable.

    Args:
        path: the file, or one that is open.
        error: what reading it has raised.
        wanted: the formats that are taken, such as "PNG or WebP".
    """
    try:
        if not isinstance(path, (str, Path)):
            path.seek(0)
        with Image.open(path, formats=OTHERS) as image:
            found = NAMES.get(str(image.format), str(image.format))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        found = wanted
    if found in wanted:
        return f"not a readable {wanted} ({error})"
    return f"is a {found}; what is taken is a {wanted}: save it as such"
