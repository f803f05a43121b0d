"""NUS-WIDE (Chua et al., 2009) becomes a data set by the rules of the paper, section 4.1.

1. `read_distribution` reads its text files: see nus_wide_files.py.
2. `select` applies the rules, and counts what each leaves: `Funnel`, beside what is published.
3. `PictureReader` reads one picture, in one of the writer's processes.

The official train list is the split train, the official test list is validation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from magneto_dist.data.sample import BadSample, Sample
from magneto_dist.data.shrink import NO_SHRINK, Shrink
from magneto_dist.data.sources.nus_wide_files import Distribution, item_id, read_distribution
from magneto_dist.data.writer import WriteReport, write_dataset
from magneto_dist.errors import InputError

IMAGE_FOLDERS = ("Flickr", "images", "Images")
# Of the whole distribution, as the paper's authors prepared it.
PUBLISHED = {
    "listed": 269_648,
    "with_tags": 133_441,
    "with_both": 119_890,
    "covered": 26_559,
    "train": 15_892,
    "validation": 10_668,
}
# Six item ids are listed twice. The authors joined tags and labels by item id, which makes four
# rows of two, and left one image in both splits; we count images.
_JOINED_TWICE = {"with_both": 12, "covered": 12, "train": 12, "validation": 12}


@dataclass(frozen=True)
class Funnel:
    """How many images are left after each rule."""

    listed: int
    """In the image list."""
    with_tags: int
    """Listed, with at least one tag among the concepts."""
    with_ground_truth: int
    """Listed, with at least one label."""
    with_both: int
    """Listed, with tags and labels."""
    covered: int
    """Of these, whose tags cover all their labels."""
    unique: int
    """Of these, after the second row of an item id is dropped."""
    train: int
    """Of these, in the official train list."""
    validation: int
    """Of these, in the official test list."""

    def __str__(self) -> str:
        """A line for each count, what is published beside it, and whether they agree."""
        lines = [f"{'':<17}  {'here':>9}  published"]
        for name, count in asdict(self).items():
            published = f"{PUBLISHED[name]:>9,}" if name in PUBLISHED else ""
            lines.append(f"{name:<17}  {count:>9,}  {published}".rstrip())
        return "\n".join([*lines, self.verdict])

    @property
    def verdict(self) -> str:
        """Whether these are the published counts, or the first that is not."""
        for name, published in PUBLISHED.items():
            if abs(getattr(self, name) - published) > _JOINED_TWICE.get(name, 0):
                return f"differs from the published counts, first in {name}"
        return "matches the published counts"


class NusWideRow(NamedTuple):
    """One image before its picture is read."""

    key: str
    """Item id: the photograph's number."""
    path: str
    """As in the image list, with slashes."""
    tags: tuple[str, ...]
    important: tuple[bool, ...]


def build(
    out: Path,
    root: Path,
    images: Path | None = None,
    *,
    annotations_only: bool = False,
    samples_per_shard: int = 2048,
    shard_megabytes: float | None = None,
    shrink: Shrink = NO_SHRINK,
    num_processes: int = 1,
) -> WriteReport:
    """Writes NUS-WIDE to the folder `out` and prints how many images each rule leaves.

    Args:
        out: folder; made if absent.
        root: folder of the distribution: ConceptsList, Groundtruth, ImageList and NUS_WID_Tags, as
            zip archives or unpacked.
        images: folder of pictures, `<category>/<number>_<id>.jpg` or `<id>.jpg`; None: the folder
            Flickr or images in `root`.
        annotations_only: write tags and labels without pictures.
        samples_per_shard: rows per shard, at most.
        shard_megabytes: of pictures per shard (1e6 bytes), at most, by their sizes before
            shrinking; a larger picture has a shard of its own. None: no such limit.
        shrink: makes large pictures smaller.
        num_processes: that read pictures and write shards.

    Raises:
        InputError: a file is absent or does not fit the others; or as for `write_dataset`.
    """
    folder = None if annotations_only else _image_folder(root, images)
    distribution = read_distribution(root)
    splits, funnel = select(distribution)
    print(funnel)
    reader = PictureReader(folder)
    return write_dataset(
        out,
        splits,
        reader,
        distribution.vocabulary,
        samples_per_shard=samples_per_shard,
        shard_megabytes=shard_megabytes,
        image_bytes=reader.image_bytes,
        shrink=shrink,
        num_processes=num_processes,
        source={"builder": "nus-wide", "annotations_only": annotations_only, **asdict(funnel)},
    )


