"""The processes that make batches: how they start, what they obey, when they end.

1. `start_fork_server`: once per training process; a fresh process from which loader processes fork,
   with everything imported. A fork of the training process itself would copy its threads and GPU.
2. `run_loader` starts loader processes, yields what they make, and ends them.
3. One that hangs ends the run: all are killed, and the error says what to look at.
4. `init_worker` runs in each of them: one thread, deaf to signals, dead with its training process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from magneto_dist.data.parcels import Packing, Parcel, Unpacking
from magneto_dist.errors import InputError

_PRELOAD = ["__main__", "magneto_dist.data.loader"]
# A scheduler sends these to every process of a job; the training process alone decides.
_SIGNALS_OF_THE_RUN = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
_MAX_WORKERS = 8
_LOOK_S = 5.0  # between two looks whether all loader processes live
_KILLED_WITHIN_S = 10.0


def cores_per_rank(ranks_per_node: int) -> int:
    """This process's share of the cores that it may use, at least 1."""
    return max(len(os.sched_getaffinity(0)) // ranks_per_node, 1)


def default_num_workers(ranks_per_node: int) -> int:
    """Loader processes per rank: its cores but one for itself, from 1 to 8."""
    return min(max(cores_per_rank(ranks_per_node) - 1, 1), _MAX_WORKERS)


def start_fork_server() -> None:
    """Starts the process that loader processes fork from, if it does not run.

    It inherits blocked signals: a SIGTERM to the process group would end it, and loading with it,
    before the training process has saved.
    """
    forkserver.set_forkserver_preload(_PRELOAD)
    resource_tracker.ensure_running()  # unblocks signals when it starts, so it has to come first
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS_OF_THE_RUN)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)


def run_loader(
    dataset: Dataset[Any],
    tokens: Sequence[Any],
    *,
    num_workers: int,
    prefetch: int,
    pin: bool,
    timeout_s: float = 0.0,
    closing: threading.Event | None = None,
) -> Iterator[Any]:
    """Yields `dataset[token]` for each token, in order, made by loader processes.

    Args:
        dataset: picklable; gives an InputError as a value, for torch would wrap a raised one.
        tokens: what to make.
        num_workers: 0: in this process.
        prefetch: items that each loader process keeps ready.
        pin: call `pin_memory` of each item.
        timeout_s: longest wait for an item of loader processes; 0: no limit.
        closing: set by another thread than the one that waits: nobody wants items any more, and
            the wait for loader processes ends within seconds.

    Raises:
        InputError: the one that the data set gave; a loader process was killed, or gave nothing
            for too long.
    """
    num_workers = min(num_workers, len(tokens))
    items = (
        _made_by_processes(dataset, tokens, num_workers, prefetch, pin, timeout_s, closing)
        if num_workers > 0
        else (dataset[token] for token in tokens)
    )
    with contextlib.closing(items):
        for item in items:
            if isinstance(item, InputError):
                raise item
            yield item.pin_memory() if pin else item


def _made_by_processes(
    dataset: Dataset[Any],
    tokens: Sequence[Any],
    num_workers: int,
    prefetch: int,
    pin: bool,
    timeout_s: float,
    closing: threading.Event | None,
) -> Generator[Any, None, None]:
    others = set(multiprocessing.active_children())
    iterator = _start(Packing(dataset), tokens, num_workers, prefetch, timeout_s)
    processes = set(multiprocessing.active_children()) - others
    unpack = Unpacking(pin)
    try:
        while (received := _next(iterator, processes, timeout_s, closing)) is not None:
            yield received if isinstance(received, InputError) else unpack(received)
    finally:
        del iterator  # ends the loader processes, those that still listen
        _kill(processes)


def _kill(processes: set[BaseProcess]) -> None:
    living = [process for process in processes if process.is_alive()]
    for process in living:
        process.kill()
    for process in living:
        process.join(_KILLED_WITHIN_S)


def _start(
    dataset: Dataset[Parcel],
    tokens: Sequence[Any],
    num_workers: int,
    prefetch: int,
    timeout_s: float,
) -> Iterator[Parcel]:
    start_fork_server()
    with warnings.catch_warnings():
        # torch's opinion on the number of processes: the user has asked for this one.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=tokens,
            num_workers=num_workers,
            multiprocessing_context="forkserver",
            prefetch_factor=prefetch,
            worker_init_fn=partial(init_worker, dict(os.environ)),
            # Making an iterator draws a number; the global generator belongs to the model.
            generator=torch.Generator(),
            # torch looks after dead processes only when this has passed: no whole `timeout_s`.
            timeout=min(timeout_s or _LOOK_S, _LOOK_S),
        )
        try:
            return iter(loader)
        except OSError as error:
            raise InputError(
                f"loader processes cannot start ({error}): there is too little shared memory"
                " (/dev/shm), or too few files may be open (ulimit -n): raise that, or use"
                " --data.num_workers 0"
            ) from None


def _next(
    iterator: Iterator[Any],
    processes: set[BaseProcess],
    timeout_s: float,
    closing: threading.Event | None,
) -> Any:
    """`next`, or None; a loader process that died or hangs is an InputError: given, not raised."""
    asked_at_s = time.monotonic()
    while True:
        try:
            return next(iterator, None)
        except RuntimeError as error:
            reason = str(error)
            if "timed out" in reason:
                if closing is not None and closing.is_set():
                    return None
                if timeout_s == 0 or time.monotonic() - asked_at_s < timeout_s:
                    continue  # torch allows to ask again
                _kill(processes)  # torch would wait for them, 5 s each
                return _stuck(timeout_s)
            if "unable to allocate shared memory" in reason:
                reason = reason.strip().splitlines()[-1]
            elif "exited unexpectedly" not in reason:
                raise
        except (OSError, EOFError) as error:
            if "in DataLoader worker process" in str(error):  # torch's mark on the data set's own
                raise
            reason = f"it left an item half sent: {error!r}"
        # Raising it in an except clause would keep torch's frames, and with them the others.
        return InputError(
            f"a loader process was ended from outside ({reason}), perhaps for want of memory or of"
            " shared memory (/dev/shm; docker run --ipc=host): lower --data.num_workers or"
            " --data.prefetch_batches, or set --train.overlap false"
        )


def _stuck(timeout_s: float) -> InputError:
    return InputError(
        f"the loader processes gave no micro-batch for {timeout_s:g} s (--data.loader_timeout_s):"
        " look whether the disk, mount or server of --data.path and of --data.cache_dir answers,"
        " and whether a stage of your own hangs; raise the limit if all that is only slow"
    )


def init_worker(environment: Mapping[str, str], _worker_id: int) -> None:
    """Settles a loader process: one thread, deaf to the signals of the run, never an orphan.

    Args:
        environment: of the training process; the fork server's is as old as that is.
    """
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS_OF_THE_RUN)
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    """Ends this process when the training process dies or itself sends SIGTERM.

    The system's parent is the fork server, so neither torch's own watchdog nor PR_SET_PDEATHSIG
    would notice the death of the training process.
    """
    training_process = multiprocessing.parent_process()
    assert training_process is not None
    while training_process.is_alive():
        received = signal.sigtimedwait(_SIGNALS_OF_THE_RUN, 1.0)
        if (
            received is not None
            and received.si_signo == signal.SIGTERM
            and received.si_pid == training_process.pid
        ):
            break
    sys.stderr.flush()
    os._exit(1)
