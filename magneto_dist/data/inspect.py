"""What a data set holds: counts and distributions, for people who are about to train on it.

1. `count` reads every annotation of a split, and the headers of some pictures.
2. `stats` makes numbers of it, `format_stats` a table of these.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from magneto_dist.data.dataset_file import Shard
from magneto_dist.data.image_bytes import ImageHeader, check_image_size, image_header
from magneto_dist.data.parallel import progress_bar
from magneto_dist.data.sample import BadSample
from magneto_dist.data.shard_index import ShardIndex
from magneto_dist.data.shards import Dataset

_TOP_TAGS = 20
_MAX_PICTURES = 10_000
_HEADER_BYTES = 65_536  # room for most EXIF blocks, which come before a JPEG's size


@dataclass
class Counts:
    """What the samples of one split hold."""

    dataset: Dataset
    split: str
    num_bad: int = 0
    """Samples whose annotation or header cannot be read."""
    tags_per_item: list[int] = field(default_factory=list)
    important_per_item: list[int] = field(default_factory=list)
    """Of labelled items."""
    tags_of_labelled: int = 0
    frequency: Counter[str] = field(default_factory=Counter)
    """Items that each tag occurs in."""
    headers: list[ImageHeader] = field(default_factory=list)
    """Of at most 10,000 pictures, evenly spaced."""


def count(dataset: Dataset, split: str) -> Counts:
    """Reads every annotation of a split, and the headers of some pictures.

    Raises:
        InputError: no such split, or a shard cannot be read.
        OSError: the same, from the disk or network.
    """
    counts = Counts(dataset, split)
    spacing = max(1, -(-dataset.num_samples(split) // _MAX_PICTURES))
    with progress_bar(dataset.num_samples(split), f"reading {split}") as bar:
        for shard in dataset.shards(split):
            index = ShardIndex.read(dataset.storage, shard.name)
            for row in range(index.num_samples):
                try:
                    tags, important = dataset.annotation(_annotation(dataset, shard, index, row))
                    if dataset.has_images and bar.n % spacing == 0:
                        counts.headers.append(_header(dataset, shard, index, row))
                except BadSample:
                    counts.num_bad += 1
                else:
                    counts.tags_per_item.append(len(tags))
                    counts.frequency.update(tags)
                    if important is not None:
                        counts.tags_of_labelled += len(tags)
                        counts.important_per_item.append(sum(important))
                bar.update()
    return counts


def stats(counts: Counts) -> dict[str, Any]:
    """The counts in numbers; distributions are minimum, mean, median and maximum."""
    dataset, split = counts.dataset, counts.split
    num_important = sum(counts.important_per_item)
    return {
        "split": split,
        "items": dataset.num_samples(split),
        "labelled": dataset.num_labelled(split),
        "bad": counts.num_bad,
        "shards": len(dataset.shards(split)),
        "bytes": sum(shard.num_bytes for shard in dataset.shards(split)),
        "tags_in_vocabulary": len(dataset.vocabulary),
        "tags_used": len(counts.frequency),
        "tags_per_item": _distribution(counts.tags_per_item),
        "important_per_item": _distribution(counts.important_per_item),
        "important_fraction": num_important / max(counts.tags_of_labelled, 1),
        "top_tags": dict(counts.frequency.most_common(_TOP_TAGS)),
        "pictures_looked_at": len(counts.headers),
        "picture_kinds": dict(Counter(header.kind for header in counts.headers)),
        "picture_width": _distribution([header.upright_size[1] for header in counts.headers]),
        "picture_height": _distribution([header.upright_size[0] for header in counts.headers]),
    }


def format_stats(counted: dict[str, Any]) -> str:
    """The result of `stats` as a table."""
    lines = [f"{counted['split']}"]
    for name, value in counted.items():
        if name in ("split", "top_tags"):
            continue
        if isinstance(value, dict):
            text = "  ".join(f"{key} {_number(number)}" for key, number in value.items()) or "-"
        else:
            text = _number(value)
        lines.append(f"  {name.replace('_', ' '):<20} {text}")
    lines.append("  most frequent tags")
    width = max(map(len, counted["top_tags"]), default=0)
    for tag, count in counted["top_tags"].items():
        lines.append(f"    {tag:<{width}}  {count:>10,}  {count / counted['items']:>6.1%} of items")
    return "\n".join(lines)


def _annotation(dataset: Dataset, shard: Shard, index: ShardIndex, row: int) -> bytes:
    offset, size = index.annotation_offset[row], index.annotation_size[row]
    return dataset.tar_storage.read(shard.file, int(offset), int(size))


def _header(dataset: Dataset, shard: Shard, index: ShardIndex, row: int) -> ImageHeader:
    offset, size = int(index.image_offset[row]), int(index.image_size[row])
    try:
        return image_header(dataset.tar_storage.read(shard.file, offset, min(size, _HEADER_BYTES)))
    except BadSample:
        check_image_size(size)
        return image_header(dataset.tar_storage.read(shard.file, offset, size))


def _distribution(values: list[int]) -> dict[str, float]:
    if not values:
        return {}
    return {
        "min": min(values),
        "mean": round(float(np.mean(values)), 3),
        "median": float(np.median(values)),
        "max": max(values),
    }


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"
