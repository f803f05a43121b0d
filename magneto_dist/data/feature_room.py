"""Room for cached features: how much disk space those of all runs may take, and which of them go.

1. A run holds `InUse` of its folder for as long as it lives: nobody else removes that.
2. Before it writes new features it asks `room_for` them. Where the bound or the disk has too little
   room, folders that no run uses go, the one unused for longest first. Should all of them not be
   enough, none goes, and the run ends with one line before it has looked at a picture.

Beside the folder KEY lies .KEY.lock, which stays when that goes; a folder's time of modification is
that of its last use.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import localtime, strftime

from magneto_dist.data.cache_room import Kept, evict, locked, open_lock
from magneto_dist.errors import InputError
from magneto_dist.files import require_space

_KEY = re.compile(r"[0-9a-f]{16}")  # whatever else people keep there is not ours to remove
_REMOVED = ".removed"


class InUse:
    """Keeps a folder, which it makes if absent, from being removed while this object lives."""

    _descriptor = -1

    def __init__(self, folder: Path) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = open_lock(_lock_of(folder))
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)  # waits for one who is just removing it
        folder.mkdir(exist_ok=True)
        os.utime(folder)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


@contextmanager
def room_for(folder: Path, num_bytes: int, max_gb: float) -> Iterator[None]:
    """Makes room for features; nobody else is given the same room within the block.

    Args:
        folder: of the features, in use by this run.
        num_bytes: that it is going to grow by; the files are made, if not filled, within the block.
        max_gb: for all folders beside it and itself, in 1e9 bytes.

    Raises:
        InputError: there is too little room, even without all that no run uses.
    """
    with ExitStack() as held:
        held.enter_context(locked(folder.parent / ".lock"))
        for half_removed in folder.parent.glob(f".*{_REMOVED}"):
            shutil.rmtree(half_removed, ignore_errors=True)  # another user's stays
        others = _others(folder, held)
        ours = _num_bytes(folder) + num_bytes
        lacking = max(
            _too_many_bytes(ours, others, max_gb), _bytes_short(folder, num_bytes, others)
        )
        removed = evict(others.idle, lacking, _remove)
        for each in (each for each in removed if each.num_bytes):
            day = strftime("%Y-%m-%d", localtime(each.used_at_s))
            print(f"removed cached features: {each.path}, {_gb(each.num_bytes)}, last used {day}")
        total = ours + others.used_bytes + others.idle_bytes - sum(r.num_bytes for r in removed)
        print(
            f"cached features: {_gb(num_bytes)} to be written to {folder}; with those of other runs"
            f" {_gb(total)}, at most {max_gb:g} GB (--data.feature_cache_gb)"
        )
        yield


@dataclass(frozen=True)
class _Others:
    """What lies beside the folder of a run."""

    idle: list[Kept]
    """Folders that no run uses, and that this user may remove."""
    used_bytes: int
    """What the others have taken, and will take."""
    promised_bytes: int
    """Of these, what they have not taken yet."""

    @property
    def idle_bytes(self) -> int:
        return sum(each.num_bytes for each in self.idle)


def _others(folder: Path, held: ExitStack) -> _Others:
    """What lies beside `folder`; no run can begin to use what is idle as long as it is `held`."""
    idle, used_bytes, promised_bytes = [], 0, 0
    for path in _folders(folder.parent):
        if path == folder:
            continue
        if os.access(path, os.W_OK) and held.enter_context(locked(_lock_of(path), waits=False)):
            idle.append(Kept(path.stat().st_mtime, _num_bytes(path), path))
        else:
            promised = _promised_bytes(path)
            promised_bytes += promised
            used_bytes += promised + _num_bytes(path)
    return _Others(idle, used_bytes, promised_bytes)


def _too_many_bytes(ours: int, others: _Others, max_gb: float) -> float:
    """By which all together are above the bound; InputError if still so without what is idle."""
    max_bytes = max_gb * 1e9
    if ours + others.used_bytes > max_bytes:
        raise InputError(
            f"cached features of {_gb(ours)} (--data.feature_views), beside"
            f" {_gb(others.used_bytes)} that other runs use, are more than"
            f" --data.feature_cache_gb {max_gb:g}: raise that, or take fewer views"
        )
    return ours + others.used_bytes + others.idle_bytes - max_bytes


def _bytes_short(folder: Path, num_bytes: int, others: _Others) -> int:
    """What the disk lacks; InputError if still so without what is idle."""
    needed = num_bytes + others.promised_bytes
    purpose = "cached features (--data.feature_views, --data.cache_dir; what no run uses would go)"
    require_space(folder, needed - others.idle_bytes, purpose)
    return needed - shutil.disk_usage(folder).free


def _remove(folder: Path) -> None:
    """At once for all who look for it: half of it, after a kill, would pass for features."""
    doomed = folder.with_name(f".{folder.name}{_REMOVED}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _folders(root: Path) -> list[Path]:
    paths = [path for path in root.iterdir() if _KEY.fullmatch(path.name)]
    return [path for path in paths if path.is_dir() and not path.is_symlink()]


def _num_bytes(folder: Path) -> int:
    """What a folder has taken of the disk."""
    return sum(status.st_blocks * 512 for status in _statuses(folder.iterdir()))


def _promised_bytes(folder: Path) -> int:
    """What files that are being filled have not taken yet."""
    parts = _statuses(folder.glob(".*.part"))
    return sum(max(status.st_size - status.st_blocks * 512, 0) for status in parts)


def _statuses(paths: Iterable[Path]) -> Iterator[os.stat_result]:
    for path in paths:
        with suppress(FileNotFoundError):  # it has got its final name meanwhile
            yield path.stat()
