"""Downloads one set of weights: resumable, checked, put in place by renaming.

In: an entry of `preprocess.weights`. Out: its file below the weights folder, and one line that says
what was done. Received bytes collect in `FILE.part`; a broken download goes on from there.
"""

from __future__ import annotations

import http.client
import logging
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from mas.errors import first_line
from preprocess.progress import counting
from preprocess.weights import Weights, WeightsError, check_hash, file_hash, is_present

logger = logging.getLogger(__name__)

CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without a byte
RETRIES = 4  # after a connection that broke
PAUSE = 1.0  # seconds before the first retry, doubled for each further one


def fetch(weights: Weights, folder: Path, *, urls: tuple[str, ...]) -> str:
    """Makes sure that the weights lie below `folder`; returns what was done, for people.

    Raises:
        WeightsError: no address answered, the checksum is wrong, or a file that lies there already
            is not the published one.
    """
    path = folder / weights.path
    if is_present(weights, folder):
        _check(weights, path)
        return f"{path} is there{_verdict(weights, path)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if weights.repository is not None:
        _fetch_repository(weights.repository, path)
        return f"{path}"
    part = path.with_name(path.name + ".part")
    download(urls, part, page=weights.page)
    try:
        _check(weights, part, downloaded=True)
    except WeightsError as error:
        part.unlink()
        raise WeightsError(f"{weights.name}: {error}") from None
    verdict = _verdict(weights, part)
    if weights.member:
        _take_member(part, weights.member, path)
    else:
        os.replace(part, path)
    return f"{path}{verdict}"


def download(urls: tuple[str, ...], part: Path, *, page: str) -> None:
    """Receives the first address that answers into `part`, going on where `part` ends.

    Raises:
        WeightsError: none worked; with the reason for each, and the page to get it from by hand.
    """
    reasons = []
    for url in urls:
        try:
            return _receive_patiently(url, part)
        except (OSError, http.client.HTTPException) as error:
            reasons.append(f"{url}: {_reason(error)}")
    path = part.with_name(part.name.removesuffix(".part"))
    raise WeightsError(
        f"{'; '.join(reasons)}. Run the command again to go on, or get the file from {page} "
        f"and put it at {path}"
    )


def _receive_patiently(url: str, part: Path) -> None:
    """Goes on after a broken connection as long as each attempt brings something."""
    for attempt in range(RETRIES + 1):
        before = part.stat().st_size if part.exists() else 0
        try:
            return _receive(url, part)
        except (OSError, http.client.HTTPException) as error:
            progress = part.exists() and part.stat().st_size > before
            final = isinstance(error, (urllib.error.HTTPError, WeightsError))
            if final or not progress or attempt == RETRIES:
                raise
            logger.warning("%s: %s; going on", url, _reason(error))
            time.sleep(PAUSE * 2**attempt)


def _receive(url: str, part: Path) -> None:
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "mini-make-a-scene"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing lies beyond what was received
            raise
        size = (error.headers.get("Content-Range") or "").removeprefix("bytes */")
        if size != str(start):
            part.unlink()  # longer than the file: of another version
            _receive(url, part)
        return
    with response:
        if response.headers.get_content_type() == "text/html":
            raise WeightsError("a web page came instead of the file")
        if start and not (response.headers.get("Content-Range") or "").startswith(
            f"bytes {start}-"
        ):
            start = 0  # the server sends it all again
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with (
            open(part, "ab" if start else "wb") as file,
            counting(
                total,
                name=part.name.removesuffix(".part"),
                unit="B",
                initial=start,
                unit_scale=True,
                unit_divisor=1024,
            ) as tell,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                tell(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    received = part.stat().st_size
    if total is not None and received < total:
        raise ConnectionError(f"the connection broke at {received:,} of {total:,} bytes")


def _fetch_repository(repository: str, path: Path) -> None:
    """Config and tensors of a hub repository; safetensors where it has them."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        files = HfApi().list_repo_files(repository)
        tensors = [f for f in files if f.startswith("model") and f.endswith(".safetensors")]
        tensors = tensors or [f for f in files if f.startswith("pytorch_model")]
        wanted = ["config.json", "preprocessor_config.json", "*.safetensors.index.json", *tensors]
        snapshot_download(repository, local_dir=path, allow_patterns=wanted)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise WeightsError(
            f"{repository}: {_reason(error)}. Run the command again to go on, or put the files of "
            f"https://huggingface.co/{repository} into {path}"
        ) from error


def _take_member(archive: Path, member: str, path: Path) -> None:
    """Moves one file of a .tar.gz to `path` and removes the archive."""
    partial = path.with_name(path.name + ".member")
    with tarfile.open(archive, "r|gz") as tar:
        for entry in tar:
            source = tar.extractfile(entry) if entry.name.removeprefix("./") == member else None
            if source is not None:
                with source, open(partial, "wb") as file:
                    shutil.copyfileobj(source, file, CHUNK)
                    file.flush()
                    os.fsync(file.fileno())
                break
        else:
            raise WeightsError(f"{archive}: holds no {member}")
    os.replace(partial, path)
    archive.unlink()


def _check(weights: Weights, path: Path, *, downloaded: bool = False) -> None:
    if weights.member and not downloaded:
        return  # the checksum is the archive's
    options = (
        {"mend": "the download was removed; try again, or another --url"} if downloaded else {}
    )
    if weights.sha256:
        check_hash(path, weights.sha256, **options)
    elif weights.md5:
        check_hash(path, weights.md5, algorithm="md5", **options)


def _verdict(weights: Weights, path: Path) -> str:
    if weights.sha256:
        return ", sha256 agrees"
    if weights.md5:
        return ", md5 agrees" if path.suffix == ".part" else ""
    if weights.repository:
        return ""
    return f", no checksum is published, this file's sha256 is {file_hash(path)}"


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return first_line(error)
