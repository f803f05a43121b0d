"""Times alternatives in turn, in one run, and writes down what was measured on what.

Machines differ and shared ones stall: what counts is the ratio within one run. Every alternative is
called in each round, in an order that turns, and judged by its median round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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
) -> list[Timing]:
    """As `compare`, of alternatives that take their own time and return it, in seconds."""
    names = list(alternatives)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in tqdm(range(-1, rounds), desc="rounds", disable=None):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken_s = alternatives[name]()
            if number >= 0:
                seconds[name].append(taken_s)
    reference = seconds[names[0]]
    return [
        Timing(
            name,
            num_items / median(seconds[name]),
            num_items / max(seconds[name]),
            num_items / min(seconds[name]),
            median(ours / own for ours, own in zip(reference, seconds[name], strict=True)),
            (notes or {}).get(name, ""),
        )
        for name in names
    ]


def _seconds(call: Callable[[], object]) -> float:
    started_at_s = time.perf_counter()
    call()
    return time.perf_counter() - started_at_s


def report(question: str, timings: Sequence[Timing], out: str | None) -> None:
    """Prints a table and, with `out`, writes it with its provenance to `benchmarks/results/`."""
    width = max(len(timing.name) for timing in timings)
    print(f"\n{question}\n{'':<{width}}  items/s  (slowest - fastest round)  ratio")
    for t in timings:
        spread = f"({t.slowest_per_s:.0f} - {t.fastest_per_s:.0f})"
        print(f"{t.name:<{width}}  {t.per_s:7.0f}  {spread:<25}  {t.ratio:5.2f}  {t.note}")
    if out:
        save(out, {"question": question, "timings": [asdict(t) for t in timings]})


def save(out: str, measured: Mapping[str, object], folder: Path = RESULTS) -> None:
    """Writes what was measured, with its provenance, to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({**provenance(), **measured}, indent=1)
    (folder / f"{out}.json").write_text(content + "\n")


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
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": revision.stdout.strip(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def parser(doc: str | None, *, timed: bool = True) -> argparse.ArgumentParser:
    """The options that every benchmark has; `--rounds` those that take times."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if timed:
        made.add_argument("--rounds", type=int, default=7, help="timed calls of each (default: 7)")
    made.add_argument("--out", help="write benchmarks/results/OUT.json (default: only print)")
    return made


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
