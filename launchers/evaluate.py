"""Scores a trained run on a split of a data set: every item once, on any number of processes.

accelerate launch launchers/evaluate.py --run RUN_DIR
accelerate launch launchers/evaluate.py --run RUN_DIR --threshold best --report DIR
torchrun --nproc_per_node 2 -- launchers/evaluate.py --run RUN_DIR   # without -- it takes our --run

--threshold FILE.json takes the threshold (and temperature) that an evaluation has written with
--out; so does predict.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from magneto_dist.config import Config, Decoder
from magneto_dist.config_io import clear_parser_errors
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources.demo import ensure_demo
from magneto_dist.decision import decision_of
from magneto_dist.errors import InputError, exit_with_clear_errors
from magneto_dist.scoring.report import require_folders, terminal_table, write_report
from magneto_dist.scoring.results import results, write_results
from magneto_dist.scoring.split import (
    ScoringOptions,
    require_scorable,
    score_split,
    without_baselines,
)
from magneto_dist.trained_run import TrainedRun, load_run
from magneto_dist.training.process import die_with_launcher, launched_world
from magneto_dist.training.session import Session


def main() -> None:
    """Command line -> table in the terminal, --out and --report."""
    with clear_parser_errors("evaluate.py"):
        given = _parser().parse_args()
    die_with_launcher()
    out, report = (Path(path) if path else None for path in (given.out, given.report))
    run = load_run(Path(given.run))
    run = replace(run, config=_settings(run.config, given))
    dataset = Dataset.open(
        run.config.data.path or str(ensure_demo()),
        run.config.data.cache_dir,
        run.config.data.cache_gb,
    )
    options = _options(given, run)
    require_scorable(run, dataset, options)
    require_folders(out, report)
    reason = without_baselines(run, dataset, given.baselines)
    session = Session(run.config.train)
    scored = score_split(run, session, dataset, replace(options, baselines=reason is None))
    if session.is_main:
        content = results(scored)
        print(terminal_table(content))
        if reason:
            print(f"no baselines: {reason}")
        if out:
            write_results(out, content)
            print(f"written: {out}")
        if report:
            write_report(report, scored, content, run.vocabulary)
            print(f"written: {report / 'report.md'}")
    session.close()


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, exit_on_error=False)
    add = parser.add_argument
    add("--run", required=True, help="RUN_DIR; its checkpoint with the best validation F1")
    add("--data.path", help="folder or URL of the data set; default: the run's")
    add("--data.stages", type=tuple[str, ...], help="your own, [] for none; default: the run's")
    add("--split", type=Literal["train", "validation"], default="validation", help="what to score")
    add("--out", help="JSON file: metrics under the split's name as in summary.json, and more")
    add("--report", help="folder for report.md, concepts.csv, scores.json and plots")
    add(
        "--batch_size",
        type=PositiveInt,
        help="items a process scores at once; default: the run's",
    )
    add(
        "--threshold",
        type=float | str,
        help="probability in [0, 1] of a predicted tag; best: the one with the highest F1 per item;"
        " or FILE.json; default: the run's",
    )
    add(
        "--calibrate",
        type=bool,
        default=False,
        help="fit a temperature for the final output (beyond the paper)",
    )
    add(
        "--choose_on",
        type=Literal["all", "half"],
        default="all",
        help="items that threshold and temperature are chosen on; half: all figures are those of"
        " the other half",
    )
    add(
        "--baselines",
        type=bool | None,
        help="also score what needs no training; reads the tags of the training split; default:"
        " where that is no download",
    )
    add("--resamples", type=NonNegativeInt, default=1000, help="of the bootstrap; 0: no intervals")
    add("--decoder", type=Decoder, help="of pictures; default: the run's")
    add(
        "--num_workers",
        type=NonNegativeInt,
        help="loader processes a rank; default: the run's",
    )
    add("--outliers", type=NonNegativeInt, default=0, help="foreign tags added to each item")
    return parser


def _settings(config: Config, given: Namespace) -> Config:
    """The run's, with what the command line says instead."""
    data = {name: given[name] for name in ("decoder", "num_workers") if given[name] is not None}
    data |= {name: value for name, value in vars(given.data).items() if value is not None}
    train: dict[str, Any] = {}
    if config.train.precision == "fp16" and not torch.cuda.is_available():
        train["precision"] = "no"  # a CPU can score what it could not have trained
    return replace(config, data=replace(config.data, **data), train=replace(config.train, **train))


def _options(given: Namespace, run: TrainedRun) -> ScoringOptions:
    chooses = given.threshold == "best"
    threshold = None if chooses else given.threshold
    is_main = launched_world().is_main  # the session comes later: it may wait for others
    decision = decision_of(threshold, run.decision, run.checkpoint_sha256, warns=is_main)
    if given.calibrate and decision.temperature is not None:
        raise InputError(
            f"--calibrate true fits a temperature, and {given.threshold} holds one: leave one out"
        )
    if given.choose_on == "half" and not (chooses or given.calibrate):
        raise InputError(
            "--choose_on half: nothing is chosen; add --threshold best or --calibrate true"
        )
    return ScoringOptions(
        split=given.split,
        decision=decision,
        chooses_threshold=chooses,
        calibrates=given.calibrate,
        halves=given.choose_on == "half",
        resamples=given.resamples,
        outliers=given.outliers,
        batch_size=given.batch_size,
    )


if __name__ == "__main__":
    exit_with_clear_errors(main)
