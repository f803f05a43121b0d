"""The tags of a split by their probability, in bins: counts that add up over batches and ranks.

1. `num_reached` tells which of rising thresholds a probability reaches; `at_each` adds up how many
   tags there are from each threshold on. What is scored at many thresholds is counted so.
2. `binned_sums` counts a batch's tags by each head's probability and by the gate's value.
3. `binned_curves` makes of these counts, summed over batches and ranks, what TensorBoard draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from magneto_dist.batch import Batch, Prediction

NUM_BINS = 100
"""Of equal width in [0, 1]; TensorBoard draws at most 127 thresholds."""


@dataclass(frozen=True)
class PrecisionRecall:
    """All tags of a split in one list, predicted from the threshold k / NUM_BINS on; k from 0.

    Targets that found no slot count as not predicted. Ratios of nothing are 0.
    """

    true_positives: Float64[Tensor, " threshold"]
    false_positives: Float64[Tensor, " threshold"]
    true_negatives: Float64[Tensor, " threshold"]
    false_negatives: Float64[Tensor, " threshold"]
    precision: Float64[Tensor, " threshold"]
    recall: Float64[Tensor, " threshold"]


@dataclass(frozen=True)
class Histogram:
    """Values in [0, 1], in NUM_BINS bins; 1 is in the last one."""

    counts: Float64[Tensor, " bin"]
    sum: float
    sum_of_squares: float


@dataclass(frozen=True)
class Curves:
    """What the counts of a split say."""

    precision_recall: dict[str, PrecisionRecall]
    """By head."""
    alpha: Histogram | None
    """Of all tags; None: there is no gate, or no tag."""


def num_reached(
    probability: Float64[Tensor, "batch slot"], thresholds: Float64[Tensor, " threshold"]
) -> Int64[Tensor, "batch slot"]:
    """How many thresholds each probability is not below: a tag is predicted at the first so many.

    NaN reaches none.
    """
    return torch.bucketize(probability.nan_to_num(nan=-1.0), thresholds, right=True)


def at_each(counts: Float64[Tensor, "*rows reached"]) -> Float64[Tensor, "*rows threshold"]:
    """From counts by `num_reached`: how many there are from each threshold on."""
    return counts.flip(-1).cumsum(-1).flip(-1)[..., 1:]


def binned_sums(prediction: Prediction, batch: Batch) -> dict[str, Float64[Tensor, "..."]]:
    """Counts of a batch, beside those of `metrics.metric_sums`; no device synchronisation."""
    real = batch.real_tags
    target = batch.target & real
    # Divided on the device: the same doubles everywhere, and no copy to wait for.
    places = torch.arange(NUM_BINS + 1, dtype=torch.float64, device=real.device)
    borders = places / NUM_BINS

    def counted(values: Tensor, *which: Bool[Tensor, "batch slot"]) -> Float64[Tensor, "row bin"]:
        reached = num_reached(values, borders).reshape(-1)
        weights = torch.stack(which).flatten(1).double()
        return weights.new_zeros(len(which), NUM_BINS + 2).index_add_(1, reached, weights)

    sums = {}
    for head in prediction.heads:
        probability = prediction.probability(head).detach().double()
        sums[f"{head}/binned"] = counted(probability, real & ~target, target)
    if prediction.alpha is not None:
        # `where`, not a product: what stands in padding, even NaN, does not matter
        alpha = torch.where(real, prediction.alpha.detach().double(), 0)
        sums |= {"alpha_binned": counted(alpha, real), "alpha_squares": alpha.square().sum()}
    return sums


def binned_curves(sums: Mapping[str, Tensor]) -> Curves:
    """What `binned_sums`, with the sums of `metrics.metric_sums`, say of a split."""
    heads = [name.removesuffix("/binned") for name in sums if name.endswith("/binned")]
    return Curves({head: _precision_recall(sums, head) for head in heads}, _alpha(sums))


def _precision_recall(sums: Mapping[str, Tensor], head: str) -> PrecisionRecall:
    negatives, positives = sums[f"{head}/binned"]
    false_positives, true_positives = at_each(negatives), at_each(positives)
    targets = positives.sum() + sums["targets_cut"]
    return PrecisionRecall(
        true_positives=true_positives,
        false_positives=false_positives,
        true_negatives=negatives.sum() - false_positives,
        false_negatives=targets - true_positives,
        precision=true_positives / (true_positives + false_positives).clamp(min=1),
        recall=true_positives / targets.clamp(min=1),
    )


def _alpha(sums: Mapping[str, Tensor]) -> Histogram | None:
    if "alpha_binned" not in sums or sums["tags"] == 0:
        return None
    (by_reached,) = sums["alpha_binned"]
    counts = by_reached[1:-1].clone()  # nothing is below 0; exactly 1 reaches all
    counts[-1] += by_reached[-1]
    return Histogram(counts, float(sums["alpha"]), float(sums["alpha_squares"]))
