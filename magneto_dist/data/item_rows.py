"""Items on disk before their pictures are read: a table or a folder of pictures, row by row.

1. `table_rows` and `folder_rows` yield rows; one that cannot be used says why, and is a row.
2. `write_rows` puts them into an Arrow file. So millions of rows take no memory, and loader
   processes are handed a path.
3. `RowsFile` gives any row by its number.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from magneto_dist.data.image_bytes import IMAGE_KINDS
from magneto_dist.data.sources.columns import parse_tags
from magneto_dist.data.sources.table import TableColumns
from magneto_dist.data.sources.table_cells import TABLE_SUFFIXES, Cells, read_cells
from magneto_dist.errors import InputError

_ROWS_AT_ONCE = 1024
_PICTURES = tuple(f".{kind}" for kind in (*IMAGE_KINDS, "jpeg"))
_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("important", pa.list_(pa.string())),
        ("error", pa.string()),
    ]
)


class ItemRow(NamedTuple):
    """One item before its picture is read."""

    path: str
    """Of its picture, from its folder, or a URL; where it stands in the table if it has none."""
    tags: list[str] | None
    """None: they are in a file beside the picture."""
    important: list[str] | None
    """The ones that are known to be important; None: not known."""
    error: str | None
    """Why it cannot be used."""


def table_rows(table: Path, columns: TableColumns) -> Iterator[ItemRow]:
    """The rows of a .csv, .tsv, .jsonl or .parquet file, in its order.

    Args:
        table: see `read_cells`.
        columns: names of the columns; that of important tags need not be there.

    Raises:
        InputError: the table cannot be read or lacks a column.
    """
    optional = {columns.important} if columns.important else set()
    wanted = [columns.image, columns.tags, columns.important]
    for where, cells in read_cells(table, wanted, optional):
        yield _table_row(where, cells, columns)


def folder_rows(folder: Path) -> Iterator[ItemRow]:
    """The pictures in a folder and its subfolders by name; hidden ones and links are left out.

    Raises:
        InputError: a folder cannot be read.
    """
    try:
        names = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from None
    for entry in names:
        if entry.name.startswith(".") or entry.is_symlink():
            continue
        if entry.is_dir():
            for row in folder_rows(Path(entry.path)):
                path, error = f"{_unicode(entry.name)}/{row.path}", _not_unicode(entry.name)
                yield row._replace(path=path, error=row.error or error)
        elif entry.name.lower().endswith(_PICTURES):
            yield ItemRow(_unicode(entry.name), None, None, _not_unicode(entry.name))


def table_of_folder(folder: Path) -> Path | None:
    """metadata.csv, .tsv, .jsonl or .parquet in a folder of pictures: it speaks for them all."""
    candidates = (folder / f"metadata{suffix}" for suffix in TABLE_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def write_rows(rows: Iterable[ItemRow], folder: Path) -> Path:
    """Writes rows to a file in `folder`, named after its content: equal rows, the same file.

    Any number of processes may do that at once.
    """
    temporary = folder / f".rows.{secrets.token_hex(4)}.tmp"
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            remaining = iter(rows)
            while some := list(islice(remaining, _ROWS_AT_ONCE)):
                columns = zip(*some, strict=True)
                arrays = [
                    pa.array(column, field.type)
                    for column, field in zip(columns, _SCHEMA, strict=True)
                ]
                writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
        with temporary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        path = folder / f"rows-{digest}.arrow"
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


class RowsFile:
    """Rows by number; picklable, for all but the rows read last stays on disk.

    Args:
        path: as `write_rows` gives it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first, self._read = 0, pa.RecordBatch.from_pylist([], _SCHEMA)

    def __len__(self) -> int:
        with pa.OSFile(str(self._path)) as file, pa.ipc.open_file(file) as reader:
            whole = reader.num_record_batches - 1
            last = reader.get_batch(whole).num_rows if whole >= 0 else 0
            return max(whole, 0) * _ROWS_AT_ONCE + last

    def __getitem__(self, number: int) -> ItemRow:
        if not 0 <= number - self._first < self._read.num_rows:
            batch = number // _ROWS_AT_ONCE
            # Not mapped into memory, of which all that was read would then seem to be in use.
            with pa.OSFile(str(self._path)) as file, pa.ipc.open_file(file) as reader:
                self._first, self._read = batch * _ROWS_AT_ONCE, reader.get_batch(batch)
        (cells,) = self._read.slice(number - self._first, 1).to_pylist()
        return ItemRow(**cells)

    @property
    def sha256(self) -> str:
        """Of all rows."""
        return self._path.stem.removeprefix("rows-")

    def __reduce__(self) -> tuple[type[RowsFile], tuple[Path]]:
        return RowsFile, (self._path,)


def _table_row(where: str, cells: Cells | str, columns: TableColumns) -> ItemRow:
    if isinstance(cells, str):
        return ItemRow(_unicode(where), [], None, _unicode(cells))
    path = cells[columns.image]
    if not isinstance(path, str) or not path:
        reason = f"column {columns.image!r} has no path of a picture"
        return ItemRow(_unicode(where), [], None, reason)
    try:
        tags = parse_tags(cells[columns.tags], columns.separator, f"column {columns.tags!r}") or ()
    except InputError as error:
        return ItemRow(_unicode(path), [], None, _unicode(str(error)))
    important = None
    # What is known beside serves to be looked at: where it makes no sense it is not known.
    if columns.important is not None and cells[columns.important] != "":
        with suppress(InputError):
            important = parse_tags(cells[columns.important], columns.separator, "")
    for text in (path, *tags):
        if error := _not_unicode(text):
            return ItemRow(_unicode(path), [], None, error)
    known = None if important is None else [_unicode(tag) for tag in important]
    return ItemRow(path, list(tags), known, None)


def _unicode(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _not_unicode(text: str) -> str | None:
    """JSON may hold half of a surrogate pair, and a file name any bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{_unicode(text)!r} is not Unicode text"
    return None
