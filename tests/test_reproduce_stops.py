"""The grid under Ctrl-C and SIGKILL: it goes on where it was, and reports what it would have."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from magneto_dist.data.sources import demo
from processes import TINY, wait_for_step
from warm import REPOSITORY, ForkedRanks, shared

Started = subprocess.Popen[str] | ForkedRanks
Start = Callable[[Path], Started]
TINY_GRID = [
    *TINY,
    "--model.backbone=squeezenet1_1",
    "--model.frozen_stages=1",
    "--train.global_batch_size=4",
    "--train.epochs=3",  # of 8 steps
    "--checkpoint.every_steps=3",
]
LAST_STEP = 24
AUX, BCE, NO_TAD = "magneto-aux", "magneto-aux-bce", "magneto-aux-no-tad"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("grid")
    demo.build(folder / "data", items=32, num_processes=1)
    torch.manual_seed(0)
    save_file(models.squeezenet1_1(weights=None).state_dict(), folder / "weights.safetensors")
    weights = f"--model.backbone_weights={folder / 'weights.safetensors'}"
    return ["--data", str(folder / "data"), "--seeds", "0", *TINY_GRID, weights]


def _forked(words: list[str]) -> Start:
    script = str(REPOSITORY / "tests" / "forked_grid.py")
    return lambda work: shared().start_ranks(script, *words, "--work", str(work), ranks=1)


def _as_a_user(words: list[str]) -> Start:
    script = str(REPOSITORY / "benchmarks" / "reproduce_ls.py")

    def start(work: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, script, *words, "--work", str(work)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        )

    return start


def test_a_grid_that_was_stopped_and_killed_reports_what_it_would_have(words, tmp_path):
    start, work = _forked([*words, "--experiments", "figure10"]), tmp_path / "gestört"
    logs = [_ctrl_c(start, work, AUX), _kill_all(start, work, BCE)]
    _lose_last_note(work, AUX)
    _require_report_of_an_undisturbed_grid(start, work, tmp_path / "undisturbed")
    _require_gone_on(work, logs)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_same_by_the_command_that_people_start(words, tmp_path):
    start, work = _as_a_user(words), tmp_path / "gestört"
    logs = [_ctrl_c(start, work, AUX), _kill_all(start, work, BCE)]
    done = _files(work, AUX)
    _kill_grid(start, work, NO_TAD)
    _lose_last_note(work, BCE)
    _require_report_of_an_undisturbed_grid(start, work, tmp_path / "undisturbed")
    _require_gone_on(work, logs)
    assert _files(work, AUX) == done


def _ctrl_c(start: Start, work: Path, run: str) -> tuple[str, str]:
    """In the middle of a run, as a terminal does it: every process is told.

    Returns the run and its log.
    """
    grid, run_dir = start(work), _run_dir(work, run)
    wait_for_step(grid, run_dir, 5)
    os.killpg(grid.pid, signal.SIGINT)
    output, _ = grid.communicate()
    assert grid.returncode == 130, output
    assert "start the same command again to go on" in output
    status = json.loads((run_dir / "status.json").read_bytes())
    assert status["state"] == "preempted"
    assert 5 <= status["step"] < LAST_STEP
    return run, (run_dir / "metrics.jsonl").read_text()


def _kill_all(start: Start, work: Path, run: str) -> tuple[str, str]:
    """SIGKILL for every process in the middle of a run.

    Returns the run and the part of its log that is safe.
    """
    grid, run_dir = start(work), _run_dir(work, run)
    wait_for_step(grid, run_dir, 16)
    os.killpg(grid.pid, signal.SIGKILL)
    grid.communicate()
    assert json.loads((run_dir / "status.json").read_bytes())["state"] == "running"
    newest = max((run_dir / "checkpoints").glob("step-*/COMPLETE")).parent.name
    step = int(newest.removeprefix("step-"))
    assert 3 <= step < LAST_STEP
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)[:-1]  # may be torn
    return run, "".join(line for line in lines if json.loads(line)["step"] <= step)


def _kill_grid(start: Start, work: Path, run: str) -> None:
    """SIGKILL for the grid alone in the middle of a run, whose launcher saves and ends."""
    grid, run_dir = start(work), _run_dir(work, run)
    wait_for_step(grid, run_dir, 3)
    os.kill(grid.pid, signal.SIGKILL)
    grid.communicate()


def _lose_last_note(work: Path, run: str) -> None:
    """As if the grid was killed between the end of a run and the note of what made it."""
    (_run_dir(work, run) / "provenance.json").unlink()


def _require_report_of_an_undisturbed_grid(start: Start, work: Path, undisturbed: Path) -> None:
    for folder in (work, undisturbed):
        grid = start(folder)
        output, _ = grid.communicate()
        assert grid.returncode == 0, output
    assert _told(work) == _told(undisturbed)


def _require_gone_on(work: Path, logs: list[tuple[str, str]]) -> None:
    """Lines of a log hold times, which no second training repeats."""
    for run, log in logs:
        assert '"step": 3,' in log
        assert (_run_dir(work, run) / "metrics.jsonl").read_text().startswith(log)


def _run_dir(work: Path, run: str) -> Path:
    return work / "runs" / run / "seed-0"


def _files(work: Path, run: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in _run_dir(work, run).rglob("*.json*")}


def _told(work: Path) -> tuple[object, ...]:
    """What the report tells: text before the times of the runs, numbers, and pictures."""
    report = work / "report"
    text, _, _ = (report / "report.md").read_text("utf-8").partition("\n## Runs\n")
    saved = json.loads((report / "report.json").read_bytes())
    runs = {
        name: [{key: value for key, value in seed.items() if key != "made_by"} for seed in of_run]
        for name, of_run in saved["runs"].items()
    }
    pictures = {path.name: path.read_bytes() for path in report.glob("*.png")}
    assert {"magneto-aux", "magneto-aux-bce"} <= runs.keys()
    assert "figure10-f1.png" in pictures
    return text, runs, saved["claims"], pictures
