"""What does an option beyond the paper gain, over seeds and on two data sets?

python benchmarks/beyond_paper.py --work FOLDER

1. Data: the demo, and `skewed_demo.py`, whose concepts differ in frequency and which has more tags;
   as many validation as training items.
2. A backbone that the recipe trains on other demo data. Then it is frozen, and its features are
   cached in six views: the runs differ in what stands behind it.
3. `configs/demo.yaml` behind this backbone, as published and with the option, with the same seeds.

Told are the metrics of the last epoch, and the differences seed by seed. What is in FOLDER already
is not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import skewed_demo
from command_line import at_least, folder_to_fill, parser
from harness import provenance, save
from magneto_dist.config import Config
from magneto_dist.config_io import parse_command_line
from magneto_dist.data.sources import demo
from magneto_dist.errors import exit_with_clear_errors
from magneto_dist.recipe import run_training
from reproduce_runs import as_options
from reproduce_smoke import write_backbone

DATA_SETS = {"demo": demo.load_item, "skewed": skewed_demo.load_item}
PUBLISHED = "published"
CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
_SLOTS = {"demo": 16, "skewed": 24}

Metrics = dict[str, float]


def main() -> None:
    """Command line -> a table, and a file with --out."""
    given = _options()
    for option in (PUBLISHED, given.option):  # what is wrong with a setting shows now
        _config(given, next(iter(DATA_SETS)), _weights(given), option, given.seeds[0])
    for name, load in DATA_SETS.items():
        if not (given.work / name / "dataset.json").exists():
            skewed_demo.build(given.work / name, load, given.items)
    weights = _backbone(given)
    runs: dict[str, dict[str, list[Metrics]]] = {}
    for name in DATA_SETS:
        runs[name] = {}
        for option in (PUBLISHED, given.option):
            configs = (_config(given, name, weights, option, seed) for seed in given.seeds)
            runs[name][option] = [_metrics(config) for config in configs]
    _print(runs)
    if given.out:
        settings = {key: getattr(given, key) for key in ("items", "epochs", "seeds", "views")}
        command = str(provenance()["command"]).replace(str(given.work), "FOLDER")
        measured = {"settings": settings, "metrics_by_data_set_option_and_seed": runs}
        save(given.out, {"command": command, **measured})


def _options() -> argparse.Namespace:
    options = parser(__doc__, timed=False)
    options.add_argument(
        "--work", type=folder_to_fill, required=True, help="folder of data sets and runs"
    )
    options.add_argument(
        "--option", default="model.mapping=bilinear", help="a setting (default: %(default)s)"
    )
    options.add_argument(
        "--items", type=at_least(4), default=4000, help="to train on, and to validate on"
    )
    options.add_argument("--epochs", type=at_least(1), default=8, help="of each run (default: 8)")
    options.add_argument(
        "--views", type=at_least(1), default=6, help="of each picture (default: 6)"
    )
    options.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2])
    options.add_argument("extra", nargs="*", help="settings of all runs, after --")
    return options.parse_args()


def _backbone(given: argparse.Namespace) -> Path:
    """Weights that were trained with other demo data than the runs'."""
    data, run = given.work / "backbone-data", given.work / "backbone"
    if not (data / "dataset.json").exists():
        demo.build(data, given.items, seed=1, num_processes=1)
    settings = {"data.path": data, "output_dir": run, "data.num_workers": 0, "train.epochs": 8}
    run_training(_parse(given, settings))
    weights = _weights(given)
    if not weights.exists():
        write_backbone(run, weights)
    return weights


def _weights(given: argparse.Namespace) -> Path:
    return given.work / "backbone.safetensors"


def _config(given: argparse.Namespace, name: str, weights: Path, option: str, seed: int) -> Config:
    settings = {
        "data.path": given.work / name,
        "data.cache_dir": given.work / "cache",
        "data.feature_views": given.views,
        "data.num_workers": 0,
        "tags.max_tags": _SLOTS[name],
        "model.backbone_weights": weights,
        "model.frozen_stages": "all",
        "train.epochs": given.epochs,
        "train.eval_every_epochs": given.epochs,
        "output_dir": given.work / f"runs/{name}-{option}-{seed}",
        "seed": seed,
    }
    if option != PUBLISHED:
        key, _, value = option.partition("=")
        settings[key] = value
    return _parse(given, settings)


def _parse(given: argparse.Namespace, settings: Mapping[str, object]) -> Config:
    config = parse_command_line("", CONFIG, [*as_options(settings), *given.extra])
    return replace(config, log=replace(config.log, tensorboard=False))


def _metrics(config: Config) -> Metrics:
    run_training(config)
    summary: dict[str, Any] = json.loads(Path(config.output_dir, "summary.json").read_text())
    found = summary["validation"]
    return {
        **{f"f1 {head}": found[head]["paper"]["f1"] for head in ("final", "image", "tag")},
        "precision": found["final"]["paper"]["precision"],
        "strict precision": found["final"]["strict"]["precision"],
        "recall": found["final"]["paper"]["recall"],
        "micro f1": found["final"]["micro_f1"],
        "macro f1": found["final"]["macro_f1"],
        "average precision": found["final"]["average_precision"],
        "alpha": found["alpha"],
    }


def _print(runs: Mapping[str, Mapping[str, Sequence[Metrics]]]) -> None:
    for name, by_option in runs.items():
        published, ours = by_option.values()
        print(f"\n{name + ', %':<18}  {'published':>14}  {list(by_option)[1]:>14}  difference")
        for metric in published[0]:
            before, after = ([100 * run[metric] for run in r] for r in (published, ours))
            gain = [b - a for a, b in zip(before, after, strict=True)]
            print(
                f"{metric:<18}  {_spread(before)}  {_spread(after)}"
                f"  {mean(gain):+6.2f} ({', '.join(f'{g:+.2f}' for g in gain)})"
            )


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):6.2f} +- {stdev(values) if len(values) > 1 else 0:4.2f}"


if __name__ == "__main__":
    exit_with_clear_errors(main)
