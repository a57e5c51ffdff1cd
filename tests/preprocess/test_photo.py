import struct
import zlib

import numpy as np
import pytest
from photo_world import encode
from PIL import Image

from preprocess.photo import (
    EXIF_ORIENTATION,
    PhotoConfig,
    cut_square,
    decode,
    pillow_rules,
    sample_square,
)
from preprocess.rejects import Reject, RejectError

CONFIG = PhotoConfig(size=32, decode_side=64, min_side=8)


def corners():
    """48 x 32 pixels: red, green, blue and grey quarters."""
    image = np.zeros((32, 48, 3), np.uint8)
    image[:16, :24], image[:16, 24:] = (230, 10, 10), (10, 230, 10)
    image[16:, :24], image[16:, 24:] = (10, 10, 230), (128, 128, 128)
    return Image.fromarray(image)


def assert_close(image, expected, tolerance=12):
    assert image.dtype == np.uint8 and image.shape == expected.shape
    assert np.abs(image.astype(int) - expected.astype(int)).mean() < tolerance


def bomb_png(width, height):
    """A PNG whose header promises width x height pixels and whose data holds none."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def frames():
    return [corners(), Image.new("RGB", (48, 32), "black"), Image.new("RGB", (48, 32), "white")]


READABLE = {
    "jpeg": lambda: encode(corners()),
    "grey jpeg": lambda: encode(corners().convert("L")),
    "cmyk jpeg": lambda: encode(corners().convert("CMYK")),
    "progressive jpeg": lambda: encode(corners(), progressive=True),
    "png": lambda: encode(corners(), "PNG"),
    "palette png": lambda: encode(corners().quantize(8), "PNG"),
    "one bit png": lambda: encode(corners().convert("1"), "PNG"),
    "webp": lambda: encode(corners(), "WEBP", quality=95),
    "animated webp": lambda: encode(
        frames()[0], "WEBP", save_all=True, append_images=frames()[1:], quality=95
    ),
    "gif": lambda: encode(corners(), "GIF"),
    "animated gif": lambda: encode(frames()[0], "GIF", save_all=True, append_images=frames()[1:]),
    "junk behind the jpeg": lambda: encode(corners()) + b"junk" * 100,
    "broken exif": lambda: encode(corners(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", READABLE)
def test_photos_of_every_kind_are_read(kind):
    expected = {
        "grey jpeg": corners().convert("L").convert("RGB"),
        "one bit png": corners().convert("1").convert("RGB"),
        "cmyk jpeg": corners().convert("CMYK").convert("RGB"),
    }.get(kind, corners())
    decoded = decode(READABLE[kind](), CONFIG)
    assert_close(decoded.image, np.asarray(expected))
    assert decoded.original == (48, 32)


def test_sixteen_bit_grey_keeps_its_range():
    ramp = np.linspace(0, 65535, 48 * 32).reshape(32, 48).astype(np.uint16)
    image = decode(encode(Image.fromarray(ramp), "PNG"), CONFIG).image
    assert_close(image, np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, -1), tolerance=1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_is_laid_over_white(mode):
    image = Image.new("RGBA", (48, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 24, 32))
    if mode == "P":
        image = image.quantize(4)
    decoded = decode(encode(image.convert(mode), "PNG"), CONFIG).image
    assert (decoded[:, :24] == 0).all() and (decoded[:, 24:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_stand_upright_by_exif(orientation):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # the camera was turned the other way
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = corners() if orientation == 1 else corners().transpose(undo[orientation])
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    decoded = decode(encode(stored, exif=exif), CONFIG)
    assert_close(decoded.image, np.asarray(corners()))
    assert decoded.original == (48, 32)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(1000, 700), (601, 1203)])
def test_large_photos_are_reduced_but_not_below_the_side_asked_for(format, size):
    large = corners().resize(size, Image.Resampling.BICUBIC)
    decoded = decode(encode(large, format), CONFIG)
    assert decoded.original == size
    assert CONFIG.decode_side <= min(decoded.image.shape[:2]) < 2 * CONFIG.decode_side + 2
    square = np.asarray(cut_square(decoded.image, 32))
    assert_close(square, np.asarray(cut_square(np.asarray(large), 32)), tolerance=4)


REFUSED = {
    "no bytes": (lambda: b"", Reject.UNKNOWN_FORMAT),
    "html": (lambda: b"<!DOCTYPE html><html>404</html>", Reject.UNKNOWN_FORMAT),
    "zeros": (lambda: bytes(5000), Reject.UNKNOWN_FORMAT),
    "bmp": (lambda: encode(corners(), "BMP"), Reject.UNKNOWN_FORMAT),
    "tiff": (lambda: encode(corners(), "TIFF"), Reject.UNKNOWN_FORMAT),
    "eps": (lambda: encode(corners(), "EPS"), Reject.UNKNOWN_FORMAT),
    "truncated jpeg": (lambda: encode(noise())[:4000], Reject.BROKEN_PHOTO),
    "truncated png": (lambda: encode(noise(), "PNG")[:4000], Reject.BROKEN_PHOTO),
    "truncated webp": (lambda: encode(noise(), "WEBP")[:1000], Reject.BROKEN_PHOTO),
    "corrupt png": (lambda: flip(encode(noise(), "PNG")), Reject.BROKEN_PHOTO),
    "jpeg header alone": (lambda: encode(corners())[:200], Reject.BROKEN_PHOTO),
    "bomb within Pillow's limit": (lambda: bomb_png(9000, 9000), Reject.TOO_MANY_PIXELS),
    "bomb Pillow warns of": (lambda: bomb_png(10000, 10000), Reject.TOO_MANY_PIXELS),
    "bomb Pillow refuses": (lambda: bomb_png(60000, 60000), Reject.TOO_MANY_PIXELS),
    "one pixel": (lambda: encode(Image.new("RGB", (1, 1)), "PNG"), Reject.TOO_SMALL),
    "thread": (lambda: encode(Image.new("RGB", (20000, 1)), "PNG"), Reject.TOO_SMALL),
    "ribbon": (lambda: encode(Image.new("RGB", (2000, 20)), "PNG"), Reject.TOO_ELONGATED),
}


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"quality": 100}, {"min_side": 0}, {"max_aspect": 0.5}]
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PhotoConfig(**wrong)


def noise():
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8))


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes(64) + content[middle + 64 :]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_usable_photo_is_refused_with_its_reason(kind):
    make, reason = REFUSED[kind]
    with pillow_rules(CONFIG), pytest.raises(RejectError) as error:
        decode(make(), CONFIG)
    assert error.value.reason is reason and error.value.detail


@pytest.mark.parametrize("megapixels", [25.0, 64.0, 100.0, 250.0])
def test_the_setting_alone_says_how_many_pixels_are_too_many(megapixels):
    """Pillow's own limits are 89 and 179 megapixels. Files within the limit lack their data."""
    config, before = PhotoConfig(max_megapixels=megapixels), Image.MAX_IMAGE_PIXELS
    width = 10_000
    height = int(megapixels * 1e6) // width
    with pillow_rules(config):
        with pytest.raises(RejectError) as within:
            decode(bomb_png(width, height), config)
        with pytest.raises(RejectError) as above:
            decode(bomb_png(width, height + 1), config)
    assert within.value.reason is Reject.BROKEN_PHOTO
    assert above.value.reason is Reject.TOO_MANY_PIXELS
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (64, 64), (63, 97), (50, 31)])
def test_photo_and_map_are_cut_to_the_same_square(shape):
    ramps = np.indices(shape).transpose(1, 2, 0)
    ramps = (ramps * (255 / np.array(shape))).round().astype(np.uint8)
    photo = np.asarray(cut_square(np.concatenate([ramps, ramps[..., :1]], -1), 16)).astype(int)
    for resolution in (1, 3):  # a map may be finer than the photo
        cells = np.kron(ramps, np.ones((resolution, resolution, 1), np.uint8))
        for axis in (0, 1):
            sampled = sample_square(cells[..., axis], 16).astype(int)
            assert np.abs(sampled - photo[..., axis]).max() <= 255 / min(shape)
