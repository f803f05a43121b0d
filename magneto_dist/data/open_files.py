"""Files that are read piece by piece, here and there; the last of them stay open."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from magneto_dist.errors import InputError

_MAX_OPEN_FILES = 64


class OpenFile:
    """A descriptor that is closed when nobody reads from it any more."""

    def __init__(self, path: Path, where: str) -> None:
        self._where = where
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._num_bytes = os.fstat(self._descriptor).st_size

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from byte `offset` on.

        Raises:
            InputError: the file ends before that.
            OSError: it cannot be read.
        """
        if offset + size > self._num_bytes:  # else the kernel would be asked for any nonsense
            raise InputError(
                f"{self._where}: has {self._num_bytes} bytes, but {offset + size} are needed; it is"
                " cut off, or its index is not its own: copy or build it again"
            )
        content = b""
        while len(content) < size:  # the kernel gives at most 2 GiB at once
            try:
                piece = os.pread(self._descriptor, size - len(content), offset + len(content))
            except OSError as error:
                raise OSError(error.errno, f"{self._where}: {error.strerror}") from None
            if not piece:
                raise OSError(f"{self._where}: was cut off while it was read")
            content += piece  # the first one is not copied
        return content


class OpenFiles:
    """The files that were read last; several threads may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[str, OpenFile] = OrderedDict()

    def get(self, name: str, open_file: Callable[[], OpenFile]) -> OpenFile:
        """The file `name`, opened where it is not."""
        with self._lock:
            file = self._files.get(name)
            if file is None:
                file = self._files[name] = open_file()
                if len(self._files) > _MAX_OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(name)
            return file
