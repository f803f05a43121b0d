"""Average precision from counts in bins of probability, without the bias of ties."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor


def binned_average_precision(
    targets: Float64[Tensor, "*rows bin"],
    tags: Float64[Tensor, "*rows bin"],
    targets_cut: float = 0.0,
) -> Float64[Tensor, "*rows"]:
    """Expected over all orders of the tags within each bin; with at most one in each it is exact.

    Let a bin hold n tags, m of them targets, below N tags with M targets in higher bins. In random
    order its i-th tag is a target with probability m / n, and precision there is
    (M + 1 + (i - 1) (m - 1) / (n - 1)) / (N + i) on average. Summed over i, with H the sum of
    1 / (N + i): m / n * ((M + 1) H + (m - 1) / (n - 1) * (n - (N + 1) H)).

    Tags that are tied in truth count as in random order, too; libraries count them by the worst.

    Args:
        targets: in each bin, of rising probability.
        tags: targets and others.
        targets_cut: targets in no bin, which are found last of all, if ever.

    Returns:
        The mean over targets of precision at their rank; 0 where there are none.
    """
    m, n = targets.flip(-1), tags.flip(-1)
    more, higher = m.cumsum(-1) - m, n.cumsum(-1) - n
    harmonic = torch.digamma(higher + n + 1) - torch.digamma(higher + 1)
    others = torch.where(n > 1, (m - 1) / (n - 1).clamp(min=1), 0)
    of_bin = m / n.clamp(min=1) * ((more + 1) * harmonic + others * (n - (higher + 1) * harmonic))
    return of_bin.sum(-1) / (targets.sum(-1) + targets_cut).clamp(min=1)
