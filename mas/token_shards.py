"""Token shards: the arrays that `mas tokenize` writes and the GPT trains on.

In and out: `00000.scene.npy`, `.image.npy`, `.text.npy`, `.row.npy` and `manifest.json`; where the
manifest says `mirrored`, also `.mirrored-scene.npy`, `.mirrored-image.npy`, `.mirrored-text.npy`.
Split off mas/shards.py, which is what everybody else imports.
Axes: N pictures, M captions (M >= N), C captions of one picture; T text, S scene, I image tokens.
"""

from __future__ import annotations

import bisect
import errno
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mas.shard_files import ShardError, write_file

MANIFEST = "manifest.json"
TOKEN_FORMAT = 1  # version of manifest.json and the arrays it lists
STREAMS = ("text", "scene", "image")
MIRRORED = "mirrored-"  # before the stream's name, in the names of files


def write_token_shard(
    folder: str,
    name: str,
    *,
    scene: np.ndarray,
    image: np.ndarray,
    text: np.ndarray,
    row: np.ndarray,
    mirrored: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes NAME.scene.npy, NAME.image.npy, NAME.text.npy and NAME.row.npy, each atomically.

    With `mirrored` also NAME.mirrored-scene.npy and so on; a picture keeps its place in them.

    Args:
        folder: where; must exist.
        name: of the scene shard, without .tar.
        scene: uint16 N S.
        image: uint16 N I.
        text: uint16 M T.
        row: int32 M, ascending: the picture each caption belongs to.
        mirrored: scene, image and text of the mirrored pictures, of the same shapes.
    """
    arrays = {"scene": scene, "image": image, "text": text}
    for array in arrays.values():
        assert array.dtype == np.uint16 and array.ndim == 2, (array.dtype, array.shape)
    assert row.dtype == np.int32 and len(row) == len(text) and len(scene) == len(image)
    if mirrored is not None:
        for stream in STREAMS:
            assert mirrored[stream].dtype == np.uint16, mirrored[stream].dtype
            assert mirrored[stream].shape == arrays[stream].shape, mirrored[stream].shape
        arrays |= {MIRRORED + stream: array for stream, array in mirrored.items()}
    arrays["row"] = row
    for stream, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        write_file(f"{folder.rstrip('/')}/{name}.{stream}.npy", buffer.getvalue())


class TokenShards:
    """All pictures of a token folder, memory-mapped: shards[i] -> (text C T, scene S, image I).

    `mirrored(i)` gives the same of the mirrored picture, where the folder holds them.
    A picture with a token out of its vocabulary raises a ShardError that names the file.
    """

    def __init__(self, folder: str | Path) -> None:
        """Opens every array and checks it against the manifest.

        Raises:
            ShardError: names the file that is missing, cut, or of another shape than promised.
        """
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.has_mirrored: bool = self.manifest.get("mirrored", False)
        self._streams: list[dict[str, np.ndarray]] = []
        self._starts = [0]  # index of the first picture of each shard, and the total
        for shard in self.manifest["shards"]:
            self._streams.append(self._open(shard))
            self._starts.append(self._starts[-1] + shard["pictures"])

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return TokenShards, (self.folder,)  # a loader worker maps the files anew, copying nothing

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._read(index, "")

    def mirrored(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(text C T, scene S, image I) of the mirrored picture, its captions in the same order.

        Raises:
            ShardError: the folder holds no mirrored pictures, or a token is of no vocabulary.
        """
        if not self.has_mirrored:
            raise ShardError(f"{self.folder}: holds no mirrored pictures; tokenize with --mirror")
        return self._read(index, MIRRORED)

    def _read(self, index: int, prefix: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect.bisect_right(self._starts, index) - 1
        streams, picture = self._streams[shard], index - self._starts[shard]
        first, last = np.searchsorted(streams["row"], [picture, picture + 1])
        text, scene, image = (streams[prefix + stream] for stream in STREAMS)
        tokens = text[first:last], scene[picture], image[picture]
        for stream, array in zip(STREAMS, tokens, strict=True):
            largest, vocabulary = array.max(initial=0), self.manifest[stream]["vocabulary"]
            if largest >= vocabulary:
                name = f"{self.manifest['shards'][shard]['name']}.{prefix}{stream}.npy"
                raise ShardError(
                    f"{self.folder / name}: picture {picture} has token {largest}, "
                    f"not of 0-{vocabulary - 1}; {_mend(self.manifest['shards'][shard])}"
                )
        return tokens

    def _open(self, shard: dict[str, Any]) -> dict[str, np.ndarray]:
        pictures, captions = shard["pictures"], shard["captions"]
        shapes: dict[str, tuple[int, ...]] = {
            "text": (captions, self.manifest["text"]["length"]),
            "scene": (pictures, self.manifest["scene"]["grid"] ** 2),
            "image": (pictures, self.manifest["image"]["grid"] ** 2),
        }
        if self.has_mirrored:
            shapes |= {MIRRORED + stream: shape for stream, shape in shapes.items()}
        shapes["row"] = (captions,)
        streams = {}
        for stream, shape in shapes.items():
            path = self.folder / f"{shard['name']}.{stream}.npy"
            dtype = np.int32 if stream == "row" else np.uint16
            try:
                array = _map_array(path)
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno == errno.EMFILE:
                    raise
                raise ShardError(f"{path}: cannot be read ({error}); {_mend(shard)}") from error
            if array.shape != shape or array.dtype != dtype:
                raise ShardError(
                    f"{path}: {array.dtype} {array.shape}, the manifest promises "
                    f"{np.dtype(dtype)} {shape}; {_mend(shard)}"
                )
            streams[stream] = array
        row = streams["row"]
        if captions and (
            row[0] != 0 or row[-1] != pictures - 1 or not np.isin(np.diff(row), (0, 1)).all()
        ):
            raise ShardError(f"{path}: not every picture has its captions; {_mend(shard)}")
        return streams


def _mend(shard: dict[str, Any]) -> str:
    return f"remove {shard['name']}.stats.json there and tokenize again"


# np.load would keep a file descriptor per array: with four to seven arrays a shard, the 1024 that a
# process commonly may hold are used up at some 150 shards. Torch closes the file it has mapped.
def _map_array(path: Path) -> np.ndarray:
    """The array of a .npy file in C order, read-only and mapped into memory.

    Raises:
        OSError, ValueError: the file is missing, cut, or something else.
    """
    import torch  # here, since everybody imports this file and only training opens token shards

    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"version {version} of the npy format")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        start, size = file.tell(), os.fstat(file.fileno()).st_size
    if fortran_order or dtype.hasobject:
        raise ValueError("neither plain numbers nor row by row")
    stop = start + math.prod(shape) * dtype.itemsize
    if size < stop:
        raise ValueError(f"{size} bytes of {stop}")
    bytes_ = torch.from_file(str(path), shared=False, size=stop, dtype=torch.uint8).numpy()
    bytes_.flags.writeable = False
    return bytes_[start:].view(dtype).reshape(shape)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ShardError(
            f"{folder}: no {MANIFEST}; this is no finished output of mas tokenize"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ShardError(f"{path}: cannot be read ({error}); tokenize again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != TOKEN_FORMAT:
        raise ShardError(f"{path}: not of format {TOKEN_FORMAT}; tokenize again")
    try:
        sizes = [
            manifest[stream][size]
            for stream, length in (("text", "length"), ("scene", "grid"), ("image", "grid"))
            for size in ("vocabulary", length)
        ]
        sizes += [shard[size] for shard in manifest["shards"] for size in ("pictures", "captions")]
        sound = isinstance(manifest.get("mirrored", False), bool)
        named = sound and all(isinstance(shard["name"], str) for shard in manifest["shards"])
    except (KeyError, TypeError) as error:
        raise ShardError(f"{path}: incomplete ({error}); tokenize again") from error
    if not named or not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ShardError(f"{path}: holds a size or a name that cannot be; tokenize again")
    return manifest
