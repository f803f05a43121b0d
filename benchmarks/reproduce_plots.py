"""The figures of the report, as PNG, one a panel."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from magneto_dist.data.inspect import Counts
from reproduce_blocks import Figure, Picture
from reproduce_grid import METRICS, Experiment, Run
from reproduce_results import Results, spread_of

_INCHES = (3.8, 3.0)  # three panels stand side by side on a desk, one on a telephone
_PIXELS_PER_INCH = 96  # of a page; the file has twice as many, for fine screens
_OVER_SEEDS = "Mean over the seeds; the band goes from the least to the most of them."


@dataclass(frozen=True)
class _Curves:
    """What is drawn over the steps."""

    label: str
    lines: Mapping[str, str]
    """Curve of a result -> what it is beside its run's title."""
    window: int = 1
    """Points over which a line is smoothed."""


_CURVES = {
    "f1": _Curves("F1 on the validation split (%)", {"f1": ""}),
    "outputs": _Curves(
        "F1 on the validation split (%)",
        {"f1": "gated output", "image_f1": "image stream", "tag_f1": "tag stream"},
    ),
    "alpha": _Curves("mean α of training batches", {"alpha": ""}, window=5),
}

Draw = Callable[[Any], None]
"""Draws on axes."""


def plot_experiment(
    experiment: Experiment, results: Results, runs: Mapping[str, Run]
) -> Figure | None:
    """Curves, bars and histograms of an experiment; None: it has none."""
    panels: dict[str, Draw] = {}
    captions = []
    for name in experiment.curves:
        panels[name] = partial(_draw_curves, _CURVES[name], experiment, results, runs)
    if experiment.curves:
        captions.append(_OVER_SEEDS)
    if "alpha" in experiment.curves:
        captions.append(f"α: mean of {_CURVES['alpha'].window} logged steps.")
    if experiment.alpha_histogram:
        panels["histogram"] = partial(_draw_alpha, experiment, results, runs)
        captions.append("Histogram: all tags of the validation split, all seeds.")
    if experiment.bars:
        panels["bars"] = partial(_draw_bars, experiment.bars, experiment, results, runs)
        captions.append("Whiskers: standard deviation over the seeds, or the paper's range.")
    return _figure(experiment, panels, " ".join(captions)) if panels else None


def plot_distribution(experiment: Experiment, all_counts: Sequence[Counts]) -> Figure:
    """Items by their number of tags and of important tags; items by tag, most frequent first."""
    panels: dict[str, Draw] = {
        "tags": lambda axes: _draw_numbers(
            axes, "tags of an item", {c.split: c.tags_per_item for c in all_counts}
        ),
        "important": lambda axes: _draw_numbers(
            axes, "important tags of an item", {c.split: c.important_per_item for c in all_counts}
        ),
        "frequency": lambda axes: _draw_frequency(axes, all_counts),
    }
    caption = "Items by their number of tags, by that of important ones, and items of each tag."
    return _figure(experiment, panels, caption)


def _draw_numbers(axes: Any, label: str, by_split: Mapping[str, Sequence[int]]) -> None:
    for split, values in by_split.items():
        axes.plot(*zip(*sorted(Counter(values).items()), strict=True), marker=".", label=split)
    axes.set(xlabel=label, ylabel="items")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()


def _draw_frequency(axes: Any, all_counts: Sequence[Counts]) -> None:
    for counts in all_counts:
        ranked = sorted(counts.frequency.values(), reverse=True)
        axes.plot(range(1, len(ranked) + 1), ranked, label=counts.split)
    axes.set(yscale="log", xlabel="rank of the tag", ylabel="items with it")
    axes.legend()


def _draw_curves(
    curves: _Curves, experiment: Experiment, results: Results, runs: Mapping[str, Run], axes: Any
) -> None:
    for run in experiment.runs:
        for name, title in curves.lines.items():
            found = [result.curves[name] for result in results[run] if name in result.curves]
            if not found:
                continue
            steps = found[0][0]
            values = np.array([_smoothed(values, curves.window) for _, values in found])
            (line,) = axes.plot(steps, values.mean(0), marker="." if curves.window == 1 else None)
            line.set_label(title or runs[run].title)
            axes.fill_between(
                steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0
            )
    axes.set(xlabel="step", ylabel=curves.label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if "alpha" in curves.lines:
        axes.set_ylim(0, 1)
    axes.legend()


def _smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Mean over up to `window` values before and at each place."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _draw_alpha(
    experiment: Experiment, results: Results, runs: Mapping[str, Run], axes: Any
) -> None:
    for run in experiment.runs:
        alpha = np.concatenate([np.array(result.alpha) for result in results[run]])
        axes.hist(
            alpha, bins=40, range=(0, 1), density=True, histtype="step", label=runs[run].title
        )
    axes.set(xlabel="α of a validation tag", ylabel="density")
    axes.legend()


def _draw_bars(
    name: str, experiment: Experiment, results: Results, runs: Mapping[str, Run], axes: Any
) -> None:
    found = {run: spread_of(results, run, name) for run in experiment.runs}
    ours = {run: spread for run, spread in found.items() if spread is not None}
    places, titles = np.arange(len(ours)), [runs[run].title.replace(", ", "\n") for run in ours]
    means = [spread.mean for spread in ours.values()]
    deviations = [spread.deviation or 0 for spread in ours.values()]
    axes.bar(places - 0.2, means, 0.4, yerr=deviations, capsize=3, label="ours")
    printed = [np.atleast_1d(experiment.paper.get(run, {}).get(name, 0)) for run in ours]
    middles = [numbers.mean() for numbers in printed]
    ranges = [np.ptp(numbers) / 2 for numbers in printed]
    axes.bar(places + 0.2, middles, 0.4, yerr=ranges, capsize=3, label="paper", color="lightgrey")
    axes.set_xticks(places, titles, fontsize=7)
    axes.set_ylabel(METRICS[name].heading)
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))  # above all bars


def _figure(experiment: Experiment, panels: Mapping[str, Draw], caption: str) -> Figure:
    pictures = []
    for name, draw in panels.items():
        file = f"{experiment.name}-{name}.png"
        alt = f"{experiment.title}: {name}"
        width = round(_INCHES[0] * _PIXELS_PER_INCH)
        pictures.append(Picture(file, _png(draw), alt, width))
    return Figure(pictures, caption)


def _png(draw: Draw) -> bytes:
    from matplotlib.figure import Figure as Canvas  # slow to import

    canvas = Canvas(figsize=_INCHES, layout="constrained")
    draw(canvas.subplots())
    for text in (*canvas.axes[0].get_xticklabels(), *canvas.axes[0].get_yticklabels()):
        text.set_fontsize(min(text.get_fontsize(), 8))
    content = io.BytesIO()
    canvas.savefig(content, dpi=2 * _PIXELS_PER_INCH, metadata={"Software": None})
    return content.getvalue()
