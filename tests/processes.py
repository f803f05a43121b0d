"""Launchers as real processes, and what they leave in a run folder."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from warm import PATIENCE_S, REPOSITORY, ForkedRanks, shared

_launched: list[subprocess.Popen[str] | ForkedRanks] = []

# Small enough for seconds, with every part of the real thing: backbone that trains, ghost batch
# norm, two streams, gate, augmentation, tag adding & dropping.
TINY = [
    "--augment.image_size=32",
    "--tags.max_tags=12",
    "--model.d_model=16",
    "--model.num_heads=2",
    "--model.d_ff=32",
    "--model.backbone_stages=2",
    "--model.batch_norm_group_size=4",
    "--optim.warmup_steps=0",
    "--train.global_batch_size=16",
    "--data.num_workers=0",
    "--data.num_streams=4",
    "--log.every_steps=1",
    "--log.tensorboard=false",
]


def launch(
    launcher: str,
    *options: str,
    ranks: int = 1,
    largest_file_bytes: int | None = None,
    cwd: Path | None = None,
) -> ForkedRanks:
    """Starts a launcher on `ranks` processes, forks of one that has imported it all.

    Files that would grow over `largest_file_bytes` meet an error, as on a full disk. What a test
    has not waited for is ended after it.
    """
    launched = shared().start_ranks(
        launcher, *options, ranks=ranks, cwd=cwd, largest_file_bytes=largest_file_bytes
    )
    _launched.append(launched)
    return launched


def launch_through(through: Sequence[str], launcher: str, *options: str) -> subprocess.Popen[str]:
    """Starts a launcher as people do, by a command that begins with `through`."""
    process = subprocess.Popen(
        [*through, str(REPOSITORY / "launchers" / launcher), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _launched.append(process)
    return process


def end_what_is_left() -> None:
    """Ends launched processes that a failed test has not waited for, lest they disturb the next."""
    for process in _launched:
        if process.poll() is None:
            process.kill()
            process.communicate()
    _launched.clear()


def run(
    launcher: str,
    *options: str,
    ranks: int = 1,
    through: Sequence[str] = (),
    cwd: Path | None = None,
) -> str:
    """Runs a launcher to its end, which must be a good one; returns what it printed."""
    if through:
        process = launch_through(through, launcher, *options)
    else:
        process = launch(launcher, *options, ranks=ranks, cwd=cwd)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    return output


def refused(launcher: str, *options: str) -> str:
    """The one line with which bad input ends."""
    process = launch(launcher, *options)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return error


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss of every logged step; no step may be logged twice."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["split"] == "train"]
    assert len(steps) == len(set(steps))
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}


def validations(run_dir: Path) -> list[dict]:
    """Lines of the evaluations of a run."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "validation"]


def summary(run_dir: Path) -> dict:
    """`summary.json` of a run."""
    return json.loads((run_dir / "summary.json").read_text())


def status(run_dir: Path) -> dict:
    """`status.json` of a run."""
    return json.loads((run_dir / "status.json").read_text())


def wait_for_step(process: subprocess.Popen[str] | ForkedRanks, run_dir: Path, step: int) -> None:
    """Waits until a step is logged; the run must not end before."""
    deadline_s = time.monotonic() + PATIENCE_S
    path = run_dir / "metrics.jsonl"
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s, f"step {step} never came"
        time.sleep(0.02)


def damage_picture(data: Path, shard: str, row: int) -> str:
    """Writes over the head of a picture; returns the key of its sample."""
    words = (data / f"{shard}.idx").read_text().splitlines()[row + 1].split()
    with (data / f"{shard}.tar").open("r+b") as file:
        file.seek(int(words[1]))
        file.write(b"no picture")
    return words[-1].removesuffix(".json")
