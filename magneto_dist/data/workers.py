"""The processes that make batches: how they start, what they obey, when they end.

1. `start_fork_server`: once per training process; a fresh process from which loader processes fork,
   with everything imported. A fork of the training process itself would copy its threads and GPU.
2. `serve` is what each of them does: one thread, deaf to signals, dead with its training process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from socket import socket
from typing import Any

import torch
from torch.utils.data import Dataset

from magneto_dist.data.parcels import Packing, Parcel
from magneto_dist.errors import InputError

_PRELOAD = ["__main__", "magneto_dist.data.loader"]
# A scheduler sends these to every process of a job; the training process alone decides.
_SIGNALS_OF_THE_RUN = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
_MAX_WORKERS = 8
MAX_TOKEN_BYTES = 1 << 16
"""Of what is to be made, pickled."""


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


def serve(
    environment: Mapping[str, str], dataset: Dataset[Any], queue: socket, pipe: Connection
) -> None:
    """Makes items of the tokens in the queue, until the training process hangs up.

    Args:
        environment: of the training process; the fork server's is as old as that is.
        dataset: what makes an item of a token.
        queue: of pickled (number, token), each a message; other processes take from it, too.
        pipe: for (number, parcel or what was raised in its place).
    """
    _settle(environment)
    items = Packing(dataset)
    with contextlib.suppress(ConnectionError):  # nobody wants any more
        while message := queue.recv(MAX_TOKEN_BYTES):
            number, token = pickle.loads(message)
            pipe.send((number, _made(items, token)))


def _made(items: Packing, token: Any) -> Parcel | Exception:
    try:
        return items[token]
    except InputError as error:
        return error
    except Exception as error:
        told = "".join(traceback.format_exception(error))
        error.add_note(f"In a loader process:\n{told}")
        try:
            return pickle.loads(pickle.dumps(error))
        except Exception:  # not every exception can be sent
            return RuntimeError(told)


def _settle(environment: Mapping[str, str]) -> None:
    """One thread, deaf to the signals of the run, never an orphan."""
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
