"""A table of pictures and their tags (CSV, TSV, JSON lines, Parquet) becomes a data set.

1. `_read` yields the cells of each row, and checks that the columns exist.
2. `_table_rows` makes rows of paths, tags and labels; nothing is read from pictures yet.
3. `unique_keys` names the samples after their pictures; `_split_of` decides what is validated on.
4. `PictureReader` reads one picture, in one of the writer's processes.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from magneto_dist.data.build_space import sizes_unknown
from magneto_dist.data.network import fetch, is_url
from magneto_dist.data.sample import BadSample, Sample
from magneto_dist.data.shrink import NO_SHRINK, Shrink
from magneto_dist.data.sources.columns import (
    VALIDATION_NAMES,
    Labels,
    check_fraction,
    is_validation,
    parse_tags,
    unique_keys,
    vocabulary_of,
)
from magneto_dist.data.sources.picture_files import picture_bytes, read_picture
from magneto_dist.data.writer import WriteReport, write_dataset
from magneto_dist.errors import InputError

Cells = dict[str, Any]
_MAX_CELL_BYTES = 2**24
_MAX_PICTURE_BYTES = 2**28
_FETCH_ATTEMPTS = 3  # dead links are common, and each would hold up the others
_FETCH_THREADS = 16


@dataclass(frozen=True)
class TableColumns:
    """Where things are in the table."""

    image: str = "file_name"
    """Column of the pictures' paths or URLs (http, https, s3, gs)."""
    tags: str = "tags"
    """Column of the tags: a list (JSON lines, Parquet) or a string with separators."""
    important: str | None = "important_tags"
    """Column of the important tags, as `tags`; an empty or absent cell: this row is unlabelled, an
    empty list: it has no important tag. None: no row is labelled."""
    split: str | None = None
    """Column that says train or validation (also: val, valid). None: split by hash."""
    separator: str = ","
    """Between the tags of a string."""


class TableRow(NamedTuple):
    """One sample before its picture is read."""

    key: str
    path: str
    """Or URL, as in the table."""
    tags: tuple[str, ...]
    important: tuple[bool, ...] | None


def build(
    out: Path,
    table: Path,
    images: Path | None = None,
    *,
    columns: TableColumns = TableColumns(),
    validation_fraction: float = 0.1,
    vocabulary: Path | None = None,
    samples_per_shard: int = 2048,
    shard_megabytes: float | None = None,
    shrink: Shrink = NO_SHRINK,
    max_skipped_fraction: float = 0.05,
    num_processes: int = 1,
) -> WriteReport:
    """Writes the pictures that `table` names to the folder `out`.

    A picture that is missing or broken, or lies outside `images`, is skipped with a reason.

    Args:
        out: folder; made if absent.
        table: .csv, .tsv, .jsonl or .parquet, in UTF-8; CSV and TSV begin with column names.
        images: folder that paths in the table start from; None: the one of the table.
        columns: names of the columns.
        validation_fraction: share of validation rows, by hash of the picture's path; not used
            where `columns.split` is given.
        vocabulary: file with one tag a line; None: all tags by falling frequency, ties by name.
        samples_per_shard: rows per shard, at most.
        shard_megabytes: of pictures per shard (1e6 bytes), at most, by their sizes before
            shrinking; a larger picture has a shard of its own. None: no such limit. Not for URLs.
        shrink: makes large pictures smaller.
        max_skipped_fraction: bad rows, as a fraction of all, above which it fails; raise it for
            URLs, of which many are dead after some years.
        num_processes: that read pictures and write shards.

    Raises:
        InputError: the table cannot be read, lacks a column, or has important tags that are not
            among the tags; the pictures do not fit on the disk, where their sizes are known; or as
            for `write_dataset`.
    """
    check_fraction(validation_fraction)
    rows, split_names = _table_rows(table, columns)
    splits: dict[str, list[TableRow]] = {"train": [], "validation": []}
    for row, name in zip(rows, split_names, strict=True):
        splits[name or _split_of(row.path, validation_fraction)].append(row)
    reader = PictureReader((images or table.parent).resolve())
    return write_dataset(
        out,
        splits,
        reader,
        vocabulary_of((row.tags for row in rows), vocabulary),
        samples_per_shard=samples_per_shard,
        shard_megabytes=shard_megabytes,
        image_bytes=reader.image_bytes,
        shrink=shrink,
        max_skipped_fraction=max_skipped_fraction,
        load_threads=_FETCH_THREADS if any(is_url(row.path) for row in rows) else 1,
        num_processes=num_processes,
        source={"builder": "table", "table": table.name},
    )


def read_rows(table: Path, columns: TableColumns) -> list[TableRow]:
    """All rows of a table, of whatever split; nothing is read from pictures yet.

    Raises:
        InputError: as for `build`.
    """
    return _table_rows(table, columns)[0]


