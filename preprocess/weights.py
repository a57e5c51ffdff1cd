"""Which weights the segmenters and the picture tokenizers use, where they lie, and fetching them.

In: a stage or a name. Out: files below the weights folder (`MAS_WEIGHTS`). Only
`mas fetch-weights` downloads; everything else asks `find_weights`, which never does, so that no
worker of a cluster run downloads anything.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Stage = Literal["panoptic", "human", "face", "vqgan"]

FOLDER_VARIABLE = "MAS_WEIGHTS"
DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/COCO-PanopticSegmentation"
FAN = "https://www.adrianbulat.com/downloads/python-fan"
HEIDELBERG = "https://heibox.uni-heidelberg.de/f"
HUB = "https://huggingface.co"
SCHP_DRIVE_ID = "1k4dllHpu0bdx38J7H28rVVLpU-kOHmnH"


class WeightsError(OSError):
    """Weights that are missing, broken or not what they should be; the message names the mend."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One published set of weights."""

    name: str  # what configs and --name say
    stage: Stage
    path: str  # below the weights folder: a file, or a folder for a hub repository
    licence: str  # printed when fetched
    page: str  # where a person finds it
    urls: tuple[str, ...] = ()  # tried in this order
    repository: str | None = None  # on the Hugging Face hub, instead of urls
    sha256: str | None = None  # of the downloaded file; None = not published
    md5: str | None = None  # where only that is published
    member: str | None = None  # the file wanted out of a downloaded .tar.gz
    default: bool = False  # fetched when a stage is asked for without a name


def _panoptic_fpn(name: str, file: str, *, default: bool = False) -> Weights:
    return Weights(
        name=name,
        stage="panoptic",
        path=f"{name}.pkl",
        urls=(f"{DETECTRON2}/{name}/{file}",),
        licence="CC BY-SA 3.0 (detectron2 model zoo; code Apache-2.0)",
        page="https://github.com/facebookresearch/detectron2/blob/main/MODEL_ZOO.md",
        default=default,
    )


def _mask2former(size: str) -> Weights:
    name = f"mask2former-swin-{size}-coco-panoptic"
    return Weights(
        name=name,
        stage="panoptic",
        path=name,
        repository=f"facebook/{name}",
        licence="CC BY-NC 4.0, not for commercial use (code MIT)",
        page=f"{HUB}/facebook/{name}",
    )


def _face(name: str, url: str, licence: str, *, sha256: str | None = None) -> Weights:
    return Weights(
        name=name,
        stage="face",
        path=f"face/checkpoints/{url.rsplit('/', 1)[1].split('?')[0]}",
        urls=(url,),
        sha256=sha256,
        licence=licence,
        page="https://github.com/1adrianb/face-alignment",
        default=name in ("2dfan4", "s3fd"),
    )


def _taming(name: str, link: str, *, sha256: str | None = None) -> Weights:
    return Weights(
        name=name,
        stage="vqgan",
        path=f"{name}.ckpt",
        urls=(f"{HEIDELBERG}/{link}/?dl=1",),
        sha256=sha256,
        licence="MIT (taming-transformers)",
        page="https://github.com/CompVis/taming-transformers",
    )


def _llamagen(name: str, repository: str, file: str) -> Weights:
    return Weights(
        name=name,
        stage="vqgan",
        path=file,
        urls=(f"{HUB}/{repository}/resolve/main/{file}",),
        licence="MIT (LlamaGen)",
        page=f"{HUB}/{repository}",
    )


