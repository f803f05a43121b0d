"""Precision, recall, F1 and friends, as sums that add up over batches and ranks.

1. `metric_sums` turns a prediction into float64 sums; no device synchronisation.
2. Sums of any split of the data are added (`add_sums`), and over ranks (`reduce_sums`).
3. `summarise` divides, once.

Two protocols differ in items that have targets and no predicted tag: `paper` leaves them out of
precision, `strict` counts their precision as 0. Both count their F1 as 0. An item without any
target has no recall, and precision and F1 only where something was predicted (then 0): one with
neither was answered rightly, and is left out of everything. Targets that found no slot
(`targets_cut`) count as not predicted.

The sums are our own code, because no library has the paper's item-wise protocols, and because sums
add up over batches and ranks in one reduction; in tests torchmetrics is the reference of the
standard metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from magneto_dist.batch import Batch, Prediction

Sums = dict[str, Float64[Tensor, "..."]]


def metric_sums(
    prediction: Prediction, batch: Batch, threshold: float, num_tags: int | None = None
) -> Sums:
    """Sums over the items of a batch: valid rows with at least one tag, in a slot or cut.

    Args:
        prediction: of the batch, on its device.
        batch: truth.
        threshold: probability from which a tag is predicted.
        num_tags: size of the vocabulary, for per-concept sums (macro F1); None: leave them out.
    """
    real = batch.real_tags
    is_item = batch.sample_valid & ((real.sum(1) + batch.tags_cut) > 0)
    sums: Sums = {
        "items": _sum(is_item),
        "tags": _sum(real),
        "tags_cut": _sum(batch.tags_cut * batch.sample_valid),
        "targets_cut": _sum(batch.targets_cut * batch.sample_valid),
    }
    for head in prediction.heads:
        probability = prediction.probability(head).detach().double()
        predicted = (probability >= threshold) & real
        of_head = _item_sums(predicted, batch, is_item)
        of_head["average_precision"] = average_precisions(probability, real, batch).sum()
        if num_tags is not None:
            of_head |= _concept_sums(predicted, real, batch, num_tags)
        sums |= {f"{head}/{name}": value for name, value in of_head.items()}
    if prediction.alpha is not None:
        # `where`, not a product: what stands in padding, even NaN, does not matter
        sums["alpha"] = torch.where(real, prediction.alpha.detach().double(), 0).sum()
    outlier = batch.outlier & real
    main = (prediction.probability(prediction.heads[0]).detach().double() >= threshold) & outlier
    sums["items_with_outlier"] = _sum(outlier.any(1))
    sums["items_with_predicted_outlier"] = _sum(main.any(1))
    return sums


def add_sums(total: Sums, more: Mapping[str, Tensor]) -> Sums:
    """The sums of two disjoint sets of items; `total` may be empty."""
    return {name: value + total[name] if total else value for name, value in more.items()}


def reduce_sums(sums: Sums, reduce: Callable[[Tensor], Tensor]) -> Sums:
    """Sums over ranks, in one call of `reduce`; names and shapes are the same on all ranks."""
    names = sorted(sums)
    packed = reduce(torch.cat([sums[name].double().reshape(-1) for name in names])).cpu()
    parts = packed.split([sums[name].numel() for name in names])
    return {name: p.reshape(sums[name].shape) for name, p in zip(names, parts, strict=True)}


def summarise(sums: Mapping[str, Tensor]) -> dict:
    """Nested metrics, fractions of 1: `["final"]["paper"]["f1"]`; a ratio of nothing is 0.

    Per head: both protocols, micro and macro F1 (macro: over concepts that are a target or
    predicted; needs per-concept sums), item-wise average precision (ties share the worst rank).
    `alpha`: mean over tags. `outlier_rate`: share of items with an added tag that has one of them
    predicted by the final output (section 5.1). Both are None where there is nothing to tell.
    """
    heads = sorted({name.split("/")[0] for name in sums if "/" in name})
    result: dict = {head: _summarise_head(sums, head) for head in heads}
    result |= {name: int(sums[name]) for name in ("items", "tags_cut", "targets_cut")}
    has_alpha = "alpha" in sums and sums["tags"] > 0
    result["alpha"] = _ratio(sums["alpha"], sums["tags"]) if has_alpha else None
    with_outlier = sums["items_with_outlier"]
    result["outlier_rate"] = (
        _ratio(sums["items_with_predicted_outlier"], with_outlier) if with_outlier > 0 else None
    )
    return result


def _item_sums(
    predicted: Bool[Tensor, "batch slot"], batch: Batch, is_item: Bool[Tensor, " batch"]
) -> Sums:
    hits = (predicted & batch.target).sum(1).double()
    num_predicted = predicted.sum(1).double()
    num_targets = ((batch.target & batch.tag_mask).sum(1) + batch.targets_cut).double() * is_item
    f1_base = num_predicted + num_targets
    return {
        "hits": hits.sum(),
        "predicted": num_predicted.sum(),
        "targets": num_targets.sum(),
        "precision": (hits / num_predicted.clamp(min=1)).sum(),
        "recall": (hits / num_targets.clamp(min=1)).sum(),
        "f1": (2 * hits / f1_base.clamp(min=1)).sum(),
        "items_with_prediction": _sum(num_predicted > 0),
        "items_with_target": _sum(num_targets > 0),
        "items_with_f1": _sum(f1_base > 0),
    }


def average_precisions(
    probability: Float64[Tensor, "batch slot"], real: Bool[Tensor, "batch slot"], batch: Batch
) -> Float64[Tensor, " batch"]:
    """Of each item: the mean over its targets of precision at the target's rank."""
    target = batch.target & real
    # [item, i, j]: slot j is ranked at least as high as slot i
    above = (probability[:, None, :] >= probability[:, :, None]) & real[:, None, :]
    precision = (above & target[:, None, :]).sum(2).double() / above.sum(2).clamp(min=1)
    num_targets = target.sum(1) + batch.targets_cut * batch.sample_valid
    return (precision * target).sum(1) / num_targets.clamp(min=1)


