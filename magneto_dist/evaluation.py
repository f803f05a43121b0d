"""Metrics, loss and curves of a whole split, each item once, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from magneto_dist.batch import Batch, Prediction, Reject
from magneto_dist.binning import Curves, binned_curves, binned_sums
from magneto_dist.config import Config, LossConfig
from magneto_dist.loss import count_for_loss, ets_loss
from magneto_dist.metrics import Sums, add_sums, metric_sums, reduce_sums, summarise


@dataclass(frozen=True)
class Example:
    """An item with what the model says of it, on CPU; slots are real tags only."""

    key: str
    pixels: UInt8[Tensor, "3 height width"] | None
    tag_ids: Int64[Tensor, " tag"]
    target: Bool[Tensor, " tag"]
    probability: Float[Tensor, " tag"]
    """Of the first head: the gated output where there is a gate."""
    alpha: Float[Tensor, " tag"] | None


class Evaluated(NamedTuple):
    """A split that was scored: metrics and curves are the same on every rank."""

    metrics: dict
    """As `summarise` gives them, with "loss", normalised over the whole split."""
    curves: Curves
    examples: list[Example]
    """Of this rank's first items."""


def evaluate_model(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    reduce: Callable[[Tensor], Tensor],
    config: Config,
    num_tags: int,
    num_examples: int = 0,
) -> Evaluated:
    """`evaluate` for a model that may be in training: it comes back in the mode it was in.

    Args:
        model: on `device`; may be wrapped (DDP and the like).
        batches: of this rank, on any device; every rank has the same number of them.
        device: where to score.
        reduce: as for `evaluate`.
        config: its loss and threshold.
        num_tags: as for `evaluate`.
        num_examples: as for `evaluate`.
    """

    def predict(batch: Batch) -> Prediction:
        with torch.no_grad():
            return model(**batch.inputs())

    was_training = model.training
    model.eval()
    try:
        return evaluate(
            predict,
            (batch.to(device) for batch in batches),
            reduce=reduce,
            loss_config=config.loss,
            threshold=config.train.threshold,
            num_tags=num_tags,
            num_examples=num_examples,
        )
    finally:
        model.train(was_training)


def evaluate(
    predict: Callable[[Batch], Prediction],
    batches: Iterable[Batch],
    *,
    reduce: Callable[[Tensor], Tensor],
    loss_config: LossConfig,
    threshold: float,
    num_tags: int,
    num_examples: int = 0,
) -> Evaluated:
    """Scores every valid row of `batches` once.

    Args:
        predict: the model in evaluation mode, without gradients.
        batches: of this rank, on the model's device; every rank has the same number of them.
        reduce: sums a float64 tensor over ranks; called once.
        loss_config: which loss to report.
        threshold: probability from which a tag is predicted.
        num_tags: size of the vocabulary.
        num_examples: items to show, of this rank's first ones.
    """
    sums: Sums = {}
    examples: list[Example] = []
    for batch in batches:
        prediction = predict(batch)
        batch_sums = metric_sums(prediction, batch, threshold, num_tags)
        batch_sums |= loss_sums(prediction, batch, loss_config) | binned_sums(prediction, batch)
        sums = add_sums(sums, batch_sums)
        if len(examples) < num_examples:
            examples += _examples(prediction, batch)[: num_examples - len(examples)]
    sums = reduce_sums(sums, reduce)
    return Evaluated({"loss": loss_of(sums), **summarise(sums)}, binned_curves(sums), examples)


def collecting_rejects(batches: Iterable[Batch], rejects: list[Reject]) -> Iterator[Batch]:
    """The same batches; what could not be scored is added to `rejects`."""
    for batch in batches:
        rejects += batch.rejects
        yield batch


def loss_sums(prediction: Prediction, batch: Batch, config: LossConfig) -> Sums:
    """The loss before normalisation: its part per item, and its part per tag.

    A part that is normalised by the number of tags vanishes where that is infinite.
    """
    ones = torch.ones(2, dtype=torch.float64, device=batch.tag_ids.device)
    whole = ets_loss(prediction, batch, ones, config).total.double()
    endless_tags = torch.stack([ones[0], ones[1] * torch.inf])
    by_items = ets_loss(prediction, batch, endless_tags, config).total.double()
    return {
        "loss_by_items": by_items,
        "loss_by_tags": whole - by_items,
        "loss_counts": count_for_loss(batch),
    }


def loss_of(sums: Sums) -> float:
    """The loss of a split from its `loss_sums`."""
    items, tags = sums["loss_counts"].clamp(min=1)
    return float(sums["loss_by_items"] / items + sums["loss_by_tags"] / tags)


def _examples(prediction: Prediction, batch: Batch) -> list[Example]:
    probability = prediction.probability(prediction.heads[0]).float().cpu()
    alpha = None if prediction.alpha is None else prediction.alpha.float().cpu()
    batch = batch.to("cpu")
    return [
        Example(
            key=batch.keys[row],
            pixels=None if batch.pixels is None else batch.pixels[row],
            tag_ids=batch.tag_ids[row, real],
            target=batch.target[row, real],
            probability=probability[row, real],
            alpha=None if alpha is None else alpha[row, real],
        )
        for row, real in enumerate(batch.tag_mask)
        if batch.sample_valid[row]
    ]
