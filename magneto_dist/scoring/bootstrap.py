"""How far another sample of items could move a number: Poisson bootstrap.

Each item counts in each of B resamples as often as a draw from the Poisson distribution with mean 1
says. The draws belong to the item, not to a process, so that sums over any split of the items add
up to the same resamples. Sums are `thresholds.VALUES`, so what is drawn again are numerators and
denominators together. The threshold stays: that it was chosen is no part of the intervals.
Chamandy, Muralidharan, Najmi, Naidu: Estimating Uncertainty for Massive Data Streams, 2012.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from magneto_dist.data.randomness import uniform

CONFIDENCE = 0.95
_MOST = 20  # a draw above it has a probability of 1e-20
_CUMULATIVE = np.cumsum([math.exp(-1) / math.factorial(count) for count in range(_MOST)])


def item_weights(
    sample_ids: Int64[Tensor, " batch"], num_resamples: int, seed: int
) -> Float64[Tensor, "resample batch"]:
    """How often each item counts in each resample; on the CPU.

    Args:
        sample_ids: positions of the items in their split; any number in padding rows.
        num_resamples: B.
        seed: the same on all ranks.
    """
    draws = uniform(seed, 0, sample_ids.numpy(), "bootstrap", num_resamples)
    counts = np.searchsorted(_CUMULATIVE, draws, side="right")
    return torch.from_numpy(counts.T.astype(np.float64))


def interval(values: Float64[Tensor, " resample"]) -> list[float]:
    """The central 95 % of the resamples (percentile interval): lower and upper end."""
    tail = (1 - CONFIDENCE) / 2
    return torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
