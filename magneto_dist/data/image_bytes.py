"""What the bytes of a picture say about it, before anything decodes them.

1. `image_header` reads type, size and orientation by content, never by a file name.
2. `checked_header` also refuses bombs (a small file can hold a huge picture, or a picture a
   thousand times over) and cut-off JPEGs, which decoders fill up with grey: some with an error,
   some without.
3. `check_image_size` refuses a file that is too large to be read at all.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from magneto_dist.data.sample import BadSample

IMAGE_KINDS = ("jpg", "png", "webp")
"""Types of pictures, as the extension of their member in a shard."""
DEFAULT_MAX_MEGAPIXELS = 100.0
MAX_IMAGE_BYTES = 1 << 28
"""Of an encoded picture: 100 megapixels of noise in PNG have more, no photograph has."""
# A decoder works through the whole picture in each scan, and a scan may take 12 bytes: 3,000 scans
# of 9 megapixels are a file of 100 kB and 10 s of work. Encoders write about 10; cjpeg and
# jpegtran, which write what a script tells them to, take no script of more than 100.
_MAX_JPEG_SCANS = 100
_JPEG_STANDALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15
_JPEG_SEQUENTIAL = {0xC0, 0xC1}  # frames of baseline and extended Huffman coding
_JPEG_SCAN, _JPEG_END = 0xDA, 0xD9
_JPEG_LAST_BYTES = bytes([0xFF, _JPEG_END])
_JPEG_APP1, _EXIF_MARK = 0xE1, b"Exif\0\0"
_EXIF_ORIENTATION, _EXIF_SHORT = 0x0112, 3
_JPEG_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # neither a stuffed 0xFF nor a restart


class ImageHeader(NamedTuple):
    """What the first bytes of a picture say."""

    kind: str
    """jpg, png or webp."""
    width: int
    """Pixels, as stored."""
    height: int
    """Pixels, as stored."""
    orientation: int = 1
    """How it is to be turned and mirrored, 1 (as stored) to 8, by EXIF."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width as shown, pixels."""
        is_turned = self.orientation >= 5
        return (self.width, self.height) if is_turned else (self.height, self.width)


def image_header(content: bytes) -> ImageHeader:
    """What a picture says of itself, by its content and never by a file name; decodes nothing.

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
        BadSample: as `image_header`; more than `max_megapixels` (1e6 pixels) by the header, or
            than MAX_IMAGE_BYTES; a JPEG that is cut off, or has more than 100 scans. Other types
            are left to their decoders, which do notice.
    """
    check_image_size(len(content))
    header = image_header(content)
    if header.width * header.height > max_megapixels * 1e6:
        raise BadSample(
            f"{header.kind} picture of {header.width}x{header.height} pixels is larger than"
            f" {max_megapixels:g} megapixels"
        )
    if header.kind == "jpg":
        _check_jpeg_scans(content)
    return header


def check_image_size(num_bytes: int) -> None:
    """Whether the file of a picture may be read.

    Raises:
        BadSample: it has more than MAX_IMAGE_BYTES.
    """
    if num_bytes > MAX_IMAGE_BYTES:
        raise BadSample(f"picture of {num_bytes} bytes is larger than {MAX_IMAGE_BYTES} bytes")


def _jpeg_header(content: bytes) -> ImageHeader:
    position, orientation = 2, 1
    while True:
        marker, position = _jpeg_marker(content, position)
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", content, position + 3)
            return ImageHeader("jpg", width, height, orientation)
        if marker in (_JPEG_SCAN, _JPEG_END):
            raise BadSample("jpg picture does not give its size")
        end = _after_jpeg_segment(content, marker, position)
        if marker == _JPEG_APP1 and content.startswith(_EXIF_MARK, position + 2):
            orientation = _exif_orientation(content[position + 2 : end])
        position = end


def _check_jpeg_scans(content: bytes) -> None:
    position, num_scans, components = 2, 0, None
    try:
        while True:
            marker, position = _jpeg_marker(content, position)
            if marker == _JPEG_END:
                return
            if marker in _JPEG_FRAMES and components is None:
                components = content[position + 7] if marker in _JPEG_SEQUENTIAL else 0
            start, position = position, _after_jpeg_segment(content, marker, position)
            if marker == _JPEG_SCAN:
                # A sequential scan of all components is the last one: most pictures need not be
                # looked through, which takes a fiftieth of the time of decoding them.
                if content[start + 2] == components and content.endswith(_JPEG_LAST_BYTES):
                    return
                num_scans += 1
                if num_scans > _MAX_JPEG_SCANS:
                    raise BadSample(f"jpg picture has more than {_MAX_JPEG_SCANS} scans")
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
    return ImageHeader("png", width, height, _exif_orientation(_png_exif(content)))


def _png_exif(content: bytes) -> bytes:
    position = 8
    while position + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, position)
        if name == b"eXIf":
            return content[position + 8 : position + 8 + length]
        position += 12 + length  # behind the checksum
    return b""


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
        width, height = (width_high << 16 | width_low) + 1, (height_high << 16 | height_low) + 1
        return ImageHeader("webp", width, height, _exif_orientation(_webp_exif(content)))
    raise BadSample("webp picture of an unknown kind")


def _webp_exif(content: bytes) -> bytes:
    position = 12
    while position + 8 <= len(content):
        name, length = struct.unpack_from("<4sI", content, position)
        if name == b"EXIF":
            return content[position + 8 : position + 8 + length]
        position += 8 + length + length % 2
    return b""


def _exif_orientation(block: bytes) -> int:
    """1, as stored, where an EXIF block does not say, or makes no sense.

    Pillow would read, and warn of, the whole block: ten times the work of this one field.
    """
    tiff = block.removeprefix(_EXIF_MARK)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (position,) = struct.unpack_from(order + "I", tiff, 4)
        (num_fields,) = struct.unpack_from(order + "H", tiff, position)
        for field in range(num_fields):
            name, kind, count, value = struct.unpack_from(
                order + "HHIH", tiff, position + 2 + 12 * field
            )
            if name == _EXIF_ORIENTATION:
                is_sound = (kind, count) == (_EXIF_SHORT, 1) and 1 <= value <= 8
                return value if is_sound else 1
    except struct.error:
        pass
    return 1
