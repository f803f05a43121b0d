"""What finished runs say: their numbers, their curves, and whether a claim shows over the seeds.

1. `read_result` reads a run folder and what launchers have written beside it.
2. `Spread`: mean and standard deviation over the seeds.
3. `judge`: a claim's difference, seed by seed, and whether it stands out from its spread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from statistics import fmean, stdev

import numpy as np

from reproduce_grid import Claim, Experiment
from reproduce_runs import Setup

SHOWS, DOES_NOT, ONE_SEED = "shows", "does not show", "one seed: not told"
# Student's t, one-sided, 5 %, by the number of seeds (degrees of freedom + 1).
_T = {2: 6.314, 3: 2.920, 4: 2.353, 5: 2.132, 6: 2.015, 7: 1.943, 8: 1.895, 9: 1.860, 10: 1.833}
_BEGINNING = 0.25  # of the steps
_EXTREME = 0.1

Curve = tuple[list[int], list[float]]
"""Steps, and values at them."""


@dataclass(frozen=True)
class Result:
    """One run of one seed."""

    numbers: Mapping[str, float]
    """By the names of `METRICS`, those that the run has."""
    curves: Mapping[str, Curve]
    alpha: Sequence[float] = field(default=(), repr=False)
    """Of every tag of the validation items."""
    summary: Mapping[str, object] = field(default_factory=dict)
    """Steps, items per second, when and by which version it was made."""


def read_result(setup: Setup, run: str, seed: int) -> Result:
    """Numbers of the evaluation with the best F1, whose weights are also what was scored."""
    folder = setup.run_dir(run, seed)
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    summary = json.loads((folder / "summary.json").read_bytes())
    evaluations = [line for line in lines if line["split"] == "validation"]
    best = next(line for line in evaluations if line["step"] == summary["best"]["step"])
    numbers, curves, alpha = {}, {}, []
    if "final/paper/f1" in best:  # not so in pre-training
        numbers = {
            name: 100 * best[f"final/paper/{name}"] for name in ("precision", "recall", "f1")
        }
        f1s = [100 * line["final/paper/f1"] for line in evaluations]
        numbers["f1_on_the_way"] = fmean(f1s)
        curves["f1"] = ([line["step"] for line in evaluations], f1s)
    if "alpha" in best:
        for head in ("image", "tag"):
            f1s = [100 * line[f"{head}/paper/f1"] for line in evaluations]
            curves[f"{head}_f1"] = ([line["step"] for line in evaluations], f1s)
            numbers[f"{head}_f1"] = 100 * best[f"{head}/paper/f1"]
        numbers |= {"alpha": best["alpha"], "alpha_skew": abs(best["alpha"] - 0.5)}
        train = [line for line in lines if line["split"] == "train"]
        curves["alpha"] = ([line["step"] for line in train], [line["alpha"] for line in train])
        first = [line["alpha"] for line in train if line["step"] <= _BEGINNING * summary["step"]]
        numbers["alpha_unrest"] = float(np.std(first)) if first else 0.0
    if setup.outliers_path(run, seed).exists():
        scores = json.loads(setup.outliers_path(run, seed).read_bytes())["validation"]
        numbers["outlier"] = 100 * scores["outlier_rate"]
        numbers["f1_with_outliers"] = 100 * scores["final"]["paper"]["f1"]
    if setup.predictions_path(run, seed).exists():
        alpha = [a for line in predictions(setup, run, seed) for a in line.get("alpha", ())]
        if alpha:
            values = np.array(alpha)
            extreme = (values < _EXTREME) | (values > 1 - _EXTREME)
            numbers["alpha_std"] = float(values.std())
            numbers["alpha_extreme"] = 100 * float(extreme.mean())
    made_by = json.loads((folder / "provenance.json").read_bytes())
    del made_by["command"], summary["validation"]  # with folders; told above
    return Result(numbers, curves, alpha, {**made_by, **summary})


def predictions(setup: Setup, run: str, seed: int) -> list[dict]:
    """Lines of predict.py."""
    text = setup.predictions_path(run, seed).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@dataclass(frozen=True)
class Spread:
    """A number over the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds; None: there is one."""
        return stdev(self.values) if len(self.values) > 1 else None

    def text(self, digits: int) -> str:
        """Mean and deviation."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


Results = Mapping[str, Sequence[Result]]
"""By run; one a seed, in the order of the seeds."""


def spread_of(results: Results, run: str, metric: str) -> Spread | None:
    """None: the run has no such number."""
    values = [r.numbers[metric] for r in results.get(run, ()) if metric in r.numbers]
    return Spread(tuple(values)) if values else None


@dataclass(frozen=True)
class Verdict:
    """A claim of the paper and what became of it."""

    experiment: str
    claim: Claim
    more: Spread
    less: Spread
    difference: Spread
    """Seed by seed: equal seeds share order, augmentation and added tags."""
    verdict: str


def judge(experiment: Experiment, results: Results) -> list[Verdict]:
    """The verdict on each of its claims."""
    verdicts = []
    for claim in experiment.claims:
        more, less = (spread_of(results, *side) for side in (claim.more, claim.less))
        assert more is not None
        assert less is not None
        pairs = zip(more.values, less.values, strict=True)
        difference = Spread(tuple(m - n for m, n in pairs))
        verdict = verdict_of(difference)
        verdicts.append(Verdict(experiment.name, claim, more, less, difference, verdict))
    return verdicts


def verdict_of(difference: Spread) -> str:
    """Whether a difference is above zero: a paired t-test over the seeds, one-sided, 5 %."""
    num_seeds, deviation = len(difference.values), difference.deviation
    if difference.mean <= 0:
        return DOES_NOT
    if deviation is None:
        return ONE_SEED
    needed = _T[min(num_seeds, max(_T))] * deviation / sqrt(num_seeds)
    return SHOWS if difference.mean > needed else DOES_NOT
