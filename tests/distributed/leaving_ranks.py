"""Ranks that leave while gloo's threads wait for the interpreter, to let go of a tensor.

leaving_ranks.py N  # with MASTER_ADDR and MASTER_PORT; prints the exit codes of the N that leave

Taking the interpreter down then would abort about every second of them.
"""

from __future__ import annotations

import os
import sys
import time

import torch
from torch import distributed

from magneto_dist.errors import exit_with_clear_errors

LATE_S = 0.5
LEAVE_S = 2.0  # the last collective is over by then, and its tensor with a thread


class _TakesLong:
    """Belongs to a module, so that the interpreter, going down, lets other threads go on."""

    def __del__(self, sleep=time.sleep) -> None:
        sleep(1)


_LINGERS = _TakesLong()


def _leave() -> None:
    tensor = torch.ones(4)
    distributed.all_reduce(tensor, async_op=True)
    del tensor  # gloo's now
    sys.setswitchinterval(100)  # no other thread gets the interpreter
    until_s = time.monotonic() + LEAVE_S
    while time.monotonic() < until_s:
        pass


def _rank(rank: int, num_ranks: int) -> None:
    distributed.init_process_group("gloo", rank=rank, world_size=num_ranks)
    distributed.barrier()
    if rank < num_ranks - 1:
        _leave()
    else:
        time.sleep(LATE_S)
        distributed.all_reduce(torch.ones(4))
        time.sleep(LEAVE_S)


def _fork(rank: int, num_ranks: int) -> int:
    pid = os.fork()
    if pid == 0:
        os.environ["WORLD_SIZE"] = str(num_ranks)
        exit_with_clear_errors(lambda: _rank(rank, num_ranks))
    return pid


if __name__ == "__main__":
    leaving = int(sys.argv[1])
    pids = [_fork(rank, leaving + 1) for rank in range(leaving + 1)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(codes[:-1])
