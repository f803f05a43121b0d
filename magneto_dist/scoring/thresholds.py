"""What becomes of each item at every threshold at once, and which threshold is the best.

1. `grid`: the thresholds.
2. `item_values`: hits, precision, F1, ... of each item at each of them; sums of these over items
   add up over batches and ranks.
3. `rates` divides sums; `best_threshold` chooses.

The definitions are those of `metrics.py`, which a training run calls for one threshold; exact, for
every threshold is compared with every probability.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from magneto_dist.batch import Batch
from magneto_dist.binning import at_each, num_reached
from magneto_dist.metrics import average_precisions

VALUES = (
    "hits",
    "predicted",
    "targets",
    "precision",
    "recall",
    "f1",
    "average_precision",
    "items_with_prediction",
    "items_with_target",
    "items_with_f1",
)
"""Last axis of `item_values`, named as the sums of `metrics.py`."""
_TAILS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005)
_EQUAL = 1e-9  # F1 of the same predictions, summed in another order


def grid(*more: float) -> Float64[Tensor, " threshold"]:
    """0.01, 0.02, ... 0.99, closer ones towards 0 and 1, and `more`; rising."""
    steps = {round(k / 100, 2) for k in range(1, 100)}
    tails = {*_TAILS, *(round(1 - tail, 4) for tail in _TAILS)}
    return torch.tensor(sorted(steps | tails | set(more)), dtype=torch.float64)


def item_values(
    probability: Float64[Tensor, "batch slot"],
    batch: Batch,
    thresholds: Float64[Tensor, " threshold"],
) -> Float64[Tensor, "batch threshold value"]:
    """`VALUES` of every row at every threshold; 0 in rows that are no items."""
    real = batch.real_tags
    target = batch.target & real
    reached = num_reached(probability, thresholds)

    def num_from_each(which: Bool[Tensor, "batch slot"]) -> Float64[Tensor, "batch threshold"]:
        counts = torch.zeros(
            len(reached), len(thresholds) + 1, dtype=torch.float64, device=reached.device
        )
        return at_each(counts.scatter_add_(1, reached, which.double()))

    hits, num_predicted = num_from_each(target), num_from_each(real)
    num_targets = (target.sum(1) + batch.targets_cut * batch.sample_valid).double()[:, None]
    f1_base = num_predicted + num_targets
    values = {
        "hits": hits,
        "predicted": num_predicted,
        "targets": num_targets,
        "precision": hits / num_predicted.clamp(min=1),
        "recall": hits / num_targets.clamp(min=1),
        "f1": 2 * hits / f1_base.clamp(min=1),
        "average_precision": average_precisions(probability, real, batch)[:, None],
        "items_with_prediction": (num_predicted > 0).double(),
        "items_with_target": (num_targets > 0).double(),
        "items_with_f1": (f1_base > 0).double(),
    }
    return torch.stack([values[name].expand_as(hits) for name in VALUES], dim=-1)


def rates(sums: Float64[Tensor, "*rows value"]) -> dict[str, Float64[Tensor, "*rows"]]:
    """Means over items from sums of `item_values`, fractions of 1; a ratio of nothing is 0.

    "precision" is the paper's, "strict_precision" counts items without a predicted tag as 0; recall
    and F1 are the same in both protocols. "micro_..." are over tags instead of items.
    """
    of = dict(zip(VALUES, sums.unbind(-1), strict=True))

    def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
        return torch.where(denominator > 0, numerator / denominator.clamp(min=1e-300), 0.0)

    return {
        "precision": ratio(of["precision"], of["items_with_prediction"]),
        "strict_precision": ratio(of["precision"], of["items_with_f1"]),
        "recall": ratio(of["recall"], of["items_with_target"]),
        "f1": ratio(of["f1"], of["items_with_f1"]),
        "average_precision": ratio(of["average_precision"], of["items_with_target"]),
        "micro_precision": ratio(of["hits"], of["predicted"]),
        "micro_recall": ratio(of["hits"], of["targets"]),
        "micro_f1": ratio(2 * of["hits"], of["predicted"] + of["targets"]),
    }


def best_threshold(
    sums: Float64[Tensor, "threshold value"], thresholds: Float64[Tensor, " threshold"]
) -> int:
    """Which threshold has the highest F1 per item; of several, the one that is nearest to 0.5."""
    f1 = rates(sums)["f1"]
    distance = (thresholds - 0.5).abs()
    return int(torch.where(f1 >= f1.max() - _EQUAL, distance, torch.inf).argmin())
