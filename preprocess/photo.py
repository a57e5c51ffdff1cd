"""Photos: safe decoding, the centre square, encoding. First and last step of the scene worker.

In: the bytes of one photo, of whatever the web has. Out: uint8 H W 3 RGB as a person sees it, and
later the square JPEG. The square of any other map of the same photo is cut by the same rule here.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from preprocess.rejects import Reject, RejectError

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif")  # members that are photos, in this order
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")  # what they may hold; the name's ending is not believed
SIGNATURE = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP", re.DOTALL)  # of the same
EXIF_ORIENTATION = 0x0112
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class PhotoConfig:
    """What becomes of a photo."""

    size: int = 256  # pixels per side of the square that is written
    quality: int = 95  # of the JPEG that is written, 1-95
    decode_side: int = 512  # larger photos may be decoded reduced, down to this short side
    max_megapixels: float = 64.0  # larger photos are rejected undecoded
    min_side: int = 32  # pixels; photos with a shorter side are rejected
    max_aspect: float = 6.0  # long side / short side; longer photos are rejected

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ValueError(f"photo.size must be at least 8 pixels, got {self.size}")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"photo.quality must be 1-95, got {self.quality}")
        for name in ("decode_side", "min_side", "max_megapixels"):
            if getattr(self, name) <= 0:
                raise ValueError(f"photo.{name} must be above 0, got {getattr(self, name)}")
        if self.max_aspect < 1:
            raise ValueError(f"photo.max_aspect must be at least 1, got {self.max_aspect}")

    @property
    def reduced_side(self) -> int:
        """Short side below which no photo is reduced before it is cut, in pixels."""
        return max(self.decode_side, self.size)


class Decoded(NamedTuple):
    """A photo as a person sees it, maybe reduced."""

    image: np.ndarray  # uint8 H W 3, RGB
    original: tuple[int, int]  # width and height before the reduction, upright


@contextlib.contextmanager
def pillow_rules(config: PhotoConfig) -> Iterator[None]:
    """Within the block bombs are errors, and it is `max_megapixels` that says what is one.

    Pillow by itself knows one limit of 89 megapixels. That and Python's warnings are the whole
    process's, so the block goes around all threads that decode, not into each.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None:
        Image.MAX_IMAGE_PIXELS = max(limit, math.ceil(config.max_megapixels * 1e6))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # of EXIF that cannot be read
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def decode(content: bytes, config: PhotoConfig) -> Decoded:
    """Decodes one photo: first frame, upright by EXIF, RGB, alpha over white.

    Large photos come back reduced by a whole factor, with a short side of at least
    `config.reduced_side`. Callers are within `pillow_rules`.

    Raises:
        RejectError: unknown format, too large, too small, too elongated, broken.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RejectError(Reject.TOO_MANY_PIXELS, str(error)) from error
    except Image.UnidentifiedImageError as error:
        start = content[:12]
        if SIGNATURE.match(start):
            raise RejectError(Reject.BROKEN_PHOTO, f"damaged header after {start!r}") from error
        detail = f"not {', '.join(FORMATS)}; it starts with {start!r}" if content else "no bytes"
        raise RejectError(Reject.UNKNOWN_FORMAT, detail) from error
    except Exception as error:  # decoders meet hostile bytes and raise whatever they like
        raise RejectError(Reject.BROKEN_PHOTO, _describe(error)) from error
    _check_size(image.size, config)
    original = image.size
    try:
        side = config.reduced_side / min(original)
        image.draft(None, (round(original[0] * side), round(original[1] * side)))
        image.load()
        orientation = _orientation(image)
        image = _to_rgb(image)
    except Exception as error:  # the same
        raise RejectError(Reject.BROKEN_PHOTO, _describe(error)) from error
    image = image.reduce(max(1, min(image.size) // config.reduced_side))
    if orientation in ORIENTATIONS:
        image = image.transpose(ORIENTATIONS[orientation])
        if orientation >= 5:  # these four exchange width and height
            original = original[::-1]
    return Decoded(np.asarray(image), original)


class Square(NamedTuple):
    """The centre square of a picture, in its pixels."""

    left: float
    top: float
    side: float

    @classmethod
    def of(cls, width: int, height: int) -> Square:
        side = min(width, height)
        return cls((width - side) / 2, (height - side) / 2, side)


def cut_square(image: np.ndarray, size: int) -> Image.Image:
    """The centre square of a photo, antialiased to `size` x `size`."""
    left, top, side = Square.of(image.shape[1], image.shape[0])
    return Image.fromarray(image).resize(
        (size, size),
        Image.Resampling.BICUBIC,  # antialiased in Pillow; a third cheaper than Lanczos
        box=(left, top, left + side, top + side),
        reducing_gap=3.0,
    )


def sample_square(map_HW: np.ndarray, size: int) -> np.ndarray:
    """The centre square of a map of ids, by nearest neighbour: what lies under each pixel's centre.

    The map may have another resolution than the photo; the same aspect makes it the same square.
    """
    if map_HW.shape == (size, size):
        return map_HW
    left, top, side = Square.of(map_HW.shape[1], map_HW.shape[0])
    steps = (np.arange(size) + 0.5) * (side / size)
    rows, columns = (top + steps).astype(np.intp), (left + steps).astype(np.intp)
    return map_HW[rows[:, None], columns]


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """JPEG bytes without metadata; full colour resolution, as the pictures are small."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:4:4")
    return buffer.getvalue()


def _check_size(size: tuple[int, int], config: PhotoConfig) -> None:
    width, height = size
    shape = f"{width}x{height} pixels"
    if width * height > config.max_megapixels * 1e6:
        raise RejectError(Reject.TOO_MANY_PIXELS, f"{shape}, above {config.max_megapixels} Mpx")
    if min(size) < config.min_side:
        raise RejectError(Reject.TOO_SMALL, f"{shape}, a side is below {config.min_side}")
    if max(size) > config.max_aspect * min(size):
        raise RejectError(Reject.TOO_ELONGATED, f"{shape}, aspect above {config.max_aspect}")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # broken EXIF is common in photos that are fine otherwise
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):  # 16-bit grey; Pillow would clip at 255
        grey = np.asarray(image).astype(np.int32) >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
