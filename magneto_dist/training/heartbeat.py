"""Who keeps the others waiting: each rank says where it is, and a watchdog reads what all say.

A collective waits for its last rank, for ever if that is stopped, hangs in its data or has lost
its network, and says of none of them who it waits for.

1. The training process notes its place (step and phase) as it goes on: an assignment, no more.
2. A thread of it writes the place to RUN_DIR/heartbeats/ every few seconds.
3. Where the place is the same as the last time, the thread also reads those of the other ranks.
4. Ranks that stay silent, or where they are while others wait for them, for longer than
   `train.collective_timeout_s` are named by the first who finds that; the others find its verdict,
   and all end.

Files, and not the key-value store of the process group: rank 0 or its torchrun serves that, and a
request to a process that is stopped never returns. The step costs nothing, and no collective, clock
of another machine or random number is used: each thread counts its own rounds, so that a job which
is stopped and continued as a whole does not take the pause for a stall.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn, TypeVar

from magneto_dist.errors import EXIT_STALLED, InputError, StalledError, print_clear_line
from magneto_dist.training.ranks import name_ranks
from magneto_dist.training.session import Session

T = TypeVar("T")
Phase = Literal["start", "data", "training", "evaluation", "saving"]
PATIENCE = 3
"""What may take long on one rank alone has so many times the timeout: everything but training after
the first step, in which compilers and caches work."""
_ROUNDS_PER_TIMEOUT, _MAX_ROUND_S = 20, 10.0
_FOLDER = "heartbeats"


class Place(NamedTuple):
    """Where a rank is."""

    count: int
    """Of the places before; ranks go the same way, so that the lower one is behind."""
    step: int
    """Global step, 0 before the first."""
    phase: str
    is_patient: bool
    """Whether it may take `PATIENCE` times as long."""


class Whereabouts:
    """The place of this process, for its watchdog.

    Args:
        is_patient: any step may take long, e.g. where a compiler meets another kind of batch.
    """

    def __init__(self, *, is_patient: bool = False) -> None:
        self._is_patient = is_patient
        self.place = Place(0, 0, "start", True)
        self._first_step = 0

    def at(self, phase: Phase, step: int | None = None) -> None:
        """Notes that this process has come so far; `step` None: still the same one."""
        before = self.place
        step = before.step if step is None else step
        self._first_step = self._first_step or step
        is_first = step == self._first_step
        is_patient = self._is_patient or phase != "training" or is_first
        self.place = Place(before.count + 1, step, phase, is_patient)

    def at_each(self, phase: Phase, items: Iterable[T]) -> Iterator[T]:
        """`items`, each of which is a place of its own."""
        for item in items:
            self.at(phase)
            yield item


class _Beat(NamedTuple):
    number: int
    place: Place


_NO_BEAT = _Beat(-1, Place(-1, 0, "start", True))


class _Seen(NamedTuple):
    """A rank, as this one has seen it since it has not moved itself."""

    beat: _Beat
    silent_s: float = 0.0
    """No new beat for so long."""
    still_s: float = 0.0
    """At the same place for so long."""

    def again(self, beat: _Beat, round_s: float) -> _Seen:
        silent_s = self.silent_s + round_s if beat.number == self.beat.number else 0.0
        still_s = self.still_s + round_s if beat.place == self.beat.place else 0.0
        return _Seen(beat, silent_s, still_s)


def find_stall(seen: dict[int, _Seen], timeout_s: float) -> str | None:
    """Judges what a rank that waits has seen of all ranks, itself included.

    Returns:
        Which ranks did not come, in words; None: nothing is to be said, or not yet.
    """
    # Half the time is enough for a suspicion, and with one there is no other judgement.
    silent = [rank for rank, each in seen.items() if each.silent_s >= timeout_s / 2]
    if any(seen[rank].silent_s < timeout_s for rank in silent):
        return None
    if silent:
        return (
            f"{_places(silent, seen)} gave no sign of life for {timeout_s:g} s: look whether the"
            " process is stopped, and whether its machine, network and the storage of RUN_DIR work"
        )
    lowest = min(each.beat.place.count for each in seen.values())
    behind = [rank for rank, each in seen.items() if each.beat.place.count == lowest]
    place = seen[behind[0]].beat.place
    limit_s = timeout_s * (PATIENCE if place.is_patient else 1)
    if any(seen[rank].still_s < limit_s for rank in behind):
        return None
    if len(behind) < len(seen):
        return (
            f"{_places(behind, seen)} did not come any further for {limit_s:g} s, and the others"
            " wait for it: look at what it does there, and at its disk or network"
        )
    if place.phase == "data":  # nobody waits for another; the loader has a limit of its own
        return None
    return (
        f"all {len(seen)} ranks have waited for each other at step {place.step} ({place.phase}) for"
        f" {limit_s:g} s, and none is behind: look whether the network between the nodes works"
    )


def _places(ranks: list[int], seen: dict[int, _Seen]) -> str:
    place = seen[ranks[0]].beat.place
    return f"{name_ranks(ranks)} of {len(seen)} (at step {place.step}, {place.phase})"


class Watchdog:
    """Ends this process where the ranks wait for one that does not come; a context manager.

    Args:
        session: this process among its peers; alone it needs no watchdog.
        run_dir: RUN_DIR, on storage that all ranks see.
        timeout_s: longest wait, see `train.collective_timeout_s`; 0: any.
        whereabouts: of this process.
        tell: is told why the process ends, before it does.

    Raises:
        InputError: RUN_DIR is not the same folder on all ranks.
    """

    def __init__(
        self,
        session: Session,
        run_dir: Path,
        timeout_s: float,
        whereabouts: Whereabouts,
        tell: Callable[[str], None],
    ) -> None:
        self._world, self._whereabouts, self._tell = session.world, whereabouts, tell
        self._timeout_s = timeout_s
        self._round_s = min(timeout_s / _ROUNDS_PER_TIMEOUT, _MAX_ROUND_S)
        self._left = threading.Event()
        self._thread = None
        if session.world.num_ranks == 1:
            return
        self._folder = run_dir / _FOLDER / session.from_main(lambda: _fresh_folder(run_dir))
        session.on_all(self._require_shared_folder)
        if timeout_s > 0:
            self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watchdog:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        self._left.set()
        if self._thread is not None and isinstance(error, RuntimeError) and self._verdict.exists():
            raise StalledError(self._verdict.read_text()) from None  # a peer has ended, and said it

    def _require_shared_folder(self) -> None:
        if not self._folder.is_dir():
            raise InputError(
                f"--output_dir {self._folder.parent.parent} is not the folder that rank 0 writes:"
                " RUN_DIR must lie on storage that all nodes share, and be the same for all"
            )

    def _watch(self) -> None:
        last, seen = None, {}
        for number in itertools.count():
            place = self._whereabouts.place
            beat = _Beat(number, place)
            with contextlib.suppress(OSError):  # a disk that is full for a while, say
                self._write(beat)
            if place != last:
                last, seen = place, {}
            else:
                ranks = range(self._world.num_ranks)
                seen = {rank: self._look(rank, beat, seen.get(rank)) for rank in ranks}
                reason = find_stall(seen, self._timeout_s)
                if reason is not None:
                    self._give_verdict(reason)
            if self._left.wait(self._round_s):
                return
            if self._verdict.exists():
                self._end(self._verdict.read_text())

    def _look(self, rank: int, own: _Beat, before: _Seen | None) -> _Seen:
        beat = own if rank == self._world.rank else self._read(rank)
        if before is None:
            return _Seen(beat or _NO_BEAT)
        return before.again(beat or before.beat, self._round_s)

    @property
    def _verdict(self) -> Path:
        return self._folder / "verdict.txt"

    def _give_verdict(self, reason: str) -> None:
        message = (
            f"{reason} (--train.collective_timeout_s {self._timeout_s:g}); then start the same"
            " command again: it goes on from the newest checkpoint"
        )
        draft = self._verdict.with_suffix(f".{self._world.rank}")
        try:
            draft.write_text(message)
            self._verdict.hardlink_to(draft)  # with its content, or not at all; only one can
        except FileExistsError:
            self._end(self._verdict.read_text())
        except OSError:
            pass  # a full disk, say: then each of the ranks says it
        print_clear_line(message)
        if not self._left.wait(2 * self._round_s):  # the others look in every round
            self._end(message)

    def _end(self, message: str) -> NoReturn:
        if self._world.is_main:
            self._tell(message)
        os._exit(EXIT_STALLED)  # the training process itself waits, and may not hear anything

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

    def _write(self, beat: _Beat) -> None:
        file = self._file(self._world.rank)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(beat))
        temporary.replace(file)

    def _read(self, rank: int) -> _Beat | None:
        try:
            number, place = json.loads(self._file(rank).read_text())
        except (OSError, ValueError):
            return None
        return _Beat(number, Place(*place))


def _fresh_folder(run_dir: Path) -> str:
    """A folder with a name of its own: processes of an older start may be alive, and write."""
    shutil.rmtree(run_dir / _FOLDER, ignore_errors=True)
    name = uuid.uuid4().hex[:8]
    (run_dir / _FOLDER / name).mkdir(parents=True)
    return name
