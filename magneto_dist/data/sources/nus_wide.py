"""NUS-WIDE (Chua et al., 2009) becomes a data set by the rules of the paper, section 4.1.

1. `_Files` finds the distributed text files, unpacked or in their zip archives.
2. `_read_flags` reads tags and ground truth: one line an image, 81 concepts.
3. `_select` applies the rules, and counts what each leaves: `Funnel`.
4. `PictureReader` reads one picture, in one of the writer's processes.

The official train list is the split train, the official test list is validation.
"""

from __future__ import annotations

import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from magneto_dist.data.sample import BadSample, Sample
from magneto_dist.data.shrink import NO_SHRINK, Shrink
from magneto_dist.data.writer import WriteReport, write_dataset
from magneto_dist.errors import InputError
from magneto_dist.vocabulary import Vocabulary

CONCEPTS_FILE = "Concepts81.txt"
TAGS_FILE = "AllTags81.txt"
IMAGE_LIST = "Imagelist.txt"
SPLIT_LISTS = {"train": "TrainImagelist.txt", "validation": "TestImagelist.txt"}
IMAGE_FOLDERS = ("Flickr", "images", "Images")
_BAD_VALUE = b"-1130179"  # once in the distribution, among labels of "lake"; meant: 0


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
        width = max(map(len, asdict(self)))
        return "\n".join(f"{name:<{width}}  {count:>9,}" for name, count in asdict(self).items())


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
    vocabulary, splits, funnel = read(root)
    print(funnel)
    reader = PictureReader(folder)
    return write_dataset(
        out,
        splits,
        reader,
        vocabulary,
        samples_per_shard=samples_per_shard,
        shard_megabytes=shard_megabytes,
        image_bytes=reader.image_bytes,
        shrink=shrink,
        num_processes=num_processes,
        source={"builder": "nus-wide", "annotations_only": annotations_only, **asdict(funnel)},
    )


def read(root: Path) -> tuple[Vocabulary, dict[str, list[NusWideRow]], Funnel]:
    """Concepts, rows of both splits, and how they came about; see `build`."""
    files = _Files(root)
    vocabulary = Vocabulary(files.lines(CONCEPTS_FILE))
    paths = _paths(files, IMAGE_LIST)
    split_of = _splits(files)
    ground_truth = read_ground_truth(root, vocabulary, len(paths))
    tags = _read_flags(files, TAGS_FILE, len(paths), len(vocabulary))
    return vocabulary, *_select(paths, split_of, vocabulary, ground_truth, tags)


def read_ground_truth(
    root: Path, vocabulary: Vocabulary, num_images: int
) -> Bool[np.ndarray, "image concept"]:
    """The labels of all images, in the order of the image list.

    Raises:
        InputError: a concept's file is absent, or is not one 0 or 1 for each image.
    """
    files = _Files(root)
    columns = [
        _read_flags(files, f"Labels_{concept}.txt", num_images, 1) for concept in vocabulary.tags
    ]
    return np.concatenate(columns, axis=1)


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


