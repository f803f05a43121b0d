"""What all bounded caches on this machine's disk share: locks, and room for what is new.

What has been unused for longest goes first. Locks are the kernel's: one that is held by a process
that dies is free.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Kept(NamedTuple):
    """A file or folder in a cache; in order, those unused for longest come first."""

    used_at_s: float
    num_bytes: int
    path: Path


def evict(kept: Iterable[Kept], num_bytes: int, remove: Callable[[Path], object]) -> list[Kept]:
    """Removes those unused for longest, until `num_bytes` or all are gone; returns them."""
    removed: list[Kept] = []
    for each in sorted(kept):
        if num_bytes <= 0:
            break
        remove(each.path)
        removed.append(each)
        num_bytes -= each.num_bytes
    return removed


@contextmanager
def locked(path: Path, *, waits: bool = True) -> Iterator[bool]:
    """Takes the lock file `path`, or says that it is taken."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
