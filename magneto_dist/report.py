"""What people look at: the table at the end of a run, pictures with their tags."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from magneto_dist.evaluation import Example
from magneto_dist.vocabulary import Vocabulary

_HEADS = (("tag", "tag head"), ("image", "image head"), ("final", "gated output"))


def final_table(metrics: dict[str, Any]) -> str:
    """Precision, recall and F1 in % of every head, both protocols, for the terminal."""
    lines = [
        f"{'validation, %':<16}{'precision':>12}{'(strict)':>10}{'recall':>10}{'F1':>8}",
        "-" * 56,
    ]
    names = [(head, name) for head, name in _HEADS if head in metrics]
    if "final" in metrics and len(names) == 2:  # a baseline's one head is its final output
        names = [("final", "output")]
    for head, name in names:
        paper, strict = metrics[head]["paper"], metrics[head]["strict"]
        lines.append(
            f"{name:<16}{100 * paper['precision']:>12.1f}{100 * strict['precision']:>10.1f}"
            f"{100 * paper['recall']:>10.1f}{100 * paper['f1']:>8.1f}"
        )
    if metrics.get("alpha") is not None:
        lines.append(f"mean alpha (weight of the picture): {metrics['alpha']:.2f}")
    return "\n".join(lines)


def examples_figure(examples: Sequence[Example], vocabulary: Vocabulary) -> Any:
    """A grid of pictures; below each its tags, the truth in bold, predictions by their score.

    Returns:
        A matplotlib Figure that belongs to no window.
    """
    from matplotlib.figure import Figure  # slow to import, and needed once an evaluation

    columns = min(4, max(1, len(examples)))
    rows = max(1, math.ceil(len(examples) / columns))
    figure = Figure(figsize=(3.2 * columns, 3.6 * rows), layout="tight")
    for place, example in enumerate(examples, start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set_axis_off()
        axes.set_title(example.key, fontsize=7)
        if example.pixels is not None:
            axes.imshow(example.pixels.permute(1, 2, 0).numpy())
        _write_tags(axes, example, vocabulary)
    return figure


def _write_tags(axes: Any, example: Example, vocabulary: Vocabulary) -> None:
    order = example.probability.argsort(descending=True).tolist()
    for line, slot in enumerate(order):
        probability, is_target = float(example.probability[slot]), bool(example.target[slot])
        axes.text(
            0.02,
            -0.06 - 0.075 * line,
            f"{probability:.2f}  {vocabulary.tags[int(example.tag_ids[slot])]}",
            transform=axes.transAxes,
            fontsize=7,
            parse_math=False,  # a tag may hold a dollar sign
            fontweight="bold" if is_target else "normal",
            color="tab:green" if (probability >= 0.5) == is_target else "tab:red",
        )
