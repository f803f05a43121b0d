"""Scores a trained run on a split of a data set: every item once, on any number of processes.

accelerate launch launchers/evaluate.py --run RUN_DIR
accelerate launch launchers/evaluate.py --run RUN_DIR --data.path DIR_OR_URL --out FILE.json
torchrun --nproc_per_node 2 -- launchers/evaluate.py --run RUN_DIR   # without -- it takes our --run
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from magneto_dist.config import Config, Decoder
from magneto_dist.config_io import clear_parser_errors
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources.demo import ensure_demo
from magneto_dist.errors import InputError, exit_with_clear_errors
from magneto_dist.report import final_table
from magneto_dist.scoring import require_scorable, score_split, write_scores
from magneto_dist.trained_run import load_run
from magneto_dist.training.process import die_with_launcher
from magneto_dist.training.session import Session


def main() -> None:
    """Command line -> table in the terminal, and --out."""
    with clear_parser_errors("evaluate.py"):
        options = _parser().parse_args()
    die_with_launcher()
    out = Path(options.out) if options.out else None
    if out and not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}; make it first")
    run = load_run(Path(options.run))
    run = replace(run, config=_settings(run.config, options))
    dataset = Dataset.open(
        run.config.data.path or str(ensure_demo()),
        run.config.data.cache_dir,
        run.config.data.cache_gb,
    )
    require_scorable(run, dataset, options.split, options.outliers)
    session = Session(run.config.train)
    scores = score_split(run, session, dataset, options.split, options.batch_size, options.outliers)
    if session.is_main:
        print(final_table(scores[options.split], options.split))
        print(f"{scores['items']:,} items, {scores['items_per_second']:.0f} items/s")
        if out:
            write_scores(out, scores)
            print(f"written: {out}")
    session.close()


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, exit_on_error=False)
    add = parser.add_argument
    add("--run", required=True, help="RUN_DIR; its checkpoint with the best validation F1")
    add("--data.path", help="folder or URL of the data set; default: the run's")
    add("--data.stages", type=tuple[str, ...], help="your own, [] for none; default: the run's")
    add("--split", type=Literal["train", "validation"], default="validation", help="what to score")
    add("--out", help="JSON file: metrics under the split's name as in summary.json, and origin")
    add(
        "--batch_size",
        type=PositiveInt,
        help="items a process scores at once; default: the run's",
    )
    add(
        "--threshold",
        type=float,
        help="probability in [0, 1] of a predicted tag; default: the run's",
    )
    add("--decoder", type=Decoder, help="of pictures; default: the run's")
    add(
        "--num_workers",
        type=NonNegativeInt,
        help="loader processes a rank; default: the run's",
    )
    add("--outliers", type=NonNegativeInt, default=0, help="foreign tags added to each item")
    return parser


def _settings(config: Config, options: Namespace) -> Config:
    """The run's, with what the command line says instead."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    data = {name: given[name] for name in ("decoder", "num_workers") if name in given}
    data |= {name: value for name, value in vars(options.data).items() if value is not None}
    train = {name: given[name] for name in ("threshold",) if name in given}
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        train["precision"] = "no"  # a CPU can score what it could not have trained
    return replace(config, data=replace(config.data, **data), train=replace(config.train, **train))


if __name__ == "__main__":
    exit_with_clear_errors(main)
