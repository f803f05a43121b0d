"""Processes against real signals; what they make is a number and who made it."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from magneto_dist.data.pool import run_loader
from magneto_dist.data.workers import default_num_workers
from magneto_dist.errors import InputError


class OddError(Exception):
    """Cannot be sent: it is made of something else than what it keeps."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"{reason} at {number}")


class Squares(Dataset):
    """Gives (number squared, process, its torch threads), or `mischief` at some numbers."""

    def __init__(self, *mischief: tuple[int, str]) -> None:
        self.mischief = dict(mischief)

    def __getitem__(self, number: int):
        what = self.mischief.get(number)
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stuck":
            time.sleep(600)
        if what == "deaf":  # holds the interpreter: no other thread runs
            re.fullmatch("(a+)+b", "a" * 60)
        if what == "late":
            time.sleep(3)
        if what == "bug":
            raise KeyError("a bug")
        if what == "odd bug":
            raise OddError(number, "a bug")
        if what == "input":
            raise InputError("shard x: broken")
        return torch.tensor(number**2), os.getpid(), torch.get_num_threads()


class Notes(Dataset):
    """Notes in a folder what was made; the first waits until there are some `others`."""

    def __init__(self, folder: Path, others: int = 0) -> None:
        self.folder, self.others = folder, others

    def __getitem__(self, number: int) -> tuple[int, int]:
        deadline_s = time.monotonic() + 20
        while number == 0 and len(os.listdir(self.folder)) < self.others:  # noqa: PTH208
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        (self.folder / str(number)).touch()
        return number, os.getpid()


def run(dataset: Dataset, tokens: range, num_workers: int, timeout_s: float = 0.0):
    return run_loader(
        dataset, tokens, num_workers=num_workers, prefetch=2, pin=False, timeout_s=timeout_s
    )


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for_end(pids: set[int], within_s: float) -> set[int]:
    deadline_s = time.monotonic() + within_s
    while (left := {pid for pid in pids if is_running(pid)}) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return left


class Environment(Dataset):
    """Gives a variable of the environment as characters."""

    def __getitem__(self, number: int):
        return torch.tensor(list(os.environ.get("SET_BETWEEN", "").encode()))


def test_processes_know_what_was_set_since_the_first_ones_started(monkeypatch):
    for value in ("one", "two"):
        monkeypatch.setenv("SET_BETWEEN", value)
        (item,) = run(Environment(), range(1), 1)
        assert bytes(item.tolist()) == value.encode()


def random_states() -> list:
    return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]


def test_items_come_in_order_from_processes_with_one_thread_that_end_early_and_late():
    before = random_states()
    items = list(run(Squares((3, "late")), range(3, 14), 2))
    assert [int(square) for square, _, _ in items] == [n**2 for n in range(3, 14)]
    pids = {pid for _, pid, _ in items}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert {threads for _, _, threads in items} == {1}
    assert not wait_for_end(pids, 5)

    iterator = run(Squares((0, "late")), range(1_000_000), 2)
    pids = {next(iterator)[1] for _ in range(4)}
    iterator.close()
    assert not wait_for_end(pids, 5)
    assert random_states() == before


def test_without_processes_the_same_and_the_global_random_state_stays():
    before = random_states()
    items = list(run(Squares(), range(5), 0))
    assert [int(square) for square, _, _ in items] == [n**2 for n in range(5)]
    assert {pid for _, pid, _ in items} == {os.getpid()}
    assert random_states() == before


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_the_user_come_through_as_they_are_and_bugs_with_their_type(num_workers):
    items = run(Squares((1, "input")), range(3), num_workers)
    next(items)
    with pytest.raises(InputError, match=r"^shard x: broken$"):
        next(items)
    with pytest.raises(KeyError, match="a bug"):
        list(run(Squares((1, "bug")), range(3), num_workers))


def test_more_may_be_made_ahead_than_the_queue_has_room_for():
    items = run_loader(Squares(), range(2000), num_workers=2, prefetch=900, pin=False)
    assert [int(square) for square, _, _ in items] == [n**2 for n in range(2000)]


def test_a_token_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match=r"a token of 7\d{4} bytes"):
        list(run_loader(Squares(), [b"x" * 70_000], num_workers=1, prefetch=1, pin=False))


