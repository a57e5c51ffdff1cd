"""Why a sample is dropped: the one fixed list, counted in stats.json and named in rejects.jsonl."""

from __future__ import annotations

from enum import StrEnum


class Reject(StrEnum):
    """Reasons, in the order in which a sample meets them."""

    UNSAFE_NAME = "unsafe_name"  # absolute, with .., hidden, not printable
    NOT_A_FILE = "not_a_file"  # link, device, sparse
    MEMBER_TOO_LARGE = "member_too_large"
    DUPLICATE_KEY = "duplicate_key"  # came again; the first one is kept
    NO_PHOTO = "no_photo"
    BAD_JSON = "bad_json"  # not JSON, no object, or `captions` no list of strings
    NO_CAPTION = "no_caption"  # missing or blank
    CAPTION_NOT_TEXT = "caption_not_text"  # not UTF-8, or with NUL
    CAPTION_TOO_LONG = "caption_too_long"
    UNKNOWN_FORMAT = "unknown_format"  # not one of the formats of preprocess/photo.py
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_SMALL = "too_small"
    TOO_ELONGATED = "too_elongated"
    BROKEN_PHOTO = "broken_photo"  # truncated or corrupt
    NO_ANNOTATION = "no_annotation"
    BAD_ANNOTATION = "bad_annotation"  # unreadable, unknown category, another aspect than the photo
    NOT_SEGMENTED = "not_segmented"  # a network refused the photo


# May be gone another time: a file that is there by then, another device or version of a network.
# The others lie in the sample itself.
PASSING = (Reject.NO_PHOTO, Reject.NO_ANNOTATION, Reject.NOT_SEGMENTED)


class RejectError(Exception):
    """Raised where a sample turns out to be unusable."""

    def __init__(self, reason: Reject, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail
