"""The files of a folder, those in linked folders among them."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

logger = logging.getLogger(__name__)


def find_files(filesystem: Any, folder: str) -> dict[str, dict[str, Any]]:
    """Details of every file below `folder`, by path and sorted by it.

    Links to folders are entered, each place once: a folder that holds one that is listed already,
    or lies in it, is left out with a warning. So a link cannot lead in a circle.
    """
    found: dict[str, dict[str, Any]] = filesystem.find(folder, detail=True)
    if not isinstance(filesystem, LocalFileSystem):
        return found
    listed, passed = [Path(folder).resolve()], []
    links = _linked_folders(found)
    while links:
        link = links.pop(0)
        del found[link]
        real = Path(link).resolve()
        if any(real.is_relative_to(place) or place.is_relative_to(real) for place in listed):
            passed.append(link)
            continue
        listed.append(real)
        inside = filesystem.find(link, detail=True)
        found |= inside
        links += _linked_folders(inside)
    if passed:
        logger.warning(
            "%s: %d linked folders are not entered, as %s: their pictures would come twice",
            *(folder, len(passed), passed[0]),
        )
    return dict(sorted(found.items()))


def _linked_folders(files: dict[str, dict[str, Any]]) -> list[str]:
    return [path for path, about in files.items() if about["islink"] and os.path.isdir(path)]
