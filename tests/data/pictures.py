"""Encoded pictures of every kind that is read, and some that are not."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encoded(width: int, height: int, kind: str, mode: str = "RGB", **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(100))
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, data, b"IEND")
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def jpeg_that_claims(width: int, height: int) -> bytes:
    content = bytearray(encoded(8, 8, "JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def turned(orientation: int, kind: str, byte_order: str = ">") -> bytes:
    """A picture whose EXIF says how it is to be turned and mirrored."""
    exif = Image.Exif()
    exif.endian = byte_order
    exif[0x010F] = "the maker comes before the orientation"
    exif[0x0112] = orientation
    return encoded(37, 21, kind, exif=exif)


PICTURES = {
    "jpg baseline": ("jpg", encoded(37, 21, "JPEG")),
    "jpg progressive": ("jpg", encoded(37, 21, "JPEG", progressive=True)),
    "jpg grey": ("jpg", encoded(37, 21, "JPEG", "L")),
    "jpg CMYK": ("jpg", encoded(37, 21, "JPEG", "CMYK")),
    "jpg with comment": ("jpg", encoded(37, 21, "JPEG", comment=b"\xff\xc0" * 50)),
    "png": ("png", encoded(37, 21, "PNG")),
    "png palette": ("png", encoded(37, 21, "PNG", "P")),
    "png alpha": ("png", encoded(37, 21, "PNG", "RGBA")),
    "png 16 bit": ("png", encoded(37, 21, "PNG", "I;16")),
    "webp lossy": ("webp", encoded(37, 21, "WEBP")),
    "webp lossless": ("webp", encoded(37, 21, "WEBP", lossless=True)),
    "webp alpha": ("webp", encoded(37, 21, "WEBP", "RGBA", exif=b"Exif\0\0")),
}


def black_png(width: int, height: int) -> bytes:
    """A whole PNG of 1 bit a pixel, in a thousandth of its size decoded."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    compressor = zlib.compressobj(1)
    line = bytes(1 + (width + 7) // 8)
    data = b"".join(compressor.compress(line) for _ in range(height)) + compressor.flush()
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def png_with_two_headers(width: int, height: int) -> bytes:
    """Black, `width` x `height`, behind another header that says 10 x 10."""
    content, small = black_png(width, height), black_png(10, 10)
    header = slice(8, 8 + 4 + 4 + 13 + 4)  # length, name, content, checksum
    return content[:8] + small[header] + content[8:]


def grey_jpeg(width: int, height: int) -> bytes:
    """A whole JPEG of one colour, at 2 bits for each block of 8 x 8 pixels.

    Both its code tables have one code, the bit 0, for "no difference" and for "end of block".
    """
    num_blocks = -(-width // 8) * -(-height // 8)
    code_table = bytes([1, *[0] * 15, 0])
    segments = (
        (0xDB, bytes([0, *[1] * 64])),
        (0xC0, struct.pack(">BHHB3B", 8, height, width, 1, 1, 0x11, 0)),
        (0xC4, b"\x00" + code_table),
        (0xC4, b"\x10" + code_table),
        (0xDA, bytes([1, 1, 0, 0, 63, 0])),
    )
    head = b"".join(
        struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
        for marker, content in segments
    )
    return b"\xff\xd8" + head + bytes(-(-2 * num_blocks // 8)) + b"\xff\xd9"


def jpeg_with_scans(num_scans: int, width: int = 64, height: int = 64) -> bytes:
    """A progressive JPEG of one colour whose last scan comes again and again."""
    buffer = io.BytesIO()
    Image.new("L", (width, height), 90).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    last_scan = content[content.rindex(b"\xff\xda") : -2]
    missing = num_scans - content.count(b"\xff\xda")
    return content[:-2] + last_scan * missing + b"\xff\xd9"


def webp_that_claims(width: int, height: int) -> bytes:
    """An extended WebP whose canvas is of that size, around a picture of 10 x 10."""
    canvas = struct.pack("<4sI4x", b"VP8X", 10) + b"".join(
        (size - 1).to_bytes(3, "little") for size in (width, height)
    )
    body = b"WEBP" + canvas + encoded(10, 10, "WEBP")[12:]
    return struct.pack("<4sI", b"RIFF", len(body)) + body
