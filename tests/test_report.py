"""The final table and the figure of examples, with names that nobody would wish for."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from magneto_dist.evaluation import Example
from magneto_dist.report import examples_figure, final_table
from magneto_dist.vocabulary import Vocabulary

HOSTILE = ("$x$", "$\\frac{1$", "Größe", "海", "🌊", "شاطئ", "a\tb", "<b>&", "{0}", "%s", "x" * 300)


def head(precision: float, strict: float, recall: float, f1: float) -> dict:
    return {
        "paper": {"precision": precision, "recall": recall, "f1": f1},
        "strict": {"precision": strict, "recall": recall, "f1": f1},
    }


def example(num_tags: int, key: str = "photo", side: int | None = 8) -> Example:
    return Example(
        key=key,
        pixels=None if side is None else torch.full((3, side, side), 200, dtype=torch.uint8),
        tag_ids=torch.arange(num_tags),
        target=torch.arange(num_tags) % 2 == 0,
        probability=torch.linspace(0, 1, num_tags),
        alpha=None,
    )


def rendered(examples: list[Example], vocabulary: Vocabulary, threshold: float = 0.5) -> np.ndarray:
    content = io.BytesIO()
    examples_figure(examples, vocabulary, threshold).savefig(content, format="png")
    return np.asarray(Image.open(content).convert("RGB"))


def test_table_shows_all_heads_and_both_protocols() -> None:
    metrics = {
        "final": head(0.915, 0.814, 0.713, 0.612),
        "image": head(0.511, 0.412, 0.313, 0.214),
        "tag": head(0.111, 0.112, 0.113, 0.114),
        "alpha": 0.256,
    }
    lines = final_table(metrics).splitlines()
    assert lines[0].split() == ["validation,", "%", "precision", "(strict)", "recall", "F1"]
    assert [line.split() for line in lines[2:5]] == [
        ["tag", "head", "11.1", "11.2", "11.3", "11.4"],
        ["image", "head", "51.1", "41.2", "31.3", "21.4"],
        ["gated", "output", "91.5", "81.4", "71.3", "61.2"],
    ]
    assert lines[5].endswith("0.26")
    assert len(lines) == 6


@pytest.mark.parametrize("stream", ["tag", "image"])
def test_table_of_a_baseline_has_one_line(stream: str) -> None:
    metrics = {"final": head(0.5, 0.4, 0.3, 0.2), stream: head(0.5, 0.4, 0.3, 0.2), "alpha": None}
    lines = final_table(metrics).splitlines()
    assert [line.split() for line in lines[2:]] == [["output", "50.0", "40.0", "30.0", "20.0"]]


def test_table_of_pretraining_has_both_streams_and_names_its_split() -> None:
    metrics = {"image": head(0.5, 0.4, 0.3, 0.2), "tag": head(0.1, 0.1, 0.1, 0.1), "alpha": None}
    lines = final_table(metrics, "train").splitlines()
    assert lines[0].startswith("train, %")
    assert [line.split()[0] for line in lines[2:]] == ["tag", "image"]


def test_hostile_names_render() -> None:
    vocabulary = Vocabulary(HOSTILE)
    picture = rendered([example(len(HOSTILE), key) for key in ("$", "$y_{", "鍵")], vocabulary)
    assert picture.std() > 0


@pytest.mark.parametrize("count", [1, 4, 5])
def test_every_example_has_its_place(count: int) -> None:
    figure = examples_figure([example(2) for _ in range(count)], Vocabulary("ab"), 0.5)
    assert len(figure.axes) == count


def test_examples_without_pictures_or_tags_render() -> None:
    rendered([example(2, side=None), example(0)], Vocabulary("ab"))


def test_colour_says_what_is_right_at_the_threshold() -> None:
    vocabulary = Vocabulary("abcd")  # targets a and c; probabilities 0, 1/3, 2/3, 1

    def colours(threshold: float) -> dict[str, tuple[str, str]]:
        (axes,) = examples_figure([example(4)], vocabulary, threshold).axes
        return {t.get_text()[-1]: (t.get_color(), t.get_fontweight()) for t in axes.texts}

    green, red = "tab:green", "tab:red"
    assert colours(0.5) == {
        "d": (red, "normal"),
        "c": (green, "bold"),
        "b": (green, "normal"),
        "a": (red, "bold"),
    }
    assert colours(0.9)["c"] == (red, "bold")
    assert colours(0.2)["b"] == (red, "normal")


def test_characters_that_the_font_lacks_are_told_apart() -> None:
    (axes,) = examples_figure([example(2, key="é\n")], Vocabulary("海川"), 0.5).axes
    assert [text.get_text() for text in axes.texts] == ["1.00  \\u5ddd", "0.00  \\u6d77"]
    assert axes.get_title() == "é\\n"


@pytest.mark.parametrize("num_tags", [1, 16, 64])
def test_nothing_overlaps(num_tags: int) -> None:
    vocabulary = Vocabulary(f"tag {number}" for number in range(num_tags))
    figure = examples_figure([example(num_tags) for _ in range(5)], vocabulary, 0.5)
    figure.canvas.draw()
    boxes = [axes.get_window_extent() for axes in figure.axes]
    texts = [text for axes in figure.axes for text in (axes.title, *axes.texts)]
    boxes += [text.get_window_extent() for text in texts]
    for number, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:number])
    last = figure.axes[0].texts[-1].get_text()
    assert last == ("and 44 more" if num_tags == 64 else "0.00  tag 0")


def test_tags_stand_by_falling_probability() -> None:
    (axes,) = examples_figure([example(3)], Vocabulary("abc"), 0.5).axes
    assert [text.get_text() for text in axes.texts] == ["1.00  c", "0.50  b", "0.00  a"]
