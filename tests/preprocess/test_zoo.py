"""Every kind of bad input next to good samples: handled or counted with its reason, never fatal."""

import bz2
import gzip
import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
from photo_world import (
    blocks,
    colour_of,
    decode,
    encode,
    photo_sample,
    preprocess_scenes,
    write_photos,
)
from PIL import Image
from test_photo import bomb_png, flip, frames, noise

from mas.shards import ShardIndex, expand_shards, read_shard
from preprocess.inspect import choose
from preprocess.photo import EXIF_ORIENTATION
from preprocess.rejects import Reject
from preprocess.status import preprocess_status

PHOTO = Image.fromarray(colour_of(blocks(96, 64)[0]))
MAX_MEMBER = 200_000  # bytes; lowered here, for a tar of 256 MiB makes a slow test
UPRIGHT = Image.Exif()
UPRIGHT[EXIF_ORIENTATION] = 1


def still(**files):
    """The members of a good sample with some replaced, added, or left out (None)."""
    return lambda key: [
        (f"{key}.{ending}", content) for ending, content in photo_sample(key, **files).files.items()
    ]


def named(pattern, content=b"x"):
    """A good sample and beside it a member with a name that nobody means well with."""
    return lambda key: [*still()(key), (pattern.replace("KEY", key), content)]


def special(kind, **fields):
    """A good sample without its photo, which is something else than a file."""

    def make(key):
        member = tarfile.TarInfo(f"{key}.jpg")
        member.type = kind
        for name, value in fields.items():
            setattr(member, name, value)
        return [*still(jpg=None)(key), (member, b"")]

    return make


def twice(key):
    return [*still()(key), *still(txt=b"another caption")(key)]


def in_wrong_order(key):
    """The members of two samples in turns, endings first."""
    one, other = still()(key), still()(f"{key} twin")
    return [member for pair in zip(reversed(one), reversed(other), strict=True) for member in pair]


def cut(image, format, share=0.6):
    content = encode(image, format)
    return content[: int(len(content) * share)]


def break_tables(jpeg):
    """A JPEG whose Huffman tables are overwritten."""
    start = jpeg.index(b"\xff\xc4")
    return jpeg[: start + 4] + b"\xff" * 200 + jpeg[start + 204 :]


SIXTEEN = Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.uint16) << 8)
ALPHA = PHOTO.convert("RGBA")
ALPHA.putalpha(200)

KEPT = {  # kinds that a person can see, and so does the preprocessor
    "cmyk jpeg": still(jpg=encode(PHOTO.convert("CMYK"))),
    "grey jpeg": still(jpg=encode(PHOTO.convert("L"))),
    "progressive jpeg": still(jpg=encode(PHOTO, progressive=True)),
    "16-bit png": still(jpg=None, png=encode(SIXTEEN, "PNG")),
    "palette png": still(jpg=None, png=encode(PHOTO.quantize(16), "PNG")),
    "alpha png": still(jpg=None, png=encode(ALPHA, "PNG")),
    "one-bit png": still(jpg=None, png=encode(PHOTO.convert("1"), "PNG")),
    "animated gif": still(
        jpg=None,
        gif=encode(
            PHOTO, "GIF", save_all=True, append_images=[f.resize(PHOTO.size) for f in frames()]
        ),
    ),
    "animated webp": still(
        jpg=None,
        webp=encode(
            PHOTO, "WEBP", save_all=True, append_images=[f.resize(PHOTO.size) for f in frames()]
        ),
    ),
    "png named jpg": still(jpg=encode(PHOTO, "PNG")),
    "jpeg named png": still(jpg=None, png=encode(PHOTO)),
    "ending in capitals": lambda key: [
        (name.replace(".jpg", ".JPG"), content) for name, content in still()(key)
    ],
    "exif orientation": still(jpg=encode(PHOTO, exif=UPRIGHT)),
    "broken exif": still(jpg=encode(PHOTO, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")),
    "junk behind the jpeg": still(jpg=encode(PHOTO) + b"<html>" * 100),
    "caption with a byte order mark": still(txt=b"\xef\xbb\xbfa dog"),
    "no json": still(json=None),
    "unknown members": still(**{"parquet": b"PAR1", "pickle": b"\x80\x04", "cls": b"3"}),
    "a folder in the tar": lambda key: [(folder_member(f"{key}/"), b""), *still()(f"{key}/x")],
    "a name of 200 letters": lambda key: still()(f"{key} {'x' * 200}"),
    "members of two samples mixed": in_wrong_order,
}
REJECTED = {
    "truncated jpeg": (still(jpg=cut(noise(), "JPEG")), Reject.BROKEN_PHOTO),
    "truncated png": (still(jpg=cut(noise(), "PNG")), Reject.BROKEN_PHOTO),
    "truncated webp": (still(jpg=cut(noise(), "WEBP", 0.3)), Reject.BROKEN_PHOTO),
    "truncated gif": (still(jpg=cut(noise(), "GIF", 0.5)), Reject.BROKEN_PHOTO),
    "corrupt jpeg": (still(jpg=break_tables(encode(noise()))), Reject.BROKEN_PHOTO),
    "corrupt png": (still(jpg=flip(encode(noise(), "PNG"))), Reject.BROKEN_PHOTO),
    "corrupt webp": (still(jpg=encode(PHOTO, "WEBP")[:23] + bytes(4000)), Reject.BROKEN_PHOTO),
    "jpeg signature alone": (still(jpg=encode(PHOTO)[:20]), Reject.BROKEN_PHOTO),
    "png signature alone": (still(jpg=encode(PHOTO, "PNG")[:30]), Reject.BROKEN_PHOTO),
    "no bytes": (still(jpg=b""), Reject.UNKNOWN_FORMAT),
    "zeros": (still(jpg=bytes(9000)), Reject.UNKNOWN_FORMAT),
    "html": (still(jpg=b"<!DOCTYPE html><title>404</title>"), Reject.UNKNOWN_FORMAT),
    "svg": (still(jpg=b"<svg xmlns='http://www.w3.org/2000/svg'/>"), Reject.UNKNOWN_FORMAT),
    "pdf": (still(jpg=b"%PDF-1.7\n"), Reject.UNKNOWN_FORMAT),
    "tiff": (still(jpg=encode(PHOTO, "TIFF")), Reject.UNKNOWN_FORMAT),
    "postscript": (still(jpg=encode(PHOTO, "EPS")), Reject.UNKNOWN_FORMAT),
    "bomb": (still(jpg=bomb_png(50_000, 50_000)), Reject.TOO_MANY_PIXELS),
    "bomb below Pillow's limit": (still(jpg=bomb_png(9000, 9000)), Reject.TOO_MANY_PIXELS),
    "1x1": (still(jpg=encode(Image.new("RGB", (1, 1)), "PNG")), Reject.TOO_SMALL),
    "20000x1": (still(jpg=encode(Image.new("RGB", (20000, 1)), "PNG")), Reject.TOO_SMALL),
    "ribbon": (still(jpg=encode(Image.new("RGB", (900, 20)))), Reject.TOO_ELONGATED),
    "no photo": (still(jpg=None), Reject.NO_PHOTO),
    "no caption": (still(txt=None), Reject.NO_CAPTION),
    "empty caption": (still(txt=b""), Reject.NO_CAPTION),
    "blank caption": (still(txt=b" \r\n\t"), Reject.NO_CAPTION),
    "100 kB caption": (still(txt=b"dog " * 25_000), Reject.CAPTION_TOO_LONG),
    "latin-1 caption": (still(txt=b"caf\xe9"), Reject.CAPTION_NOT_TEXT),
    "utf-16 caption": (still(txt="dog".encode("utf-16")), Reject.CAPTION_NOT_TEXT),
    "NUL in the caption": (still(txt=b"a\0dog"), Reject.CAPTION_NOT_TEXT),
    "json list": (still(json=b"[1]"), Reject.BAD_JSON),
    "json null": (still(json=b"null"), Reject.BAD_JSON),
    "cut json": (still(json=b'{"url": "http'), Reject.BAD_JSON),
    "json not in utf-8": (still(json=b'{"a": "\xff"}'), Reject.BAD_JSON),
    "json of 100,000 brackets": (still(json=b"[" * 100_000), Reject.BAD_JSON),
    "json number of 10,000 digits": (still(json=b'{"a": ' + b"9" * 10_000 + b"}"), Reject.BAD_JSON),
    "captions of numbers": (still(json=b'{"captions": [1]}'), Reject.BAD_JSON),
    "no annotation": (still(**{"panoptic.png": None}), Reject.NO_ANNOTATION),
    "annotation cut": (still(**{"panoptic.png": b"\x89PNG\r\n\x1a\n"}), Reject.BAD_ANNOTATION),
    "annotation bomb": (still(**{"panoptic.png": bomb_png(60_000, 60_000)}), Reject.BAD_ANNOTATION),
    "unknown category": (
        still(**{"segments.json": b'{"segments_info": [{"id": 1, "category_id": 12}]}'}),
        Reject.BAD_ANNOTATION,
    ),
    "symbolic link": (special(tarfile.SYMTYPE, linkname="/etc/passwd"), Reject.NOT_A_FILE),
    "hard link": (special(tarfile.LNKTYPE, linkname="good 0.jpg"), Reject.NOT_A_FILE),
    "device": (special(tarfile.CHRTYPE, devmajor=1, devminor=5), Reject.NOT_A_FILE),
    "named pipe": (special(tarfile.FIFOTYPE), Reject.NOT_A_FILE),
}
ALONGSIDE = {  # a member is refused, the sample it came with is good
    "path traversal": (named("../../KEY.jpg"), Reject.UNSAFE_NAME),
    "absolute path": (named("/etc/KEY.jpg"), Reject.UNSAFE_NAME),
    "backslashes": (named("..\\KEY.jpg"), Reject.UNSAFE_NAME),
    "hidden file": (named("._KEY.jpg"), Reject.UNSAFE_NAME),
    "control characters": (named("\x1b[2JKEY.jpg"), Reject.UNSAFE_NAME),
    "name not in utf-8": (named("\udcff\udcfeKEY.jpg"), Reject.UNSAFE_NAME),
    "a member too large": (named("KEY.png", bytes(MAX_MEMBER + 1)), Reject.MEMBER_TOO_LARGE),
    "the same key twice": (twice, Reject.DUPLICATE_KEY),
}
KINDS = {**{k: (m, None) for k, m in KEPT.items()}, **REJECTED, **ALONGSIDE}


def folder_member(name):
    member = tarfile.TarInfo(name)
    member.type = tarfile.DIRTYPE
    return member


def tar_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, content in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class Zoo:
    """All kinds in one shard, a good sample before and after each, and what became of them."""

    def __init__(self, folder):
        members = []
        for number, (kind, (make, _)) in enumerate(KINDS.items()):
            members += [*still()(f"good {number}"), *make(kind)]
        (folder / "00000.tar").write_bytes(tar_of([*members, *still()("good last")]))
        self.status = preprocess_scenes(
            folder / "00000.tar", folder / "out", threads=2, batch_size=5
        )
        self.samples = {s.key: s for s in read_shard(str(folder / "out" / "00000.tar"))}
        lines = (folder / "out" / "00000.rejects.jsonl").read_text().splitlines()
        self.rejects = [json.loads(line) for line in lines]
        self.stats = json.loads((folder / "out" / "00000.stats.json").read_text())
        self.files = {path.relative_to(folder).parts[0] for path in folder.rglob("*")}
        self.outside = list(folder.parent.glob("*.jpg"))

    def samples_of(self, kind):
        mine = (f"{kind}/", f"{kind} twin", f"{kind} xx")
        return [key for key in self.samples if key == kind or key.startswith(mine)]

    def rejects_of(self, kind):
        """Samples by their key, members with bad names by the kind that is part of the name."""
        named = kind in ALONGSIDE
        return [r for r in self.rejects if r["key"] == kind or (named and kind in r["key"])]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mas.shards.MAX_MEMBER_BYTES", MAX_MEMBER)
        return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.mark.parametrize("kind", KEPT)
def test_unusual_samples_are_kept(zoo, kind):
    assert len(zoo.samples_of(kind)) == (2 if "two samples" in kind else 1)
    assert not zoo.rejects_of(kind)
    photo = decode(zoo.samples[zoo.samples_of(kind)[0]].files["jpg"])
    assert photo.shape == (48, 48, 3)
    wanted = decode(zoo.samples["good 0"].files["jpg"]).mean(axis=(0, 1))
    if not any(word in kind for word in ("grey", "16-bit", "alpha", "one-bit", "cmyk")):
        assert np.abs(photo.mean(axis=(0, 1)) - wanted).max() < 12, kind


@pytest.mark.parametrize("kind", REJECTED)
def test_bad_samples_are_rejected_with_their_reason(zoo, kind):
    assert not zoo.samples_of(kind)
    reasons = [reject["reason"] for reject in zoo.rejects_of(kind)]
    wanted = REJECTED[kind][1].value
    assert reasons == [wanted]
    assert all(reject["detail"] for reject in zoo.rejects_of(kind))


@pytest.mark.parametrize("kind", ALONGSIDE)
def test_bad_members_are_refused_and_their_sample_is_kept(zoo, kind):
    assert zoo.samples_of(kind) == [kind]
    assert [reject["reason"] for reject in zoo.rejects_of(kind)] == [ALONGSIDE[kind][1].value]
    assert zoo.samples[kind].files["txt"] == f"picture {kind}".encode()


def test_every_good_sample_is_kept_unchanged_and_in_order(zoo, tmp_path):
    good = [key for key in zoo.samples if key.startswith("good")]
    assert good == [*(f"good {number}" for number in range(len(KINDS))), "good last"]
    write_photos(tmp_path / "00000.tar", [photo_sample(key) for key in good])
    assert preprocess_scenes(tmp_path / "00000.tar", tmp_path / "out") == 0
    alone = {sample.key: sample for sample in read_shard(str(tmp_path / "out" / "00000.tar"))}
    assert all(zoo.samples[key] == alone[key] for key in good)


def test_every_reject_is_counted_once_and_nothing_is_extracted(zoo):
    assert len(KINDS) >= 60
    assert zoo.stats["rejected"] == Counter(reject["reason"] for reject in zoo.rejects)
    refused = {"unsafe_name", "not_a_file", "member_too_large", "duplicate_key"}
    dropped = sum(n for reason, n in zoo.stats["rejected"].items() if reason not in refused)
    unread = sum(reason.value == "not_a_file" for _, reason in REJECTED.values())
    assert zoo.stats["photos_in"] == zoo.stats["photos_out"] + dropped + unread
    assert zoo.stats["photos_out"] == len(zoo.samples) and zoo.status == 0
    assert zoo.files == {"00000.tar", "out"} and not zoo.outside


GOOD_TAR = tar_of([member for i in range(3) for member in still()(f"{i}")])
BLOCK = 512
TARS = {
    "cut within a member": (GOOD_TAR[: len(GOOD_TAR) // 2 + 100], "truncated"),
    "cut between members": (GOOD_TAR[: GOOD_TAR.index(b"1.jpg")], "truncated"),
    "no bytes": (b"", "empty file"),
    "gzip": (gzip.compress(GOOD_TAR), "compressed; run gunzip"),
    "bzip2": (bz2.compress(GOOD_TAR), "not a readable tar"),
    "html": (b"<!DOCTYPE html>" * 100, "not a readable tar"),
    "a photo": (encode(noise()), "not a readable tar"),
    "a broken header": (GOOD_TAR.replace(b"1.jpg", b"!.jpg", 1), "broken tar header"),
    "zeros where a download was cut": (
        GOOD_TAR[: GOOD_TAR.index(b"1.jpg")].ljust(len(GOOD_TAR), b"\0"),
        "not padding",
    ),
    "two tars in one": (GOOD_TAR + GOOD_TAR, "not padding"),
}


@pytest.fixture(scope="module")
def bad_tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    for kind, (content, _) in TARS.items():
        (folder / f"{kind}.tar").write_bytes(content)
        (folder / f"{kind} and good.tar").write_bytes(GOOD_TAR)
    return folder, preprocess_scenes(folder, folder / "out")


@pytest.mark.parametrize("kind", TARS)
def test_bad_tars_fail_alone_and_say_why(bad_tars, kind):
    folder, status = bad_tars
    error = json.loads((folder / "out" / f"{kind}.error.json").read_text())["error"]
    assert status == 1 and TARS[kind][1] in error and f"{kind}.tar" in error
    assert not (folder / "out" / f"{kind}.tar").exists()
    kept = read_shard(str(folder / "out" / f"{kind} and good.tar"))
    assert [sample.key for sample in kept] == ["0", "1", "2"]


def test_a_tar_of_rejects_alone_is_done_and_empty(tmp_path, caplog):
    (tmp_path / "00000.tar").write_bytes(tar_of(still(jpg=b"")("a")))
    (tmp_path / "00001.tar").write_bytes(GOOD_TAR)
    assert preprocess_scenes(tmp_path, tmp_path / "out") == 0
    assert not list(read_shard(str(tmp_path / "out" / "00000.tar")))
    (warning,) = caplog.messages
    assert warning == "shard 00000: not one sample could be used: unknown_format 1"


EMPTY_TARS = {"an end alone": tar_of([]), "zeros alone": bytes(tarfile.RECORDSIZE)}


@pytest.mark.parametrize("kind", EMPTY_TARS)
def test_a_tar_without_samples_is_done_and_every_reader_passes_over_it(tmp_path, caplog, kind):
    """img2dataset writes one where not a single download of a shard was successful."""
    photos, scenes = tmp_path / "photos", tmp_path / "scenes"
    photos.mkdir()
    (photos / "00000.tar").write_bytes(EMPTY_TARS[kind])
    (photos / "00001.tar").write_bytes(GOOD_TAR)
    assert preprocess_scenes(photos, scenes) == 0
    assert caplog.messages == ["shard 00000: holds no samples"]
    stats = json.loads((scenes / "00000.stats.json").read_text())
    assert (stats["photos_in"], stats["photos_out"], stats["rejected"]) == (0, 0, {})
    assert (scenes / "00000.rejects.jsonl").read_bytes() == b""
    assert not list(read_shard(str(scenes / "00000.tar")))
    assert preprocess_status(str(scenes)) == 0
    assert ShardIndex(expand_shards(str(scenes))).keys == ["0", "1", "2"]
    assert [sample.key for sample in choose(expand_shards(str(scenes)), 1)] == ["0"]


def test_a_run_without_any_sample_fails(tmp_path):
    """As where the input is not what was meant."""
    (tmp_path / "00000.tar").write_bytes(tar_of([]))
    with pytest.raises(ValueError, match=r"00000\.tar: there is not one sample in it"):
        preprocess_scenes(tmp_path / "00000.tar", tmp_path / "out")
