"""Any data set of the `datasets` library becomes a data set of ours.

1. `_open` loads a split: from the hub, from local files, or from a folder of `save_to_disk`.
2. `_rows` reads the columns of tags; pictures stay where they are.
3. `PictureReader` reads one picture, encoded as it is, in one of the writer's processes; each opens
   the data set for itself, for a row is only a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from magneto_dist.data.sample import BadSample, Sample
from magneto_dist.data.shrink import NO_SHRINK, Shrink
from magneto_dist.data.sources.columns import (
    Labels,
    check_fraction,
    is_validation,
    parse_tags,
    vocabulary_of,
)
from magneto_dist.data.writer import WriteReport, write_dataset
from magneto_dist.errors import InputError


@dataclass(frozen=True)
class HfSplit:
    """What to load."""

    path: str
    """Name on the hub, a builder ("imagefolder", "parquet"), or a folder of `save_to_disk`."""
    split: str
    """Name of the split there."""
    config: str | None = None
    """Name of the configuration, where there are several."""
    data_files: str | None = None
    """Files for a builder: a path or a pattern."""
    data_dir: str | None = None
    """Folder for a builder."""


@dataclass(frozen=True)
class HfColumns:
    """Where things are."""

    image: str = "image"
    """Column of pictures: of the type Image, or of encoded bytes."""
    tags: str = "tags"
    """Column of the tags: a list, or a string with separators."""
    important: str | None = "important_tags"
    """Column of the important tags, as `tags`; null: this row is unlabelled. None: all rows are."""
    separator: str = ","
    """Between the tags of a string."""


class HfRow(NamedTuple):
    """One sample before its picture is read."""

    key: str
    source: HfSplit
    number: int
    """Row in it, from 0."""
    tags: tuple[str, ...]
    important: tuple[bool, ...] | None


def build(
    out: Path,
    path: str,
    *,
    config: str | None = None,
    data_files: str | None = None,
    data_dir: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    validation_fraction: float = 0.1,
    columns: HfColumns = HfColumns(),
    vocabulary: Path | None = None,
    samples_per_shard: int = 2048,
    shrink: Shrink = NO_SHRINK,
    num_processes: int = 1,
) -> WriteReport:
    """Writes splits of a data set of the `datasets` library to the folder `out`.

    Args:
        out: folder; made if absent.
        path: as for `datasets.load_dataset`; or a folder written by `save_to_disk`.
        config: name of the configuration, where there are several.
        data_files: for a builder such as "parquet": a path or a pattern.
        data_dir: for a builder such as "imagefolder": a folder.
        train_split: its name there.
        validation_split: its name there; None: rows of the train split, by hash of their number.
        validation_fraction: share of rows that are validated on if there is no `validation_split`.
        columns: names of the columns.
        vocabulary: file with one tag a line; None: all tags by falling frequency, ties by name.
        samples_per_shard: rows per shard.
        shrink: makes large pictures smaller.
        num_processes: that read pictures and write shards.

    Raises:
        InputError: the data set cannot be loaded, lacks a column, or has important tags that are
            not among the tags; or as for `write_dataset`.
    """
    check_fraction(validation_fraction)
    source = HfSplit(path, train_split, config, data_files, data_dir)
    splits = {"train": _rows(source, columns)}
    if validation_split is not None:
        other = HfSplit(path, validation_split, config, data_files, data_dir)
        splits["validation"] = _rows(other, columns)
    else:
        train, validation = [], []
        for row in splits["train"]:
            chosen = validation if is_validation(row.key, validation_fraction) else train
            chosen.append(row)
        splits = {"train": train, "validation": validation}
    tags = (row.tags for rows in splits.values() for row in rows)
    return write_dataset(
        out,
        splits,
        PictureReader(columns.image),
        vocabulary_of(tags, vocabulary),
        samples_per_shard=samples_per_shard,
        shrink=shrink,
        num_processes=num_processes,
        source={"builder": "hf", "path": path, "config": config},
    )


@dataclass(frozen=True)
class PictureReader:
    """Makes a sample of a row."""

    column: str
    """Of pictures."""

    def __call__(self, row: HfRow) -> Sample:
        """Reads the picture of a row, without decoding it.

        Raises:
            BadSample: there is none, or its file cannot be read.
        """
        cell = _pictures(row.source, self.column)[row.number][self.column]
        if isinstance(cell, dict):  # the type Image: bytes, or a path where they lie
            cell = cell["bytes"] if cell["bytes"] is not None else _read(cell["path"], row.key)
        if not isinstance(cell, bytes):
            raise BadSample(f"column {self.column!r} has no picture", row.key)
        return Sample(row.key, cell, row.tags, row.important)


def _read(path: str, key: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadSample(f"picture {path!r} cannot be read: {error.strerror}", key) from None


def _rows(source: HfSplit, columns: HfColumns) -> list[HfRow]:
    where = f"{source.path}, split {source.split!r}"
    data = _open(source)
    wanted = [columns.image, columns.tags, columns.important]
    missing = [name for name in wanted if name is not None and name not in data.column_names]
    if missing:
        raise InputError(
            f"{where}: there is no column {missing[0]!r}; the columns are"
            f" {', '.join(map(repr, data.column_names))}"
        )
    labels = Labels()
    rows = []
    texts = data.select_columns([name for name in wanted[1:] if name is not None])
    for number, cells in enumerate(texts):
        place = f"{where}, row {number}"
        tags = parse_tags(cells[columns.tags], columns.separator, f"{place}, {columns.tags!r}")
        important = None
        if columns.important is not None:
            cell_name = f"{place}, {columns.important!r}"
            important = parse_tags(cells[columns.important], columns.separator, cell_name)
        flags = labels.importance(tags or (), important, place)
        rows.append(HfRow(f"{source.split}-{number:08d}", source, number, tags or (), flags))
    labels.check(where)
    return rows


@lru_cache(maxsize=2)
def _pictures(source: HfSplit, column: str) -> Any:
    """The column of pictures as encoded bytes; opened once in each process."""
    import datasets

    data = _open(source).select_columns([column])
    if isinstance(data.features[column], datasets.Image):
        data = data.cast_column(column, datasets.Image(decode=False))
    return data


def _open(source: HfSplit) -> Any:
    """A split of the data set.

    Raises:
        InputError: it cannot be loaded.
    """
    import datasets  # takes a second; only this source needs it

    try:
        if (Path(source.path) / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(Path(source.path) / source.split))
        if (Path(source.path) / "dataset_info.json").exists():
            return datasets.load_from_disk(source.path)
        return datasets.load_dataset(
            source.path,
            source.config,
            data_files=source.data_files,
            data_dir=source.data_dir,
            split=source.split,
        )
    except Exception as error:  # whatever the hub, a builder or the file system stumbled over
        raise InputError(
            f"data set {source.path}, split {source.split!r}: cannot be loaded:"
            f" {type(error).__name__}: {error}"
        ) from error
