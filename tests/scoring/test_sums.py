"""All figures of a split against plain loops, however its items are cut into batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision

from magneto_dist.batch import Batch, Prediction
from magneto_dist.config import LossConfig
from magneto_dist.evaluation import evaluate
from magneto_dist.scoring.average_precision import binned_average_precision
from magneto_dist.scoring.bootstrap import interval, item_weights
from magneto_dist.scoring.sums import Scores, ScoreSums
from magneto_dist.scoring.thresholds import best_threshold, grid
from test_metrics import MODELS, NUM_TAGS, Item, Tag, items_of, part, reference, tensors

THRESHOLDS = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7, 0.93, 1.0], dtype=torch.float64)
NUM_RESAMPLES = 7


def new_sums(prediction: Prediction, resamples: int = NUM_RESAMPLES) -> ScoreSums:
    return ScoreSums(
        prediction.heads,
        {"half": lambda batch: torch.full(batch.tag_ids.shape, 0.5, dtype=torch.float64)},
        num_tags=NUM_TAGS,
        thresholds=THRESHOLDS,
        loss=LossConfig(),
        resampled=slice(None),
        num_resamples=resamples,
        seed=3,
        device=torch.device("cpu"),
    )


def scores_of(
    *parts: tuple[Prediction, Batch], reduce: Callable[[Tensor], Tensor] = lambda packed: packed
) -> Scores:
    sums = new_sums(parts[0][0])
    for prediction, batch in parts:
        sums.update(prediction, batch)
    return sums.reduced(reduce)


def assert_same(got: dict, expected: dict, **tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same(got[name], value, **tolerance)
        else:
            assert got[name] == (None if value is None else pytest.approx(value, **tolerance)), name


@given(items_of(), st.sampled_from(list(MODELS)))
def test_figures_at_every_threshold_are_those_of_plain_loops(items: list[Item], model: str) -> None:
    prediction, batch = tensors(items, model)
    scores = scores_of((prediction, batch))
    for number, threshold in enumerate(THRESHOLDS.tolist()):
        expected = reference(items, prediction, threshold)
        got, of_baselines = scores.metrics(number)
        del got["loss"]
        assert_same(got, expected, abs=1e-12)
        sweep = scores.sweep(scores.main)
        head = expected[prediction.heads[0]]
        assert float(sweep["f1"][number]) == pytest.approx(head["paper"]["f1"], abs=1e-12)
        assert float(sweep["strict_precision"][number]) == pytest.approx(
            head["strict"]["precision"], abs=1e-12
        )
        predicts_all = reference(items, prediction, 0.0)[prediction.heads[0]]
        if threshold <= 0.5:  # a baseline that says 0.5 of everything
            assert_same(of_baselines["half"]["paper"], predicts_all["paper"], abs=1e-12)
        else:
            assert of_baselines["half"]["micro_f1"] == 0


@given(items_of(), st.sampled_from(list(MODELS)))
def test_the_figures_of_training_are_the_same(items: list[Item], model: str) -> None:
    prediction, batch = tensors(items, model)
    expected, *_ = evaluate(
        lambda _: prediction,
        [batch],
        reduce=lambda packed: packed,
        loss_config=LossConfig(),
        threshold=0.7,
        num_tags=NUM_TAGS,
    )
    assert_same(scores_of((prediction, batch)).metrics(4)[0], expected, abs=1e-12)


@given(items_of(), st.sampled_from(list(MODELS)), st.sets(st.integers(1, 5)))
def test_any_cut_into_ranks_and_batches_gives_the_same_sums(
    items: list[Item], model: str, cuts: set[int]
) -> None:
    prediction, batch = tensors(items, model)
    edges = [0, *sorted(cut for cut in cuts if cut < len(items)), len(items)]
    parts = [part(prediction, batch, slice(*ends)) for ends in pairwise(edges)]
    of_ranks: list[Tensor] = []

    def reduce(packed: Tensor) -> Tensor:
        of_ranks.append(packed)
        return torch.stack(of_ranks).sum(0)

    whole = scores_of((prediction, batch))
    in_batches = scores_of(*parts)
    for rows in parts:  # each on a rank of its own: the last one sees the sums of all
        over_ranks = scores_of(rows, reduce=reduce)
    for scores in (in_batches, over_ranks):
        assert scores.sums.keys() == whole.sums.keys()
        for name, value in whole.sums.items():
            torch.testing.assert_close(scores.sums[name], value, rtol=1e-12, atol=1e-12)


@given(items_of(), items_of())
def test_rows_that_are_not_valid_count_for_nothing(items: list[Item], more: list[Item]) -> None:
    """Whatever stands in them: a half that is not scored keeps its tags."""
    prediction, batch = tensors([*items, *more], "magneto")
    valid = batch.sample_valid & (torch.arange(len(batch.keys)) < len(items))
    masked = scores_of((prediction, Batch(**{**vars(batch), "sample_valid": valid})))
    alone = scores_of(part(prediction, batch, slice(0, len(items))))
    for name, value in alone.sums.items():
        if not name.startswith("loss"):  # normalised by all slots of a batch
            torch.testing.assert_close(masked.sums[name], value, rtol=1e-12, atol=1e-12)


def expected_average_precision(seen: list[tuple[int, bool]]) -> float:
    """The mean over all orders that leave bins in falling order, of (bin, is it a target)."""
    orders = [
        order
        for order in permutations(seen)
        if all(first[0] >= second[0] for first, second in pairwise(order))
    ]
    values = []
    for order in orders:
        found = [target for _, target in order]
        precisions = [sum(found[: i + 1]) / (i + 1) for i, target in enumerate(found) if target]
        values.append(sum(precisions) / max(1, sum(found)))
    return float(np.mean(values))


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6))
def test_binned_average_precision_is_the_mean_over_all_orders(seen: list) -> None:
    targets, tags = torch.zeros(2, 4, dtype=torch.float64)
    for place, target in seen:
        targets[place] += target
        tags[place] += 1
    got = float(binned_average_precision(targets, tags))
    assert got == pytest.approx(expected_average_precision(seen), abs=1e-12)
    with_cut = float(binned_average_precision(targets, tags, 2))
    num_targets = int(targets.sum())
    assert with_cut == pytest.approx(got * num_targets / (num_targets + 2), abs=1e-12)


@given(st.permutations(range(12)), st.lists(st.booleans(), min_size=12, max_size=12))
def test_with_one_tag_a_bin_it_is_that_of_torchmetrics(order: list[int], target: list) -> None:
    counts = torch.zeros(2, 12, dtype=torch.float64)
    counts[0] = 1
    counts[1, order] = torch.tensor(target).double()
    got = float(binned_average_precision(counts[1], counts[0]))
    if not any(target):
        assert got == 0
        return
    chances = torch.tensor(order, dtype=torch.float64) / 12
    exact = binary_average_precision(chances, torch.tensor(target).long())
    assert got == pytest.approx(exact.item(), abs=1e-6)


@given(items_of(max_slots=4))
def test_concepts_are_those_of_plain_loops(items: list[Item]) -> None:
    prediction, batch = tensors(items, "tf-it")
    concepts = scores_of((prediction, batch)).concepts("final")
    at = concepts.at(3)
    chances = prediction.probability("final").tolist()
    mean, by_chance = [], []
    for concept in range(NUM_TAGS):
        seen = [
            (chances[row][slot], tag.target)
            for row, item in enumerate(items)
            if item.valid
            for slot, tag in enumerate(item.tags)
            if tag.tag_id == concept
        ]
        assume(len(seen) <= 6)  # else too many orders to try
        targets = sum(target for _, target in seen)
        predicted = [target for chance, target in seen if chance >= 0.5]
        assert (at.items[concept], at.targets[concept]) == (len(seen), targets)
        assert (at.predicted[concept], at.hits[concept]) == (len(predicted), sum(predicted))
        if targets:
            bins = [(sum(chance >= t for t in THRESHOLDS.tolist()), of) for chance, of in seen]
            mean.append(expected_average_precision(bins))
            by_chance.append(expected_average_precision([(0, of) for _, of in bins]))
            assert float(at.average_precision[concept]) == pytest.approx(mean[-1], abs=1e-12)
            assert at.recall[concept] == sum(predicted) / targets
        else:
            assert at.average_precision[concept] == at.recall[concept] == 0
    for got, values in ((concepts.mean_average_precision, mean), (concepts.chance, by_chance)):
        assert got == pytest.approx(np.mean(values) if values else 0, abs=1e-12)


@given(items_of())
def test_macro_figures_are_means_over_concepts_that_occur(items: list[Item]) -> None:
    prediction, batch = tensors(items, "tf-t")
    macro = scores_of((prediction, batch)).concepts("final").macro(3)
    expected = reference(items, prediction, 0.5)["final"]["macro_f1"]
    assert macro["f1"] == pytest.approx(expected, abs=1e-12)


# thresholds -------------------------------------------------------------------------------------


def test_the_grid_has_round_numbers_and_what_is_asked_for() -> None:
    thresholds = grid(0.123, 0.5)
    assert len(thresholds) == len(set(thresholds.tolist())) == 112
    assert torch.equal(thresholds, thresholds.sort().values)
    for wanted in (0.5, 0.123, 0.01, 0.99, 0.0001, 0.9999, 0.29):
        assert wanted in thresholds.tolist()


def test_the_best_threshold_has_the_highest_f1_and_is_near_the_middle() -> None:
    def item(target: bool, probability: float) -> Item:
        return Item((Tag(0, target, False, math.log(probability / (1 - probability)), 0, 0),))

    items = [item(True, 0.8), item(True, 0.75), item(False, 0.2), item(False, 0.6)]
    prediction, batch = tensors(items, "tf-it")
    scores = scores_of((prediction, batch))
    assert float(scores.thresholds[scores.best(scores.main)]) == 0.7  # 0.6 < t <= 0.75
    f1 = scores.sweep(scores.main)["f1"]
    assert float(f1[scores.best(scores.main)]) == float(f1.max()) == 1
    flat = torch.ones(len(THRESHOLDS), 10, dtype=torch.float64)
    assert THRESHOLDS[best_threshold(flat, THRESHOLDS)] == 0.5


def test_nan_is_never_predicted() -> None:
    prediction, batch = tensors([Item((Tag(0, True, True, math.nan, 0, 0),))], "tf-it")
    metrics, _ = scores_of((prediction, batch)).metrics(0)
    assert metrics["final"]["paper"]["recall"] == 0


# bootstrap --------------------------------------------------------------------------------------


@given(items_of())
def test_resamples_count_items_as_often_as_their_weights_say(items: list[Item]) -> None:
    prediction, batch = tensors(items, "magneto")
    scores = scores_of((prediction, batch))
    weights = item_weights(batch.sample_ids, NUM_RESAMPLES, seed=3)
    for resample, counts in enumerate(weights.long().tolist()):
        drawn = [item for item, count in zip(items, counts, strict=True) for _ in range(count)]
        rows = [row for row, count in enumerate(counts) for _ in range(count)]
        if not rows:
            continue
        repeated = Prediction(*(None if x is None else x[rows] for x in prediction))
        expected = reference(drawn, repeated, 0.5)["image"]
        sums = scores.sums["heads/image/resampled"][resample, 3]
        f1 = sums[5] / sums[9].clamp(min=1)
        assert float(f1) == pytest.approx(expected["paper"]["f1"], abs=1e-12)


def test_weights_are_poisson_and_belong_to_the_item() -> None:
    ids = torch.arange(2_000)
    weights = item_weights(ids, 200, seed=0)
    assert weights.shape == (200, 2_000)
    assert weights.mean() == pytest.approx(1, abs=0.01)
    assert weights.var() == pytest.approx(1, abs=0.01)
    for count in range(4):
        share = (weights == count).double().mean()
        assert share == pytest.approx(math.exp(-1) / math.factorial(count), abs=0.005)
    correlation = torch.corrcoef(weights[:2])[0, 1]
    assert abs(correlation) < 5 / math.sqrt(2_000)
    shuffled = torch.randperm(2_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(item_weights(ids[shuffled], 200, seed=0), weights[:, shuffled])


def test_intervals_are_those_of_theory() -> None:
    """F1 of items that are hit or missed is a mean of 0 and 1: its standard error is known."""
    draw = np.random.default_rng(0).random(1_000) < 0.7
    items = [Item((Tag(0, True, False, 1.0 if hit else -1.0, 0, 0),)) for hit in draw]
    prediction, batch = tensors(items, "tf-it")
    sums = new_sums(prediction, resamples=1000)
    sums.update(prediction, batch)
    scores = sums.reduced(lambda packed: packed)
    low, high = scores.intervals(scores.main, 3)["f1"]  # type: ignore[index]
    mean, error = draw.mean(), math.sqrt(draw.mean() * (1 - draw.mean()) / len(draw))
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
    better = scores.intervals("baselines/half", 3)["f1_main_is_better_by"]  # type: ignore[index]
    assert better[1] < 0  # the baseline predicts everything, and everything is a target
    assert interval(torch.arange(101, dtype=torch.float64)) == pytest.approx([2.5, 97.5])


def test_without_resamples_there_are_no_intervals() -> None:
    prediction, batch = tensors([Item((Tag(0, True, False, 1, 1, 1),))], "magneto")
    sums = new_sums(prediction, resamples=0)
    sums.update(prediction, batch)
    scores = sums.reduced(lambda packed: packed)
    assert scores.intervals(scores.main, 3) is None
