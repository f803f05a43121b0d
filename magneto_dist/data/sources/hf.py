"""Any data set of the `datasets` library becomes a data set of ours.

1. `hf_split.py` opens a split: of the hub, of local files, or of a folder of `save_to_disk`.
2. `_rows` reads the columns of tags, and keeps them in memory: the vocabulary and the split need
   all of them before the first shard. Pictures stay where they are and are not decoded.
3. `PictureReader` reads one picture, encoded as it is, in one of the writer's processes; each opens
   the data set for itself, for a row is only a number.

Streamed, the data set is read like this twice, and never kept; see `build` for what it costs.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from magneto_dist.data.build_space import sizes_unknown
from magneto_dist.data.parallel import progress_bar
from magneto_dist.data.sample import BadSample, Sample
from magneto_dist.data.shrink import NO_SHRINK, Shrink
from magneto_dist.data.sources.columns import (
    Labels,
    check_fraction,
    is_validation,
    parse_tags,
    vocabulary_of,
)
from magneto_dist.data.sources.hf_cells import Cells, Place, all_rows, read_named
from magneto_dist.data.sources.hf_split import (
    HfSplit,
    cache_folders,
    encoded,
    is_saved,
    num_rows,
    open_split,
    own_folders,
    own_urls,
    select,
)
from magneto_dist.data.sources.picture_files import picture_bytes
from magneto_dist.data.writer import WriteReport, write_dataset
from magneto_dist.errors import InputError

_SIZES_LOCK = threading.Lock()


@dataclass(frozen=True)
class HfColumns:
    """Where things are."""

    image: str = "image"
    """Column of pictures: of the type Image, of encoded bytes, or of paths."""
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
    """Row in it (streamed: in its group), from 0."""
    tags: tuple[str, ...]
    important: tuple[bool, ...] | None
    file: int = 0
    group: int = 0
    """Of a streamed split; see `hf_cells.py`."""


def build(
    out: Path,
    path: str,
    *,
    config: str | None = None,
    data_files: str | None = None,
    data_dir: str | None = None,
    images: Path | None = None,
    streaming: bool = False,
    train_split: str = "train",
    validation_split: str | None = None,
    validation_fraction: float = 0.1,
    columns: HfColumns = HfColumns(),
    vocabulary: Path | None = None,
    samples_per_shard: int = 2048,
    shard_megabytes: float | None = None,
    shrink: Shrink = NO_SHRINK,
    max_skipped_fraction: float = 0.05,
    num_processes: int = 1,
) -> WriteReport:
    """Writes splits of a data set of the `datasets` library to the folder `out`.

    With `streaming`, no picture is kept but in the shards. A first pass reads the columns of tags
    alone (of Parquet nothing else is fetched, of other formats whole rows are), a second one the
    pictures. Each shard begins to read at the row group of Parquet, or else at the file, that its
    first row is in, and drops what comes before; a process that goes on to the next shard goes on
    reading where it is. So pictures are read about once for each split that is made of them (twice
    where validation rows are chosen by hash), and once more for each further process where there
    is but one group. To go on after a kill costs the first pass again, and in the second one the
    rows of one group up to the first that is missing; shards that are finished are not read again.
    A process holds one group of Parquet in memory, in bytes as they are stored.

    Args:
        out: folder; made if absent.
        path: as for `datasets.load_dataset`; or a folder written by `save_to_disk`.
        config: name of the configuration, where there are several.
        data_files: for a builder such as "parquet": a path or a pattern.
        data_dir: for a builder such as "imagefolder": a folder.
        images: folder that pictures may lie in if rows name them by path; None: only where the
            data set itself lies. A picture anywhere else is skipped with a reason.
        streaming: read without a copy of the data set in memory or in the cache of `datasets`; a
            folder of `save_to_disk` never needs one.
        train_split: its name there.
        validation_split: its name there; None: rows of the train split, by hash of their number.
        validation_fraction: share of rows that are validated on if there is no `validation_split`.
        columns: names of the columns.
        vocabulary: file with one tag a line; None: all tags by falling frequency, ties by name.
        samples_per_shard: rows per shard, at most.
        shard_megabytes: of pictures per shard (1e6 bytes), at most, by their sizes before
            shrinking; a larger picture has a shard of its own. None: no such limit. Not with
            `streaming`.
        shrink: makes large pictures smaller.
        max_skipped_fraction: bad rows, as a fraction of all, above which it fails.
        num_processes: that read pictures and write shards.

    Raises:
        InputError: the data set cannot be loaded, lacks a column, or has important tags that are
            not among the tags; or as for `write_dataset`.
    """
    check_fraction(validation_fraction)
    if shard_megabytes is not None and streaming:
        raise sizes_unknown(f"data set {path}, streamed")
    source = HfSplit(
        path,
        train_split,
        config,
        data_files,
        data_dir,
        images=None if images is None else str(images),
        streaming=streaming and not is_saved(path),
    )
    splits = {"train": _rows(source, columns)}
    if validation_split is not None:
        splits["validation"] = _rows(replace(source, split=validation_split), columns)
    else:
        train, validation = [], []
        for row in splits["train"]:
            chosen = validation if is_validation(row.key, validation_fraction) else train
            chosen.append(row)
        splits = {"train": train, "validation": validation}
    tags = (row.tags for rows in splits.values() for row in rows)
    reader = PictureReader(columns.image)
    return write_dataset(
        out,
        splits,
        reader,
        vocabulary_of(tags, vocabulary),
        samples_per_shard=samples_per_shard,
        shard_megabytes=shard_megabytes,
        image_bytes=None if source.streaming else reader.image_bytes,
        shrink=shrink,
        max_skipped_fraction=max_skipped_fraction,
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
        pictures = _pictures(row.source, self.column)
        cell = pictures.cells[Place(row.file, row.group, row.number)]
        if isinstance(cell, dict):  # the type Image: bytes, or a path where they lie
            cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
        if isinstance(cell, str):
            cell = read_named(cell, pictures.folders, pictures.urls, row.key)
        if not isinstance(cell, bytes):
            raise BadSample(f"column {self.column!r} has no picture", row.key)
        return Sample(row.key, cell, row.tags, row.important)

    def image_bytes(self, row: HfRow) -> int:
        """The size of the picture of a row of a data set on disk; 0: it cannot be read.

        Raises:
            InputError: it lies in an archive.
        """
        with _SIZES_LOCK:  # else each thread would look for itself, first
            return _sizes(row.source, self.column)[row.number]


def _rows(source: HfSplit, columns: HfColumns) -> list[HfRow]:
    data = open_split(source)
    # Some formats have no list of columns but that of their first row.
    names = data.column_names or list(next(iter(data), {}))
    wanted = [columns.image, columns.tags, columns.important]
    missing = [name for name in wanted if name is not None and name not in names]
    if missing:
        raise InputError(
            f"{source.where}: there is no column {missing[0]!r}; the columns are"
            f" {', '.join(map(repr, names))}; name yours with --columns.image, --columns.tags and"
            " --columns.important"
        )
    texts = select(source, data, [name for name in wanted[1:] if name is not None])
    labels = Labels()
    rows = []
    with progress_bar(num_rows(source, data), f"reading tags of {source.split}") as bar:
        for place, cells in all_rows(texts, source.where, source.streaming):
            tags, flags = _annotation(cells, columns, f"{source.where}, row {len(rows)}", labels)
            key = f"{source.split}-{len(rows):08d}"
            rows.append(HfRow(key, source, place.number, tags, flags, place.file, place.group))
            bar.update()
    labels.check(source.where)
    return rows


def _annotation(
    cells: dict[str, Any], columns: HfColumns, where: str, labels: Labels
) -> tuple[tuple[str, ...], tuple[bool, ...] | None]:
    """The tags of a row, and which are important."""
    tags = parse_tags(cells[columns.tags], columns.separator, f"{where}, {columns.tags!r}")
    # The same few tags in millions of rows: one string each.
    tags = tuple(map(sys.intern, tags or ()))
    important = None
    if columns.important is not None:
        cell_name = f"{where}, {columns.important!r}"
        important = parse_tags(cells[columns.important], columns.separator, cell_name)
    return tags, labels.importance(tags, important, where)


class _Pictures(NamedTuple):
    """The column of pictures, and where those may lie that it names by path."""

    cells: Cells
    """Encoded bytes, or paths."""
    folders: list[Path]
    urls: tuple[str, ...]
    """What URLs must begin with."""


@lru_cache(maxsize=2)
def _pictures(source: HfSplit, column: str) -> _Pictures:
    """Opened once in each process."""
    data, is_image = encoded(select(source, open_split(source), [column]), column)
    folders = own_folders(source)
    if is_image:  # such a path may be one that `datasets` made, of a file that it has downloaded
        folders += cache_folders()
    cells = Cells(data, column, source.where, source.streaming)
    return _Pictures(cells, [Path(folder).resolve() for folder in folders], own_urls(source))


@lru_cache(maxsize=2)
def _sizes(source: HfSplit, column: str) -> list[int]:
    """Of all pictures of a split on disk, of which nothing is read but where they begin and end."""
    pictures = _pictures(source, column)
    sizes = []
    for size, name in pictures.cells.sizes():
        if name is not None and "://" in name:
            raise sizes_unknown(f"picture {name}")
        sizes.append(size if name is None else picture_bytes(name, pictures.folders))
    return sizes