def test_an_error_comes_in_its_place():
    items = run(Squares((2, "late"), (3, "input")), range(6), 2)
    assert [int(next(items)[0]) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(InputError, match="broken"):
        next(items)


def test_a_process_that_takes_long_holds_no_other_up(tmp_path):
    dataset = Notes(tmp_path, others=7)
    items = list(run_loader(dataset, range(20), num_workers=2, prefetch=4, pin=False))
    assert [number for number, _ in items] == [*range(20)]
    first, *others = [pid for _, pid in items[:8]]
    assert len({*others}) == 1
    assert first not in others


def test_a_bug_tells_where_it_happened_in_its_process():
    with pytest.raises(KeyError) as bug:
        list(run(Squares((1, "bug")), range(3), 1))
    (note,) = bug.value.__notes__
    assert 'raise KeyError("a bug")' in note
    with pytest.raises(RuntimeError, match="OddError: a bug at 1"):
        list(run(Squares((1, "odd bug")), range(3), 1))


def test_a_killed_process_is_a_clear_error_and_its_neighbours_end():
    items = run(Squares((8, "killed")), range(100), 2)
    pids = {next(items)[1] for _ in range(2)}
    started_at_s = time.monotonic()
    with pytest.raises(
        InputError, match=r"loader process was ended from outside \(SIGKILL\).*num_workers"
    ):
        list(items)
    assert time.monotonic() - started_at_s < 20
    assert not wait_for_end(pids, 10)


@pytest.mark.parametrize("free", [0, 2, 4])
def test_too_few_open_files_are_a_clear_error_and_nothing_stays_open(free):
    list(run(Squares(), range(1), 1))  # the fork server is there
    gc.collect()
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # With that of the listing, which is closed again, as many as there are below the limit.
    fillers = [os.open(os.devnull, os.O_RDONLY) for _ in range(max(map(int, before)) + 8)]
    try:
        limit = max(fillers) + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        for _ in range(free):
            os.close(fillers.pop())
        with pytest.raises(InputError, match=r"cannot start.*too few files.*ulimit -n"):
            list(run(Squares(), range(1), 1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for filler in fillers:
            os.close(filler)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= len(before)  # noqa: PTH208


SCRIPT = """
    import os, signal, sys, time
    sys.path.insert(0, {folder!r})
    from test_workers import Squares, run

    if __name__ == "__main__":
        stopped = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
        items = run(Squares((0, "late")), range(60), 2)
        print(os.getpid(), *{{next(items)[1] for _ in range(4)}}, flush=True)
        while not stopped:
            time.sleep(0.01)
        time.sleep(1)  # long enough for processes that would die of the signal
        print(sum(1 for _ in zip(range(40), items)), flush=True)
        time.sleep(600)
"""


def test_processes_outlive_a_signal_to_the_whole_group_but_not_the_training_process(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT).format(folder=str(Path(__file__).parent)))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        pids = {int(pid) for pid in process.stdout.readline().split()}
        assert len(pids) == 3
        os.killpg(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == "40\n"
        group = pids_of_group(process.pid)
        assert pids < group  # the fork server belongs to it too
        process.kill()
        process.wait()
        assert not wait_for_end(group, 10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_stuck_process_is_ended_when_its_batches_are_no_longer_wanted():
    items = run(Squares((6, "stuck")), range(60), 2)
    pids = {next(items)[1] for _ in range(4)}
    items.close()
    assert not wait_for_end(pids, 5)


@pytest.mark.parametrize("mischief", ["stuck", "deaf"])
def test_a_process_that_hangs_is_one_clear_error_and_none_is_left(mischief):
    items = run(Squares((6, mischief)), range(60), 2, timeout_s=2.0)
    pids = {next(items)[1] for _ in range(4)}
    started_at_s = time.monotonic()
    with pytest.raises(InputError, match=r"gave no micro-batch for 2 s \(--data\.loader_timeout_s"):
        list(items)
    assert 2 <= time.monotonic() - started_at_s < 10
    assert not wait_for_end(pids, 1)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_a_process_is_no_further_ahead_than_it_may(prefetch, tmp_path):
    items = run_loader(Notes(tmp_path), range(40), num_workers=2, prefetch=prefetch, pin=False)
    for number in range(3):
        assert next(items)[0] == number
        allowed = {tmp_path / str(other) for other in range(number + 1 + 2 * prefetch)}
        deadline_s = time.monotonic() + 10
        while (made := set(tmp_path.iterdir())) < allowed and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert made == allowed
    time.sleep(0.2)
    assert set(tmp_path.iterdir()) == allowed
    items.close()


def test_a_process_that_is_late_loses_nothing(monkeypatch):
    monkeypatch.setattr("magneto_dist.data.pool._LOOK_S", 0.2)
    items = run(Squares((6, "late")), range(12), 2, timeout_s=30.0)
    assert [int(square) for square, _, _ in items] == [n**2 for n in range(12)]


def pids_of_group(group: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if int(stat.read_text().rpartition(")")[2].split()[2]) == group:
                found.add(int(stat.parent.name))
    return found


def test_the_default_is_this_ranks_cores_but_one_and_at_most_8(monkeypatch):
    counts = {}
    for cores in (1, 2, 8, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        counts[cores] = [default_num_workers(ranks_per_node) for ranks_per_node in (1, 4)]
    assert counts == {1: [1, 1], 2: [1, 1], 8: [7, 1], 64: [8, 8]}
