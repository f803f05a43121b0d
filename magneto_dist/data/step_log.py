"""Logs of a run: one JSON object a line, each with the global step it belongs to.

1. `append` and `extend` hand lines to the operating system; steps never go down.
2. `flush` waits until they are on disk: before a checkpoint is marked complete.
3. `cut_back` drops what came after the checkpoint from which a run goes on.

A kill may leave half a line at the end of a file. Everything that reads one drops it.
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from magneto_dist.errors import InputError


class StepLog:
    """A JSONL file with one writer, made where it is absent; goes on after its last whole line.

    Args:
        path: the file; its folder is made too.

    Raises:
        InputError: the file cannot be made or written, e.g. because the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            self._truncate(_end_of_last_line)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Adds one line; `entry` has a "step" not below that of the line before."""
        self.extend([entry])

    def extend(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Adds a line for each entry."""
        lines = "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in entries)
        unwritten = lines.encode()
        with _named(self.path):
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) :]

    def flush(self) -> None:
        """Waits until all lines are on disk."""
        with _named(self.path):
            os.fsync(self._file.fileno())

    def cut_back(self, step: int, *, evaluated: bool = True) -> None:
        """Keeps the entries up to and including a global step, and drops all later ones.

        Without `evaluated` it drops those of the evaluation after `step`, too: it will come again.
        The file only becomes shorter, so that a kill at any moment leaves the old or the new one.
        """
        with _named(self.path):
            self._truncate(lambda file, size: _end_of_step(file, size, (step, evaluated)))

    def entries_from(self, step: int) -> list[dict[str, Any]]:
        """The entries of a global step and all later ones; every line is whole."""
        with self.path.open("rb") as file:
            _end_of_step(file, file.seek(0, os.SEEK_END), (step - 1, True))
            return [json.loads(line) for line in file]

    def close(self) -> None:
        """Ends writing."""
        self._file.close()

    def _truncate(self, find_end: Callable[[IO[bytes], int], int]) -> None:
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            end = find_end(file, size)
        if end < size:
            self._file.truncate(end)
            os.fsync(self._file.fileno())


def cut_back_all(folder: Path, step: int, *, evaluated: bool = True) -> None:
    """Cuts all logs in `folder` back to a global step, as one process before any other writes.

    A run that goes on with fewer ranks also has files of ranks that it no longer has.
    """
    for path in sorted(folder.glob("*.jsonl")):
        log = StepLog(path)
        log.cut_back(step, evaluated=evaluated)
        log.close()


def read_entries(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The whole lines from `offset` on, and the offset after them."""
    with path.open("rb") as file:
        file.seek(offset)
        content, _, _ = file.read().rpartition(b"\n")
    entries = [json.loads(line) for line in content.splitlines()]
    return entries, offset + len(content) + bool(content)


def _end_of_last_line(file: IO[bytes], size: int, block_bytes: int = 1 << 16) -> int:
    for start in range(size - block_bytes, -block_bytes, -block_bytes):
        file.seek(max(start, 0))
        newline = file.read(min(block_bytes, block_bytes + start)).rfind(b"\n")
        if newline >= 0:
            return max(start, 0) + newline + 1
    return 0


def _end_of_step(file: IO[bytes], size: int, last: tuple[float, bool]) -> int:
    """Where the first entry after `last` begins, and the file is left; bisects, for a ledger may
    hold 1e9 lines."""
    offset = bisect_right(range(size), last, key=lambda offset: _step_from(file, offset))
    _seek_line(file, offset)
    return file.tell()


def _step_from(file: IO[bytes], offset: int) -> tuple[float, bool]:
    """Step of the first line that begins at or after `offset`, and whether an evaluation wrote it.

    Infinite past the last one. A step's evaluation comes after the step.
    """
    _seek_line(file, offset)
    line = file.readline()
    try:
        entry = json.loads(line)
        return entry["step"], entry.get("split") == "validation"
    except ValueError:  # the end, or what a crash of the machine left there
        return math.inf, False


def _seek_line(file: IO[bytes], offset: int) -> None:
    file.seek(max(offset - 1, 0))
    if offset > 0:
        file.readline()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
