"""Items that are made before they are asked for, in threads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


class Stopwatch:
    """Adds up the time of what it was told to measure."""

    def __init__(self) -> None:
        self.elapsed_s = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measures the time inside."""
        started_at_s = time.perf_counter()
        try:
            yield
        finally:
            self.elapsed_s += time.perf_counter() - started_at_s


def made_ahead(
    sources: Iterator[S],
    make: Callable[[S], T],
    *,
    depth: int,
    num_threads: int = 1,
    settle_thread: Callable[[], object] = lambda: None,
    waiting: Stopwatch | None = None,
    closing: Event | None = None,
) -> Generator[T, None, None]:
    """`make` of each source, in order; up to `depth` lie ready or are made while one is in use.

    What a source or `make` raises comes in its place. Closing the iterator waits for what is being
    taken and made, and closes `sources`.

    Args:
        sources: none is None; taken by a thread of their own.
        make: called by several threads at once, where there are several.
        depth: at least 1.
        num_threads: that make.
        settle_thread: called once in each of them.
        waiting: adds up how long sources were waited for: while an item was needed whose source
            had not come, or was made while other threads had none.
        closing: set when the iterator is closed, for sources that can be told to end.
    """
    watch = waiting or Stopwatch()
    taking = ThreadPoolExecutor(1, "take")
    making = ThreadPoolExecutor(num_threads, "make", settle_thread)

    def take() -> Future[T] | None:
        source = next(sources, None)
        return None if source is None else making.submit(make, source)

    try:
        pending = deque(taking.submit(take) for _ in range(depth))
        while True:
            taken = pending.popleft()
            with watch.running():
                made = taken.result()
            if made is None:
                return
            started_at_s = time.perf_counter()
            item = made.result()
            if len(pending) >= num_threads and not pending[num_threads - 1].done():
                watch.elapsed_s += time.perf_counter() - started_at_s
            pending.append(taking.submit(take))
            yield item
    finally:
        if closing is not None:
            closing.set()
        try:
            taking.shutdown(cancel_futures=True)
        finally:
            making.shutdown(cancel_futures=True)
            if (close := getattr(sources, "close", None)) is not None:
                close()
