"""What one sample is: its key, its tags, and the checks that they pass.

`valid_key` judges its name; `parse_annotation` reads its tags, `annotation_bytes` writes them. Its
picture is judged in `image_bytes.py`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

MAX_ANNOTATION_BYTES = 1 << 24
"""A thousand times what tags take; parsed, JSON takes several times its bytes."""
_KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")  # with its extension a key fits ustar's 100 bytes


class BadSample(Exception):  # noqa: N818 - it speaks of the sample, not of a bug
    """One sample that cannot be used; `key` where it is known, else "".

    It never stops a run by itself: the sample is listed or quarantined with this reason.
    """

    def __init__(self, reason: str, key: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.key = key


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture as it came (encoded), its tags, and which of them are important."""

    key: str
    """Unique in the data set; see `valid_key`."""
    image: bytes | None
    """JPEG, PNG or WebP; None in a text-only data set."""
    tags: tuple[str, ...]
    important: tuple[bool, ...] | None
    """One for each tag; None: unlabelled."""


@dataclass(frozen=True)
class AnnotationFields:
    """Where the JSON of a sample holds what; the default is what our own builders write."""

    tags: str = "tags"
    """Name of the field with the tags, a list of strings."""
    important: str | None = "important"
    """Name of the field that says which tags are important; None: all samples are unlabelled."""
    separator: str | None = None
    """The tags are one string with this between them; None: they are a list."""
    important_are_tags: bool = False
    """`important` names tags (in the form of `tags`); False: it has a 0 or 1 for each."""


OUR_FIELDS = AnnotationFields()


def valid_key(key: str) -> bool:
    """Whether `key` can name a sample: 1 to 90 ASCII letters, digits, `_` or `-`.

    Dots separate a key from its extension, slashes make folders: neither may be part of a key.
    """
    return _KEY.fullmatch(key) is not None


def parse_annotation(
    content: bytes, fields: AnnotationFields = OUR_FIELDS
) -> tuple[tuple[str, ...], tuple[bool, ...] | None]:
    """Reads `{"tags": [...], "important": [0/1, ...]}`; other fields are ignored.

    A tag that is listed twice is kept once, important if it is so anywhere.

    Args:
        content: JSON in UTF-8.
        fields: where it holds what.

    Returns:
        The tags in order and whether each is important; None where the sample is unlabelled.

    Raises:
        BadSample: no JSON of that form, no tag at all, lists of different lengths, or more than
            MAX_ANNOTATION_BYTES.
    """
    check_annotation_size(len(content))
    try:
        text = content.decode("utf-8")
        annotation = _JSON.decode(text)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise BadSample(f"annotation is not JSON in UTF-8: {error}") from None
    if not isinstance(annotation, dict):
        raise BadSample("annotation is no JSON object")
    may_be_escaped = "\\u" in text
    tags = _tags(annotation, fields.tags, fields.separator, may_be_escaped)
    if not tags:
        raise BadSample("annotation has no tags")
    if fields.important is None or annotation.get(fields.important) is None:
        return tuple(dict.fromkeys(tags)), None
    if fields.important_are_tags:
        chosen = set(_tags(annotation, fields.important, fields.separator, may_be_escaped))
        if not chosen <= set(tags):
            raise BadSample(f"annotation has {fields.important!r} tags that are not among its tags")
        important = [tag in chosen for tag in tags]
    else:
        important = _flags(annotation[fields.important], fields.important, len(tags))
    if len(set(tags)) == len(tags):
        return tuple(tags), tuple(map(bool, important))
    merged: dict[str, bool] = {}
    for tag, flag in zip(tags, important, strict=True):
        merged[tag] = merged.get(tag, False) or bool(flag)
    return tuple(merged), tuple(merged.values())


def check_annotation_size(num_bytes: int) -> None:
    """Whether an annotation may be read.

    Raises:
        BadSample: it has more than MAX_ANNOTATION_BYTES.
    """
    if num_bytes > MAX_ANNOTATION_BYTES:
        raise BadSample(
            f"annotation of {num_bytes} bytes is larger than {MAX_ANNOTATION_BYTES} bytes"
        )


def annotation_bytes(sample: Sample) -> bytes:
    """The annotation as it stands in a shard: JSON, the same bytes for the same sample."""
    annotation: dict[str, list] = {"tags": list(sample.tags)}
    if sample.important is not None:
        annotation["important"] = [int(flag) for flag in sample.important]
    text = json.dumps(annotation, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")  # half a pair is for the reader to refuse


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


def _tags(annotation: dict, field: str, separator: str | None, may_be_escaped: bool) -> list[str]:
    value = annotation.get(field)
    if separator is not None and isinstance(value, str):
        value = [tag for part in value.split(separator) if (tag := " ".join(part.split()))]
    # An escape can be half of a surrogate pair, which no UTF-8 vocabulary can hold.
    if (
        not isinstance(value, list)
        or not set(map(type, value)) <= {str}
        or "" in value
        or (may_be_escaped and any(re.search("[\ud800-\udfff]", tag) for tag in value))
    ):
        raise BadSample(f"annotation has no list of non-empty strings under {field!r}")
    return value


def _flags(value: object, field: str, num_tags: int) -> list[bool]:
    # Types first, for 1.0 == 1, but a float is no flag.
    if (
        not isinstance(value, list)
        or not set(map(type, value)) <= {int, bool}
        or not set(value) <= {0, 1}
    ):
        raise BadSample(f"annotation has an {field!r} that is no list of 0 and 1")
    if len(value) != num_tags:
        raise BadSample(f"annotation has {num_tags} tags but {len(value)} {field!r} flags")
    return value
