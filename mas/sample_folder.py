"""The folder of `mas sample`: what a run has painted, kept until the run is complete.

In: pictures, a stretch of the run at a time. Out: 0000.png …, 0000.scene.png …, grid.png and
samples.json, which replace older ones when all are there. Until then they lie in a hidden folder
named after what the run is; the same run, begun again, finds them there and goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

import mas
from mas.errors import naming_full
from mas.lock import locked
from mas.model_folder import ModelError
from mas.request import Generation
from mas.scene import SceneMap
from mas.sheet import contact_sheet
from mas.storage import StorageError, read_json, write_json

logger = logging.getLogger(__name__)

SAMPLES = "samples.json"
SHEET = "grid.png"
WRITING = ".writing."  # prefix of the hidden folder that a run fills first
LOCK = f"{WRITING}lock"  # file in the output folder that a run holds as long as it lasts
PART = ".part.json"  # ending of what is noted of a stretch in the hidden folder
OWN_FILE = re.compile(r"\d{4,}(\.scene)?\.png|grid\.png|samples\.json")
SMALLEST_CELL, LARGEST_CELL = 128, 256  # pixels of a picture in the contact sheet
MOST_ROWS = 400  # of it; larger ones are more than Pillow opens without a warning

About = dict[str, Any]  # a picture as samples.json describes it


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is noted of a stretch of a run once its pictures are written."""

    first: int  # pictures sampled before it
    pictures: list[About]
    dropped: list[About]  # candidates of which only seed and score are noted
    settings: dict[str, Any]
    seconds: float
    tokens: float  # sampled

    @property
    def sampled(self) -> int:
        """Its pictures, the dropped ones included."""
        return len(self.pictures) + len(self.dropped)


class Run:
    """What a run has painted so far; one a command, handed out by `writing`."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder: Path | None = None
        self.parts: list[Part] = []

    def begin(self, **what: Any) -> None:
        """Finds what an earlier run of the same has finished; `what` decides about pictures."""
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        self.folder = self.output / f"{WRITING}{digest[:16]}"
        self.folder.mkdir(exist_ok=True)
        take_back(self.output, self.folder)
        for path in sorted(self.folder.glob(f"*{PART}")):
            part = _read_part(path)
            if part is not None and part.first == self.sampled:
                self.parts.append(part)
            else:  # or one behind such a part: all that is left of them is painted again
                path.unlink()
        if self.parts:
            logger.info("%s: going on after %d pictures that are there", self.output, self.sampled)

    @property
    def sampled(self) -> int:
        """Pictures sampled so far, the dropped ones included."""
        return sum(part.sampled for part in self.parts)

    @property
    def written(self) -> int:
        """Pictures in the folder so far."""
        return sum(len(part.pictures) for part in self.parts)

    def add(
        self, result: Generation, *, about: Mapping[str, Any], dropped: Generation | None = None
    ) -> None:
        """Writes the pictures of the next stretch; from then on they are not lost."""
        assert self.folder is not None
        part = write_part(
            self.folder,
            result,
            about=about,
            dropped=dropped,
            first=self.sampled,
            number=self.written,
        )
        write_json(self.folder / f"{part.first:08}{PART}", asdict(part))
        self.parts.append(part)

    def finish(self, *, about: Mapping[str, Any]) -> dict[str, Any]:
        """Puts everything in the older ones' place; returns what samples.json says."""
        assert self.folder is not None
        content = write_summary(self.folder, self.parts, about=about)
        replace_samples(self.output, self.folder)
        return content

    def give_up(self) -> None:
        """Leaves what is finished for the same run, begun again, and nothing else."""
        if self.parts:
            logger.warning(
                "%s: %d pictures are kept; the same command goes on from there",
                self.output,
                self.sampled,
            )
        elif self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _read_part(path: Path) -> Part | None:
    """None where the file, or a picture it names, is not whole, as after a power cut."""
    try:
        part = Part(**json.loads(path.read_text("utf-8")))
        files = [
            path.parent / about[kind] for about in part.pictures for kind in ("image", "scene")
        ]
        for file in files:
            with Image.open(file, formats=["PNG"]) as image:
                image.verify()
    except (OSError, SyntaxError, ValueError, TypeError, KeyError):
        return None
    return part


@contextmanager
def writing(output: Path) -> Iterator[Run]:
    """Hands out the run that writes to a folder; older samples there stay until it finishes.

    A run that fails before anything is finished takes with it the folders that it made and that
    nobody else uses.

    Raises:
        ModelError: `output` is a file, holds anything that is not of this command, or is being
            written by another run.
        OSError: `output` cannot be written.
    """
    check_output(output)
    made = [path for path in (output, *output.parents) if not path.exists()]
    output.mkdir(parents=True, exist_ok=True)
    run = Run(output)
    try:
        with alone(output), naming_full(output):
            try:
                yield run
            except BaseException:
                run.give_up()
                raise
    except BaseException:
        with suppress(OSError):  # something is there
            for path in made:
                path.rmdir()
        raise


def check_output(output: Path) -> None:
    """Refuses a folder in which there is anything that `mas sample` did not write."""
    if not output.exists():
        return
    if not output.is_dir():
        raise ModelError(f"{output}: is a file; choose a folder")
    others = sorted(p.name for p in output.iterdir() if not p.name.startswith(WRITING))
    foreign = [name for name in others if not OWN_FILE.fullmatch(name)]
    half_moved = any(output.glob(f"{WRITING}*/{SAMPLES}"))  # by a run that was stopped
    if foreign or (others and not half_moved and SAMPLES not in others):
        name = foreign[0] if foreign else others[0]
        raise ModelError(f"{output}: holds something else ({name}); choose a new folder")


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Keeps other runs out of a folder; what hidden ones lie there then was left by killed runs.

    Without locks, as on Windows, nobody is kept out.
    """
    with locked(output / LOCK) as other:
        if other is not None:
            raise ModelError(f"{output}: another run is writing there; choose another folder")
        yield


def replace_samples(output: Path, finished: Path) -> None:
    """Clears away older samples and what killed runs left, then moves the finished ones there.

    samples.json, whose name is the last of all, moves when everything else is there.
    """
    for path in sorted(output.iterdir()):
        if path.name.startswith(WRITING) and path.name != finished.name and path.is_dir():
            shutil.rmtree(path)
        elif OWN_FILE.fullmatch(path.name):
            path.unlink()
    for path in sorted(finished.iterdir()):
        if OWN_FILE.fullmatch(path.name):
            path.replace(output / path.name)
    shutil.rmtree(finished)


def take_back(output: Path, finished: Path) -> None:
    """Undoes a `replace_samples` that was stopped while it moved the finished pictures."""
    try:
        pictures = read_json(finished / SAMPLES)["pictures"]
    except StorageError:  # none was begun
        return
    for name in (about[kind] for about in pictures for kind in ("image", "scene")):
        if not (finished / name).exists() and (output / name).exists():
            (output / name).replace(finished / name)


def write_result(folder: Path, result: Generation, *, about: Mapping[str, Any]) -> None:
    """Writes a whole generation into an empty folder: pictures, scenes, sheet and samples.json.

    Args:
        folder: is empty.
        result: the pictures to write.
        about: what samples.json says of model and machine.
    """
    write_summary(folder, [write_part(folder, result, about=about)], about=about)


def write_part(
    folder: Path,
    result: Generation,
    *,
    about: Mapping[str, Any],
    dropped: Generation | None = None,
    first: int = 0,
    number: int = 0,
) -> Part:
    """Writes pictures and scenes, and returns what is to be noted of them.

    Args:
        folder: where to.
        result: the pictures to write.
        about: what samples.json says of model and machine.
        dropped: candidates of which only seed and score are noted.
        first: pictures sampled before these.
        number: of the first file.
    """
    origin = {"settings": result.settings, "model": about["model"]["sha256"]}
    pictures = []
    for i, (image, scene) in enumerate(zip(result.images, result.scenes, strict=True)):
        files = {"image": f"{number + i:04}.png", "scene": f"{number + i:04}.scene.png"}
        described = describe(result, i)
        image.save(folder / files["image"], pnginfo=png_text(described | origin))
        scene.to_png(folder / files["scene"])
        pictures.append(files | described)
    away = [] if dropped is None else [describe(dropped, i) for i in range(len(dropped.images))]
    return Part(
        first=first,
        pictures=pictures,
        dropped=away,
        settings=result.settings,
        seconds=result.seconds,
        tokens=result.seconds * result.tokens_per_second,
    )


def write_summary(
    folder: Path, parts: Sequence[Part], *, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes contact sheet and samples.json of all parts, whose pictures are in the folder.

    Returns what samples.json says.
    """
    pictures = [picture for part in parts for picture in part.pictures]
    dropped = [picture for part in parts for picture in part.dropped]
    captions = list(dict.fromkeys(picture["caption"] for picture in pictures))
    first_seed = min(picture["seed"] for picture in [*pictures, *dropped])
    settings, seconds = parts[-1].settings, sum(part.seconds for part in parts)
    shown = list(dict.fromkeys(picture["caption"] for picture in pictures[:MOST_ROWS]))
    origin = {"settings": settings, "model": about["model"]["sha256"]}
    text = png_text({"caption": "; ".join(shown), "seed": first_seed} | origin)
    draw_sheet(folder, pictures).save(folder / SHEET, pnginfo=text)
    content = {
        "caption": captions[0] if len(captions) == 1 else captions,
        "seed": first_seed,
        "settings": settings,
        **about,
        "version": mas.__version__,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(sum(part.tokens for part in parts) / seconds, 1),
        "pictures": pictures,
    }
    if "rerank" in about:
        content["dropped"] = dropped
    write_json(folder / SAMPLES, content)
    return content


def describe(result: Generation, i: int) -> About:
    """What picture i was made from, and its score where there is one."""
    about: About = {"caption": result.captions[i], "seed": result.seeds[i]}
    if result.negative_prompt:
        about["negative_prompt"] = result.negative_prompt
    return about if result.scores is None else about | {"score": round(result.scores[i], 5)}


def draw_sheet(folder: Path, pictures: Sequence[About]) -> Image.Image:
    """A row a picture, of the first: caption, scene in palette colours with edges, picture."""
    rows = []
    for about in pictures[:MOST_ROWS]:
        text = f"{about['caption'] or '(no caption)'}\n\nseed {about['seed']}"
        if "score" in about:
            text += f"\nscore {about['score']:.3f}"
        with Image.open(folder / about["image"]) as image:
            picture = image.convert("RGB")
        rows.append((text, SceneMap.from_png(folder / about["scene"]).to_rgb(edges=True), picture))
    cell = min(max(rows[0][2].width, SMALLEST_CELL), LARGEST_CELL)
    return contact_sheet(rows, cell=cell, header=("caption", "scene", "picture"))


def png_text(content: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    """Text chunks: texts as they are, everything else as JSON; nothing that varies by run."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in content.items():
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        chunks.add_itxt(key, text)
    return chunks
