"""Everything that is summed while a split is scored, each item once, and what the sums say.

1. `ScoreSums.update` adds a batch, in place: memory does not grow with the number of items.
2. `ScoreSums.reduced` adds up the ranks, in one call, and gives `Scores`, the same on each.
3. `Scores` divides: metrics at a threshold, the sweep, intervals, concepts, calibration.

A scorer is a head of the model or a baseline; the first head is the main one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from magneto_dist.batch import Batch, Prediction
from magneto_dist.binning import at_each, num_reached
from magneto_dist.config import LossConfig
from magneto_dist.evaluation import loss_of, loss_sums
from magneto_dist.metrics import Sums, reduce_sums, summarise
from magneto_dist.scoring import bootstrap
from magneto_dist.scoring.baselines import Baseline
from magneto_dist.scoring.calibration import LogOdds, add_log_odds, borders
from magneto_dist.scoring.concepts import Concepts, add_concept_counts
from magneto_dist.scoring.thresholds import VALUES, best_threshold, item_values, rates

_INTERVALS = ("precision", "strict_precision", "recall", "f1", "micro_f1", "average_precision")


class ScoreSums:
    """The sums of one rank.

    Args:
        heads: of the model, the main one first.
        baselines: by name.
        num_tags: size of the vocabulary.
        thresholds: rising, see `thresholds.grid`.
        loss: which loss to report.
        resampled: which thresholds intervals are wanted at.
        num_resamples: of the bootstrap; 0: no intervals.
        seed: of the bootstrap.
        device: of predictions and batches.
    """

    def __init__(
        self,
        heads: tuple[str, ...],
        baselines: Mapping[str, Baseline],
        *,
        num_tags: int,
        thresholds: Float64[Tensor, " threshold"],
        loss: LossConfig,
        resampled: slice,
        num_resamples: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._heads, self._baselines, self._loss = heads, baselines, loss
        self._resampled, self._num_resamples, self._seed = resampled, num_resamples, seed
        self._thresholds, self._borders = thresholds.to(device), borders().to(device)
        shapes: dict[str, tuple[int, ...]] = {
            **{f"heads/{head}/concepts": (2, num_tags, len(thresholds) + 1) for head in heads},
            **{f"heads/{head}/odds": (3, len(self._borders) + 1) for head in heads},
            **{f"{scorer}/items": (len(thresholds), len(VALUES)) for scorer in self._scorers},
            **{
                f"{scorer}/resampled": (num_resamples, len(thresholds[resampled]), len(VALUES))
                for scorer in self._scorers
            },
            **dict.fromkeys(("items", "tags", "tags_cut", "targets_cut", "alpha"), ()),
            **dict.fromkeys(("loss_by_items", "loss_by_tags", "items_with_outlier"), ()),
            "loss_counts": (2,),
            "largest_outlier": (len(thresholds) + 1,),
        }
        self._sums: Sums = {
            name: torch.zeros(shape, dtype=torch.float64, device=device)
            for name, shape in shapes.items()
        }

    @property
    def _scorers(self) -> tuple[str, ...]:
        return (
            *(f"heads/{head}" for head in self._heads),
            *(f"baselines/{name}" for name in self._baselines),
        )

    def update(self, prediction: Prediction, batch: Batch) -> None:
        """Adds the valid rows of a batch, which is on the device of the sums."""
        real = batch.real_tags
        probabilities = {
            **{f"heads/{head}": prediction.probability(head).double() for head in self._heads},
            **{f"baselines/{name}": of(batch) for name, of in self._baselines.items()},
        }
        weights = None
        if self._num_resamples:
            ids = batch.sample_ids.cpu()
            weights = bootstrap.item_weights(ids, self._num_resamples, self._seed).to(real.device)
        for scorer, probability in probabilities.items():
            values = item_values(probability, batch, self._thresholds)
            self._sums[f"{scorer}/items"] += values.sum(0)
            if weights is not None:
                self._sums[f"{scorer}/resampled"] += torch.tensordot(
                    weights, values[:, self._resampled], dims=1
                )
        for head in self._heads:
            name, target = f"heads/{head}", batch.target & real
            counts = self._sums[f"{name}/concepts"]
            add_concept_counts(counts, probabilities[name], batch, self._thresholds)
            odds, log_p = self._sums[f"{name}/odds"], prediction.log_probabilities(head)
            add_log_odds(odds, log_p, target, real, self._borders)
        self._add_outliers(probabilities[f"heads/{self._heads[0]}"], batch.outlier & real)
        self._add({**_counts(prediction, batch), **loss_sums(prediction, batch, self._loss)})

    def reduced(self, reduce: Callable[[Tensor], Tensor]) -> Scores:
        """The sums over all ranks; every rank must call it.

        Args:
            reduce: sums a float64 tensor over ranks; called once.
        """
        sums = reduce_sums(self._sums, reduce)
        return Scores(
            sums, self._heads, tuple(self._baselines), self._thresholds.cpu(), self._resampled
        )

    def _add(self, sums: Mapping[str, Tensor]) -> None:
        for name, value in sums.items():
            self._sums[name] += value

    def _add_outliers(self, probability: Float64[Tensor, "batch slot"], outlier: Tensor) -> None:
        reached = torch.where(outlier, num_reached(probability, self._thresholds), 0)
        fooled, has_outlier = reached.amax(1), outlier.any(1).double()
        self._sums["largest_outlier"].index_add_(0, fooled, has_outlier)
        self._sums["items_with_outlier"] += has_outlier.sum()


@dataclass(frozen=True)
class Scores:
    """What a split's sums say; thresholds are meant by their number."""

    sums: Sums
    heads: tuple[str, ...]
    baselines: tuple[str, ...]
    thresholds: Float64[Tensor, " threshold"]
    resampled: slice

    @property
    def main(self) -> str:
        """The scorer whose threshold is chosen."""
        return f"heads/{self.heads[0]}"

    @property
    def scorers(self) -> tuple[str, ...]:
        """Heads and baselines, as in the names of the sums."""
        return (*(f"heads/{h}" for h in self.heads), *(f"baselines/{b}" for b in self.baselines))

    @property
    def targets_cut(self) -> float:
        """Targets that found no slot."""
        return float(self.sums["targets_cut"])

    def metrics(self, threshold: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `evaluate` gives them for the model; and the same of each baseline."""
        plain = ("items", "tags", "tags_cut", "targets_cut", "items_with_outlier")
        sums = {name: self.sums[name] for name in plain}
        if len(self.heads) == 3:  # there is a gate
            sums["alpha"] = self.sums["alpha"]
        sums["items_with_predicted_outlier"] = at_each(self.sums["largest_outlier"])[threshold]
        for scorer in self.scorers:
            name = scorer.split("/")[1]
            values = self.sums[f"{scorer}/items"][threshold]
            sums |= {f"{name}/{v}": values[place] for place, v in enumerate(VALUES)}
            if scorer.startswith("heads/"):
                concepts = self.concepts(name).at(threshold)
                sums[f"{name}/concept_hits"] = concepts.hits
                sums[f"{name}/concept_predicted"] = concepts.predicted
                sums[f"{name}/concept_targets"] = concepts.targets
        metrics = summarise(sums)
        of_baselines = {name: metrics.pop(name) for name in self.baselines}
        return {"loss": loss_of(self.sums), **metrics}, of_baselines

    def sweep(self, scorer: str) -> dict[str, Float64[Tensor, " threshold"]]:
        """`thresholds.rates` at every threshold."""
        return rates(self.sums[f"{scorer}/items"])

    def best(self, scorer: str) -> int:
        """The threshold with the highest F1 per item (the same in both protocols)."""
        return best_threshold(self.sums[f"{scorer}/items"], self.thresholds)

    def concepts(self, head: str) -> Concepts:
        """Every concept by itself."""
        return Concepts(self.sums[f"heads/{head}/concepts"])

    def odds(self, head: str) -> LogOdds:
        """All tags by their log-odds."""
        return LogOdds(self.sums[f"heads/{head}/odds"])

    def intervals(self, scorer: str, threshold: int) -> dict[str, list[float]] | None:
        """95 % intervals of rates, and of the F1 by which the main head is better; None: no
        resamples."""
        place = range(len(self.thresholds))[self.resampled].index(threshold)
        ours = rates(self.sums[f"{scorer}/resampled"][:, place])
        if len(ours["f1"]) == 0:
            return None
        intervals = {name: bootstrap.interval(ours[name]) for name in _INTERVALS}
        if scorer != self.main:
            main = rates(self.sums[f"{self.main}/resampled"][:, place])
            intervals["f1_main_is_better_by"] = bootstrap.interval(main["f1"] - ours["f1"])
        return intervals


def _counts(prediction: Prediction, batch: Batch) -> Sums:
    real, valid = batch.real_tags, batch.sample_valid
    counts = {
        "items": (valid & ((real.sum(1) + batch.tags_cut) > 0)).sum(),
        "tags": real.sum(),
        "tags_cut": (batch.tags_cut * valid).sum(),
        "targets_cut": (batch.targets_cut * valid).sum(),
    }
    if prediction.alpha is not None:
        # `where`, not a product: what stands in padding, even NaN, does not matter
        counts["alpha"] = torch.where(real, prediction.alpha.double(), 0).sum()
    return counts
