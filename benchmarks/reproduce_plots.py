"""The figures of the report, as PNG: means over the seeds, and bands from the least to the most."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from magneto_dist.data.inspect import Counts
from reproduce_grid import METRICS, RUNS, Experiment
from reproduce_results import Results, spread_of

_CURVES = {
    "f1": ("F1 on the validation split (%)", 1),
    "alpha": ("mean α of training batches", 5),
}
"""Label, and over how many points a line is smoothed."""


def plot_experiment(experiment: Experiment, results: Results) -> bytes | None:
    """Curves, bars and histograms of an experiment side by side; None: it has none."""
    parts: list[Any] = [(_draw_curve, name) for name in experiment.curves]
    if experiment.alpha_histogram:
        parts.append((_draw_alpha, "alpha"))
    if experiment.bars:
        parts.append((_draw_bars, experiment.bars))
    if not parts:
        return None
    figure = _figure(len(parts))
    all_axes = figure.subplots(1, len(parts), squeeze=False)[0]
    for axes, (draw, name) in zip(all_axes, parts, strict=True):
        draw(axes, experiment, results, name)
    return _png(figure)


def plot_distribution(all_counts: Sequence[Counts]) -> bytes:
    """Items by their number of tags and of important tags; items by tag, most frequent first."""
    figure = _figure(3)
    tags, important, frequency = figure.subplots(1, 3)
    for counts in all_counts:
        for axes, values in ((tags, counts.tags_per_item), (important, counts.important_per_item)):
            numbers = sorted(Counter(values).items())
            axes.plot(*zip(*numbers, strict=True), marker="o", label=counts.split)
        ranked = sorted(counts.frequency.values(), reverse=True)
        frequency.plot(range(1, len(ranked) + 1), ranked, label=counts.split)
    frequency.set(yscale="log", xlabel="rank of the tag", ylabel="items with it")
    tags.set(xlabel="tags of an item", ylabel="items")
    important.set(xlabel="important tags of an item", ylabel="items")
    tags.legend()
    return _png(figure)


def _draw_curve(axes: Any, experiment: Experiment, results: Results, name: str) -> None:
    label, window = _CURVES[name]
    for run in experiment.runs:
        curves = [result.curves[name] for result in results[run] if name in result.curves]
        if not curves:
            continue
        steps = curves[0][0]
        values = np.array([_smoothed(values, window) for _, values in curves])
        (line,) = axes.plot(steps, values.mean(0), marker="." if window == 1 else None)
        line.set_label(RUNS[run].title)
        axes.fill_between(
            steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0
        )
    axes.set(xlabel="step", ylabel=label)
    if name == "alpha":
        axes.set_ylim(0, 1)
    axes.legend()


def _smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Mean over up to `window` values before and at each place."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _draw_alpha(axes: Any, experiment: Experiment, results: Results, _name: str) -> None:
    for run in experiment.runs:
        alpha = np.concatenate([np.array(result.alpha) for result in results[run]])
        axes.hist(
            alpha, bins=40, range=(0, 1), density=True, histtype="step", label=RUNS[run].title
        )
    axes.set(xlabel="α of a validation tag, all seeds", ylabel="density")
    axes.legend()


def _draw_bars(axes: Any, experiment: Experiment, results: Results, name: str) -> None:
    found = {run: spread_of(results, run, name) for run in experiment.runs}
    ours = {run: spread for run, spread in found.items() if spread is not None}
    places, titles = np.arange(len(ours)), [RUNS[run].title.replace(", ", "\n") for run in ours]
    axes.bar(
        places - 0.2,
        [spread.mean for spread in ours.values()],
        0.4,
        yerr=[spread.deviation or 0 for spread in ours.values()],
        capsize=3,
        label="ours",
    )
    paper = [experiment.paper.get(run, {}).get(name, 0) for run in ours]
    axes.bar(places + 0.2, paper, 0.4, label="paper", color="lightgrey")
    axes.set_xticks(places, titles, fontsize=7)
    axes.set_ylabel(METRICS[name].heading)
    axes.legend()


def _figure(num_parts: int) -> Any:
    from matplotlib.figure import Figure  # slow to import

    return Figure(figsize=(5.0 * num_parts, 3.6), layout="constrained")


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, dpi=90, metadata={"Software": None})
    return content.getvalue()
