"""Plots of a split that was scored, as PNG."""

from __future__ import annotations

import io
from typing import Any

from magneto_dist.report import head_names
from magneto_dist.scoring import calibration
from magneto_dist.scoring.split import SplitScores

_COLOURS = {"final": "tab:blue", "image": "tab:orange", "tag": "tab:green"}
_MARKERS = ("s", "^", "D")  # of baselines


def plots(scored: SplitScores, content: dict[str, Any]) -> dict[str, bytes]:
    """PNG files by name.

    Args:
        scored: the split.
        content: its `results`.
    """
    draw = {
        "precision_recall": _draw_precision_recall,
        "thresholds": _draw_thresholds,
        "calibration": _draw_calibration,
        "concepts": _draw_concepts,
    }
    return {name: _png(function, scored, content) for name, function in draw.items()}


def _png(draw: Any, scored: SplitScores, content: dict[str, Any]) -> bytes:
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    draw(figure, scored, content)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def _draw_precision_recall(figure: Any, scored: SplitScores, content: dict[str, Any]) -> None:
    axes, comparison = figure.subplots(), content["comparison"]
    for head, name in reversed(head_names(content[content["split"]])):
        precision, recall = calibration.precision_recall(
            scored.scores.odds(head), scored.scores.targets_cut
        )
        area = comparison[head]["micro_average_precision"]
        axes.step(
            recall, precision, where="pre", color=_COLOURS[head], label=f"{name}, AP {area:.3f}"
        )
        at = comparison[head]
        axes.plot(at["micro_recall"], at["micro_precision"], "o", color=_COLOURS[head])
    for marker, name in zip(_MARKERS, content["baselines"], strict=False):
        at = comparison[name]
        axes.plot(
            at["micro_recall"],
            at["micro_precision"],
            marker,
            color="grey",
            label=name.replace("_", " "),
        )
    axes.set(
        xlabel="recall, all tags together",
        ylabel="precision",
        xlim=(0, 1.02),
        ylim=(0, 1.02),
        title=f"points: threshold {scored.decision.threshold:g}",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")


def _draw_thresholds(figure: Any, scored: SplitScores, content: dict[str, Any]) -> None:
    axes, scores = figure.subplots(), scored.scores
    thresholds = scores.thresholds.tolist()
    main = scores.sweep(scores.main)
    for name, style, label in (
        ("precision", ":", "precision, paper"),
        ("strict_precision", "-.", "precision, strict"),
        ("recall", "--", "recall"),
    ):
        axes.plot(thresholds, main[name], style, color="tab:blue", alpha=0.6, label=label)
    for head, name in reversed(head_names(content[content["split"]])):
        f1 = scores.sweep(f"heads/{head}")["f1"]
        axes.plot(thresholds, f1, color=_COLOURS[head], label=f"F1, {name}")
    if "baselines/tag_prior" in scores.scorers:
        f1 = scores.sweep("baselines/tag_prior")["f1"]
        axes.plot(thresholds, f1, color="grey", label="F1, tag prior")
    best = content["thresholds"]["best_on_these_items"]
    axes.axvline(scored.decision.threshold, color="black", linewidth=0.8)
    axes.plot(best["threshold"], best["f1"], "*", color="tab:blue", markersize=12,
              label=f"best: {best['threshold']:g}")  # fmt: skip
    axes.set(
        xlabel=f"threshold (line: {scored.decision.threshold:g}, used)",
        ylabel="mean over items",
        xlim=(0, 1),
        ylim=(0, 1.02),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)


def _draw_calibration(figure: Any, scored: SplitScores, content: dict[str, Any]) -> None:
    curve, counts = figure.subplots(2, height_ratios=(4, 1), sharex=True)
    curve.plot([0, 1], [0, 1], color="grey", linewidth=0.8, label="as it should be")
    of = content["calibration"]
    variants = [("as they are", of, "tab:blue")]
    if "at_temperature" in of:
        after = of["at_temperature"]
        variants.append((f"at temperature {after['temperature']:.2f}", after, "tab:red"))
    for label, variant, colour in variants:
        rows = variant["reliability"]
        probability = [row["probability"] for row in rows]
        error = variant["expected_calibration_error"]
        curve.plot(
            probability,
            [row["important"] for row in rows],
            "o-",
            color=colour,
            label=f"{label}, calibration error {error:.3f}",
        )
        counts.step(probability, [row["tags"] for row in rows], where="mid", color=colour)
    curve.set(ylabel="fraction that is important", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    curve.grid(alpha=0.3)
    curve.legend(loc="upper left")
    counts.set(xlabel="probability of a tag", ylabel="tags", yscale="log")


def _draw_concepts(figure: Any, scored: SplitScores, content: dict[str, Any]) -> None:
    from matplotlib.ticker import LogFormatter

    axes, head = figure.subplots(), scored.scores.heads[0]
    concepts = scored.scores.concepts(head)
    chance, concepts = concepts.average_precision_by_chance, concepts.at(scored.threshold)
    shown = concepts.targets > 0
    axes.scatter(concepts.items[shown], concepts.average_precision[shown], s=14, label="AP")
    axes.scatter(
        concepts.items[shown], chance[shown], s=14, color="grey", marker="x", label="by chance"
    )
    mean = content["comparison"][head]["mean_average_precision"]
    axes.axhline(mean, color="tab:blue", linewidth=0.8, label=f"mean (mAP) {mean:.3f}")
    axes.set(
        xscale="log",
        xlabel="items with the tag",
        ylabel="average precision of the tag",
        ylim=(0, 1.02),
    )
    axes.xaxis.set_major_formatter(LogFormatter())
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
