"""Metrics against plain Python loops over plain floats, however the items are cut into batches."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_average_precision,
    multilabel_f1_score,
)

from magneto_dist.batch import Batch, Prediction
from magneto_dist.metrics import Sums, add_sums, metric_sums, reduce_sums, summarise

NUM_TAGS = 7
NAN = float("nan")
MODELS = {"magneto": "itg", "pre-training": "it", "tf-it": "i", "tf-t": "t"}
LOGITS = st.sampled_from([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])  # few values: many ties
THRESHOLDS = st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0])


@dataclass(frozen=True)
class Tag:
    """A slot that holds a tag, in plain numbers."""

    tag_id: int
    target: bool
    outlier: bool
    image: float
    tag: float
    gate: float


@dataclass(frozen=True)
class Item:
    tags: tuple[Tag, ...]
    tags_cut: int = 0
    targets_cut: int = 0
    valid: bool = True


def items_of(max_slots: int = 5) -> st.SearchStrategy[list[Item]]:
    tag = st.builds(
        Tag, st.integers(0, NUM_TAGS - 1), st.booleans(), st.booleans(), LOGITS, LOGITS, LOGITS
    )
    cut = st.tuples(st.integers(0, 2), st.integers(0, 2)).map(lambda c: (sum(c), c[0]))
    item = st.builds(
        lambda tags, cut, valid: Item(tuple(tags), cut[0], cut[1], valid),
        st.lists(tag, max_size=max_slots),
        cut,
        st.sampled_from([True, True, True, False]),
    )
    return st.lists(item, min_size=1, max_size=6)


def tensors(items: list[Item], model: str, padding: float = NAN) -> tuple[Prediction, Batch]:
    """The items as a batch; where there is no tag stands what would spoil a sum."""
    slots = 6

    def slotted(name: str, empty: float, dtype: torch.dtype) -> Tensor:
        rows = [
            [getattr(tag, name) for tag in item.tags] + [empty] * (slots - len(item.tags))
            for item in items
        ]
        return torch.tensor(rows, dtype=dtype)

    lengths = torch.tensor([[len(item.tags)] for item in items])
    batch = Batch(
        tag_ids=slotted("tag_id", NUM_TAGS, torch.int64),
        tag_mask=torch.arange(slots) < lengths,
        target=slotted("target", True, torch.bool),
        outlier=slotted("outlier", True, torch.bool),
        sample_valid=torch.tensor([item.valid for item in items]),
        sample_ids=torch.arange(len(items)),
        tags_cut=torch.tensor([item.tags_cut for item in items]),
        targets_cut=torch.tensor([item.targets_cut for item in items]),
        pixels=None,
        keys=("",) * len(items),
        step=1,
        micro_step=0,
        epoch=0,
    )
    logits = {
        f"{name}_logits": slotted(name, padding, torch.float64)
        for name in ("image", "tag", "gate")
        if name[0] in MODELS[model]
    }
    return Prediction(**logits), batch


def part(prediction: Prediction, batch: Batch, rows: slice) -> tuple[Prediction, Batch]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    cut = {name: value[rows] for name, value in values.items() if isinstance(value, Tensor)}
    return Prediction(*(None if x is None else x[rows] for x in prediction)), replace(batch, **cut)


def ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


def average_precision(chances: list[float], targets: list[bool], targets_cut: int) -> float:
    total = 0.0
    for chance, target in zip(chances, targets, strict=True):
        if target:
            ranked_above = [t for c, t in zip(chances, targets, strict=True) if c >= chance]
            total += sum(ranked_above) / len(ranked_above)
    return ratio(total, sum(targets) + targets_cut)


def reference(items: list[Item], prediction: Prediction, threshold: float) -> dict:
    """What `summarise` should say, item by item and tag by tag."""
    scored = [
        (row, item)
        for row, item in enumerate(items)
        if item.valid and len(item.tags) + item.tags_cut > 0
    ]
    result: dict = {
        "items": len(scored),
        "tags_cut": sum(item.tags_cut for _, item in scored),
        "targets_cut": sum(item.targets_cut for _, item in scored),
    }
    chances = {head: prediction.probability(head).tolist() for head in prediction.heads}
    for head in prediction.heads:
        precisions, recalls, f1s, mean_precisions = [], [], [], []
        hits, predicted, targets = Counter(), Counter(), Counter()
        num_cut = 0
        for row, item in scored:
            of_tags = chances[head][row][: len(item.tags)]
            chosen = [tag for tag, p in zip(item.tags, of_tags, strict=True) if p >= threshold]
            wanted = [tag for tag in item.tags if tag.target]
            num_wanted = len(wanted) + item.targets_cut
            num_hits = sum(tag.target for tag in chosen)
            if chosen:
                precisions.append(num_hits / len(chosen))
            if num_wanted:
                recalls.append(num_hits / num_wanted)
                mean_precisions.append(
                    average_precision(of_tags, [tag.target for tag in item.tags], item.targets_cut)
                )
            if chosen or num_wanted:
                f1s.append(2 * num_hits / (len(chosen) + num_wanted))
            hits.update(tag.tag_id for tag in chosen if tag.target)
            predicted.update(tag.tag_id for tag in chosen)
            targets.update(tag.tag_id for tag in wanted)
            num_cut += item.targets_cut
        concepts = predicted.keys() | targets.keys()
        both = {"recall": ratio(sum(recalls), len(recalls)), "f1": ratio(sum(f1s), len(f1s))}
        all_targets = targets.total() + num_cut
        result[head] = {
            "paper": {"precision": ratio(sum(precisions), len(precisions)), **both},
            "strict": {"precision": ratio(sum(precisions), len(f1s)), **both},
            "micro_f1": ratio(2 * hits.total(), predicted.total() + all_targets),
            "average_precision": ratio(sum(mean_precisions), len(mean_precisions)),
            "macro_f1": ratio(
                sum(2 * hits[c] / (predicted[c] + targets[c]) for c in concepts), len(concepts)
            ),
        }
    result["alpha"] = None
    if prediction.alpha is not None:
        alphas = prediction.alpha.tolist()
        of_tags = [a for row, item in scored for a in alphas[row][: len(item.tags)]]
        result["alpha"] = sum(of_tags) / len(of_tags) if of_tags else None
    main = chances[prediction.heads[0]]
    with_outlier = [(row, item) for row, item in scored if any(t.outlier for t in item.tags)]
    fooled = [
        any(tag.outlier and main[row][slot] >= threshold for slot, tag in enumerate(item.tags))
        for row, item in with_outlier
    ]
    result["outlier_rate"] = sum(fooled) / len(fooled) if fooled else None
    return result


def assert_close(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_close(got[name], value)
        else:
            assert got[name] == (None if value is None else pytest.approx(value, abs=1e-12)), name


def metrics(
    items: list[Item], model: str = "magneto", threshold: float = 0.5, padding: float = NAN
) -> dict:
    prediction, batch = tensors(items, model, padding)
    return summarise(metric_sums(prediction, batch, threshold, NUM_TAGS))


def item(text: str, *, targets_cut: int = 0) -> Item:
    """One character a tag: h hit, f falsely predicted, m missed, r rightly left out."""
    logits = {"h": 1.0, "f": 1.0, "m": -1.0, "r": -1.0}
    tags = [
        Tag(tag_id, char in "hm", False, logits[char], logits[char], 0.0)
        for tag_id, char in enumerate(text)
    ]
    return Item(tuple(tags), tags_cut=targets_cut, targets_cut=targets_cut)


@given(items_of(), st.sampled_from(list(MODELS)), THRESHOLDS, st.sampled_from([NAN, 9.0]))
def test_metrics_equal_plain_loops(
    items: list[Item], model: str, threshold: float, padding: float
) -> None:
    prediction, _ = tensors(items, model)
    expected = reference(items, prediction, threshold)
    assert_close(metrics(items, model, threshold, padding), expected)


@given(items_of(), st.sampled_from(list(MODELS)), st.sets(st.integers(1, 5)))
def test_sums_of_any_split_add_up(items: list[Item], model: str, cuts: set[int]) -> None:
    prediction, batch = tensors(items, model)
    whole = metric_sums(prediction, batch, 0.5, NUM_TAGS)
    edges = [0, *sorted(cut for cut in cuts if cut < len(items)), len(items)]
    total: Sums = {}
    for start, stop in pairwise(edges):
        rows = part(prediction, batch, slice(start, stop))
        total = add_sums(total, metric_sums(*rows, 0.5, NUM_TAGS))
    assert total.keys() == whole.keys()
    for name, value in whole.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(total[name], value, rtol=1e-13, atol=1e-13)


@given(items_of(), items_of())
def test_rows_that_are_not_valid_count_for_nothing(items: list[Item], more: list[Item]) -> None:
    invalid = [replace(one, valid=False) for one in more]
    assert_close(metrics([*items, *invalid]), metrics(items))


@given(items_of(), st.integers(1, 4))
def test_sums_over_ranks_are_one_call(items: list[Item], num_ranks: int) -> None:
    sums = metric_sums(*tensors(items, "magneto"), 0.5, NUM_TAGS)
    calls = []

    def reduce(packed: Tensor) -> Tensor:
        calls.append(packed.shape)
        return packed * num_ranks

    reduced = reduce_sums(sums, reduce)
    assert len(calls) == 1
    assert reduced.keys() == sums.keys()
    for name, value in sums.items():
        assert torch.equal(reduced[name], value * num_ranks)


@given(st.permutations(range(6)), st.lists(st.booleans(), min_size=6, max_size=6))
def test_average_precision_without_ties_is_torchmetrics(
    order: list[int], targets: list[bool]
) -> None:
    logits = [place / 2 - 1.5 for place in order]
    tags = tuple(
        Tag(slot, target, False, logit, 0.0, 0.0)
        for slot, (logit, target) in enumerate(zip(logits, targets, strict=True))
    )
    got = metrics([Item(tags)], "tf-it")["final"]["average_precision"]
    if not any(targets):
        assert got == 0
        return
    chances = torch.tensor(logits, dtype=torch.float64).sigmoid()
    expected = binary_average_precision(chances, torch.tensor(targets).long())
    assert got == pytest.approx(expected.item(), abs=1e-6)  # torchmetrics counts in float32


@given(st.lists(st.text("hfmr", min_size=5, max_size=5), min_size=1, max_size=6))
def test_micro_and_macro_f1_are_torchmetrics(texts: list[str]) -> None:
    got = metrics([item(text) for text in texts])["final"]
    predicted = torch.tensor([[char in "hf" for char in text] for text in texts]).int()
    target = torch.tensor([[char in "hm" for char in text] for text in texts]).int()
    occurs = (predicted | target).any(0)  # torchmetrics counts a concept that never does as 0
    if not occurs.any():
        assert got["micro_f1"] == got["macro_f1"] == 0
        return
    predicted, target = predicted[:, occurs], target[:, occurs]
    # every concept twice, which changes no mean: torchmetrics wants two labels or more
    twice = [torch.cat([t, t], 1) for t in (predicted, target)]
    for average in ("micro", "macro"):
        expected = multilabel_f1_score(*twice, num_labels=twice[0].shape[1], average=average)
        assert got[f"{average}_f1"] == pytest.approx(expected.item(), abs=1e-6)  # float32


def test_tags_of_equal_probability_share_the_worst_rank() -> None:
    tied = Item(tuple(Tag(i, i == 0, False, 0.0, 0.0, 0.0) for i in range(4)))
    assert metrics([tied])["final"]["average_precision"] == 1 / 4


def test_a_tag_is_predicted_from_the_threshold_on() -> None:
    at_the_threshold = Item((Tag(0, True, True, 0.0, 0.0, 0.0),))
    got = metrics([at_the_threshold], threshold=0.5)
    assert got["final"]["paper"]["recall"] == got["outlier_rate"] == 1


def test_protocols_differ_in_items_without_a_predicted_tag() -> None:
    got = metrics([item("hf"), item("mr")])["final"]
    assert (got["paper"]["precision"], got["strict"]["precision"]) == (1 / 2, 1 / 4)
    for protocol in ("paper", "strict"):
        assert got[protocol]["recall"] == 1 / 2
        assert got[protocol]["f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert got["micro_f1"] == 2 / 4


def test_items_without_a_target_have_no_recall_and_an_f1_only_where_predicted() -> None:
    silent, wrong = metrics([item("h"), item("rr")]), metrics([item("h"), item("fr")])
    assert silent["final"]["paper"] == {"precision": 1, "recall": 1, "f1": 1}
    assert silent["final"]["strict"] == silent["final"]["paper"]
    assert wrong["final"]["strict"]["precision"] == 1 / 2
    assert wrong["final"]["paper"] == {"precision": 1 / 2, "recall": 1, "f1": 1 / 2}


def test_targets_that_found_no_slot_are_missed() -> None:
    got = metrics([item("h", targets_cut=3)])
    assert got["targets_cut"] == got["tags_cut"] == 3
    assert got["final"]["paper"] == {"precision": 1, "recall": 1 / 4, "f1": 2 / 5}
    assert got["final"]["average_precision"] == 1 / 4
    assert got["final"]["micro_f1"] == 2 / 5


def test_macro_f1_is_the_mean_over_concepts_that_occur() -> None:
    # concept 0: one hit, one miss; concept 1: falsely predicted; concept 2: right to leave out
    assert metrics([item("hfr"), item("m")])["final"]["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_outlier_rate_is_the_share_of_items_that_were_fooled() -> None:
    def with_outlier(logit: float) -> Item:
        return Item((*item("h").tags, Tag(3, False, True, logit, logit, 0.0)))

    items = [item("hf"), with_outlier(1.0), with_outlier(-1.0), with_outlier(-1.0)]
    assert metrics(items)["outlier_rate"] == 1 / 3
    assert metrics(items[:1])["outlier_rate"] is None


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7, 0.9])
def test_a_probability_at_the_threshold_is_the_same_for_outliers_as_for_tags(
    threshold: float,
) -> None:
    """A float32 probability that is a rounded threshold lies on one side of it, not on both."""
    logit = torch.tensor(threshold).logit().item()
    items = [Item((Tag(0, False, True, logit, logit, 0.0),))]
    prediction, batch = tensors(items, "tf-t")
    prediction = Prediction(tag_logits=prediction.tag_logits.float())  # type: ignore[union-attr]
    sums = metric_sums(prediction, batch, threshold)
    assert sums["items_with_predicted_outlier"] == sums["final/predicted"]


def test_alpha_is_the_mean_over_tags_and_none_without_any() -> None:
    gates = [Item((Tag(0, True, False, 0.0, 0.0, gate),)) for gate in (-2.0, 0.0, 2.0)]
    two = Item((Tag(0, True, False, 0.0, 0.0, -2.0), Tag(1, True, False, 0.0, 0.0, -2.0)))
    low = torch.tensor(-2.0, dtype=torch.float64).sigmoid().item()
    assert metrics(gates)["alpha"] == pytest.approx(0.5, abs=1e-12)
    assert metrics([two, gates[2]])["alpha"] == pytest.approx((2 * low + (1 - low)) / 3, abs=1e-12)
    assert metrics(gates, "tf-t")["alpha"] is None
    assert metrics([Item((), tags_cut=1)])["alpha"] is None


def test_without_the_vocabulary_there_is_no_macro_f1() -> None:
    sums = metric_sums(*tensors([item("hf")], "magneto"), 0.5)
    assert "macro_f1" not in summarise(sums)["final"]