WEIGHTS = (
    _panoptic_fpn("panoptic_fpn_R_50_3x", "139514569/model_final_c10459.pkl", default=True),
    _panoptic_fpn("panoptic_fpn_R_101_3x", "139514519/model_final_cafdb1.pkl"),
    *(_mask2former(size) for size in ("tiny", "small", "base", "large")),
    Weights(
        name="schp-lip",
        stage="human",
        path="exp-schp-201908261155-lip.pth",
        urls=(
            f"https://drive.usercontent.google.com/download?id={SCHP_DRIVE_ID}&confirm=t",
            f"{HUB}/zhengchong/CatVTON/resolve/main/SCHP/exp-schp-201908261155-lip.pth",
        ),
        sha256="24fa3254ceeb74c8435458994a64b522fb439a3635b7b86ff470457e0413da00",
        licence="not stated by the authors (code MIT); trained on LIP",
        page=f"https://drive.google.com/file/d/{SCHP_DRIVE_ID}/view",
        default=True,
    ),
    _face(
        "2dfan4",
        f"{FAN}/2DFAN4-11f355bf06.pth.tar",
        "BSD-3-Clause (face-alignment)",
        sha256="11f355bf0693120222f5955ce3f9dc8fb5763ebb30a47d7906e509490d32e4aa",
    ),
    _face(
        "s3fd",
        f"{FAN}/s3fd-619a316812.pth",
        "BSD-3-Clause (face-alignment)",
        sha256="619a31681264d3f7f7fc7a16a42cbbe8b23f31a256f75a366e5a1bcd59b33543",
    ),
    _face(
        "yunet",
        "https://github.com/opencv/opencv_zoo/raw/main/models/face_detection_yunet/"
        "face_detection_yunet_2023mar.onnx",
        "MIT (OpenCV zoo)",
        sha256="8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
    ),
    _face("retinaface", f"{FAN}/retinaface_mobilenet0.25.pth", "MIT (Pytorch_Retinaface)"),
    _face(
        "blazeface",
        "https://github.com/hollance/BlazeFace-PyTorch/blob/master/blazeface.pth?raw=true",
        "Apache-2.0 (MediaPipe)",
    ),
    _face(
        "blazeface-anchors",
        "https://github.com/hollance/BlazeFace-PyTorch/blob/master/anchors.npy?raw=true",
        "Apache-2.0 (MediaPipe)",
    ),
    Weights(
        name="mindalle",
        stage="vqgan",
        path="mindalle-stage1_last.ckpt",
        urls=(
            "https://arena.kakaocdn.net/brainrepo/models/minDALL-E/"
            "57b008f02ceaa02b779c8b7463143315/1.3B.tar.gz",
        ),
        md5="57b008f02ceaa02b779c8b7463143315",
        member="1.3B/stage1_last.ckpt",
        licence="not stated for stage 1 (minDALL-E: code Apache-2.0, stage 2 CC BY-NC-SA 4.0)",
        page="https://github.com/kakaobrain/minDALL-E",
        default=True,
    ),
    _taming(
        "vqgan_imagenet_f16_16384",
        "867b05fc8c4841768640",
        sha256="845a68805098cb666420d5db93df53f3a3b6dd443e6dd85c05759c5b998cd663",
    ),
    _taming("vqgan_imagenet_f16_1024", "140747ba53464f49b476"),
    _taming("vqgan_gumbel_f8", "34a747d5765840b5a99d"),
    _llamagen("llamagen-vq-ds16-c2i", "FoundationVision/LlamaGen", "vq_ds16_c2i.pt"),
    _llamagen("llamagen-vq-ds16-t2i", "peizesun/llamagen_t2i", "vq_ds16_t2i.pt"),
)


@dataclass(frozen=True, kw_only=True)
class WeightsState:
    """Where one set of weights belongs on this machine, and whether it is there."""

    name: str
    stage: Stage
    path: Path
    licence: str
    present: bool


