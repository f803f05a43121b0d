"""What is made ahead: in order, no further ahead than asked, by as many threads as asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

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


def test_closing_ends_the_threads_and_the_source() -> None:
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    before = threading.active_count()
    made = made_ahead(endless(), lambda item: item, depth=2, num_threads=2)
    next(made)
    assert threading.active_count() > before
    made.close()
    del made
    assert closed.wait(30)
    assert threading.active_count() == before


def test_only_sources_count_as_waited_for() -> None:
    def slow(of: str, wanted: str) -> None:
        time.sleep(0.2 if of == wanted else 0)

    def waited(who: str) -> float:
        def sources() -> Iterator[int]:
            for number in (1, 2, 3):
                slow("source", who)
                yield number

        waiting = Stopwatch()
        made = made_ahead(sources(), lambda _: slow("make", who), depth=2, waiting=waiting)
        assert len(list(made)) == 3
        return waiting.elapsed_s

    assert waited("source") > 0.4
    assert waited("make") < 0.1
