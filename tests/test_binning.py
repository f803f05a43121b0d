"""Curves of a split against plain loops, however its items are cut into batches."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_precision_recall_curve

from magneto_dist.batch import Batch, Prediction
from magneto_dist.binning import NUM_BINS, Curves, binned_curves, binned_sums
from magneto_dist.metrics import Sums, add_sums, metric_sums, reduce_sums
from test_metrics import MODELS, Item, Tag, items_of, part, tensors

THRESHOLDS = [k / NUM_BINS for k in range(NUM_BINS + 1)]


def curves_of(*parts: tuple[Prediction, Batch]) -> Curves:
    total: Sums = {}
    for prediction, batch in parts:
        of_part = metric_sums(prediction, batch, 0.5) | binned_sums(prediction, batch)
        total = add_sums(total, of_part)
    return binned_curves(reduce_sums(total, lambda packed: packed))


def scored(items: list[Item], values: list[list[float]]) -> list[tuple[float, bool]]:
    """The value of every tag that counts, and whether the tag is a target."""
    return [
        (value, tag.target)
        for item, of_item in zip(items, values, strict=True)
        for tag, value in zip(item.tags, of_item, strict=False)
        if item.valid
    ]


@given(items_of(), st.sampled_from(list(MODELS)), st.sets(st.integers(1, 5)))
def test_curves_of_any_split_are_those_of_plain_loops(
    items: list[Item], model: str, cuts: set[int]
) -> None:
    prediction, batch = tensors(items, model)
    edges = [0, *sorted(cut for cut in cuts if cut < len(items)), len(items)]
    curves = curves_of(*(part(prediction, batch, slice(*ends)) for ends in pairwise(edges)))
    assert set(curves.precision_recall) == set(prediction.heads)
    num_cut = sum(item.targets_cut for item in items if item.valid)
    for head, curve in curves.precision_recall.items():
        tags = scored(items, prediction.probability(head).tolist())
        num_targets = sum(target for _, target in tags) + num_cut
        for place, threshold in enumerate(THRESHOLDS):
            predicted = [target for p, target in tags if p >= threshold]
            hits = sum(predicted)
            wrong = len(predicted) - hits
            assert curve.true_positives[place] == hits
            assert curve.false_positives[place] == wrong
            assert curve.false_negatives[place] == num_targets - hits
            assert curve.true_negatives[place] == len(tags) + num_cut - num_targets - wrong
            assert curve.precision[place] == (hits / len(predicted) if predicted else 0)
            assert curve.recall[place] == (hits / num_targets if num_targets else 0)


@given(items_of(), st.sampled_from(list(MODELS)))
def test_the_histogram_of_alpha_is_that_of_a_loop(items: list[Item], model: str) -> None:
    prediction, batch = tensors(items, model)
    got = curves_of((prediction, batch)).alpha
    alphas = [] if prediction.alpha is None else scored(items, prediction.alpha.tolist())
    if not alphas:
        assert got is None
        return
    assert got is not None
    counts = [0] * NUM_BINS
    for alpha, _ in alphas:
        counts[sum(alpha >= threshold for threshold in THRESHOLDS[1:-1])] += 1
    assert got.counts.tolist() == counts
    assert got.sum == pytest.approx(sum(alpha for alpha, _ in alphas))
    assert got.sum_of_squares == pytest.approx(sum(alpha**2 for alpha, _ in alphas))


def test_values_of_0_and_1_are_in_the_first_and_the_last_bin() -> None:
    item = Item(tuple(Tag(0, True, False, x, x, x) for x in (-1e4, 1e4, 1e4)))
    curves = curves_of(tensors([item], "magneto"))
    assert curves.alpha is not None
    assert (curves.alpha.counts[0], curves.alpha.counts[-1]) == (1, 2)
    curve = curves.precision_recall["image"]
    assert (curve.true_positives[0], curve.true_positives[-1]) == (3, 2)


@pytest.mark.parametrize("seed", [0, 1])
def test_precision_and_recall_are_those_of_torchmetrics(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(40, 6, generator=generator, dtype=torch.float64)
    prediction = Prediction(tag_logits=logits)
    _, batch = tensors([Item(())] * 40, "tf-t")
    target = torch.rand(40, 6, generator=generator) < logits.sigmoid()
    mask = torch.rand(40, 6, generator=generator) < 0.8
    batch = Batch(**{**vars(batch), "tag_mask": mask, "target": target})
    curve = curves_of((prediction, batch)).precision_recall["final"]
    precision, recall, _ = binary_precision_recall_curve(
        prediction.probability("final")[mask],
        target[mask].long(),
        torch.tensor(THRESHOLDS, dtype=torch.float64),
    )
    some = curve.true_positives + curve.false_positives > 0
    assert some.sum() > NUM_BINS / 2
    torch.testing.assert_close(curve.precision[some].float(), precision[:-1][some].float())
    torch.testing.assert_close(curve.recall.float(), recall[:-1].float())