def _select(
    paths: list[str],
    split_of: dict[str, str],
    vocabulary: Vocabulary,
    ground_truth: Bool[np.ndarray, "image concept"],
    tags: Bool[np.ndarray, "image concept"],
) -> tuple[dict[str, list[NusWideRow]], Funnel]:
    """The rules of section 4.1.

    Tags outside the concepts are not in `tags` to begin with (rule 1). Left are images with a label
    whose tags cover all labels (rule 2), which then have a tag, too (rule 3).
    """
    has_tag, has_label = tags.any(axis=1), ground_truth.any(axis=1)
    has_both = has_tag & has_label
    covered = has_both & ~(ground_truth & ~tags).any(axis=1)
    splits: dict[str, list[NusWideRow]] = {split: [] for split in SPLIT_LISTS}
    keys: set[str] = set()
    for row in np.flatnonzero(covered).tolist():
        key = _item_id(paths[row])
        if key in keys:
            continue
        keys.add(key)
        if paths[row] not in split_of:
            lists = " nor in ".join(SPLIT_LISTS.values())
            raise InputError(f"{IMAGE_LIST}: {paths[row]} is neither in {lists}")
        concepts = np.flatnonzero(tags[row]).tolist()
        splits[split_of[paths[row]]].append(
            NusWideRow(
                key,
                paths[row],
                tuple(vocabulary.tags[concept] for concept in concepts),
                tuple(ground_truth[row, concepts].tolist()),
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


def _item_id(path: str) -> str:
    """2124494179 of actor/0001_2124494179.jpg."""
    return PurePosixPath(path).stem.rpartition("_")[2]


# Files ------------------------------------------------------------------------------------------


class _Files:
    """The text files of the distribution by name; each name occurs once in it."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise InputError(f"{root}: is no folder")
        self._root = root
        self._places: dict[str, tuple[Path, str | None]] = {}
        for archive in sorted(root.glob("*.zip")):
            for member in self._members(archive):
                self._places[PurePosixPath(member).name] = (archive, member)
        for pattern in ("*.txt", "*/*.txt", "*/*/*.txt"):
            for path in sorted(root.glob(pattern)):
                self._places[path.name] = (path, None)

    def content(self, name: str) -> bytes:
        """The bytes of a file."""
        if name not in self._places:
            raise InputError(f"{self._root}: has no {name}, neither unpacked nor in a zip archive")
        path, member = self._places[name]
        try:
            if member is None:
                return path.read_bytes()
            with zipfile.ZipFile(path) as archive:
                return archive.read(member)
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: {name} cannot be read: {error}") from None

    def lines(self, name: str) -> list[str]:
        """The lines of a file, without blanks at their ends and without blank lines."""
        try:
            lines = self.content(name).decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: is not text: {error}") from None
        return [line.strip() for line in lines if line.strip()]

    def _members(self, archive: Path) -> list[str]:
        try:
            with zipfile.ZipFile(archive) as file:
                return [name for name in file.namelist() if name.endswith(".txt")]
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{archive}: cannot be read: {error}") from None


def _paths(files: _Files, name: str) -> list[str]:
    paths = [line.replace("\\", "/") for line in files.lines(name)]
    for path in paths:
        # These become names of files that are opened: nothing but what is distributed.
        if PurePosixPath(path).is_absolute() or ".." in path.split("/"):
            raise InputError(f"{name}: {path!r} leaves the folder of pictures")
        if not _item_id(path).isdecimal():
            raise InputError(f"{name}: {path!r} does not end with the number of an item")
    return paths


def _splits(files: _Files) -> dict[str, str]:
    """Path -> split."""
    split_of: dict[str, str] = {}
    for split, name in SPLIT_LISTS.items():
        for path in _paths(files, name):
            if split_of.setdefault(path, split) != split:
                raise InputError(f"{name}: {path} is in {SPLIT_LISTS[split_of[path]]}, too")
    return split_of


def _read_flags(
    files: _Files, name: str, num_lines: int, num_columns: int
) -> Bool[np.ndarray, "line column"]:
    """A table of 0 and 1 between blanks.

    Raises:
        InputError: another value, or other numbers of lines and columns.
    """
    content = files.content(name)
    content = content.replace(_BAD_VALUE, b"0")
    characters = np.frombuffer(content, dtype=np.uint8)
    is_value = characters > ord(" ")
    values = characters[is_value]
    if np.any((values != ord("0")) & (values != ord("1"))):
        word = next(word for word in content.split() if word not in (b"0", b"1"))
        raise InputError(f"{name}: holds {word.decode('latin-1')!r:.40}, not only 0 and 1")
    # With blanks between all values and 1, 2, 3 ... times num_columns values before every line's
    # end, no value can have slipped into another place.
    values_before = np.cumsum(is_value, dtype=np.int64)
    line_ends = values_before[characters == ord("\n")]
    joined = np.any(is_value[1:] & is_value[:-1])
    if joined or len(values) != num_lines * num_columns or np.any(line_ends % num_columns):
        raise InputError(
            f"{name}: must have {num_lines} lines of {num_columns} values, but has"
            f" {len(content.splitlines())} lines and {len(values)} values"
        )
    return (values == ord("1")).reshape(num_lines, num_columns)
