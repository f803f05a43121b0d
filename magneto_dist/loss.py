"""The objective of training (paper, section 3.2), as a sum over micro-batches and ranks.

1. `count_for_loss` counts what a micro-batch holds; the caller adds the counts of all micro-batches
   and ranks of a step.
2. `ets_loss` gives each micro-batch its share, divided by these global counts: the shares add up to
   the loss of the whole global batch, however it was cut.

Everything here is float32 (float64 for a float64 model), outside autocast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from magneto_dist.batch import Batch, Prediction
from magneto_dist.config import LossConfig


class LossParts(NamedTuple):
    """This micro-batch's share of the loss of the global batch."""

    total: Float[Tensor, ""]
    """Equation 5: the sum of the heads; the one to call `backward` on."""
    heads: dict[str, Float[Tensor, ""]]
    """Loss of each head that is trained ("final", "image", "tag"), detached, for logs."""


def count_for_loss(batch: Batch) -> Float64[Tensor, " 2"]:
    """(valid items, real tags in them) of a micro-batch; to be summed over all of a step."""
    return torch.stack([batch.sample_valid.sum(), batch.real_tags.sum()]).double()


def ets_loss(
    prediction: Prediction, batch: Batch, counts: Float64[Tensor, " 2"], config: LossConfig
) -> LossParts:
    """BCE-Dice of the gated output plus those of both streams (equations 4 and 5).

    L_total = L_g + L_it + L_t with L_g of head "final", L_it of "image", L_t of "tag". Without
    auxiliary losses it is L_g alone; without a gate (pre-training) L_it + L_t; a baseline has one
    loss, of its only head.

    Args:
        prediction: logits of any precision; those of padding and of invalid rows do not matter.
        batch: targets, `tag_mask` and `sample_valid`.
        counts: `count_for_loss` summed over all micro-batches and ranks of the step.
        config: which losses, and what BCE is averaged over.
    """
    real = batch.real_tags
    num_items, num_tags = counts.clamp(min=1)
    num_slots = batch.num_slots or real.shape[1]
    bce_divisor = num_items * num_slots if config.normalisation == "slots" else num_tags
    with torch.autocast(real.device.type, enabled=False):
        prediction = _without_padding(prediction, real)
        target = batch.target & real
        losses = {
            head: _head_loss(prediction, head, target, real, bce_divisor, num_items, config)
            for head in trained_heads(prediction, config)
        }
        total = torch.stack(list(losses.values())).sum()
    return LossParts(total, {head: loss.detach() for head, loss in losses.items()})


def trained_heads(prediction: Prediction, config: LossConfig) -> tuple[str, ...]:
    """The heads whose losses are added up."""
    if prediction.gate_logits is not None and not config.auxiliary:
        return ("final",)
    if prediction.gate_logits is None and "final" in prediction.heads:
        return ("final",)  # a baseline: its stream is its output, and counts once
    return prediction.heads


def _head_loss(
    prediction: Prediction,
    head: str,
    target: Bool[Tensor, "batch slot"],
    real: Bool[Tensor, "batch slot"],
    bce_divisor: Float64[Tensor, ""],
    num_items: Float64[Tensor, ""],
    config: LossConfig,
) -> Float[Tensor, ""]:
    bce = _bce_sum(prediction, head, target, real)
    loss = bce / bce_divisor.to(bce.dtype)
    if config.kind == "bce":
        return loss
    dice = _dice_sum(prediction.probability(head), target, real, config.dice_smoothing)
    return loss + dice / num_items.to(dice.dtype)


def _bce_sum(
    prediction: Prediction,
    head: str,
    target: Bool[Tensor, "batch slot"],
    real: Bool[Tensor, "batch slot"],
) -> Float[Tensor, ""]:
    """Equation 2 summed over real tags: -y log p - (1 - y) log(1 - p), y target."""
    log_p = prediction.log_probabilities(head)
    return -torch.where(real, torch.where(target, log_p.positive, log_p.negative), 0).sum()


def _dice_sum(
    probability: Float[Tensor, "batch slot"],
    target: Bool[Tensor, "batch slot"],
    real: Bool[Tensor, "batch slot"],
    smoothing: float,
) -> Float[Tensor, ""]:
    """Equation 3 per item, summed: 1 - (2 sum(y p) + s) / (sum(y) + sum(p) + s), s smoothing.

    |y n p| is the sum of products and |p| the sum of probabilities, over the real tags of the item.
    An item without tags loses nothing (1 - s / s), so invalid rows need no weight of their own.
    """
    predicted = torch.where(real, probability, 0)
    overlap = torch.where(target, predicted, 0).sum(1)
    size = predicted.sum(1) + target.sum(1)
    return (1 - (2 * overlap + smoothing) / (size + smoothing)).sum()


def _without_padding(prediction: Prediction, real: Bool[Tensor, "batch slot"]) -> Prediction:
    """Logit 0 where there is no tag, so that nothing there, not even NaN, reaches a gradient."""
    return Prediction(*(None if x is None else torch.where(real, x, 0) for x in prediction))
