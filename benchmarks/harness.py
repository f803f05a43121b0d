"""Times alternatives in turn, in one run, and writes down what was measured on what.

Machines differ and shared ones stall: what counts is the ratio within one run. Every alternative is
called in each round, in an order that turns, and judged by its median round.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "torchvision", "simplejpeg", "pillow", "opencv-python-headless",
             "nvidia-dali-cuda130", "accelerate", "deepspeed", "webdataset", "datasets", "litdata",
             "mosaicml-streaming", "onnx", "onnxruntime")  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """One alternative."""

    name: str
    per_s: float
    """Items per second in the median round."""
    slowest_per_s: float
    fastest_per_s: float
    ratio: float
    """Speed relative to the first alternative, median over the rounds."""
    note: str = ""
    rounds_per_s: tuple[float, ...] = ()
    """Items per second in each round, in the order in which they were taken."""


def compare(
    alternatives: Mapping[str, Callable[[], object]],
    num_items: int,
    rounds: int,
    notes: Mapping[str, str] | None = None,
) -> list[Timing]:
    """Calls every alternative once a round, after one round to warm up.

    Args:
        alternatives: by name; each works through the same items. The first is the reference.
        num_items: that one call works through.
        rounds: at least 3.
        notes: what else is known of an alternative, by name.
    """
    measured = {name: partial(_seconds, call) for name, call in alternatives.items()}
    return compare_measured(measured, num_items, rounds, notes)


def compare_measured(
    alternatives: Mapping[str, Callable[[], float]],
    num_items: int,
    rounds: int,
    notes: Mapping[str, str] | None = None,
    *,
    shows_bar: bool = True,
) -> list[Timing]:
    """As `compare`, of alternatives that take their own time and return it, in seconds."""
    names = list(alternatives)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    turns = [
        (number, name)
        for number in range(-1, rounds)
        for name in names[number % len(names) :] + names[: number % len(names)]
    ]
    # disable=None: where nobody looks
    with tqdm(turns, unit="call", disable=None if shows_bar else True) as bar:
        for number, name in bar:
            bar.set_description(f"round {number + 1} of {rounds}, {name}")
            taken_s = alternatives[name]()
            if number >= 0:
                seconds[name].append(taken_s)
    return timings_of(seconds, num_items, notes)


def timings_of(
    seconds: Mapping[str, Sequence[float]], num_items: int, notes: Mapping[str, str] | None = None
) -> list[Timing]:
    """Timings, given the seconds of each alternative in every round; the first is the reference."""
    reference = next(iter(seconds.values()))
    return [
        Timing(
            name,
            num_items / median(taken_s),
            num_items / max(taken_s),
            num_items / min(taken_s),
            median(ours / own for ours, own in zip(reference, taken_s, strict=True)),
            (notes or {}).get(name, ""),
            tuple(num_items / each_s for each_s in taken_s),
        )
        for name, taken_s in seconds.items()
    ]


def _seconds(call: Callable[[], object]) -> float:
    started_at_s = time.perf_counter()
    call()
    return time.perf_counter() - started_at_s


class Clock(NamedTuple):
    """A moment: compare two of them."""

    wall_s: float
    core_s: float
    """CPU time of all threads of this process and of its living child processes, so far."""


def now(device: torch.device) -> Clock:
    """This moment, once `device` has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    children = sum(_core_s(child.pid) for child in multiprocessing.active_children())
    return Clock(time.perf_counter(), time.process_time() + children)


def _core_s(pid: int | None) -> float:
    """User and system time of a process, from /proc, in steps of 10 ms."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended, or there is no /proc
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def report(question: str, timings: Sequence[Timing], out: str | None) -> None:
    """Prints a table and, with `out`, writes it with its provenance to `benchmarks/results/`."""
    width = max(len(timing.name) for timing in timings)
    print(f"\n{question}\n{'':<{width}}  items/s  (slowest - fastest round)  ratio")
    for t in timings:
        per_s, slowest, fastest = map(in_figures, (t.per_s, t.slowest_per_s, t.fastest_per_s))
        spread = f"({slowest} - {fastest})"
        print(f"{t.name:<{width}}  {per_s:>7}  {spread:<25}  {t.ratio:5.2f}  {t.note}")
    if out:
        save(out, {"question": question, "timings": [asdict(t) for t in timings]})


def in_figures(per_s: float) -> str:
    """A rate with three figures or more."""
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"


def reason_of(stderr: str) -> str:
    """Why a launcher has failed: its clear line, or the end of what it said."""
    said = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return said[0].removeprefix("error: ") if said else stderr[-3000:]


def save(out: str, measured: Mapping[str, object], folder: Path = RESULTS) -> None:
    """Writes what was measured, with its provenance, to `folder`."""
    path = folder / f"{out}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**provenance(), **measured}, indent=1) + "\n")


def provenance() -> dict[str, object]:
    """Command, commit, hardware and versions."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "command": _command(),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": revision.stdout.strip(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _command() -> str:
    """How this process was started, without the folders of this machine."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    start = ["torchrun", f"--nproc_per_node={ranks}", "--"] if ranks > 1 else ["python"]
    options = [Path(word).name if _leads_out(word) else word for word in sys.argv[1:]]
    return shlex.join([*start, f"benchmarks/{Path(sys.argv[0]).name}", *options])


def _leads_out(word: str) -> bool:
    """Whether it is a path to what others do not have at that place."""
    return Path(word).is_absolute() or ".." in Path(word).parts


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
