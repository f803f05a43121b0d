"""Photographs for benchmarks: JPEGs of one size, made of any photographs, all different."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from magneto_dist.errors import InputError

WIDTH, HEIGHT, QUALITY = 500, 375, 86  # about 50 kB


def make_photographs(photos: Path, num_items: int) -> dict[str, bytes]:
    """JPEGs by key, all different, of the size that this benchmark is about.

    Args:
        photos: folder with the JPEGs that they are parts of.
        num_items: how many.

    Raises:
        InputError: one of those is no picture.
    """
    originals = [_read(path) for path in sorted(photos.glob("*.jpg"))]
    generator = np.random.default_rng(0)
    return {
        f"photo-{number:06}": _photograph(originals[number % len(originals)], generator)
        for number in range(num_items)
    }


def write_files(folder: Path, photographs: dict[str, bytes]) -> None:
    """Writes JPEGs by key to `folder/files`."""
    (folder / "files").mkdir()
    for key, content in photographs.items():
        (folder / "files" / f"{key}.jpg").write_bytes(content)


def _read(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:  # PIL.UnidentifiedImageError is one
        raise InputError(f"{path}: no picture can be read ({error})") from None


def _photograph(original: Image.Image, generator: np.random.Generator) -> bytes:
    """A part of the original, somewhat enlarged at most, so that no two are equal."""
    scale = max(WIDTH / original.width, HEIGHT / original.height) * generator.uniform(1, 1.3)
    width, height = (
        max(WIDTH, int(original.width * scale)),
        max(HEIGHT, int(original.height * scale)),
    )
    left = int(generator.integers(0, width - WIDTH + 1))
    top = int(generator.integers(0, height - HEIGHT + 1))
    part = original.resize((width, height), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    part.crop((left, top, left + WIDTH, top + HEIGHT)).save(content, "JPEG", quality=QUALITY)
    return content.getvalue()
