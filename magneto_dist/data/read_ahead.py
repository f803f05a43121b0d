"""Shards of remote data sets are fetched before they are needed.

The order is known: what a later step reads can be asked for now. Each loader process does so for
its own micro-batches. A shard that another one is fetching is left to it: with an empty cache all
begin with the same shards, and would fetch them one after the other.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress
from queue import SimpleQueue

from magneto_dist.data.storage import Storage
from magneto_dist.errors import FormatError, InputError

_NUM_THREADS = 4


class ReadAhead:
    """Fetches files into the cache, in threads that end with this object.

    Args:
        storage: of a remote data set.
    """

    def __init__(self, storage: Storage) -> None:
        self._wanted: set[str] = set()
        self._names: SimpleQueue[str | None] = SimpleQueue()
        for _ in range(_NUM_THREADS):
            # A daemon: it must not keep a process alive that is done.
            threading.Thread(target=_fetch, args=(storage, self._names), daemon=True).start()
            weakref.finalize(self, self._names.put, None).atexit = False

    def want(self, names: Iterable[str]) -> None:
        """Asks for files in this order, but for those that the last call wanted, too."""
        names = list(dict.fromkeys(names))
        for name in names:
            if name not in self._wanted:
                self._names.put(name)
        self._wanted = set(names)


def _fetch(storage: Storage, names: SimpleQueue[str | None]) -> None:
    while (name := names.get()) is not None:
        # Whoever needs the file meets the error himself, and can say what it was needed for.
        with suppress(InputError, FormatError, OSError):
            storage.fetch_ahead(name)
