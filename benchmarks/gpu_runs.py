"""A part of `gpu.py` at work: a process group of its own that is watched, and ended in time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import IO

from gpu_parts import ROOT, Part
from magneto_dist.errors import InputError


@dataclass(frozen=True)
class Outcome:
    """What became of a part."""

    part: str
    state: str
    """done, failed, out of time, not started."""
    exit_code: int | None
    wall_s: float
    limit_s: float
    device_memory_mib: dict[str, float] | None
    """Of the whole GPU, sampled: before the part, and its most; None without nvidia-smi."""
    device_busy_percent: float | None
    """Median over the samples of the share of time in which a kernel ran."""
    result: dict | None
    log: Path = field(repr=False)


def run_part(
    part: Part, left_s: float, work: Path, *, watches_gpu: bool, grace_s: float = 10.0
) -> Outcome:
    """Runs a part to its end, or to the end of its time.

    Args:
        part: what to run.
        left_s: of the time for all; the part has no more than this.
        work: where its log goes.
        watches_gpu: sample the GPU's memory.
        grace_s: between SIGTERM and SIGKILL.
    """
    limit_s = min(part.limit_s, left_s)
    log = work / f"{part.name}.log"
    if limit_s <= 0:
        return Outcome(part.name, "not started", None, 0.0, 0.0, None, None, None, log)
    work.mkdir(parents=True, exist_ok=True)
    if not part.keeps:
        for left in (part.leaves, *part.pictures):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    started_at_s = time.monotonic()
    with _watching(work / f"{part.name}.smi", watches_gpu) as samples, log.open("w") as output:
        exit_code = _run([sys.executable, *part.command], limit_s, grace_s, output)
    wall_s = time.monotonic() - started_at_s
    memory, busy = _device_use(samples) if watches_gpu else (None, None)
    state = {None: "out of time", 0: "done"}.get(exit_code, "failed")
    result = None
    try:
        result = part.read(part.leaves)
    except (OSError, ValueError, LookupError, ElementTree.ParseError, InputError) as error:
        state = "failed" if state == "done" else state
        with log.open("a") as output:
            print(f"no result can be read: {error!r}", file=output)
    return Outcome(part.name, state, exit_code, wall_s, limit_s, memory, busy, result, log)


def _run(command: list[str], limit_s: float, grace_s: float, output: IO[str]) -> int | None:
    """Its exit code; None where it had to be ended. Nothing that it started is left."""
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
    )
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _watching(samples: Path, wanted: bool) -> Iterator[Path]:
    """Has nvidia-smi write memory (MiB) and use (%) of the first visible GPU, twice a second."""
    process = None
    if wanted:
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        query = "--query-gpu=memory.used,utilization.gpu"
        command = ["nvidia-smi", "-i", gpu, query, "--format=csv,noheader,nounits", "-lms", "500"]
        with suppress(FileNotFoundError), samples.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
    try:
        yield samples
    finally:
        if process is not None:
            process.terminate()
            process.wait()


def _device_use(samples: Path) -> tuple[dict[str, float] | None, float | None]:
    rows = []
    for line in samples.read_text().splitlines():
        with suppress(ValueError):
            memory, busy = map(float, line.split(","))
            rows.append((memory, busy))
    if not rows:
        return None, None
    memory_mib, busy_percent = zip(*rows, strict=True)
    return {"before": memory_mib[0], "most": max(memory_mib)}, median(busy_percent)
