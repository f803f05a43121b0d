"""What all bounded caches on this machine's disk share: locks, and room for what is new.

What has been unused for longest goes first. Locks are the kernel's: one that is held by a process
that dies is free.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Kept(NamedTuple):
    """A file or folder in a cache; in order, those unused for longest come first."""

    used_at_s: float
    num_bytes: int
    path: Path


def evict(kept: Iterable[Kept], num_bytes: float, remove: Callable[[Path], object]) -> list[Kept]:
    """Removes those unused for longest, until `num_bytes` or all are gone; returns them."""
    removed: list[Kept] = []
    for each in sorted(kept):
        if num_bytes <= 0:
            break
        remove(each.path)
        removed.append(each)
        num_bytes -= each.num_bytes
    return removed


def open_lock(path: Path) -> int:
    """A descriptor of a lock file, which it makes if absent; another user's will do for reading."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def locked(path: Path, *, waits: bool = True) -> Iterator[bool]:
    """Takes the lock file `path`, or says that it is taken."""
    with open(open_lock(path), "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
