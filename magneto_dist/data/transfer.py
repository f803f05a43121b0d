"""Contents behind URLs on their way: broken off where they come too slowly.

Clients give up after some seconds of silence, if at all; a server that sends a byte now and then
would hold a run for ever.

1. What can be seen on its way (a download, a stream) must bring MIN_BYTES_PER_S in each WINDOW_S.
2. Any other request has to be answered within ANSWER_WITHIN_S.

The client of hf shows nothing of what is on its way, and is left to its own limit of silence.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

MIN_BYTES_PER_S = 10_000
WINDOW_S = 60.0
ANSWER_WITHIN_S = 120.0
_BLOCK_BYTES = 1 << 23


class TooSlowError(OSError):
    """A server is broken off; no TimeoutError, of which fsspec would drop the message."""


class Readable(Protocol):
    """A file that is read once, from its start to its end."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, and none only at the end."""
        ...


def answer(fs: Any, method: str, url: str, **options: Any) -> Any:
    """What a method of an fsspec client says of a URL.

    Raises:
        TooSlowError: nothing within ANSWER_WITHIN_S.
        Exception: of the client.
    """
    from fsspec.exceptions import FSTimeoutError

    if fs.async_impl:
        options["timeout"] = ANSWER_WITHIN_S
    try:
        return getattr(fs, method)(url, **options)
    except FSTimeoutError:
        raise TooSlowError(f"no answer within {ANSWER_WITHIN_S:g} s") from None


def download(fs: Any, url: str, target: Path) -> None:
    """Copies a file to `target`.

    Raises:
        TooSlowError: it comes too slowly.
        Exception: of the client.
    """
    from fsspec.asyn import sync
    from fsspec.callbacks import Callback

    if not fs.async_impl:
        fs.get_file(url, str(target))
        return
    progress = Callback()
    sync(fs.loop, _watched, lambda: fs._get_file(url, str(target), callback=progress), progress)


@contextmanager
def stream(fs: Any, url: str, num_bytes: int) -> Iterator[Readable]:
    """A file that is read as it comes: by one request where the client can do so.

    Not every HTTP server has ranges, and of one request the content cannot change in between.

    Args:
        fs: the client.
        url: of the file.
        num_bytes: of the file, or the most that will be read.

    Raises:
        TooSlowError: by `read`, when it comes too slowly.
        Exception: of the client.
    """
    from fsspec.asyn import sync

    if not fs.async_impl:
        with fs.open(url, block_size=_BLOCK_BYTES) as file:
            yield file
        return
    try:
        file = sync(fs.loop, fs.open_async, url, "rb", size=num_bytes)
    except NotImplementedError:
        yield _Ranges(fs, url, num_bytes)
        return
    try:
        yield _Stream(fs, file)
    finally:
        sync(fs.loop, _close, file)


async def _watched(start: Callable[[], Awaitable[object]], progress: Any) -> None:
    """Awaits a download, of which `progress.value` says how many bytes have come."""
    task = asyncio.ensure_future(start())
    received = 0
    try:
        while not (await asyncio.wait({task}, timeout=WINDOW_S))[0]:
            _require_rate(progress.value - received, WINDOW_S)
            received = progress.value
        await task
    finally:
        if task.cancel():  # and nobody writes to its file any more
            await asyncio.gather(task, return_exceptions=True)


async def _close(file: Any) -> None:
    if file.r is not None:  # the answer, which the file of S3 would leave open
        file.r.close()
    await file.close()


def _require_rate(num_bytes: int, seconds: float) -> None:
    if num_bytes < MIN_BYTES_PER_S * seconds:
        raise TooSlowError(
            f"broken off, for it gave {num_bytes} bytes in {seconds:.3g} s, fewer than"
            f" {MIN_BYTES_PER_S} bytes per second"
        )


class _Stream:
    """What comes of one request; time that the reader takes for himself does not count."""

    def __init__(self, fs: Any, file: Any) -> None:
        self._fs, self._file = fs, file
        self._received, self._waited_s = 0, 0.0

    def read(self, size: int, /) -> bytes:
        from fsspec.asyn import sync
        from fsspec.exceptions import FSTimeoutError

        asked_at_s = time.monotonic()
        try:
            piece: Any = sync(self._fs.loop, self._file.read, size, timeout=WINDOW_S)
        except FSTimeoutError:
            raise TooSlowError(f"broken off, for nothing came in {WINDOW_S:g} s") from None
        self._waited_s += time.monotonic() - asked_at_s
        self._received += len(piece)
        if piece and self._waited_s >= WINDOW_S:
            _require_rate(self._received, self._waited_s)
            self._received, self._waited_s = 0, 0.0
        return piece


class _Ranges:
    """What comes of one request for each piece."""

    def __init__(self, fs: Any, url: str, num_bytes: int) -> None:
        self._fs, self._url = fs, url
        self._position, self._end = 0, num_bytes

    def read(self, size: int, /) -> bytes:
        end = min(self._position + size, self._end)
        if end == self._position:
            return b""
        piece = answer(self._fs, "cat_file", self._url, start=self._position, end=end)
        self._position += len(piece)
        if self._position < end:
            self._end = self._position
        return piece
