"""What one sample is, and the checks that its bytes pass before anything else touches them.

1. `valid_key` names it, `parse_annotation` reads its tags (`annotation_bytes` writes them).
2. `image_header` reads type and size from the first bytes of the picture, without decoding it.
3. `check_image_size` refuses bombs by that header; only then `check_image_decodes` decodes.
"""

from __future__ import annotations

import io
import json
import re
import struct
import warnings
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

IMAGE_KINDS = ("jpg", "png", "webp")
"""Types of pictures, as the extension of their member in a shard."""
DEFAULT_MAX_MEGAPIXELS = 100.0
_KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")  # with its extension a key fits ustar's 100 bytes
_PIL_FORMATS = {"jpg": ("JPEG",), "png": ("PNG",), "webp": ("WEBP",)}
_JPEG_STANDALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15
_JPEG_SCAN_OR_END = {0xDA, 0xD9}


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


class ImageHeader(NamedTuple):
    """What the first bytes of a picture say."""

    kind: str
    """jpg, png or webp."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""


def valid_key(key: str) -> bool:
    """Whether `key` can name a sample: 1 to 90 ASCII letters, digits, `_` or `-`.

    Dots separate a key from its extension, slashes make folders: neither may be part of a key.
    """
    return _KEY.fullmatch(key) is not None


def parse_annotation(content: bytes) -> tuple[tuple[str, ...], tuple[bool, ...] | None]:
    """Reads `{"tags": [...], "important": [0/1, ...]}`; other fields are ignored.

    A tag that is listed twice is kept once, important if it is so anywhere.

    Returns:
        The tags in order and whether each is important; None where the sample is unlabelled.

    Raises:
        BadSample: no JSON of that form, no tag at all, or lists of different lengths.
    """
    try:
        annotation = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise BadSample(f"annotation is not JSON in UTF-8: {error}") from None
    if not isinstance(annotation, dict):
        raise BadSample("annotation is no JSON object")
    tags = annotation.get("tags")
    if not isinstance(tags, list) or not all(_is_text(tag) for tag in tags):
        raise BadSample("annotation has no list of non-empty strings under 'tags'")
    if not tags:
        raise BadSample("annotation has no tags")
    if "important" not in annotation:
        return tuple(dict.fromkeys(tags)), None
    important = annotation["important"]
    # `type(x) in` and not `x in`: 1.0 == 1, but a float is no flag.
    if not isinstance(important, list) or not all(
        type(flag) in (int, bool) and flag in (0, 1) for flag in important
    ):
        raise BadSample("annotation has an 'important' that is no list of 0 and 1")
    if len(important) != len(tags):
        raise BadSample(f"annotation has {len(tags)} tags but {len(important)} 'important' flags")
    merged: dict[str, bool] = {}
    for tag, flag in zip(tags, important, strict=True):
        merged[tag] = merged.get(tag, False) or bool(flag)
    return tuple(merged), tuple(merged.values())


def annotation_bytes(sample: Sample) -> bytes:
    """The annotation as it stands in a shard: JSON, the same bytes for the same sample."""
    annotation: dict[str, list] = {"tags": list(sample.tags)}
    if sample.important is not None:
        annotation["important"] = [int(flag) for flag in sample.important]
    text = json.dumps(annotation, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")  # half a pair is for the reader to refuse


def image_header(content: bytes) -> ImageHeader:
    """Type and size of a picture, by its content and never by a file name; decodes nothing.

    Raises:
        BadSample: neither JPEG, PNG nor WebP, or a header that is cut off or makes no sense.
    """
    try:
        if content[:2] == b"\xff\xd8":
            header = _jpeg_header(content)
        elif content[:8] == b"\x89PNG\r\n\x1a\n":
            header = _png_header(content)
        elif content[:4] == b"RIFF" and content[8:12] == b"WEBP":
            header = _webp_header(content)
        else:
            raise BadSample("picture is neither JPEG, PNG nor WebP")
    except (struct.error, IndexError):
        raise BadSample("picture ends before its size is given") from None
    if header.width < 1 or header.height < 1:
        raise BadSample(f"{header.kind} picture of {header.width}x{header.height} pixels")
    return header


def check_image_size(header: ImageHeader, max_megapixels: float) -> None:
    """Refuses pictures whose pixels would not fit: a small file can hold a huge picture.

    Raises:
        BadSample: more than `max_megapixels` (1e6 pixels) by the header.
    """
    if header.width * header.height > max_megapixels * 1e6:
        raise BadSample(
            f"{header.kind} picture of {header.width}x{header.height} pixels is larger than"
            f" {max_megapixels:g} megapixels"
        )


def check_image_decodes(content: bytes, max_megapixels: float) -> ImageHeader:
    """Decodes the whole picture once and throws the pixels away.

    Raises:
        BadSample: not a picture, too large, cut off or broken.
    """
    header = image_header(content)
    check_image_size(header, max_megapixels)
    with warnings.catch_warnings():
        # Pillow warns of odd EXIF data and of sizes that our own limit has already judged.
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(content), formats=_PIL_FORMATS[header.kind]) as picture:
                picture.load()
        except Exception as error:  # broken pictures raise whatever the decoder stumbled over
            raise BadSample(f"{header.kind} picture does not decode: {error}") from None
    return header


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_text(value: object) -> bool:
    # JSON can hold half of a surrogate pair, which no UTF-8 vocabulary can.
    return isinstance(value, str) and value != "" and not re.search("[\ud800-\udfff]", value)


def _jpeg_header(content: bytes) -> ImageHeader:
    position = 2
    while True:
        if content[position] != 0xFF:
            raise BadSample("jpg picture has no marker where one must be")
        while content[position] == 0xFF:  # fill bytes
            position += 1
        marker = content[position]
        position += 1
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", content, position + 3)
            return ImageHeader("jpg", width, height)
        if marker in _JPEG_SCAN_OR_END:
            raise BadSample("jpg picture does not give its size")
        if marker not in _JPEG_STANDALONE:
            (length,) = struct.unpack_from(">H", content, position)
            if length < 2:
                raise BadSample("jpg picture has a segment without length")
            position += length


def _png_header(content: bytes) -> ImageHeader:
    length, name, width, height = struct.unpack_from(">I4sII", content, 8)
    if (length, name) != (13, b"IHDR"):
        raise BadSample("png picture does not begin with its header")
    return ImageHeader("png", width, height)


def _webp_header(content: bytes) -> ImageHeader:
    chunk = content[12:16]
    if chunk == b"VP8 ":  # lossy: frame tag (3 bytes), start code, then 14 bits each
        start_code, width, height = struct.unpack_from("<3sHH", content, 23)
        if start_code != b"\x9d\x01\x2a":
            raise BadSample("webp picture does not begin with a key frame")
        return ImageHeader("webp", width & 0x3FFF, height & 0x3FFF)
    if chunk == b"VP8L":  # lossless: signature byte, then 14 bits each, less one
        signature, bits = struct.unpack_from("<BI", content, 20)
        if signature != 0x2F:
            raise BadSample("webp picture has a wrong lossless signature")
        return ImageHeader("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if chunk == b"VP8X":  # extended: flags (4 bytes), then 24 bits each, less one
        width_low, width_high, height_low, height_high = struct.unpack_from("<HBHB", content, 24)
        return ImageHeader(
            "webp", (width_high << 16 | width_low) + 1, (height_high << 16 | height_low) + 1
        )
    raise BadSample("webp picture of an unknown kind")
