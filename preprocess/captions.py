"""Captions and the JSON beside a photo: checked before the photo is decoded.

In: KEY.txt and KEY.json as they came. Out: the caption for KEY.txt and the fields for KEY.json, or
the reason why there is none; at the end KEY.json itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from mas.shards import Sample, ShardError, is_too_large, one_line, read_captions
from preprocess.rejects import Reject, RejectError


class Texts(NamedTuple):
    """What is written beside the photo."""

    caption: str  # KEY.txt when it has text, else the first of the JSON's `captions`; stripped
    fields: dict[str, Any]  # of KEY.json, as they came


def read_texts(sample: Sample, *, max_bytes: int) -> Texts:
    """Reads and checks caption and JSON of a sample.

    A caption is text that a person could have written: UTF-8, without NUL, at most `max_bytes`.
    One bad caption rejects the sample, as the others may be just as broken.

    Raises:
        RejectError: bad JSON; no, unreadable or too long captions.
    """
    try:
        line = one_line(sample.files.get("txt", b"").decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RejectError(Reject.CAPTION_NOT_TEXT, f"txt: {error}") from error
    fields = _read_fields(sample)
    try:
        captions = read_captions(sample)
    except ShardError as error:
        raise RejectError(Reject.BAD_JSON, str(error)) from error
    for caption in [line, *captions]:
        _check(caption, max_bytes)
    if not captions:
        raise RejectError(Reject.NO_CAPTION, "neither a txt nor `captions` in the JSON has text")
    return Texts(line or captions[0], fields)


def dump_fields(fields: Mapping[str, Any]) -> bytes:
    """KEY.json, no larger than every reader takes it.

    In ASCII where that fits; in UTF-8 scripts other than Latin take half of it or less.

    Raises:
        RejectError: too large in both.
    """
    for in_ascii in (True, False):
        # Half a surrogate pair cannot be UTF-8; the escape for it is JSON's as well as Python's.
        content = json.dumps(fields, ensure_ascii=in_ascii).encode("utf-8", "backslashreplace")
        if not is_too_large("KEY.json", len(content)):
            return content
    raise RejectError(Reject.MEMBER_TOO_LARGE, f"the JSON to be written has {len(content)} bytes")


def _read_fields(sample: Sample) -> dict[str, Any]:
    try:
        fields = json.loads(sample.files.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise RejectError(Reject.BAD_JSON, str(error)) from error
    if not isinstance(fields, dict):
        raise RejectError(Reject.BAD_JSON, f"a JSON {type(fields).__name__}, not an object")
    return fields


def _check(caption: str, max_bytes: int) -> None:
    try:
        size = len(caption.encode("utf-8"))
    except UnicodeEncodeError as error:  # JSON may spell half a surrogate pair
        raise RejectError(Reject.CAPTION_NOT_TEXT, str(error)) from error
    if "\0" in caption:
        raise RejectError(Reject.CAPTION_NOT_TEXT, "contains NUL")
    if size > max_bytes:
        raise RejectError(Reject.CAPTION_TOO_LONG, f"{size} bytes, above {max_bytes}")
