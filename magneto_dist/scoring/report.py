"""What people read of a split that was scored: a short table, and a folder to look at.

1. `terminal_table`: the terminal.
2. `write_report`: report.md with plots beside it, concepts.csv, scores.json.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from magneto_dist.errors import InputError
from magneto_dist.files import write_atomically
from magneto_dist.report import head_names, table_head, table_line
from magneto_dist.scoring.plots import plots
from magneto_dist.scoring.results import write_results
from magneto_dist.scoring.split import SplitScores
from magneto_dist.vocabulary import Vocabulary

_NUM_CONCEPTS = 30  # in report.md; all are in concepts.csv
_COLUMNS = ("items", "important", "predicted", "precision", "recall", "f1", "average_precision")


def require_folders(out: Path | None, report: Path | None) -> None:
    """Checks before the work that its results can be written.

    Raises:
        InputError: no folder for `out`, or `report` cannot be made.
    """
    if out and not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}; make it first")
    if report:
        try:
            report.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--report {report}: no such folder can be made: {error.strerror}"
            ) from None


def terminal_table(content: dict[str, Any]) -> str:
    """Heads and baselines with the 95 % interval of F1; then a line each for what else matters."""
    split = content["split"]
    metrics, comparison = content[split], content["comparison"]
    rows = [(table_line(name, metrics[head]), head) for head, name in head_names(metrics)]
    rows += [
        (table_line(name.replace("_", " "), of), name) for name, of in content["baselines"].items()
    ]
    has_intervals = any(of["intervals"] for of in comparison.values())
    title, rule = table_head(split)
    lines = [f"{title}{'95 % of F1':>16}", f"{rule}{16 * '-'}"] if has_intervals else [title, rule]
    lines += [line + _interval(comparison[name]["intervals"]) for line, name in rows]
    if metrics.get("alpha") is not None:
        lines.append(f"mean alpha (weight of the picture): {metrics['alpha']:.2f}")
    return "\n".join([*lines, *remarks(content)])


def remarks(content: dict[str, Any]) -> list[str]:
    """Threshold, mAP, calibration, outliers and number of items, in a line each."""
    thresholds, decision = content["thresholds"], content["decision"]
    head, best = thresholds["head"], thresholds["best_on_these_items"]
    main = content["comparison"][head]
    chosen = dict.fromkeys(decision["chosen"], f", chosen on {decision['chosen_on']}")
    threshold = f"{decision['threshold']:g}{chosen.get('threshold', '')}"
    lines = [
        f"threshold {threshold}; the best on these items is {best['threshold']:g}"
        f" (F1 {100 * best['f1']:.1f})",
        f"mAP over concepts {100 * main['mean_average_precision']:.1f} (by chance"
        f" {100 * main['mean_average_precision_by_chance']:.1f}); macro F1"
        f" {100 * main['macro_f1']:.1f}, micro F1 {100 * main['micro_f1']:.1f}",
        f"calibration error of the probabilities {100 * main['expected_calibration_error']:.1f}"
        + _after(content["calibration"], chosen.get("temperature", "")),
    ]
    if content[content["split"]]["outlier_rate"] is not None:
        rate = content[content["split"]]["outlier_rate"]
        lines.append(f"items with a foreign tag predicted: {100 * rate:.2f} %")
    lines.append(f"{content['items']:,} items, {content['items_per_second']:.0f} items/s")
    return lines


def write_report(
    folder: Path, scored: SplitScores, content: dict[str, Any], vocabulary: Vocabulary
) -> None:
    """Writes report.md, its plots, concepts.csv and scores.json, each whole or not at all.

    Raises:
        InputError: one of them cannot be written.
    """
    concepts = concept_rows(scored, vocabulary)
    pictures = plots(scored, content)
    files = {f"{name}.png": png for name, png in pictures.items()}
    files["concepts.csv"] = _csv(concepts)
    files["report.md"] = _markdown(content, concepts, tuple(pictures)).encode()
    try:
        for name, file in files.items():
            write_atomically(folder / name, file)
    except OSError as error:
        raise InputError(f"--report {folder}: {error.strerror}") from None
    write_results(folder / "scores.json", content)


def concept_rows(scored: SplitScores, vocabulary: Vocabulary) -> list[list[Any]]:
    """Tag and `_COLUMNS` of every concept that an item carries, the most frequent first."""
    scores = scored.scores.concepts(scored.scores.heads[0]).at(scored.threshold)
    counts = torch.stack([scores.items, scores.targets, scores.predicted], 1).long().tolist()
    ratios = torch.stack(
        [scores.precision, scores.recall, scores.f1, scores.average_precision], 1
    ).tolist()
    rows = [
        [tag, *of_tag, *shares]
        for tag, of_tag, shares in zip(vocabulary.tags, counts, ratios, strict=True)
        if of_tag[0]
    ]
    return sorted(rows, key=lambda row: -row[1])


def _csv(concepts: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["tag", *_COLUMNS])
    writer.writerows([*row[:4], *(f"{value:.6f}" for value in row[4:])] for row in concepts)
    return text.getvalue().encode()


def _markdown(
    content: dict[str, Any], concepts: Sequence[Sequence[Any]], pictures: Sequence[str]
) -> str:
    split, comparison = content["split"], content["comparison"]
    metrics = content[split]
    shown = [
        *head_names(metrics),
        *((name, name.replace("_", " ")) for name in content["baselines"]),
    ]
    parts = [
        f"# {Path(content['run']).name}, {content['checkpoint']}: {split}\n",
        f"Data {_cell(content['data'])}, {content['items']:,} items,"
        f" {content['items_not_scored']:,} not scored, {content['outliers']} foreign tags added to"
        f" each. All figures in %; intervals are those of 95 % over resampled items.\n",
        _table(
            ("", "precision", "strict", "recall", "F1", "95 %", "worse than the output by",
             "micro F1", "macro F1", "mAP", "best threshold", "F1 there"),
            [_comparison_row(label, comparison[name]) for name, label in shown],
        ),
        "\n".join(f"- {line}" for line in remarks(content)) + "\n",
        "\n".join(f"![{name}]({name}.png)" for name in pictures) + "\n",
        f"## Concepts\n\nThe {min(_NUM_CONCEPTS, len(concepts))} most frequent of"
        f" {len(concepts):,} ([all](concepts.csv)); average precision is binned by the"
        f" {len(content['thresholds']['sweep'])} thresholds of the sweep, within which order is"
        " taken as random.\n",
        _table(
            ("tag", *(name.replace("_", " ") for name in _COLUMNS)),
            [
                [_cell(row[0]), *(f"{count:,}" for count in row[1:4]), *map(_percent, row[4:])]
                for row in concepts[:_NUM_CONCEPTS]
            ],
        ),
        _baselines_explained(content["baselines"]),
    ]  # fmt: skip
    return "\n".join(parts)


def _comparison_row(label: str, of: dict[str, Any]) -> list[str]:
    intervals = of["intervals"] or {}
    return [
        label,
        *(_percent(of[name]) for name in ("precision", "strict_precision", "recall", "f1")),
        _range(intervals.get("f1")),
        _range(intervals.get("f1_main_is_better_by")),
        *(_percent(of.get(name)) for name in ("micro_f1", "macro_f1", "mean_average_precision")),
        f"{of['best']['threshold']:g}",
        _percent(of["best"]["f1"]),
    ]


def _baselines_explained(baselines: dict[str, Any]) -> str:
    if not baselines:
        return ""
    return (
        "Baselines need no training: keep all tags; keep so many of an item's tags, the most"
        " frequent ones in the training split; P(important | tag) of the training split.\n"
    )


def _after(of: dict[str, Any], chosen: str) -> str:
    if "at_temperature" not in of:
        return " %"
    after = of["at_temperature"]
    return (
        f" %; at temperature {after['temperature']:.3f}:"
        f" {100 * after['expected_calibration_error']:.1f} %{chosen}"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows)) + "\n"


def _cell(text: str) -> str:
    """As it stands in a table: a tag may hold what Markdown reads as something else."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>|#!$~&" else c for c in text)


def _interval(intervals: dict[str, Any] | None) -> str:
    return f"{_range(intervals['f1']):>16}" if intervals else ""


def _range(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
