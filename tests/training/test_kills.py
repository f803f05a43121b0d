"""A run that is killed again and again, inside saves too: no step wrong, none lost that was saved.

1. A seed says when a run is hit (as it starts, after a step, inside a save) and by which signal.
2. After each hit the folder is looked at: what can be loaded, and how many steps are lost.
3. The run is started again, to the next hit or to its end; then it must equal an undisturbed one.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from magneto_dist.training.checkpoint import find_damage, finish_renames
from processes import TINY, losses, status, summary
from warm import Forked, Warm

STEPS, EPOCH_STEPS, SAVE_STEPS = 24, 6, 4
DUE = [s for s in range(1, STEPS + 1) if s % SAVE_STEPS == 0 or s % EPOCH_STEPS == 0]
"""Steps after which a checkpoint is written."""
KILL, TERM = signal.SIGKILL, signal.SIGTERM


@dataclass(frozen=True)
class Hit:
    """When a run is hit, and by what."""

    where: Literal["start", "step", "save"]
    signal: signal.Signals
    steps: int
    """Of this launch, before the hit: "step" alone."""
    delay_s: float
    """From the launch, from the step, or from the beginning of a save."""

    @classmethod
    def draw(cls, rng: random.Random) -> Hit:
        where = rng.choice(["start", "step", "save", "save"])
        longest_s = {"start": 1.0, "step": 0.1, "save": 0.08}[where]
        return cls(where, rng.choice([KILL, TERM]), rng.randint(1, 6), rng.uniform(0, longest_s))


@dataclass(frozen=True)
class Found:
    """What lies in a run folder."""

    trained: int
    """Last step in metrics.jsonl."""
    saved: int
    """Step of the newest checkpoint, which has to be sound."""

    @classmethod
    def at(cls, run_dir: Path) -> Found:
        finish_renames(run_dir)  # the first thing that the next launch does
        folders = sorted((run_dir / "checkpoints").glob("step-*"))
        assert not folders or find_damage(folders[-1]) is None, folders[-1]
        saved = int(folders[-1].name.removeprefix("step-")) if folders else 0
        return cls(last_step(run_dir), saved)


def last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    whole_lines = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    return json.loads(whole_lines[-1])["step"] if whole_lines else 0


def start(warm: Warm, data: Path, run_dir: Path, keep: int, asynchronous: bool) -> Forked:
    return warm.start(
        "train_ls.py",
        *TINY,
        f"--max_steps={STEPS}",
        f"--checkpoint.every_steps={SAVE_STEPS}",
        f"--checkpoint.keep={keep}",
        f"--checkpoint.asynchronous={str(asynchronous).lower()}",
        "--train.max_micro_batch_size=8",
        "--data.ledger=true",
        f"--data.path={data}",
        f"--output_dir={run_dir}",
    )


def hit(run: Forked, run_dir: Path, before: Found, planned: Hit) -> None:
    """Sends the signal at the moment that was planned, or when the run ends before."""
    checkpoints = run_dir / "checkpoints"
    if planned.where == "step":
        # What a kill has lost is cut away first.
        wait_until(run, lambda: last_step(run_dir) <= before.saved)
        wait_until(run, lambda: last_step(run_dir) >= before.saved + planned.steps)
    elif planned.where == "save":
        # One that a kill has left is removed first.
        wait_until(run, lambda: not any(checkpoints.glob(".step-*.tmp")))
        wait_until(run, lambda: any(checkpoints.glob(".step-*.tmp")))
    time.sleep(planned.delay_s)
    run.send_signal(planned.signal)


def wait_until(run: Forked, happened: Callable[[], bool], within_s: float = 60) -> None:
    deadline_s = time.monotonic() + within_s
    while not happened() and not run.has_ended and time.monotonic() < deadline_s:
        time.sleep(0.001)


def certainly_saved(trained: int, asynchronous: bool) -> int:
    """Step of the newest save that no kill after the step `trained` can have hit.

    One that follows the last step may not have begun. Written while training goes on, the one that
    has begun last may be under way; it began when the one before was in its place.
    """
    begun = [0, 0, *(step for step in DUE if step < trained)]
    return begun[-2 if asynchronous else -1]


def assert_little_is_lost(
    run: Forked, run_dir: Path, code: int, before: Found, planned: Hit, asynchronous: bool
) -> None:
    after = Found.at(run_dir)
    assert after.saved >= before.saved
    if planned.signal == KILL:
        assert after.saved >= certainly_saved(after.trained, asynchronous), (before, after)
    elif code == 75:
        assert after.saved == after.trained
        assert status(run_dir)["state"] == "preempted"
        assert status(run_dir)["step"] == after.saved
    else:  # before it listened to signals, and so before it did anything
        assert code == -TERM, run.output
        assert after == before


def campaign(warm: Warm, data: Path, folder: Path, hits: int, seed: int) -> Counter[str]:
    """Hits runs, one after the other, until there were `hits`; the last one goes on to its end."""
    rng, tally = random.Random(seed), Counter[str]()
    undisturbed = folder / "undisturbed"
    assert warm.wait(start(warm, data, undisturbed, keep=2, asynchronous=True)) == 0
    while tally["hits"] < hits:
        tally["runs"] += 1
        run_dir, keep = folder / f"run-{tally['runs']}", rng.choice([1, 2])
        asynchronous = rng.choice([False, True])
        code = -1
        while code != 0:
            before = Found.at(run_dir)
            run = start(warm, data, run_dir, keep, asynchronous)
            if tally["hits"] == hits:
                code = warm.wait(run)
                assert code == 0, run.output
                break
            planned = Hit.draw(rng)
            hit(run, run_dir, before, planned)
            code = warm.wait(run)
            if code == 0:  # it was done already
                break
            assert_little_is_lost(run, run_dir, code, before, planned, asynchronous)
            count(tally, planned, before, run_dir, code)
        assert_same_run(run_dir, undisturbed)
    return tally


def count(tally: Counter[str], planned: Hit, before: Found, run_dir: Path, code: int) -> None:
    after = Found.at(run_dir)
    half_written = any((run_dir / "checkpoints").glob(".step-*"))
    tally["hits"] += 1
    tally[f"{planned.signal.name} ({planned.where})"] += 1
    tally["left a checkpoint half-written"] += half_written
    if planned.signal == KILL:
        tally["steps lost to SIGKILL"] += after.trained - after.saved
    else:
        tally["steps lost to SIGTERM"] += after.trained - after.saved if code == 75 else 0
        tally["SIGTERM before the run listened"] += code == -TERM


def assert_same_run(run_dir: Path, other: Path) -> None:
    assert status(run_dir)["state"] == "done"
    assert losses(run_dir) == losses(other)
    assert summary(run_dir)["validation"] == summary(other)["validation"]
    for name in ("ledger/rank-00000.jsonl", f"checkpoints/step-{STEPS:08d}/model.safetensors"):
        assert (run_dir / name).read_bytes() == (other / name).read_bytes(), name


def test_a_few_hits(warm: Warm, demo_shards: Path, tmp_path: Path) -> None:
    assert campaign(warm, demo_shards, tmp_path, hits=5, seed=0)["hits"] == 5


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_hundred_hits(
    warm: Warm, demo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tally = campaign(warm, demo_shards, tmp_path, hits=200, seed=1)
    with capsys.disabled():
        print("\n" + "\n".join(f"{number:5d}  {what}" for what, number in sorted(tally.items())))
    assert tally["steps lost to SIGTERM"] == 0
    assert tally["left a checkpoint half-written"] >= 20  # else few hits went into saves
