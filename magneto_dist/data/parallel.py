"""Work on many shards in many processes, with one progress bar and a clean end.

1. Tasks go to processes forked from the clean server that loader processes come from, too.
2. They count items as they go; the bar shows items/s and the time left.
3. After an error or Ctrl-C the processes stop within one item; should this process be killed, they
   end by themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from magneto_dist.errors import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")
Tick = Callable[[], None]
"""Called by the work after each item; raises where the work has become pointless."""
_REFRESH_S = 0.25
_REFRESH_LOG_S = 30.0  # where standard error is a file


class _StoppedError(Exception):
    """Nobody waits for this work any more."""


def run_tasks(
    work: Callable[[Task, Tick], Result],
    tasks: Sequence[Task],
    *,
    num_processes: int,
    num_items: int,
    description: str,
) -> Iterator[Result]:
    """Yields `work(task, tick)` for each task, as they are done.

    Args:
        work: picklable; calls `tick()` after each of its items.
        tasks: picklable.
        num_processes: 1: in this process.
        num_items: over all tasks, for the progress bar.
        description: of the progress bar.

    Raises:
        InputError: `num_processes` is below 1, or one of the processes was killed.
    """
    if num_processes < 1:
        raise InputError(f"num_processes {num_processes}: must be at least 1")
    with progress_bar(num_items, description) as bar:
        num_processes = min(num_processes, len(tasks))
        if num_processes <= 1:
            for task in tasks:
                yield work(task, lambda: _advance(bar, 1))
        else:
            yield from _run_in_processes(work, tasks, num_processes, bar)


def progress_bar(
    num_items: int | None,
    description: str,
    over: Iterable[Any] | None = None,
    *,
    unit: str = "item",
    shown: bool = True,
) -> tqdm:
    """Counts items on standard error, with the time that is left.

    Args:
        num_items: None: how many there will be is not known.
        description: of what goes on.
        over: what the bar is to be iterated in place of; None: it will be told of each item.
        unit: what an item is called.
        shown: False: by another process.
    """
    return tqdm(
        over,
        total=num_items,
        desc=description,
        unit=unit,
        mininterval=_REFRESH_S if sys.stderr.isatty() else _REFRESH_LOG_S,
        smoothing=0.05,
        dynamic_ncols=True,
        disable=not shown,
    )


def _run_in_processes(
    work: Callable[[Task, Tick], Result], tasks: Sequence[Task], num_processes: int, bar: tqdm
) -> Iterator[Result]:
    from magneto_dist.data.workers import start_fork_server  # here: imports torch, which takes time

    start_fork_server()  # its children are deaf to the Ctrl-C that a terminal sends to them, too
    context = multiprocessing.get_context("forkserver")
    num_done, stop = context.Value("q", 0), context.Event()
    shared = (work, num_done, stop, dict(os.environ))
    pool = ProcessPoolExecutor(num_processes, context, _init_process, shared)
    try:
        pending: set[Future[Result]] = {pool.submit(_run_task, task) for task in tasks}
        while pending:
            done, pending = wait(pending, timeout=_REFRESH_S, return_when=FIRST_COMPLETED)
            _advance(bar, num_done.value - bar.n)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise InputError(
            f"{bar.desc}: one of {num_processes} processes was killed, perhaps for want of memory:"
            " start the same command again with fewer processes"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _advance(bar: tqdm, count: int) -> None:
    bar.update(count)


# In the other processes -------------------------------------------------------------------------

_work: Callable[[Any, Tick], Any]
_tick: Tick


def _init_process(
    work: Callable[[Any, Tick], Any], num_done: Any, stop: Any, environment: Mapping[str, str]
) -> None:
    global _work, _tick
    os.environ.clear()  # the fork server's, which may be older than what the user has set since
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def tick() -> None:
        with num_done.get_lock():
            num_done.value += 1
        if stop.is_set():
            raise _StoppedError

    _work, _tick = work, tick


def _run_task(task: Any) -> Any:
    return _work(task, _tick)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
