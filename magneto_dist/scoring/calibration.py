"""Do probabilities mean what they say? Calibration, temperature, and the precision-recall curve.

1. `add_log_odds` counts the tags of a batch in fine bins of their log-odds, log p - log(1 - p).
2. Summed over batches and ranks the counts are a `LogOdds`: everything below reads these alone.
3. `reliability` and `expected_calibration_error`: probability against the share that is important.
4. `fit_temperature`, beyond the paper: log-odds are divided by T, so that ranks and what is
   predicted at 0.5 stay, and probabilities become less (T > 1) or more (T < 1) certain.
5. `precision_recall`: over all tags together.

All are finely binned (0.02 in log-odds, and borders where the bins of the calibration error have
theirs); without a temperature the calibration error is exact but for what 1e-5 of probability does.
Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, 2017.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64
from torch import Tensor
from torch.nn.functional import logsigmoid

from magneto_dist.batch import LogProbabilities
from magneto_dist.scoring.average_precision import binned_average_precision

NUM_BINS = 15
"""Bins of equal width in probability, as is usual."""
_LARGEST = 16.0  # log-odds of the last bin: a probability of 1 - 1e-7
_WIDTH = 0.02
_UNSURE = 50.0  # larger log-odds, infinite ones too, count as this in means
_COLDEST, _HOTTEST = 0.05, 20.0  # temperatures


def borders() -> Float64[Tensor, " border"]:
    """Between the bins of log-odds, rising."""
    fine = torch.arange(-_LARGEST, _LARGEST + _WIDTH / 2, _WIDTH, dtype=torch.float64)
    coarse = torch.arange(1, NUM_BINS, dtype=torch.float64) / NUM_BINS
    return torch.cat([fine, coarse.logit()]).sort().values


@dataclass(frozen=True)
class LogOdds:
    """All tags of a split by the log-odds that one head gives them."""

    counts: Float64[Tensor, "3 bin"]
    """Tags that are no target, targets, and the sum of the log-odds of both."""

    @property
    def negatives(self) -> Float64[Tensor, " bin"]:
        """Tags that are no target."""
        return self.counts[0]

    @property
    def positives(self) -> Float64[Tensor, " bin"]:
        """Targets."""
        return self.counts[1]

    @property
    def tags(self) -> Float64[Tensor, " bin"]:
        """Both."""
        return self.counts[:2].sum(0)

    @property
    def mean(self) -> Float64[Tensor, " bin"]:
        """Mean log-odds of a bin."""
        return self.counts[2] / self.tags.clamp(min=1)


@dataclass(frozen=True)
class Reliability:
    """Bins of equal width in probability; those without tags are 0."""

    tags: Float64[Tensor, " bin"]
    probability: Float64[Tensor, " bin"]
    """Mean of the bin's tags."""
    important: Float64[Tensor, " bin"]
    """Fraction of the bin's tags that are a target."""


def add_log_odds(
    counts: Float64[Tensor, "3 bin"],
    log_probabilities: LogProbabilities,
    target: Bool[Tensor, "batch slot"],
    real: Bool[Tensor, "batch slot"],
    edges: Float64[Tensor, " border"],
) -> None:
    """Adds the real tags of a batch to `LogOdds.counts`, in place."""
    positive, negative = (part.detach().double() for part in log_probabilities)
    odds = torch.where(real, positive - negative, 0).nan_to_num().clamp(-_UNSURE, _UNSURE)
    place = torch.bucketize(odds, edges, right=True).view(-1)
    for row, weight in enumerate((real & ~target, real & target, odds * real)):
        counts[row].index_add_(0, place, weight.double().view(-1))


def reliability(odds: LogOdds, temperature: float = 1.0) -> Reliability:
    """What the tags' probabilities say, and how many of them are important."""
    probability = (odds.mean / temperature).sigmoid()
    # A bin of log-odds that begins at a border k / NUM_BINS has its mean at or above it.
    place = (probability * NUM_BINS + 1e-9).long().clamp(max=NUM_BINS - 1)

    def binned(weights: Float64[Tensor, " bin"]) -> Float64[Tensor, " bin"]:
        return torch.zeros(NUM_BINS, dtype=torch.float64).index_add_(0, place, weights)

    tags = binned(odds.tags)
    return Reliability(
        tags=tags,
        probability=binned(odds.tags * probability) / tags.clamp(min=1),
        important=binned(odds.positives) / tags.clamp(min=1),
    )


def expected_calibration_error(binned: Reliability) -> float:
    """ECE: mean over all tags of |probability - fraction important| of their bin."""
    gaps = (binned.probability - binned.important).abs()
    return float((gaps * binned.tags).sum() / binned.tags.sum().clamp(min=1))


def negative_log_likelihood(odds: LogOdds, temperature: float = 1.0) -> float:
    """Mean over all tags, in nats."""
    scaled = odds.mean / temperature
    loss = -(odds.positives * logsigmoid(scaled) + odds.negatives * logsigmoid(-scaled)).sum()
    return float(loss / odds.tags.sum().clamp(min=1))


def fit_temperature(odds: LogOdds) -> float:
    """The temperature with the smallest negative log-likelihood, from 0.05 to 20.

    That is convex in 1 / T, so its slope has one root, which is found by halving.
    """
    low, high = 1 / _HOTTEST, 1 / _COLDEST
    for _ in range(60):
        sharpness = (low * high) ** 0.5
        expected = (odds.mean * sharpness).sigmoid() * odds.tags
        slope = float(((expected - odds.positives) * odds.mean).sum())
        low, high = (low, sharpness) if slope > 0 else (sharpness, high)
    return 1 / sharpness


def precision_recall(
    odds: LogOdds, targets_cut: float = 0.0
) -> tuple[Float64[Tensor, " bin"], Float64[Tensor, " bin"]]:
    """Precision and recall of all tags together, from the highest log-odds down to each bin's end.

    Args:
        odds: counts.
        targets_cut: targets that found no slot, which are never predicted.
    """
    hits, predicted = odds.positives.flip(0).cumsum(0), odds.tags.flip(0).cumsum(0)
    some = predicted > 0
    targets = (hits[-1] + targets_cut).clamp(min=1)
    return hits[some] / predicted[some], hits[some] / targets


def micro_average_precision(odds: LogOdds, targets_cut: float = 0.0) -> float:
    """Average precision of all tags in one list."""
    return float(binned_average_precision(odds.positives, odds.tags, targets_cut))
