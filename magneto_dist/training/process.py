"""What a training process does about signals and about the death of its launcher."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from magneto_dist.world import World

_PR_SET_PDEATHSIG = 1
ORPHAN_GRACE_S = 60
"""A process whose launcher died has this long to save before it is ended."""


class StopRequest:
    """Remembers that somebody asked this process to stop; the loop asks at every step boundary.

    SIGTERM and SIGUSR1 come from schedulers, the first SIGINT from Ctrl-C; a second Ctrl-C ends
    the process at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._launcher = os.getppid()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: object) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if os.getppid() != self._launcher:
            # An orphan may wait in a collective for ever; the alarm's default action ends it.
            signal.alarm(ORPHAN_GRACE_S)
        print(f"{self.signal.name}: saving at the end of this step", file=sys.stderr, flush=True)


def die_with_launcher() -> None:
    """Has the kernel send SIGTERM when the launcher that started us dies (Linux).

    A SIGKILLed torchrun leaves its workers alive; they would go on writing into a run folder that
    a restarted job also writes. A script that was started by hand may outlive its shell (nohup).
    """
    launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if not (launched and sys.platform == "linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1 and "LOCAL_RANK" in os.environ and not _launcher_is_process_1():
        sys.exit("the process launcher is gone")  # it died before we asked


def launched_world() -> World:
    """Where torchrun or accelerate say that this process stands; started by hand, it is alone."""
    place = {name: int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK")}
    sizes = {name: int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    return World(
        rank=place["RANK"],
        num_ranks=sizes["WORLD_SIZE"],
        rank_of_node=place["LOCAL_RANK"],
        ranks_per_node=sizes["LOCAL_WORLD_SIZE"],
    )


def _launcher_is_process_1() -> bool:
    """In a container whose command is torchrun it is process 1, which else adopts orphans."""
    command = Path("/proc/1/cmdline").read_bytes()
    return any(name in command for name in (b"torchrun", b"torch.distributed", b"accelerate"))
