"""Cells of a data set of the `datasets` library, by row or one after the other.

A streamed data set is a sequence of files; those of Parquet are sequences of row groups. It can be
opened at the start of each group. So a row is (file, group, number): to read it, everything before
it in its group is read and dropped, but no other group. A file of another format is one group, and
so is a data set that lies on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from pyarrow.compute import call_function

from magneto_dist.data.network import ATTEMPTS, fetch, retried
from magneto_dist.data.sample import BadSample
from magneto_dist.data.sources.picture_files import find_picture, read_picture
from magneto_dist.errors import InputError

_ARCHIVES = ("zip://", "tar://")
_MAX_PICTURE_BYTES = 2**28
_ROWS_AT_ONCE = 1000


class Place(NamedTuple):
    """Where a row is."""

    file: int
    group: int
    """In the file, from 0."""
    number: int
    """In the group, from 0."""


class Cells:
    """The cells of one column; quick where rows are asked for in order."""

    def __init__(self, data: Any, column: str, where: str, is_streamed: bool) -> None:
        self._data = data
        self._column = column
        self._where = where
        self._is_streamed = is_streamed
        self._file, self._groups = -1, data
        self._next = Place(-1, 0, 0)
        self._rows: Iterator[dict[str, Any]] = iter(())

    def __getitem__(self, place: Place) -> Any:
        if not self._is_streamed:
            return self._data[place.number][self._column]
        try:
            if place[:2] != self._next[:2] or place.number < self._next.number:
                self._open(place)
            row = next(islice(self._rows, place.number - self._next.number, None), None)
        except Exception as error:
            raise _unreadable(self._where, error) from error
        self._next = place._replace(number=place.number + 1)
        if row is None:
            raise InputError(f"{self._where}: has fewer rows than it had when its tags were read")
        return row[self._column]

    def sizes(self) -> Iterator[tuple[int, str | None]]:
        """The bytes of each picture of a data set on disk, or the path where it lies."""
        for batch in self._data.with_format("arrow").iter(_ROWS_AT_ONCE):
            for cells in batch[self._column].chunks:
                yield from _sizes(cells)

    def _open(self, place: Place) -> None:
        """Goes to a place."""
        self._rows = iter(())  # before the next is opened: each holds tens of megabytes
        if place.file != self._file:
            self._file, self._groups = place.file, _groups(self._data, place.file)
        group = self._groups.shard(self._groups.num_shards, place.group)
        self._rows = iter(group.skip(place.number))
        self._next = place


def _sizes(cells: pyarrow.Array) -> Iterator[tuple[int, str | None]]:
    """See `Cells.sizes`; contents are not looked at, so they are not even read from disk."""
    contents = names = None
    if pyarrow.types.is_struct(cells.type):  # the type Image
        fields = dict(zip((field.name for field in cells.type), cells.flatten(), strict=True))
        contents, names = fields.get("bytes"), fields.get("path")
    elif pyarrow.types.is_binary(cells.type) or pyarrow.types.is_large_binary(cells.type):
        contents = cells
    else:
        names = cells
    nothing = [None] * len(cells)
    lengths = nothing if contents is None else call_function("binary_length", [contents])
    for length, name in zip(lengths, nothing if names is None else names, strict=True):
        num_bytes = None if length is None else length.as_py()
        path = None if name is None or num_bytes is not None else name.as_py()
        yield num_bytes or 0, path if isinstance(path, str) else None


def all_rows(data: Any, where: str, is_streamed: bool) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Every row with its place.

    Raises:
        InputError: reading failed.
    """
    try:
        if not is_streamed:
            yield from ((Place(0, 0, number), cells) for number, cells in enumerate(data))
            return
        for file in range(data.num_shards):
            groups = _groups(data, file)
            for group in range(groups.num_shards):
                rows = groups.shard(groups.num_shards, group)
                for number, cells in enumerate(rows):
                    yield Place(file, group, number), cells
    except Exception as error:
        raise _unreadable(where, error) from error


def _groups(data: Any, file: int) -> Any:
    """A file, cut as finely as the library can."""
    part = data.shard(data.num_shards, file)
    # Versions of the library before 5 lack this or leave a file whole. Then all is as before,
    # but for memory: of a Parquet file that is opened as one, Arrow reads the rest ahead.
    return part.reshard() if hasattr(part, "reshard") else part


def read_named(name: str, folders: Sequence[Path], urls: tuple[str, ...], key: str) -> bytes:
    """The content of a picture that a data set names by path or URL.

    Args:
        name: perhaps of a member of an archive: `zip://MEMBER::PATH`.
        folders: that the picture or archive may lie in; see `picture_files.py`.
        urls: what its URL must begin with if it has one.
        key: of its sample, for the message.

    Raises:
        BadSample: it lies elsewhere, or cannot be read.
    """
    *archives, file = name.split("::") if name.startswith(_ARCHIVES) else [name]
    if not all(hop.startswith(_ARCHIVES) for hop in archives):
        raise BadSample(f"picture {name!r} lies in something else than a zip or tar", key)
    if "://" not in file:
        if not archives:
            return read_picture(file, folders, key)
        file = str(find_picture(file, folders, key))
    elif not file.startswith(urls) or ".." in file.split("/"):
        raise BadSample(f"picture {name!r} lies outside the data set", key)
    try:
        if archives:
            url = "::".join([*archives, file])
            return retried(url, lambda: _read_member(url), ATTEMPTS)
        return fetch(file, _MAX_PICTURE_BYTES, ATTEMPTS)
    except (OSError, InputError) as error:
        raise BadSample(f"picture cannot be read: {error}", key) from None


def _read_member(url: str) -> bytes:
    import fsspec  # here, as in network.py

    with fsspec.open(url, "rb") as file:
        content = file.read(_MAX_PICTURE_BYTES + 1)  # pyright: ignore[reportAttributeAccessIssue]
    if len(content) > _MAX_PICTURE_BYTES:
        raise PermissionError(f"has more than {_MAX_PICTURE_BYTES} bytes")
    return content


def _unreadable(where: str, error: Exception) -> InputError:
    # The library asks again by itself where the network fails; this is what remained.
    reason = " ".join(str(error).split())  # in one line
    return InputError(
        f"{where}: cannot be read: {type(error).__name__}: {reason}; the same command goes on where"
        " it stopped"
    )
