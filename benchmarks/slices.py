"""Processes that have the cores in turn, a slice of time each: what else goes on hits all alike.

A shared machine is slower in one minute than in the next. Alternatives that run one after the other
differ by that; those that are stopped and go on several times a second do not.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple

import psutil

from harness import reason_of
from magneto_dist.errors import InputError

_LOOK_S = 0.02
_DIES_WITHIN_S = 10.0


class Ran(NamedTuple):
    """What a process took and said."""

    slices: Sequence[tuple[float, float]]
    """From when to when it ran, by `time.perf_counter`, which all processes share."""
    last_line: str
    """Of stdout."""

    def seconds(self, start_s: float, end_s: float) -> float:
        """How long it ran between two moments."""
        return sum(max(0.0, min(end, end_s) - max(start, start_s)) for start, end in self.slices)


class _Command:
    """A command and all that it starts, stopped but for its own slices."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._name, self._slices = name, list[tuple[float, float]]()
        # Files and not pipes: a process that is left over would keep a pipe open. Opened to append,
        # for the place that is read here is also where the command would write.
        self._said, self._complaints = (tempfile.TemporaryFile("a+") for _ in range(2))  # noqa: SIM115
        self._process = psutil.Popen(command, stdout=self._said, stderr=self._complaints, env=env)
        self._members: list[psutil.Process] = [self._process]

    def __enter__(self) -> _Command:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._signal(signal.SIGKILL, self._members)
        psutil.wait_procs(self._members, timeout=_DIES_WITHIN_S)
        self._said.close()
        self._complaints.close()

    def warm_up(self) -> None:
        """Runs until it says a line, or ends."""
        while not self._lines() and not self._runs(_LOOK_S):
            pass
        self._stop()

    def run(self, slice_s: float) -> Ran | None:
        """Runs so long; what came of it, where it has ended."""
        started_at_s = time.perf_counter()
        self._signal(signal.SIGCONT, self._members)
        has_ended = self._runs(slice_s)
        self._stop()
        self._slices.append((started_at_s, time.perf_counter()))
        if not has_ended:
            return None
        if self._process.wait() != 0 or not (lines := self._lines()):
            self._complaints.seek(0)
            raise InputError(f"{self._name} failed: {reason_of(self._complaints.read())}")
        return Ran(self._slices, lines[-1])

    def _runs(self, at_most_s: float) -> bool:
        """Whether it ends within this time."""
        with suppress(psutil.TimeoutExpired):
            self._process.wait(at_most_s)
            return True
        return False

    def _lines(self) -> list[str]:
        self._said.seek(0)
        return self._said.read().splitlines()

    def _stop(self) -> None:
        """Stops all processes of the command."""
        self._signal(signal.SIGSTOP, self._members)  # before looking: what is stopped starts none
        while found := [each for each in self._tree() if each not in self._members]:
            self._signal(signal.SIGSTOP, found)
            self._members += found

    def _tree(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return self._process.children(recursive=True)
        return []

    def _signal(self, number: signal.Signals, members: Sequence[psutil.Process]) -> None:
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(number)


def run_in_slices(
    commands: Mapping[str, Sequence[str]], slice_s: float, env: Mapping[str, str]
) -> dict[str, Ran]:
    """Runs commands to their ends, each in its slices, one of them at a time.

    Args:
        commands: by name; each says a line when it is warm, from when on it is stopped for others,
            and at its end its result.
        slice_s: length of a slice, seconds.
        env: their environment.

    Raises:
        InputError: one of them fails.
    """
    ran: dict[str, Ran] = {}
    with ExitStack() as stack:
        running: dict[str, _Command] = {}
        for name, words in commands.items():
            running[name] = stack.enter_context(_Command(name, words, env))
            running[name].warm_up()
        while running:
            for name, command in list(running.items()):
                if (result := command.run(slice_s)) is not None:
                    ran[name] = result
                    del running[name]
    return ran
