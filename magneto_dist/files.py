"""Files that are whole or absent, whatever kills the process."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from magneto_dist.errors import InputError


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` beside `path`, syncs it, and renames it into place."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` at the end of the block, or leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Waits until the content of `path` is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Waits until the names in the folder `path` are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(folder: Path, num_bytes: float, purpose: str) -> None:
    """Checks that a write will fit before it begins.

    Raises:
        InputError: less than `num_bytes` are free where `folder` lies.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise InputError(
            f"{purpose} needs {num_bytes / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are"
            " free: make room or choose another folder"
        )
