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
