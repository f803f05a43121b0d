"""Items made by loader processes, in order, as the training process asks for them.

1. `run_loader` starts loader processes, yields what they make, and ends them.
2. Each takes the next token as soon as it is free. In torch's DataLoader each has every n-th token,
   and all are as slow as the slowest; what sends and receives there takes twice the time.
3. One that hangs or is killed ends the run: the error says what to look at.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import pickle
import select
import signal
import socket
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset

from magneto_dist.data.parcels import Unpacking
from magneto_dist.data.workers import MAX_TOKEN_BYTES, serve, start_fork_server
from magneto_dist.errors import InputError

_LOOK_S = 1.0  # between two looks whether anybody still wants items
_ENDS_WITHIN_S = 5.0
_PIPE_BYTES = 1 << 20  # what any user may have; several items without their large tensors


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
        dataset: picklable.
        tokens: what to make; each takes at most MAX_TOKEN_BYTES, pickled.
        num_workers: 0: in this process.
        prefetch: items for each loader process that may be made ahead.
        pin: call `pin_memory` of each item.
        timeout_s: longest wait for an item of loader processes; 0: no limit.
        closing: set by another thread than the one that waits: nobody wants items any more, and
            the wait for loader processes ends within seconds.

    Raises:
        InputError: a loader process was killed, or gave nothing for too long.
        Exception: of the data set; from a loader process with its traceback as a note, or as a
            RuntimeError with it where it cannot be sent.
    """
    num_workers = min(num_workers, len(tokens))
    if num_workers > 0:
        with _starting():
            start_fork_server()
            pool = _Pool(dataset, tokens, num_workers, prefetch, pin)
        items = pool.items(timeout_s, closing or threading.Event())
    else:
        items = (dataset[token] for token in tokens)
    with contextlib.closing(items):
        for item in items:
            yield item.pin_memory() if pin else item


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError) as error:
        raise InputError(
            f"loader processes cannot start ({error!r}): too few files may be open (ulimit -n), or"
            " there may be too few processes (ulimit -u): raise that, or use --data.num_workers 0"
        ) from None


class _Pool:
    """Loader processes that take tokens from one queue."""

    def __init__(
        self,
        dataset: Dataset[Any],
        tokens: Sequence[Any],
        num_workers: int,
        prefetch: int,
        pin: bool,
    ) -> None:
        self._dataset, self._tokens, self._pin = dataset, tokens, pin
        self._num_workers, self._most_ahead = num_workers, num_workers * prefetch
        # Of whole messages, each of which is received by one process.
        self._queue, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._queue.setblocking(False)
        self._poll = select.poll()
        self._workers: dict[int, _Worker] = {}
        """By the descriptors of their pipes."""
        self._num_given = 0
        self._arrived: dict[int, Any] = {}
        """Items, or what was raised in their place, by number, until it is their turn."""

    def items(self, timeout_s: float, closing: threading.Event) -> Generator[Any, None, None]:
        """One for each token, in order."""
        try:
            with _starting(), self._theirs:
                for _ in range(self._num_workers):
                    self._start_worker()
            self._give(self._most_ahead)
            for number in range(len(self._tokens)):
                if not self._has_arrived(number, timeout_s, closing):
                    return
                if isinstance(self._arrived[number], Exception):
                    raise self._arrived[number]
                self._give(number + 1 + self._most_ahead)
                yield self._arrived.pop(number)  # not kept here: it would hold its memory
        finally:
            self._end()

    def _start_worker(self) -> None:
        worker = _Worker(self._dataset, self._theirs, self._pin)
        self._workers[worker.descriptor] = worker
        self._poll.register(worker.descriptor, select.POLLIN)

    def _give(self, end: int) -> None:
        """Tokens up to this number, as far as the queue has room."""
        # Where no process lives any more, the end of their pipes tells.
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while self._num_given < min(end, len(self._tokens)):
                message = pickle.dumps((self._num_given, self._tokens[self._num_given]))
                if len(message) > MAX_TOKEN_BYTES:
                    raise ValueError(f"a token of {len(message)} bytes, pickled")
                self._queue.send(message)
                self._num_given += 1

    def _has_arrived(self, number: int, timeout_s: float, closing: threading.Event) -> bool:
        """Waits for that item; False: nobody wants it any more."""
        asked_at_s = time.monotonic()
        look_ms = 1000 * min(timeout_s or _LOOK_S, _LOOK_S)
        while number not in self._arrived:
            for descriptor, _ in self._poll.poll(look_ms):
                made, item = self._workers[descriptor].take()
                self._arrived[made] = item
            if closing.is_set():
                return False
            waited_s = time.monotonic() - asked_at_s
            if timeout_s and waited_s >= timeout_s and number not in self._arrived:
                for worker in self._workers.values():
                    worker.process.kill()  # they would not listen
                raise InputError(
                    f"the loader processes gave no micro-batch for {timeout_s:g} s"
                    " (--data.loader_timeout_s): look whether the disk, mount or server of"
                    " --data.path and of --data.cache_dir answers, and whether a stage of your own"
                    " hangs; raise the limit if all that is only slow"
                )
        return True

    def _end(self) -> None:
        """Ends processes: by themselves where they still listen, after the item that they make."""
        self._queue.close()
        for worker in self._workers.values():
            worker.hang_up()
        self._wait_for_ends()
        for worker in self._workers.values():
            worker.process.kill()
        self._wait_for_ends()

    def _wait_for_ends(self) -> None:
        deadline_s = time.monotonic() + _ENDS_WITHIN_S
        for worker in self._workers.values():
            worker.process.join(max(deadline_s - time.monotonic(), 0.0))


class _Worker:
    """A loader process as the training process sees it."""

    def __init__(self, dataset: Dataset[Any], queue: socket.socket, pin: bool) -> None:
        context = multiprocessing.get_context("forkserver")
        self._unpack = Unpacking(pin)
        self._pipe, theirs = context.Pipe(duplex=False)
        with theirs:
            with contextlib.suppress(OSError):  # the user may have many large ones
                fcntl.fcntl(theirs.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            arguments = (dict(os.environ), dataset, queue, theirs)
            self.process = context.Process(target=serve, args=arguments, daemon=True)
            self.process.start()
        self.descriptor = self._pipe.fileno()

    def take(self) -> tuple[int, Any]:
        """The next item, or what the data set raised in its place, and the number of its token.

        Raises:
            InputError: the process is dead.
        """
        try:
            number, received = self._pipe.recv()
        except (OSError, EOFError, RuntimeError) as error:  # of memory that cannot be received, too
            raise InputError(
                f"a loader process was ended from outside ({self._end_of_it() or repr(error)}),"
                " perhaps for want of memory or of shared memory (/dev/shm; docker run --ipc=host):"
                " lower --data.num_workers or --data.prefetch_batches, or set --train.overlap false"
            ) from None
        return number, received if isinstance(received, Exception) else self._unpack(received)

    def _end_of_it(self) -> str:
        """What has ended it; empty: it runs."""
        self.process.join(_LOOK_S)
        code = self.process.exitcode
        if code is None:
            return ""
        names = {number.value: number.name for number in signal.Signals}
        return names.get(-code, f"exit code {code}")

    def hang_up(self) -> None:
        """Tells it that nobody wants its items any more."""
        self._pipe.close()