def weights_folder() -> Path:
    """`MAS_WEIGHTS`, or the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    default = f"{cache}/mini-make-a-scene/weights"
    return Path(os.environ.get(FOLDER_VARIABLE) or default).expanduser()


def known_weights() -> list[WeightsState]:
    """Every set of weights the project knows, with its place and whether it is there."""
    folder = weights_folder()
    return [
        WeightsState(
            name=weights.name,
            stage=weights.stage,
            path=folder / weights.path,
            licence=weights.licence,
            present=is_present(weights, folder),
        )
        for weights in WEIGHTS
    ]


def is_present(weights: Weights, folder: Path) -> bool:
    """Whether the file, or the folder with its config and tensors, is there."""
    path = folder / weights.path
    if weights.repository is None:
        return path.is_file()
    tensors = [*path.glob("model*.safetensors"), *path.glob("pytorch_model*.bin")]
    return (path / "config.json").is_file() and bool(tensors)


def find_weights(name: str) -> Path:
    """The file or folder of known weights, or of one's own, given by path.

    Raises:
        WeightsError: it is not there; the message says how to get it.
    """
    weights = next((w for w in WEIGHTS if w.name == name), None)
    if weights is None:
        path = Path(name).expanduser()
        if not path.exists():
            known = ", ".join(w.name for w in WEIGHTS)
            raise WeightsError(f"{name}: no such file, and not one of the known weights {known}")
        return path
    folder = weights_folder()
    if not is_present(weights, folder):
        raise WeightsError(missing(weights, folder))
    return folder / weights.path


def lacking_weights(*names: str) -> list[str]:
    """What `find_weights` says of those that are not there."""
    lacks = []
    for name in names:
        try:
            find_weights(name)
        except WeightsError as error:
            lacks.append(str(error))
    return lacks


def missing(weights: Weights, folder: Path) -> str:
    """One line that names the missing file, its address and the command that fetches it."""
    name = "" if weights.default else f" --name {weights.name}"
    address = weights.page if weights.repository or not weights.urls else weights.urls[0]
    found_at = f" (see {weights.page})" if address != weights.page else ""
    file = f"its {weights.member}" if weights.member else "it"
    return (
        f"the weights {weights.name} are missing: run `mas fetch-weights {weights.stage}{name}`, "
        f"or download {address}{found_at} and put {file} at {folder / weights.path}"
    )


def check_hash(
    path: Path,
    expected: str,
    *,
    algorithm: str = "sha256",
    mend: str = "remove the file and fetch it again",
) -> None:
    """Compares a file's checksum with the published one; `mend` says what to do about it.

    Raises:
        WeightsError: they differ, with both in the message.
    """
    found = file_hash(path, algorithm=algorithm)
    if found != expected.lower():
        raise WeightsError(
            f"{path}: {algorithm} is {found}, but {expected} is the published one; {mend}"
        )


def file_hash(path: Path, *, algorithm: str = "sha256") -> str:
    """Hexadecimal checksum of a file of any size."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, algorithm).hexdigest()
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None


def fetch_weights(
    stage: Stage,
    *,
    name: str | None = None,
    folder: str | None = None,
    url: str | None = None,
    offline: bool = False,
) -> None:
    """Downloads published weights into the weights folder, checked by checksum.

    A broken download goes on where it stopped when the command is run again. Files that are
    already there are checked, not downloaded.

    Args:
        stage: panoptic, human, face or vqgan.
        name: which weights of the stage; default: its usual ones.
        folder: where to put them; default: MAS_WEIGHTS, or a folder in the user's cache.
        url: download from this address (a mirror, file:// included) instead; needs a single file.
        offline: download nothing; fail with name and address of what is missing.
    """
    from preprocess.download import fetch

    chosen = [w for w in WEIGHTS if w.stage == stage and (w.name == name if name else w.default)]
    if not chosen:
        names = ", ".join(w.name for w in WEIGHTS if w.stage == stage)
        raise ValueError(f"no {stage} weights are called {name!r}: use one of {names}")
    if url and (len(chosen) > 1 or chosen[0].repository):
        raise ValueError("--url replaces the address of one file: say which with --name")
    target = Path(folder).expanduser() if folder else weights_folder()
    if offline and (absent := [w for w in chosen if not is_present(w, target)]):
        raise WeightsError("; ".join(missing(w, target) for w in absent))
    for weights in chosen:
        print(f"{weights.name}: licence {weights.licence}")
        print(f"  {fetch(weights, target, urls=(url,) if url else weights.urls)}")
    if target != weights_folder():
        print(f"set {FOLDER_VARIABLE}={target} so that they are found there")
