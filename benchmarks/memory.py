"""Does a training step fit into the memory of a GPU, and what fills it?

python benchmarks/memory.py [--config configs/ls.yaml] [--out memory]
python benchmarks/memory.py --measured [--limit] [--out memory_gpu]      # on a GPU

Predicts the peak of a step for every micro-batch size, with and without activation checkpointing
and mixed precision, on fake tensors (`predicted_memory.py`; no GPU is needed), and the largest
micro-batch that fits. With --measured the same steps run on this machine's GPU as well, each in a
process of its own, and the allocator's figures stand beside the predicted ones. With --limit the
allocator gets no more than --budget_gb leaves it, as if the GPU were that small.

What tensors take is predicted. What else takes memory is assumed, and added:
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from command_line import above_zero, at_least, folder_to_fill, parser
from harness import RESULTS, save
from magneto_dist.config import Config
from magneto_dist.config_io import load_config
from magneto_dist.errors import InputError, exit_with_clear_errors
from predicted_memory import StepMemory, predict
from step_memory import Measured, measure

ASSUMED = {
    "CUDA context": (
        500_000_000,
        "CUDA context and loaded kernels; PyTorch's developers measured 287 MB for one"
        " convolution when they began to load kernels lazily",
    ),
    "cuBLAS workspaces": (
        2 * 8_519_680,
        "8.1 MiB for each handle and stream on GPUs before Hopper (PyTorch's allocator shows it);"
        " two: forward and backward threads",
    ),
    "cuDNN workspace": (
        250_000_000,
        "for the algorithms that its heuristics choose; a guess, not known before a GPU is asked",
    ),
}
FRAGMENTATION = 0.1  # of what tensors take: reserved beyond allocated; a guess, too


@dataclass(frozen=True)
class Case:
    """One way to cut and compute the global batch."""

    precision: str
    micro_batch: int
    recomputes: bool
    """With activation checkpointing."""

    def of(self, config: Config) -> Config:
        """`config` in this way."""
        train = replace(
            config.train,
            precision=self.precision,  # type: ignore[arg-type]
            max_micro_batch_size=self.micro_batch,
            global_batch_size=max(config.train.global_batch_size, self.micro_batch),
            activation_checkpointing=self.recomputes,
        )
        return replace(config, train=train, model=replace(config.model, backbone_weights="none"))

    def __str__(self) -> str:
        checkpointing = ", checkpointing" if self.recomputes else ""
        return f"{self.precision}, micro-batch {self.micro_batch}{checkpointing}"


def main() -> None:
    """Command line -> table, plot, and files with --out."""
    given = _options().parse_args()
    if given.measured and not torch.cuda.is_available():
        raise InputError("--measured: there is no CUDA device")
    config = load_config(given.config)
    budget = int(given.budget_gb * 1e9)
    cases = [
        Case(*values)
        for values in product(given.precisions, given.micro_batches, _flags(given.checkpointing))
    ]
    predicted = cache(lambda case: predict(case.of(config), given.num_tags))  # seconds each
    rows = [row_of(case, predicted(case), budget) for case in tqdm(cases, disable=None)]
    largest = [
        largest_fit(config, predicted, precision, recomputes, budget)
        for precision, recomputes in product(given.precisions, _flags(given.checkpointing))
        if not given.quick
    ]
    if given.measured:
        limit = budget - ASSUMED["CUDA context"][0] if given.limit else None
        for case, row in zip(cases, rows, strict=True):
            snapshot = given.snapshots and str(given.snapshots / f"{case}.pickle")
            row["measured"] = asdict(
                _measure_alone(case.of(config), given.num_tags, limit, snapshot)
            )
    _print(rows, largest, given.budget_gb)
    if given.out:
        measured = {
            "question": f"memory of a training step of {given.config}, bytes",
            "num_tags": given.num_tags,
            "image_size": config.augment.image_size,
            "budget_bytes": budget,
            "assumed": {name: {"bytes": b, "why": why} for name, (b, why) in ASSUMED.items()},
            "assumed_fragmentation": FRAGMENTATION,
            "cases": rows,
            "largest_micro_batch": largest,
        }
        save(given.out, measured)
        plot(rows, budget, RESULTS / f"{given.out}.png")


def _options() -> argparse.ArgumentParser:
    assumed = "\n".join(f"  {name}: {b / 1e6:.0f} MB; {why}" for name, (b, why) in ASSUMED.items())
    fragmentation = f"  fragmentation: {FRAGMENTATION:.0%} of what tensors take"
    options = parser(f"{__doc__}{assumed}\n{fragmentation}", timed=False)
    options.add_argument(
        "--config", type=Path, default=Path("configs/ls.yaml"), help="(default: LS)"
    )
    options.add_argument(
        "--num_tags",
        type=at_least(1),
        default=24_056,
        help="of the vocabulary (default: 24056, LS)",
    )
    options.add_argument(
        "--micro_batches",
        type=at_least(1),
        nargs="+",
        default=[64, 128, 256],
        help="(default: 64 128 256)",
    )
    options.add_argument(
        "--precisions",
        nargs="+",
        default=["fp16", "no"],
        choices=("no", "fp16", "bf16"),
        help="(default: fp16 no)",
    )
    options.add_argument(
        "--checkpointing", choices=("no", "yes", "both"), default="both", help="(default: both)"
    )
    options.add_argument(
        "--budget_gb", type=above_zero, default=10.5, help="1e9 bytes of the GPU (default: 10.5)"
    )
    options.add_argument("--quick", action="store_true", help="do not look for the largest")
    options.add_argument("--measured", action="store_true", help="also on this machine's GPU")
    options.add_argument(
        "--snapshots", type=folder_to_fill, help="folder for the allocator's history"
    )
    options.add_argument("--limit", action="store_true", help="with --measured: no more memory")
    return options


def _flags(chosen: str) -> tuple[bool, ...]:
    return {"no": (False,), "yes": (True,), "both": (False, True)}[chosen]


def row_of(case: Case, memory: StepMemory, budget: int) -> dict:
    """What is written of a case; bytes."""
    extras = {name: size for name, (size, _) in ASSUMED.items()}
    extras["fragmentation"] = int(FRAGMENTATION * memory.peak)
    total = memory.peak + sum(extras.values())
    buckets = max(0, memory.all_gradients - memory.gradients)
    return {
        **asdict(case),
        "parts": memory.parts(),
        "peak_at": memory.peak_at,
        "tensors": memory.peak,
        "extras": extras,
        "total": total,
        "fits": total <= budget,
        # gradient_as_bucket_view: gradients never leave their buckets.
        "total_with_ddp": total + int((1 + FRAGMENTATION) * buckets),
    }


def largest_fit(
    config: Config,
    predicted: Callable[[Case], StepMemory],
    precision: str,
    recomputes: bool,
    budget: int,
) -> dict:
    """The largest micro-batch, in whole groups of ghost batch norm, whose step fits.

    Found from a straight line through two predictions, and confirmed by predicting it and the next.

    Args:
        config: whose step.
        predicted: the memory of a case of it.
        precision: of the cases.
        recomputes: of the cases.
        budget: bytes.
    """
    group = config.model.batch_norm_group_size

    def total(micro_batch: int) -> int:
        case = Case(precision, micro_batch, recomputes)
        return row_of(case, predicted(case), budget)["total"]

    base = config.train.global_batch_size
    small, large = total(base), total(2 * base)  # one micro-step each
    per_row = (large - small) / base
    found = max(group, int((budget - small) / per_row + base) // group * group)
    while found > group and total(found) > budget:
        found -= group
    while total(found + group) <= budget:
        found += group
    return {
        "precision": precision,
        "recomputes": recomputes,
        "micro_batch": found,
        "total": total(found),
    }


def _measure_alone(
    config: Config, num_tags: int, limit: int | None, snapshot: str | None
) -> Measured:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(measure, config, num_tags, limit, snapshot).result()


# Shown ------------------------------------------------------------------------------------------


def _print(rows: Sequence[dict], largest: Sequence[dict], budget_gb: float) -> None:
    names = list(rows[0]["parts"])
    print(f"\npredicted peak of a training step, GB of 1e9 bytes; {budget_gb} are there")
    for row in rows:
        parts = ", ".join(f"{name} {row['parts'][name] / 1e9:.2f}" for name in names)
        print(
            f"{_name(row)}: tensors {row['tensors'] / 1e9:.2f}, with what is assumed"
            f" {row['total'] / 1e9:.2f} (DDP {row['total_with_ddp'] / 1e9:.2f}):"
            f" {'fits' if row['fits'] else 'does not fit'}\n  {parts}\n  at {row['peak_at']}"
        )
        if measured := row.get("measured"):
            print(
                f"  measured: allocated {measured['allocated'] / 1e9:.2f}"
                f" ({measured['allocated'] / row['tensors']:.2f} of tensors predicted), reserved"
                f" {measured['reserved'] / 1e9:.2f}, beyond {measured['context'] / 1e9:.2f}"
                f"{', ran out' if measured['ran_out'] else ''}"
            )
    for found in largest:
        case = Case(found["precision"], found["micro_batch"], found["recomputes"])
        print(f"largest that fits: {case} ({found['total'] / 1e9:.2f} GB)")


def _name(row: dict) -> str:
    return str(Case(row["precision"], row["micro_batch"], row["recomputes"]))


def plot(rows: Sequence[dict], budget: int, path: Path) -> None:
    """A bar for each case, of its parts, beside the budget."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    parts = [{**row["parts"], **row["extras"]} for row in rows]
    left = [0.0] * len(rows)
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for name, colour in zip(parts[0], colours, strict=False):
        widths = [part[name] / 1e9 for part in parts]
        axes.barh([_name(row) for row in rows], widths, left=left, label=name, color=colour)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.axvline(budget / 1e9, color="black", linestyle="--", label="budget")
    axes.invert_yaxis()
    axes.set_xlabel("peak of a training step, predicted, GB (1e9 bytes)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    exit_with_clear_errors(main)