@dataclass(frozen=True)
class PictureReader:
    """Makes a sample of a row."""

    images: Path | None
    """Folder of pictures; None: samples have none."""

    def __call__(self, row: NusWideRow) -> Sample:
        """Reads the picture of a row.

        Raises:
            BadSample: it is in none of the known places.
        """
        return Sample(row.key, self._image(row), row.tags, row.important)

    def image_bytes(self, row: NusWideRow) -> int:
        """The size of the picture of a row; 0: there is none."""
        if self.images is None:
            return 0
        for name in _names(row):
            try:
                return (self.images / name).stat().st_size
            except OSError:
                continue
        return 0

    def _image(self, row: NusWideRow) -> bytes | None:
        if self.images is None:
            return None
        for name in _names(row):
            try:
                return (self.images / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise BadSample(f"{name} cannot be read: {error.strerror}", row.key) from None
        raise BadSample(f"there is neither {row.path} nor {row.key}.jpg", row.key)


def _names(row: NusWideRow) -> tuple[str, ...]:
    """Where the picture of a row may lie."""
    return row.path, f"{row.key}.jpg", PurePosixPath(row.path).name


def _image_folder(root: Path, images: Path | None) -> Path:
    candidates = [images] if images else [root / name for name in IMAGE_FOLDERS]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise InputError(
        f"there is no folder {' or '.join(map(str, candidates))}: give the folder of the pictures,"
        " or build with --annotations-only"
    )


def select(distribution: Distribution) -> tuple[dict[str, list[NusWideRow]], Funnel]:
    """The rules of section 4.1: rows of each split, and how they came about.

    Tags outside the concepts are not in the files to begin with (rule 1). Left are images with a
    label whose tags cover all labels (rule 2), which then have a tag, too (rule 3).

    Raises:
        InputError: an image that is left is in no official list.
    """
    paths, tags, truth = distribution.paths, distribution.tags, distribution.ground_truth
    has_tag, has_label = tags.any(axis=1), truth.any(axis=1)
    has_both = has_tag & has_label
    covered = has_both & ~(truth & ~tags).any(axis=1)
    names = distribution.vocabulary.tags
    split_of = {row: split for split, rows in distribution.rows.items() for row in rows.tolist()}
    splits: dict[str, list[NusWideRow]] = {split: [] for split in distribution.rows}
    keys: set[str] = set()
    for row in np.flatnonzero(covered).tolist():
        key = item_id(paths[row])
        if key in keys:
            continue
        keys.add(key)
        if row not in split_of:
            raise InputError(
                f"{paths[row]}: is neither in TrainImagelist.txt nor TestImagelist.txt"
            )
        concepts = np.flatnonzero(tags[row]).tolist()
        splits[split_of[row]].append(
            NusWideRow(
                key,
                paths[row],
                tuple(names[concept] for concept in concepts),
                tuple(truth[row, concepts].tolist()),
            )
        )
    funnel = Funnel(
        listed=len(paths),
        with_tags=int(has_tag.sum()),
        with_ground_truth=int(has_label.sum()),
        with_both=int(has_both.sum()),
        covered=int(covered.sum()),
        unique=len(keys),
        train=len(splits["train"]),
        validation=len(splits["validation"]),
    )
    return splits, funnel
