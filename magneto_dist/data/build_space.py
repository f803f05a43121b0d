"""How large a build becomes: for shards of so many bytes, and for the free disk space.

1. `picture_sizes` asks the source, where it knows the sizes of pictures before it reads them.
2. `require_space_for` checks before the first shard is written.
3. `SpaceLeft` checks after each shard, by what the shards so far have taken: sizes may be unknown,
   pictures may be shrunk, and others may write to the same disk.
4. `clear_full_disk` says what is to be done where the disk has filled up all the same.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from magneto_dist.data.build_folder import FinishedShard, ShardPlan
from magneto_dist.data.parallel import progress_bar
from magneto_dist.errors import InputError
from magneto_dist.files import require_space

Row = TypeVar("Row")
_THREADS, _ROWS = 16, 1000  # that wait where files are far away; rows that each takes at once


def check_shard_megabytes(shard_megabytes: float) -> None:
    """Checks a limit.

    Raises:
        InputError: it is not above 0.
    """
    if not shard_megabytes > 0:
        raise InputError(f"shard_megabytes {shard_megabytes}: must be above 0")


def sizes_unknown(pictures: str) -> InputError:
    """The error where `shard_megabytes` cannot be kept to."""
    return InputError(
        f"{pictures}: sizes of pictures are not known before all are read: use samples_per_shard"
        " instead of shard_megabytes"
    )


def picture_sizes(
    splits: Mapping[str, Sequence[Row]], image_bytes: Callable[[Row], int] | None
) -> dict[str, list[int]]:
    """The size of each row's picture.

    Raises:
        InputError: the source does not know them.
    """
    if image_bytes is None:
        raise sizes_unknown("this source")
    sizes: dict[str, list[int]] = {}
    with (
        progress_bar(sum(map(len, splits.values())), "sizes of pictures") as bar,
        ThreadPoolExecutor(_THREADS) as threads,
    ):
        for split, rows in splits.items():
            sizes[split] = []
            parts = (rows[i : i + _ROWS] for i in range(0, len(rows), _ROWS))
            for part in threads.map(lambda part: [*map(image_bytes, part)], parts):
                sizes[split] += part
                bar.update(len(part))
    return sizes


def require_space_for(
    out: Path, missing: Sequence[ShardPlan], sizes: Mapping[str, Sequence[int]]
) -> None:
    """Checks that the pictures of the missing shards fit.

    Raises:
        InputError: they do not.
    """
    needed = sum(
        sum(sizes[plan.split][plan.first_row : plan.first_row + len(plan.rows)]) for plan in missing
    )
    require_space(out, needed, "the data set")


@dataclass
class SpaceLeft:
    """Whether the rest of a build will fit, by the average of what it has written."""

    out: Path
    rows_left: int
    num_processes: int
    """Each may be at a shard whose bytes are on disk already, but not yet counted."""
    num_shards: int = 0
    num_rows: int = 0
    num_bytes: int = 0

    def add(self, written: FinishedShard) -> None:
        """Counts a shard in.

        Raises:
            InputError: the rest will not fit.
        """
        rows = written.shard.num_samples + len(written.skipped)
        self.num_shards += 1
        self.num_rows += rows
        self.num_bytes += written.shard.num_bytes
        self.rows_left -= rows
        shards_begun = min(self.num_processes, self.num_shards)
        not_begun = self.rows_left - self.num_rows * shards_begun // self.num_shards
        if not_begun > 0:
            require_space(
                self.out,
                self.num_bytes * not_begun // self.num_rows,
                "the rest of the data set, which the same command goes on with,",
            )


@contextlib.contextmanager
def clear_full_disk(out: Path) -> Iterator[None]:
    """Turns the error of a full disk into one clear line.

    Raises:
        InputError: the disk was full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{out}: the disk is full: make room and start the same command again, it goes on where"
            " it stopped"
        ) from None
