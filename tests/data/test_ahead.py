"""What is made ahead: in order, no further ahead than asked, by as many threads as asked."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures.thread import BrokenThreadPool

import pytest

from magneto_dist.data.ahead import Stopwatch, made_ahead


@pytest.mark.parametrize("num_threads", [1, 3])
def test_items_come_in_order_however_long_each_takes(num_threads: int) -> None:
    def make(number: int) -> int:
        time.sleep(0.02 if number % 3 == 0 else 0)
        return 10 * number

    made = made_ahead(iter(range(1, 20)), make, depth=4, num_threads=num_threads)
    assert list(made) == [10 * number for number in range(1, 20)]


def test_several_are_made_at_once() -> None:
    together = threading.Barrier(2, timeout=30)  # breaks, unless two threads come

    def make(number: int) -> int:
        together.wait()
        return number

    assert list(made_ahead(iter([1, 2, 3, 4]), make, depth=2, num_threads=2)) == [1, 2, 3, 4]


def test_each_thread_is_settled_once() -> None:
    settled: list[int] = []
    made = made_ahead(
        iter(range(1, 30)),
        lambda _: threading.get_ident(),
        depth=3,
        num_threads=2,
        settle_thread=lambda: settled.append(threading.get_ident()),
    )
    assert {*made} <= {*settled}
    assert len(settled) == len({*settled}) <= 2


@pytest.mark.parametrize("fails_in", ["source", "make"])
def test_an_error_comes_in_the_place_of_its_item(fails_in: str) -> None:
    def sources() -> Iterator[int]:
        yield from (1, 2)
        if fails_in == "source":
            raise OSError("no third")
        yield 3

    def make(number: int) -> int:
        if number == 3:
            raise OSError("no third")
        return number

    made = made_ahead(sources(), make, depth=4, num_threads=2)
    assert [next(made), next(made)] == [1, 2]
    with pytest.raises(OSError, match="no third"):
        next(made)


class Source:
    """Numbers without end; knows whether it was closed."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            self.closed.set()


def our_threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith(("take", "make"))}


def test_closing_ends_the_threads_and_the_source() -> None:
    source = Source()
    made = made_ahead(iter(source), lambda item: item, depth=2, num_threads=2)
    next(made)
    assert our_threads()
    made.close()
    assert source.closed.is_set()
    assert not our_threads()


def test_closing_breaks_off_a_source_that_waits_if_it_can_be_told() -> None:
    closing, ended = threading.Event(), threading.Event()

    def waits() -> Iterator[int]:
        yield 1
        assert closing.wait(60)
        ended.set()

    made = made_ahead(waits(), lambda item: item, depth=2, closing=closing)
    assert next(made) == 1
    made.close()
    assert ended.is_set()


@pytest.mark.parametrize("fails", ["make", "settle_thread"])
def test_an_error_ends_the_source_and_the_threads(fails: str) -> None:
    def fail(*_: int) -> None:
        raise OSError("no more")

    source = Source()
    made = made_ahead(
        iter(source),
        fail if fails == "make" else lambda item: item,
        depth=3,
        num_threads=2,
        **({"settle_thread": fail} if fails == "settle_thread" else {}),
    )
    with pytest.raises((OSError, BrokenThreadPool)):
        next(made)
    assert source.closed.is_set()
    assert not our_threads()


@pytest.mark.parametrize(
    ("source_s", "make_s", "num_threads", "least_s", "most_s"),
    [
        (0.2, 0.0, 1, 0.5, 2.0),  # all of it
        (0.0, 0.2, 1, 0.0, 0.3),  # nothing of 0.8
        (0.2, 0.3, 4, 0.5, 2.0),  # threads have nothing to do
        (0.1, 0.4, 2, 0.0, 0.4),  # they have: only the first source is waited for
    ],
)
def test_what_counts_as_waiting_is_what_more_sources_would_have_saved(
    source_s: float, make_s: float, num_threads: int, least_s: float, most_s: float
) -> None:
    def sources() -> Iterator[int]:
        for number in range(4):
            time.sleep(source_s)
            yield number

    waiting = Stopwatch()
    made = made_ahead(
        sources(),
        lambda _: time.sleep(make_s) or 1,
        depth=num_threads + 1,
        num_threads=num_threads,
        waiting=waiting,
    )
    assert len(list(made)) == 4
    assert least_s <= waiting.elapsed_s <= most_s
