"""What does the training loop cost over a bare one, of the same step on the same batches?

python benchmarks/train_step.py --config configs/demo.yaml --rounds 9

The loop is the real one: accelerate, ledger, metrics.jsonl, TensorBoard, progress bar, seeds of
dropout, counts of the global batch, gradients ready to be reduced. The bare one is what one would
write with torch alone. Both train on batches that lie ready, in turn, in one run.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from command_line import at_least, parser
from harness import Timing, compare_measured, report
from magneto_dist.config import Config
from magneto_dist.config_io import parse_command_line
from magneto_dist.data.loader import Loader
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources.demo import ensure_demo
from magneto_dist.errors import InputError, exit_with_clear_errors
from magneto_dist.parts import derive_plan
from magneto_dist.training.checkpoint import Progress
from magneto_dist.training.session import Session
from training_rounds import Rounds, Taken, endless, ready, training_job

FIXED_STEPS = 4


@dataclass(frozen=True)
class Overhead:
    """What the loop takes beyond the bare one, as a fraction of that; medians of the rounds."""

    timings: list[Timing]
    wall: float
    cores: float
    """By CPU time, which other processes on the machine do not lengthen."""


def main() -> None:
    """Command line -> table, and a file with --out."""
    given, overrides = _parse()
    argv = ["--config", str(given.config), *overrides]
    config = parse_command_line(str(__doc__), given.config, argv)
    dataset = Dataset.open(config.data.path or str(ensure_demo()))
    found = overhead(config, dataset, given.rounds, given.steps)
    bare, loop = found.timings
    note = f"{found.wall:+.1%} time, {found.cores:+.1%} CPU time"
    question = f"the loop of {given.config.stem} over a bare one, batch"
    report(
        f"{question} {config.train.global_batch_size}",
        [bare, replace(loop, note=note)],
        given.out,
    )


def _parse() -> tuple[argparse.Namespace, list[str]]:
    options = parser(__doc__)
    options.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    options.add_argument("--steps", type=at_least(1), default=20, help="of a round (default: 20)")
    return options.parse_known_args()


def overhead(config: Config, dataset: Dataset, rounds: int, num_steps: int) -> Overhead:
    """Takes rounds of both in turn.

    Args:
        config: of the run, in one process; its ledger, logs and metrics are on.
        dataset: whose first batches are trained on.
        rounds: timed calls of each.
        num_steps: of a call.

    Raises:
        InputError: settings for which a bare loop would need more than a bare loop has.
    """
    if config.train.precision == "fp16":
        raise InputError("--train.precision fp16: the bare loop scales no loss; take bf16 or no")
    if config.optim.clip_norm or config.train.ema_decay:
        raise InputError(
            "--optim.clip_norm, --train.ema_decay: the bare loop has neither; leave them at 0"
        )
    config = endless(replace(config, data=replace(config.data, ledger=True)))
    session = Session(config.train, config.optim.clip_norm)
    plan = derive_plan(config, session, Progress())
    loader = Loader(dataset, "train", config, session.world, plan, training=True)
    made = loader.batches(1, FIXED_STEPS)
    fixed = [list(itertools.islice(made, plan.micro_steps)) for _ in range(FIXED_STEPS)]
    with (
        tempfile.TemporaryDirectory() as folder,
        training_job(config, session, dataset, plan, loader, Path(folder)) as job,
    ):
        turns = Rounds(job, warm_steps=1)
        ways: dict[str, Callable[[], Taken]] = {
            "bare": lambda: turns.bare(fixed, num_steps),
            "loop": lambda: turns.loop(num_steps, ready(job, fixed, overlap=False)),
        }
        core_s: dict[str, list[float]] = {name: [] for name in ways}

        def call(name: str) -> float:
            taken = ways[name]()
            core_s[name].append(taken.core_s / taken.images)
            return taken.wall_s / taken.images

        timings = compare_measured({n: lambda n=n: call(n) for n in ways}, 1, rounds)
    pairs = zip(core_s["bare"][1:], core_s["loop"][1:], strict=True)
    cores = median(loop / bare for bare, loop in pairs) - 1
    return Overhead(timings, 1 / timings[1].ratio - 1, cores)


if __name__ == "__main__":
    exit_with_clear_errors(main)
