"""Items to predict: samples by number, from a data set or from a table, labelled or not.

An item that cannot be used is a `BadSample` in its place: nothing is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from magneto_dist.data.sample import BadSample, Sample
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources.table import PictureReader, TableColumns, TableRow, read_rows
from magneto_dist.data.stream import Record, SampleReader, load_rows


class Items(Protocol):
    """Picklable, so that loader processes can read them."""

    def __len__(self) -> int: ...

    def read(self, numbers: Sequence[int]) -> list[Sample | BadSample]:
        """These items, in this order.

        Raises:
            InputError: a shard cannot be read.
        """
        ...


@dataclass(frozen=True)
class TableItems:
    """The rows of a table, each with its picture."""

    rows: list[TableRow]
    pictures: PictureReader

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, numbers: Sequence[int]) -> list[Sample | BadSample]:
        """See `Items`."""
        return [self._read(self.rows[number]) for number in numbers]

    def _read(self, row: TableRow) -> Sample | BadSample:
        try:
            return self.pictures(row)
        except BadSample as error:
            return error


@dataclass(frozen=True)
class ShardItems:
    """The samples of one split in their order."""

    dataset: Dataset
    split: str
    with_images: bool

    def __len__(self) -> int:
        return self.dataset.num_samples(self.split)

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


def open_table(table: Path, images: Path | None, columns: TableColumns) -> TableItems:
    """The rows of a .csv, .tsv, .jsonl or .parquet file; paths start from `images`.

    Args:
        table: see `sources/table.py`.
        images: folder of the pictures; None: the one of the table.
        columns: names of the columns; that of important tags is not read.

    Raises:
        InputError: the table cannot be read or lacks a column.
    """
    unlabelled = TableColumns(columns.image, columns.tags, None, None, columns.separator)
    root = (images or table.parent).resolve()
    return TableItems(read_rows(table, unlabelled), PictureReader(root))
