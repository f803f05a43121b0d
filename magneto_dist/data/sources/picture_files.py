"""Pictures that rows name by path: read where they may lie, and nowhere else.

A table or data set may come from anywhere; a path in it must not lead to the user's other files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from magneto_dist.data.sample import BadSample


def read_picture(name: str, folders: Sequence[Path], key: str) -> bytes:
    """The content of a picture.

    Args:
        name: its path, relative ones from the first folder.
        folders: that it may lie in; absolute, without links.
        key: of its sample, for the message.

    Raises:
        BadSample: it is not there, or not inside one of the folders.
    """
    try:
        return find_picture(name, folders, key).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise BadSample(f"picture {name!r} cannot be read: {reason}", key) from None


def picture_bytes(name: str, folders: Sequence[Path]) -> int:
    """The size of a picture; 0 where `read_picture` would say why it cannot be read."""
    try:
        return find_picture(name, folders, "").stat().st_size
    except (BadSample, OSError, ValueError):
        return 0


def find_picture(name: str, folders: Sequence[Path], key: str) -> Path:
    """Where a picture or an archive of some would be; see `read_picture`.

    Raises:
        BadSample: not inside one of the folders.
    """
    if not folders:
        raise BadSample(f"picture {name!r} is a file, but no folder of pictures is given", key)
    path = (folders[0] / name).resolve()  # follows "..", links and absolute paths
    if not any(path.is_relative_to(folder) for folder in folders):
        raise BadSample(f"picture {name!r} lies outside {folders[0]}", key)
    return path