@dataclass(frozen=True)
class PictureReader:
    """Makes a sample of a row."""

    root: Path
    """Folder that every picture lies in; absolute, without links."""

    def __call__(self, row: TableRow) -> Sample:
        """Reads the picture of a row, or fetches it.

        Raises:
            BadSample: it is not there, or not inside the folder.
        """
        if is_url(row.path):
            try:
                image = fetch(row.path, _MAX_PICTURE_BYTES, _FETCH_ATTEMPTS)
            except (OSError, InputError) as error:
                raise BadSample(f"picture cannot be fetched: {error}", row.key) from None
            return Sample(row.key, image, row.tags, row.important)
        image = read_picture(row.path, [self.root], row.key)
        return Sample(row.key, image, row.tags, row.important)

    def image_bytes(self, row: TableRow) -> int:
        """The size of the picture of a row; 0: it cannot be read.

        Raises:
            InputError: it has to be fetched.
        """
        if is_url(row.path):
            raise sizes_unknown(f"picture {row.path}")
        return picture_bytes(row.path, [self.root])


def _split_of(path: str, validation_fraction: float) -> str:
    # By path and not by key: a picture that is listed twice is on one side only.
    return "validation" if is_validation(path, validation_fraction) else "train"


def _table_rows(table: Path, columns: TableColumns) -> tuple[list[TableRow], list[str | None]]:
    """All rows, and the split that each names (None: by hash)."""
    paths: list[str] = []
    split_names: list[str | None] = []
    annotations: list[tuple[tuple[str, ...], tuple[bool, ...] | None]] = []
    labels = Labels()
    for where, cells in _read(table, columns):
        path = cells[columns.image]
        if not isinstance(path, str) or not path:
            raise InputError(f"{where}, column {columns.image!r}: has no path of a picture")
        tags = parse_tags(cells[columns.tags], columns.separator, f"{where}, {columns.tags!r}")
        # The same few tags in millions of rows: one string each.
        tags = tuple(map(sys.intern, tags or ()))
        important = None
        if columns.important is not None and cells[columns.important] != "":
            cell_name = f"{where}, {columns.important!r}"
            important = parse_tags(cells[columns.important], columns.separator, cell_name)
        annotations.append((tags, labels.importance(tags, important, where)))
        split_names.append(None if columns.split is None else _named_split(cells, columns, where))
        paths.append(path)
    labels.check(str(table))
    keys = unique_keys(paths)
    rows = [
        TableRow(key, path, tags, important)
        for key, path, (tags, important) in zip(keys, paths, annotations, strict=True)
    ]
    return rows, split_names


def _named_split(cells: Cells, columns: TableColumns, where: str) -> str:
    name = cells[columns.split or ""]
    if name in VALIDATION_NAMES:
        return "validation"
    if name != "train":
        allowed = ", ".join(("train", *VALIDATION_NAMES))
        raise InputError(f"{where}, column {columns.split!r}: {name!r} is none of {allowed}")
    return "train"


# Formats ----------------------------------------------------------------------------------------


def _read(table: Path, columns: TableColumns) -> Iterator[tuple[str, Cells]]:
    """(where it stands, cells) of each row.

    Raises:
        InputError: no such file, another format, broken content, or a column that is not there.
    """
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Cells]]]] = {
        ".csv": _read_delimited,
        ".tsv": _read_delimited,
        ".jsonl": _read_json_lines,
        ".parquet": _read_parquet,
    }
    reader = readers.get(table.suffix.lower())
    if reader is None:
        raise InputError(f"table {table}: must be one of {', '.join(readers)}")
    wanted = [columns.image, columns.tags, columns.important, columns.split]
    optional = {columns.important} if table.suffix.lower() == ".jsonl" else set()
    try:
        for where, cells in reader(table):
            missing = [name for name in wanted if name is not None and name not in cells]
            if set(missing) - optional:
                raise InputError(
                    f"{where}: there is no column {missing[0]!r}; the columns are"
                    f" {', '.join(map(repr, cells))}; name yours with --columns.image,"
                    " --columns.tags and --columns.important (null: no labels), and begin a CSV"
                    " with a line of names"
                )
            yield where, {**dict.fromkeys(missing), **cells}
    except OSError as error:
        raise InputError(f"table {table}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"table {table}: is not UTF-8 text ({error}); save it as UTF-8") from None


def _read_delimited(table: Path) -> Iterator[tuple[str, Cells]]:
    delimiter = "\t" if table.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(_MAX_CELL_BYTES)
    with table.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a BOM
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            for fields in reader:
                where = f"{table}, line {reader.line_num}"
                if fields and len(header) == 1 and ";" in header[0]:
                    raise InputError(
                        f"{table}: its columns are separated by ';': save it with {delimiter!r}"
                    )
                if fields and len(fields) != len(header):
                    raise InputError(
                        f"{where}: {len(fields)} fields, but {len(header)} columns; a field that"
                        f" holds {delimiter!r} must be in double quotes"
                    )
                if fields:  # a blank line has none
                    yield where, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise InputError(f"{table}, line {reader.line_num}: {error}") from None


def _read_json_lines(table: Path) -> Iterator[tuple[str, Cells]]:
    with table.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            where = f"{table}, line {number}"
            if not line.strip():
                continue
            try:
                cells = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where}: is not JSON: {error}") from None
            if not isinstance(cells, dict):
                raise InputError(f"{where}: is no JSON object")
            yield where, cells


def _read_parquet(table: Path) -> Iterator[tuple[str, Cells]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(table) as file:
            number = 0
            for batch in file.iter_batches():
                for cells in batch.to_pylist():
                    number += 1
                    yield f"{table}, row {number}", cells
    except pyarrow.ArrowException as error:
        raise InputError(f"table {table}: is no Parquet file: {error}") from None