def _concept_sums(
    predicted: Bool[Tensor, "batch slot"],
    real: Bool[Tensor, "batch slot"],
    batch: Batch,
    num_tags: int,
) -> Sums:
    target = batch.target & real

    def per_concept(which: Bool[Tensor, "batch slot"]) -> Float64[Tensor, " tag"]:
        counts = torch.zeros(num_tags + 1, dtype=torch.float64, device=which.device)
        return counts.index_add(0, batch.tag_ids.reshape(-1), which.reshape(-1).double())[:-1]

    return {
        "concept_hits": per_concept(predicted & target),
        "concept_predicted": per_concept(predicted),
        "concept_targets": per_concept(target),
    }


def _summarise_head(sums: Mapping[str, Tensor], head: str) -> dict:
    of_head = {name.removeprefix(f"{head}/"): v for name, v in sums.items()}
    f1 = _ratio(of_head["f1"], of_head["items_with_f1"])
    recall = _ratio(of_head["recall"], of_head["items_with_target"])
    result: dict = {
        protocol: {"precision": _ratio(of_head["precision"], items), "recall": recall, "f1": f1}
        for protocol, items in (
            ("paper", of_head["items_with_prediction"]),
            ("strict", of_head["items_with_f1"]),
        )
    }
    result["micro_f1"] = _ratio(2 * of_head["hits"], of_head["predicted"] + of_head["targets"])
    result["average_precision"] = _ratio(of_head["average_precision"], of_head["items_with_target"])
    if "concept_hits" in of_head:
        base = of_head["concept_predicted"] + of_head["concept_targets"]
        f1_sum = (2 * of_head["concept_hits"] / base.clamp(min=1)).sum()
        result["macro_f1"] = _ratio(f1_sum, _sum(base > 0))
    return result


def _sum(values: Bool[Tensor, "..."] | Float[Tensor, "..."]) -> Float64[Tensor, ""]:
    return values.sum().double()


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    return float(numerator / denominator) if denominator > 0 else 0.0
