"""A data set to measure with where there is none: noise that costs what photographs cost.

Its spectrum falls with frequency, as that of photographs does, and so steeply that a JPEG of
500 x 375 pixels has about 50 kB. Tags have no meaning.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import simplejpeg
from jaxtyping import UInt8

from magneto_dist.data.sample import Sample
from magneto_dist.data.shards import Dataset
from magneto_dist.data.writer import write_dataset
from magneto_dist.vocabulary import Vocabulary

QUALITY = 86
_ORIGINALS, _MARGIN = 8, 1.3  # pictures are parts of these, which are larger by so much
_CONTRAST = 45.0  # of 255, standard deviation
_SLOPE = 1.45  # amplitude falls as 1 / frequency ** _SLOPE


def make_synthetic(
    folder: Path, items: int, size: tuple[int, int], num_tags: int, tags_per_item: int
) -> Dataset:
    """Shards in `folder`, unless they are there; an eighth as many items for validation.

    Args:
        folder: where they are made.
        items: to train on.
        size: width and height of the pictures, pixels.
        num_tags: of the vocabulary.
        tags_per_item: in the mean; an item has one to almost twice as many.
    """
    if not (folder / "dataset.json").exists():
        width, height = size
        rng = np.random.default_rng(0)
        originals = [
            _noise(rng, int(width * _MARGIN), int(height * _MARGIN)) for _ in range(_ORIGINALS)
        ]
        vocabulary = Vocabulary([f"tag-{number:05}" for number in range(num_tags)])
        most = min(2 * tags_per_item - 1, num_tags)

        def make(number: int) -> Sample:
            own = np.random.default_rng(number)
            tags = own.choice(num_tags, own.integers(1, most + 1), replace=False)
            return Sample(
                f"synthetic-{number:06}",
                _part(originals[number % _ORIGINALS], own, width, height),
                tuple(vocabulary.tags[tag] for tag in tags),
                tuple(bool(flag) for flag in own.integers(0, 2, len(tags))),
            )

        write_dataset(
            folder,
            {"train": range(items), "validation": range(items, items + max(1, items // 8))},
            make,
            vocabulary,
            samples_per_shard=256,
            num_processes=1,
            source={"builder": "synthetic"},
        )
    return Dataset.open(str(folder))


def _noise(rng: np.random.Generator, width: int, height: int) -> UInt8[np.ndarray, "h w 3"]:
    """Coloured noise, most of it common to the three colours, as in photographs."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    planes = []
    for _ in range(4):
        spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**_SLOPE
        plane = np.fft.irfft2(spectrum, s=(height, width))
        planes.append(plane / plane.std())
    common, *colours = planes
    channels = [127 + _CONTRAST * (common + 0.2 * colour) for colour in colours]
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


def _part(
    original: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, width: int, height: int
) -> bytes:
    top = rng.integers(original.shape[0] - height + 1)
    left = rng.integers(original.shape[1] - width + 1)
    part = np.ascontiguousarray(original[top : top + height, left : left + width])
    return simplejpeg.encode_jpeg(part, quality=QUALITY)
