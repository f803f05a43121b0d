"""What a study of the paper's is made of: what is trained, told of it, and claimed.

1. `Run`: what is trained. It is named once and trained once a seed, however many tables use it.
2. `Experiment`: a table or figure of the paper; its runs, its numbers, its claims.
3. `Study`: the runs and experiments on one data set, and settings for a small one.

`reproduce_nus_wide_grid.py` and `reproduce_ls_grid.py` hold the two studies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal


@dataclass(frozen=True)
class Run:
    """One training run, for every seed."""

    name: str
    title: str
    settings: Mapping[str, object] = field(default_factory=dict)
    """What it changes in its configuration."""
    launcher: str = "train_nuswide.py"
    config: str = "nuswide.yaml"
    """File in `configs/`."""
    init_from: str | None = None
    """Name of the run whose weights it starts from (section 5.2)."""


@dataclass(frozen=True)
class Metric:
    """A number of a run."""

    heading: str
    digits: int = 2


METRICS: Mapping[str, Metric] = {
    "precision": Metric("Prec (%)"),
    "recall": Metric("Recall (%)"),
    "f1": Metric("F1 (%)"),
    "image_f1": Metric("F1 of the image stream (%)"),
    "tag_f1": Metric("F1 of the tag stream (%)"),
    "f1_on_the_way": Metric("F1, mean over evaluations (%)"),
    "outlier": Metric("Outlier (%)"),
    "f1_with_outliers": Metric("F1 with outliers (%)"),
    "alpha": Metric("α, mean", 3),
    "alpha_skew": Metric("distance of mean α from 0.5", 3),
    "alpha_std": Metric("α, standard deviation over tags", 3),
    "alpha_extreme": Metric("tags with α < 0.1 or > 0.9 (%)", 1),
    "alpha_unrest": Metric("unrest of α at the beginning", 4),
}
"""Percentages and, for alpha, fractions of 1; `reproduce_results.py` says how each is taken."""
NEED_OUTLIERS = {"outlier", "f1_with_outliers"}
NEED_PREDICTIONS = {"alpha_std", "alpha_extreme"}


Printed = float | tuple[float, float]
"""A number of the paper, or the least and the most that it gives."""


@dataclass(frozen=True)
class Claim:
    """The paper says that one number is larger than another; each is (run, metric)."""

    text: str
    place: str
    more: tuple[str, str]
    less: tuple[str, str]


def more(run: str, than: str, metric: str, text: str, place: str) -> Claim:
    """A claim about the same number of two runs."""
    return Claim(text, place, (run, metric), (than, metric))


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper."""

    name: str
    title: str
    place: str
    """Where the paper has it."""
    runs: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    paper: Mapping[str, Mapping[str, Printed]] = field(default_factory=dict)
    """Run -> metric -> what the paper prints; figures have none in print."""
    claims: tuple[Claim, ...] = ()
    curves: tuple[str, ...] = ()
    """What is drawn over the steps: f1 or outputs (validation), alpha (training)."""
    bars: str | None = None
    """Metric that is drawn as bars."""
    alpha_histogram: bool = False
    shows: Literal["runs", "data", "items"] = "runs"
    """What runs say, what the data set holds, or predictions for items of it."""
    data: Mapping[str, float] = field(default_factory=dict)
    """What the paper says of its data, by name."""
    items: Sequence[tuple[str, str, str]] = ()
    """The paper's items: tags, prediction, ground truth."""
    note: str = ""

    @property
    def needs_outliers(self) -> bool:
        """Whether its runs are scored with added tags."""
        return bool(NEED_OUTLIERS & set(self.metrics))

    @property
    def needs_predictions(self) -> bool:
        """Whether its runs are asked about every tag of the validation items."""
        return bool(NEED_PREDICTIONS & set(self.metrics)) or self.shows == "items"


SMOKE: Mapping[str, object] = {
    "data.num_workers": 0,  # starting loader processes takes longer than they save
    "augment.image_size": 48,
    "augment.crop_scale_min": 0.7,
    "augment.policy": "none",  # it would change the colours, which are tags
    "model.d_model": 64,
    "model.d_ff": 128,
    "model.dropout": 0.1,
    "model.backbone_stages": 3,
    "optim.lr": 0.05,
    "optim.warmup_steps": 30,
    "optim.schedule": "cosine",
    "train.epochs": 5,
    "log.every_steps": 5,
    "log.tensorboard": False,
}
"""For minutes instead of days; what both studies share."""


@dataclass(frozen=True)
class Study:
    """The paper's experiments on one data set."""

    title: str
    """The data set."""
    all_runs: tuple[Run, ...]
    """What another one starts from comes before it."""
    all_experiments: tuple[Experiment, ...]
    smoke: Mapping[str, object]
    """Settings of every run under which it takes minutes on the demo data, with a backbone that
    `train_ls.py` trained on other demo data."""

    @cached_property
    def runs(self) -> Mapping[str, Run]:
        """By name, in order."""
        return {run.name: run for run in self.all_runs}

    @cached_property
    def experiments(self) -> Mapping[str, Experiment]:
        """By name, in order."""
        return {experiment.name: experiment for experiment in self.all_experiments}
