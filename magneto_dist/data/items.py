"""Items to predict: samples by number, from a data set, a table or a folder, labelled or not.

An item that cannot be used is a `BadSample` in its place: nothing is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from magneto_dist.data.dataset_file import DATASET_FILE
from magneto_dist.data.item_rows import (
    ItemRow,
    RowsFile,
    folder_rows,
    table_of_folder,
    table_rows,
    write_rows,
)
from magneto_dist.data.network import is_url
from magneto_dist.data.sample import BadSample, Sample, parse_annotation
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources.columns import parse_tags
from magneto_dist.data.sources.picture_files import read_picture
from magneto_dist.data.sources.table import PictureReader, TableColumns, TableRow
from magneto_dist.data.sources.table_cells import TABLE_SUFFIXES
from magneto_dist.data.stream import Record, SampleReader, load_rows
from magneto_dist.errors import InputError


class Items(Protocol):
    """Picklable, so that loader processes can read them."""

    def __len__(self) -> int: ...

    def read(self, numbers: Sequence[int]) -> list[Sample | BadSample]:
        """These items, in this order.

        Raises:
            InputError: a shard cannot be read.
        """
        ...


class StoredItems(Items, Protocol):
    """Items that a later process finds again."""

    @property
    def sha256(self) -> str:
        """Tells these items from others; pictures outside shards may still have changed."""
        ...


@dataclass(frozen=True)
class PictureItems:
    """Pictures that a table names or that lie in a folder; the key is the path."""

    rows: RowsFile
    pictures: PictureReader
    with_images: bool
    separator: str
    """Between the tags of a text file beside a picture; a line break always is."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sha256(self) -> str:
        """See `StoredItems`."""
        given = [self.rows.sha256, str(self.pictures.root), self.separator]
        return hashlib.sha256(json.dumps(given).encode()).hexdigest()

    def read(self, numbers: Sequence[int]) -> list[Sample | BadSample]:
        """See `Items`."""
        return [self._read(self.rows[number]) for number in numbers]

    def _read(self, row: ItemRow) -> Sample | BadSample:
        if row.error is not None:
            return BadSample(row.error, row.path)
        try:
            tags, important = self._labels(row)
            labelled = TableRow(row.path, row.path, tags, important)
            return (
                self.pictures(labelled)
                if self.with_images
                else Sample(row.path, None, *labelled[2:])
            )
        except BadSample as error:
            return BadSample(error.reason, row.path)

    def _labels(self, row: ItemRow) -> tuple[tuple[str, ...], tuple[bool, ...] | None]:
        if row.tags is None:
            return self._labels_beside(row.path)
        if row.important is None:
            return tuple(row.tags), None
        return tuple(row.tags), tuple(tag in row.important for tag in row.tags)

    def _labels_beside(self, picture: str) -> tuple[tuple[str, ...], tuple[bool, ...] | None]:
        """From NAME.json, in the format of a shard's, or else NAME.txt, beside NAME.jpg."""
        path = PurePosixPath(picture)
        text, annotation = path.with_suffix(".txt"), path.with_suffix(".json")
        if (self.pictures.root / annotation).is_file():
            return parse_annotation(read_picture(str(annotation), [self.pictures.root], picture))
        if not (self.pictures.root / text).is_file():
            raise BadSample(
                f"has no tags: neither {text.name} nor {annotation.name} lies beside it"
            )
        try:
            content = read_picture(str(text), [self.pictures.root], picture).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise BadSample(f"{text.name} is not UTF-8 text") from None
        return parse_tags(content.replace("\n", self.separator), self.separator, "") or (), None


@dataclass(frozen=True)
class ShardItems:
    """The samples of one split in their order."""

    dataset: Dataset
    split: str
    with_images: bool

    def __len__(self) -> int:
        return self.dataset.num_samples(self.split)

    @property
    def sha256(self) -> str:
        """See `StoredItems`."""
        shards = [asdict(shard) for shard in self.dataset.shards(self.split)]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()

    def read(self, numbers: Sequence[int]) -> list[Sample | BadSample]:
        """See `Items`."""
        rows = load_rows(
            np.array(numbers, dtype=np.int64),
            self._reader,
            needs_images=self.with_images,
            needs_labels=False,
        )
        items: list[Sample | BadSample] = []
        for row in rows:
            assert row is not None  # only padding is
            items.append(row.sample if isinstance(row, Record) else BadSample(row.reason, row.key))
        return items

    @cached_property
    def _reader(self) -> SampleReader:
        return SampleReader(self.dataset, self.split, with_images=self.with_images)


def open_items(
    source: str,
    scratch: Path,
    *,
    with_images: bool,
    split: str,
    images: Path | None,
    columns: TableColumns,
) -> StoredItems:
    """What there is to predict in `source`.

    Args:
        source: a data set (folder or URL); a .csv, .tsv, .jsonl or .parquet file; a folder of
            pictures with a table metadata.csv (or .tsv, .jsonl, .parquet), or with the tags of
            each NAME.jpg in NAME.txt or NAME.json.
        scratch: folder for the rows of a table, or the names in a folder.
        with_images: whether pictures are needed.
        split: of a data set.
        images: folder that paths in a table start from; None: the one of the table.
        columns: of a table, names and separator.

    Raises:
        InputError: it cannot be read, holds no items, or has no pictures though they are needed.
    """
    path = Path(source)
    items: StoredItems
    if not is_url(source) and path.suffix.lower() in TABLE_SUFFIXES and not path.is_dir():
        items = _open_table(path, scratch, images, columns, with_images)
    elif not is_url(source) and path.is_dir() and not (path / DATASET_FILE).exists():
        items = _open_folder(path, scratch, images, columns, with_images)
    else:
        dataset = Dataset.open(source)
        if with_images and not dataset.has_images:
            raise InputError(f"{source}: has no pictures, which the model looks at")
        items = ShardItems(dataset, split, with_images)
    if len(items) == 0:
        raise InputError(f"{source}: holds no items")
    return items


def _open_table(
    table: Path, scratch: Path, images: Path | None, columns: TableColumns, with_images: bool
) -> PictureItems:
    rows = RowsFile(write_rows(table_rows(table, columns), scratch))
    reader = PictureReader((images or table.parent).resolve())
    return PictureItems(rows, reader, with_images, columns.separator)


def _open_folder(
    folder: Path, scratch: Path, images: Path | None, columns: TableColumns, with_images: bool
) -> PictureItems:
    if table := table_of_folder(folder):
        return _open_table(table, scratch, images, columns, with_images)
    rows = RowsFile(write_rows(folder_rows(folder), scratch))
    if len(rows) == 0:
        raise InputError(
            f"{folder}: no data set there (dataset.json), no table (metadata.csv) and no pictures"
        )
    return PictureItems(rows, PictureReader(folder.resolve()), with_images, columns.separator)
