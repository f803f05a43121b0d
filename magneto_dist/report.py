"""What people look at: the final table of a run, pictures with their tags, a data set in plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magneto_dist.data.inspect import Counts
from magneto_dist.errors import InputError
from magneto_dist.evaluation import Example
from magneto_dist.vocabulary import Vocabulary

_HEADS = (("tag", "tag head"), ("image", "image head"), ("final", "gated output"))

_PICTURE_IN = 2.8
_LINE_IN = 0.13
_GAP_IN = 0.3
_MAX_TAGS = 20  # below a picture
_MAX_CHARACTERS = 40  # of a name


def final_table(metrics: dict[str, Any], split: str = "validation") -> str:
    """Precision, recall and F1 in % of every head, both protocols, for the terminal."""
    lines = table_head(split)
    lines += [table_line(name, metrics[head]) for head, name in head_names(metrics)]
    if metrics.get("alpha") is not None:
        lines.append(f"mean alpha (weight of the picture): {metrics['alpha']:.2f}")
    return "\n".join(lines)


def table_head(split: str) -> list[str]:
    """The first two lines of `final_table`."""
    columns = f"{'precision':>12}{'(strict)':>10}{'recall':>10}{'F1':>8}"
    return [f"{split + ', %':<16}{columns}", "-" * 56]


def table_line(name: str, metrics: dict[str, Any]) -> str:
    """Both protocols of one head, in %."""
    paper, strict = metrics["paper"], metrics["strict"]
    return (
        f"{name:<16}{100 * paper['precision']:>12.1f}{100 * strict['precision']:>10.1f}"
        f"{100 * paper['recall']:>10.1f}{100 * paper['f1']:>8.1f}"
    )


def head_names(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """The heads that a table shows, the final one last, and what people call them."""
    names = [(head, name) for head, name in _HEADS if head in metrics]
    if "final" in metrics and len(names) == 2:  # a baseline's one head is its final output
        return [("final", "output")]
    return names


def examples_figure(examples: Sequence[Example], vocabulary: Vocabulary, threshold: float) -> Any:
    """A grid of pictures; below each its tags by falling probability, the truth in bold.

    Green: rightly predicted or left out at `threshold`; red: wrongly.

    Returns:
        A matplotlib Figure that belongs to no window.
    """
    from matplotlib.figure import Figure  # slow to import, and needed once an evaluation

    columns = min(4, max(1, len(examples)))
    rows = max(1, math.ceil(len(examples) / columns))
    lines = min(max((len(e.tag_ids) for e in examples), default=0), _MAX_TAGS) + 1
    width_in = columns * (_PICTURE_IN + _GAP_IN) + _GAP_IN
    row_in = _PICTURE_IN + lines * _LINE_IN + 2 * _GAP_IN
    height_in = rows * row_in
    figure = Figure(figsize=(width_in, height_in))
    for place, example in enumerate(examples):
        row, column = divmod(place, columns)
        left_in = _GAP_IN + column * (_PICTURE_IN + _GAP_IN)
        bottom_in = height_in - row * row_in - _GAP_IN - _PICTURE_IN
        axes = figure.add_axes(
            (
                left_in / width_in,
                bottom_in / height_in,
                _PICTURE_IN / width_in,
                _PICTURE_IN / height_in,
            )
        )
        axes.set_axis_off()
        axes.set_title(_drawable(example.key), fontsize=7, parse_math=False)
        if example.pixels is not None:
            axes.imshow(example.pixels.permute(1, 2, 0).numpy())
        _write_tags(axes, example, vocabulary, threshold)
    return figure


def _write_tags(axes: Any, example: Example, vocabulary: Vocabulary, threshold: float) -> None:
    def write(line: int, text: str, **style: str) -> None:
        axes.annotate(
            text,
            xy=(0, 0),
            xycoords="axes fraction",
            xytext=(0, -72 * _LINE_IN * (line + 1)),  # 72 points an inch
            textcoords="offset points",
            fontsize=7,
            parse_math=False,  # a tag may hold a dollar sign
            **style,
        )

    order = example.probability.argsort(descending=True).tolist()
    for line, slot in enumerate(order[:_MAX_TAGS]):
        probability, is_target = float(example.probability[slot]), bool(example.target[slot])
        write(
            line,
            f"{probability:.2f}  {_drawable(vocabulary.tags[int(example.tag_ids[slot])])}",
            fontweight="bold" if is_target else "normal",
            color="tab:green" if (probability >= threshold) == is_target else "tab:red",
        )
    if len(order) > _MAX_TAGS:
        write(_MAX_TAGS, f"and {len(order) - _MAX_TAGS} more")


def _drawable(text: str) -> str:
    """`text` as it fits below a picture, characters that the font lacks as escapes.

    Instead of each of them matplotlib would draw the same box, and warn.
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font

    characters = get_font(findfont(FontProperties())).get_charmap()
    drawable = "".join(
        c if ord(c) in characters else c.encode("unicode_escape").decode("ascii") for c in text
    )
    return drawable if len(drawable) <= _MAX_CHARACTERS else drawable[: _MAX_CHARACTERS - 1] + "…"


def plot_stats(all_counts: Sequence[Counts], path: Path) -> None:
    """Draws the counts of all splits into one picture.

    Args:
        all_counts: one for each split.
        path: .png, .svg or .pdf.

    Raises:
        InputError: it cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(10, 7), layout="constrained")
    (frequency, tags), (important, sizes) = figure.subplots(2, 2)
    for counts in all_counts:
        ranked = sorted(counts.frequency.values(), reverse=True)
        frequency.loglog(range(1, len(ranked) + 1), ranked, label=counts.split)
        for axes, values in (
            (tags, counts.tags_per_item),
            (important, counts.important_per_item),
        ):
            numbers, items = np.unique(np.array(values, dtype=np.int64), return_counts=True)
            axes.plot(numbers, items / max(items.sum(), 1), marker=".", label=counts.split)
            axes.set_ylim(bottom=0)
        heights, widths = np.array([h.upright_size for h in counts.headers]).reshape(-1, 2).T
        sizes.scatter(widths, heights, s=4, alpha=0.3, label=counts.split)
    for axes, x, y in (
        (frequency, "rank of the tag", "items with the tag"),
        (tags, "tags of an item", "fraction of items"),
        (important, "important tags of an item", "fraction of labelled items"),
        (sizes, "width of the picture, pixels", "height, pixels"),
    ):
        axes.set(xlabel=x, ylabel=y)
        axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: another format
        raise InputError(f"plot {path}: cannot be written: {error}") from None
