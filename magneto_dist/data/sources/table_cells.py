"""The cells of a table, row by row: CSV, TSV, JSON lines, Parquet.

A row that cannot be read is a reason in its place, and those who read decide what that means: a
data set is not built of such a table, a prediction goes on with the next row.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from magneto_dist.errors import InputError

Cells = dict[str, Any]
Row = tuple[str, Cells | str]
"""Where it stands, and its cells by column or why it has none."""
_MAX_CELL_BYTES = 2**24


def read_cells(
    table: Path, columns: Collection[str | None], optional: Collection[str] = ()
) -> Iterator[Row]:
    """Each row of a table.

    Args:
        table: .csv, .tsv, .jsonl or .parquet, in UTF-8; CSV and TSV begin with column names.
        columns: that are asked for, None for nothing; a row of JSON lines may lack one, then it has
            a reason in its place.
        optional: of these, the ones that may be absent: their cells are None.

    Raises:
        InputError: no such file, another format, broken content, or a column that even the first
            row does not have.
    """
    reader = _READERS.get(table.suffix.lower())
    if reader is None:
        raise InputError(f"table {table}: must be one of {', '.join(_READERS)}")
    wanted = [name for name in columns if name is not None]
    is_first = True
    try:
        for where, cells in reader(table):
            if isinstance(cells, str):
                yield where, cells
                continue
            missing = [name for name in wanted if name not in cells]
            absent = [name for name in missing if name not in optional]
            if absent:
                reason = (
                    f"there is no column {absent[0]!r}; the columns are"
                    f" {', '.join(map(repr, cells))}"
                )
                if is_first:
                    raise InputError(
                        f"{where}: {reason}; name yours with --columns.image, --columns.tags and"
                        " --columns.important (null: no labels), and begin a CSV with a line of"
                        " names"
                    )
                yield where, reason
            else:
                yield where, {**dict.fromkeys(missing), **cells}
            is_first = False
    except OSError as error:
        raise InputError(f"table {table}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"table {table}: is not UTF-8 text ({error}); save it as UTF-8") from None


def _read_delimited(table: Path) -> Iterator[Row]:
    delimiter = "\t" if table.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(_MAX_CELL_BYTES)
    with table.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a BOM
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            try:
                fields = next(reader, None)
            except csv.Error as error:
                yield f"{table}, line {reader.line_num}", str(error)
                continue
            where = f"{table}, line {reader.line_num}"
            if fields is None:
                return
            if header is None:
                header = fields
            elif fields and len(header) == 1 and ";" in header[0]:
                raise InputError(
                    f"{table}: its columns are separated by ';': save it with {delimiter!r}"
                )
            elif fields and len(fields) != len(header):
                yield (
                    where,
                    f"{len(fields)} fields, but {len(header)} columns; a field that holds"
                    f" {delimiter!r} must be in double quotes",
                )
            elif fields:  # a blank line has none
                yield where, dict(zip(header, fields, strict=True))


def _read_json_lines(table: Path) -> Iterator[Row]:
    with table.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            where = f"{table}, line {number}"
            if not line.strip():
                continue
            try:
                cells = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield where, f"is not JSON: {error}"
            else:
                yield where, cells if isinstance(cells, dict) else "is no JSON object"


def _read_parquet(table: Path) -> Iterator[Row]:
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


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}
TABLE_SUFFIXES = tuple(_READERS)
