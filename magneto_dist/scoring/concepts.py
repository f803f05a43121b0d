"""Every concept (tag of the vocabulary) by itself: precision, recall, F1, average precision, mAP.

1. `add_concept_counts` sorts the tags of a batch by concept and by the thresholds that they reach.
2. Summed over batches and ranks they become `Concepts`.

What a concept is scored on are the items that carry it in a slot; targets that found no slot
(`targets_cut`) are of no concept. Average precision is binned: tags between two neighbouring
thresholds count as in random order. Memory: 16 bytes a concept and threshold, however many items
there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float64
from torch import Tensor

from magneto_dist.batch import Batch
from magneto_dist.binning import at_each, num_reached
from magneto_dist.scoring.average_precision import binned_average_precision


@dataclass(frozen=True)
class ConceptScores:
    """At one threshold; counts are items. Ratios of nothing are 0."""

    items: Float64[Tensor, " tag"]
    """That carry the tag."""
    targets: Float64[Tensor, " tag"]
    """For which it is important."""
    predicted: Float64[Tensor, " tag"]
    hits: Float64[Tensor, " tag"]
    precision: Float64[Tensor, " tag"]
    recall: Float64[Tensor, " tag"]
    f1: Float64[Tensor, " tag"]
    average_precision: Float64[Tensor, " tag"]


@dataclass(frozen=True)
class Concepts:
    """Counts of one head over a split."""

    counts: Float64[Tensor, "2 tag reached"]
    """Tags that are no target, and targets, by how many thresholds they reach."""

    def at(self, threshold: int) -> ConceptScores:
        """Scores where a tag is predicted from the threshold with this number on."""
        hits = self._hits[:, threshold]
        predicted = self._predicted[:, threshold]
        items, targets = self.counts.sum((0, 2)), self.counts[1].sum(1)
        return ConceptScores(
            items=items,
            targets=targets,
            predicted=predicted,
            hits=hits,
            precision=hits / predicted.clamp(min=1),
            recall=hits / targets.clamp(min=1),
            f1=2 * hits / (predicted + targets).clamp(min=1),
            average_precision=self.average_precision,
        )

    def macro(self, threshold: int) -> dict[str, float]:
        """Means over the concepts that are a target or predicted."""
        scores = self.at(threshold)
        occurs = scores.predicted + scores.targets > 0
        return {
            name: _mean(getattr(scores, name)[occurs]) for name in ("precision", "recall", "f1")
        }

    @cached_property
    def average_precision(self) -> Float64[Tensor, " tag"]:
        """Of each concept; 0 where it is never a target."""
        return binned_average_precision(self.counts[1], self.counts.sum(0))

    @property
    def mean_average_precision(self) -> float:
        """mAP: the mean over the concepts that are a target at least once."""
        return _mean(self.average_precision[self.counts[1].sum(1) > 0])

    @property
    def chance(self) -> float:
        """The mAP that ranking by chance has on average."""
        return _mean(self.average_precision_by_chance[self.counts[1].sum(1) > 0])

    @property
    def average_precision_by_chance(self) -> Float64[Tensor, " tag"]:
        """Of each concept, expected: all of its items in one bin."""
        targets, items = self.counts[1].sum(1), self.counts.sum((0, 2))
        return binned_average_precision(targets[:, None], items[:, None])

    @cached_property
    def _hits(self) -> Float64[Tensor, "tag threshold"]:
        return at_each(self.counts[1])

    @cached_property
    def _predicted(self) -> Float64[Tensor, "tag threshold"]:
        return at_each(self.counts.sum(0))


def add_concept_counts(
    counts: Float64[Tensor, "2 tag reached"],
    probability: Float64[Tensor, "batch slot"],
    batch: Batch,
    thresholds: Float64[Tensor, " threshold"],
) -> None:
    """Adds the tags of a batch to `Concepts.counts`, in place: they may be large."""
    real = batch.real_tags
    _, num_tags, num_bins = counts.shape
    place = (batch.target * num_tags + batch.tag_ids) * num_bins + num_reached(
        probability, thresholds
    )
    # Without a tag the id is one too large; weight 0 goes anywhere.
    counts.view(-1).index_add_(0, torch.where(real, place, 0).view(-1), real.double().view(-1))


def _mean(values: Float64[Tensor, " tag"]) -> float:
    return float(values.mean()) if len(values) else 0.0
