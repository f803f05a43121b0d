"""What the bytes of a picture say about it, before anything decodes them.

1. `image_header` reads type and size by content, never by a file name.
2. `checked_header` also refuses bombs (a small file can hold a huge picture) and cut-off JPEGs,
   which decoders fill up with grey: some with an error, some without.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from magneto_dist.data.sample import BadSample

IMAGE_KINDS = ("jpg", "png", "webp")
"""Types of pictures, as the extension of their member in a shard."""
DEFAULT_MAX_MEGAPIXELS = 100.0
_JPEG_STANDALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15
_JPEG_SCAN, _JPEG_END = 0xDA, 0xD9
_JPEG_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # neither a stuffed 0xFF nor a restart


class ImageHeader(NamedTuple):
    """What the first bytes of a picture say."""

    kind: str
    """jpg, png or webp."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""


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


def checked_header(content: bytes, max_megapixels: float) -> ImageHeader:
    """The header of a picture that is worth decoding.

    Raises:
        BadSample: as `image_header`; more than `max_megapixels` (1e6 pixels) by the header; a JPEG
            that is cut off. Other types are left to their decoders, which do notice.
    """
    header = image_header(content)
    if header.width * header.height > max_megapixels * 1e6:
        raise BadSample(
            f"{header.kind} picture of {header.width}x{header.height} pixels is larger than"
            f" {max_megapixels:g} megapixels"
        )
    if header.kind == "jpg":
        _check_jpeg_is_whole(content)
    return header


def _jpeg_header(content: bytes) -> ImageHeader:
    position = 2
    while True:
        marker, position = _jpeg_marker(content, position)
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", content, position + 3)
            return ImageHeader("jpg", width, height)
        if marker in (_JPEG_SCAN, _JPEG_END):
            raise BadSample("jpg picture does not give its size")
        position = _after_jpeg_segment(content, marker, position)


def _check_jpeg_is_whole(content: bytes) -> None:
    position = 2
    try:
        while True:
            marker, position = _jpeg_marker(content, position)
            if marker == _JPEG_END:
                return
            position = _after_jpeg_segment(content, marker, position)
            if marker == _JPEG_SCAN:
                after_scan = _JPEG_AFTER_SCAN.search(content, position)
                position = after_scan.start() if after_scan else len(content)
    except (struct.error, IndexError):
        raise BadSample("jpg picture is cut off") from None


def _jpeg_marker(content: bytes, position: int) -> tuple[int, int]:
    """The marker that begins at `position`, and where it ends."""
    if content[position] != 0xFF:
        raise BadSample("jpg picture has no marker where one must be")
    while content[position] == 0xFF:  # fill bytes
        position += 1
    return content[position], position + 1


def _after_jpeg_segment(content: bytes, marker: int, position: int) -> int:
    if marker in _JPEG_STANDALONE:
        return position
    (length,) = struct.unpack_from(">H", content, position)
    if length < 2:
        raise BadSample("jpg picture has a segment without length")
    return position + length


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
