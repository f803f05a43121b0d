"""Shards of remote data sets, and their indexes, on this machine's disk.

The cache is bounded, and shared by all processes of a node.

1. A shard that is there is used, and marked as used.
2. Else one process takes the shard's lock; the others wait for it, and find the shard there. Who
   only fetches ahead goes on to another shard instead.
3. Room is made: the shards unused for longest go.
4. It is downloaded under a temporary name, checked, and renamed into place.

Between downloads the cache is never larger than its bound; shards that arrive at the same moment
may exceed it until the last of them is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from magneto_dist.data.cache_room import Kept, evict, locked
from magneto_dist.errors import InputError
from magneto_dist.files import require_space, sync_file, sync_folder

Size = Callable[[], int]
Download = Callable[[Path, int], object]
_USED_AGAIN_AFTER_S = 60  # a mark of use is not renewed more often
_ABANDONED_AFTER_S = 3600  # a temporary file that nobody has written to for so long


def default_cache_dir() -> Path:
    """Where shards are kept unless `data.cache_dir` says otherwise."""
    return Path.home() / ".cache" / "magneto_dist" / "shards"


@dataclass(frozen=True)
class ShardCache:
    """A folder of downloaded shards."""

    folder: Path
    max_gb: float
    """In 1e9 bytes, over all data sets."""

    def path(self, key: str, name: str, size: Size, download: Download) -> Path:
        """The shard `name` of the data set `key`.

        Args:
            key: anything; another one has other shards.
            name: of the file.
            size: asks for its bytes.
            download: writes those bytes to a file, or raises.

        Raises:
            InputError: it does not fit into the cache or onto the disk.
        """
        return self._get(key, name, size, download, waits=True)

    def fetch_ahead(self, key: str, name: str, size: Size, download: Download) -> None:
        """As `path`, unless another process is just downloading it."""
        self._get(key, name, size, download, waits=False)

    def require_space_for(self, key: str, num_bytes: Mapping[str, int]) -> None:
        """Looks whether the cache can grow by the shards of a data set that it does not hold.

        Args:
            key: of the data set.
            num_bytes: of its shards, by name.

        Raises:
            InputError: it cannot, or cannot be written.
        """
        folder = self._folder_of(key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--data.cache_dir {self.folder}: {error.strerror}") from None
        there = {path.name for path in folder.iterdir()}
        missing = sum(size for name, size in num_bytes.items() if name not in there)
        held = sum(file.num_bytes for file in self._files())
        growth = min(held + missing, self.max_gb * 1e9) - held
        purpose = f"the cache of shards (--data.cache_dir; at most --data.cache_gb {self.max_gb:g})"
        require_space(self.folder, growth, purpose)

    def _get(self, key: str, name: str, size: Size, download: Download, *, waits: bool) -> Path:
        shard = self._folder_of(key) / name
        if _mark_used(shard):
            return shard
        shard.parent.mkdir(parents=True, exist_ok=True)
        with locked(shard.with_name(f".{name}.lock"), waits=waits) as is_ours:
            if is_ours and not _mark_used(shard):
                self._download(shard, size(), download)
        return shard

    def _folder_of(self, key: str) -> Path:
        return self.folder / hashlib.sha256(key.encode()).hexdigest()[:16]

    def _download(self, shard: Path, num_bytes: int, download: Download) -> None:
        temporary = shard.with_name(f".{shard.name}.tmp")
        temporary.unlink(missing_ok=True)  # of a process that was killed
        self._make_room(num_bytes, shard.name)
        require_space(self.folder, num_bytes, f"shard {shard.name}")
        try:
            download(temporary, num_bytes)
            sync_file(temporary)
            temporary.rename(shard)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(shard.parent)
        self._make_room(0, shard.name)

    def _make_room(self, num_bytes: int, name: str) -> None:
        max_bytes = self.max_gb * 1e9
        if num_bytes > max_bytes:
            raise InputError(
                f"shard {name} of {num_bytes / 1e9:.3g} GB does not fit into the cache of"
                f" {self.max_gb:g} GB: raise data.cache_gb"
            )
        with locked(self.folder / ".lock"):
            files = list(self._files())
            too_many = sum(file.num_bytes for file in files) + num_bytes - max_bytes
            evict(files, too_many, lambda path: path.unlink(missing_ok=True))

    def _files(self) -> Iterator[Kept]:
        """Every shard, and what killed processes left."""
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
                status = path.stat()
                is_abandoned = time.time() - status.st_mtime > _ABANDONED_AFTER_S
                if path.suffix in (".tar", ".idx") or (path.suffix == ".tmp" and is_abandoned):
                    yield Kept(status.st_mtime, status.st_size, path)


def _mark_used(shard: Path) -> bool:
    try:
        if time.time() - shard.stat().st_mtime > _USED_AGAIN_AFTER_S:
            os.utime(shard)
    except FileNotFoundError:
        return False
    return True
