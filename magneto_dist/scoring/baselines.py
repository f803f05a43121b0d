"""Baselines that need no training, so that a score means something.

1. `count_training_tags` reads the tags of the training split, no pictures, over all ranks.
2. `baselines` makes of them what can be said of an item's tags without looking at the item:

- keep all: every tag is important;
- top k: the item's k tags that are the most frequent ones in training, k being the mean number of
  important tags of a training item, rounded, and at least 1;
- tag prior: P(important | tag) of the training split, as a probability.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from magneto_dist.batch import Batch
from magneto_dist.config import Config
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.parallel import progress_bar
from magneto_dist.data.shards import Dataset
from magneto_dist.training.session import Session

Baseline = Callable[[Batch], Float64[Tensor, "batch slot"]]
"""Batch -> probability of every tag."""

_BATCH_SIZE = 1024
_FEW = 20_000


@dataclass(frozen=True)
class TrainingTags:
    """The tags of the training items."""

    frequency: Float64[Tensor, " tag"]
    """Items that carry the tag."""
    important: Float64[Tensor, " tag"]
    """Items for which it is important."""
    items: int
    """Items with a tag."""


def count_training_tags(dataset: Dataset, config: Config, session: Session) -> TrainingTags:
    """Reads the training split once, cut to the slots that the model has; every rank calls.

    Raises:
        InputError: a shard cannot be read.
    """
    world = session.world
    data = replace(config.data, feature_views=0)
    if dataset.num_samples("train") <= _FEW:  # read before loader processes have started
        data = replace(data, num_workers=0)
    text_only = replace(config, model=replace(config.model, kind="tf-t"), data=data)
    plan = BatchPlan.derive(_BATCH_SIZE * world.num_ranks, world.num_ranks, _BATCH_SIZE, 1)
    loader = Loader(dataset, "train", text_only, world, plan, training=False)
    num_tags = len(dataset.vocabulary)
    counts = torch.zeros(2, num_tags + 1, dtype=torch.float64)
    num_items = torch.zeros(1, dtype=torch.float64)
    batches = progress_bar(
        loader.steps_per_epoch,
        "tags of train",
        loader.batches(1, loader.steps_per_epoch),
        unit="batch",
        shown=session.is_main,
    )
    for batch in batches:
        for row, which in enumerate((batch.tag_mask, batch.tag_mask & batch.target)):
            counts[row].index_add_(0, batch.tag_ids.view(-1), which.double().view(-1))
        num_items += batch.tag_mask.any(1).sum()
    counts, num_items = session.reduce_sum(counts).cpu(), session.reduce_sum(num_items)
    return TrainingTags(counts[0, :-1], counts[1, :-1], int(num_items))


def baselines(tags: TrainingTags, device: torch.device) -> dict[str, Baseline]:
    """By name, as in the results."""
    share = tags.important.sum() / tags.frequency.sum().clamp(min=1)
    # One item more, of the average tag: also what is said of a tag that training has not.
    prior = _padded((tags.important + share) / (tags.frequency + 1), device)
    frequency = _padded(tags.frequency, device)
    k = max(1, round(float(tags.important.sum()) / max(tags.items, 1)))
    return {
        "keep_all": lambda batch: torch.ones_like(batch.tag_ids, dtype=torch.float64),
        f"top_{k}": lambda batch: _most_frequent(batch, frequency, k),
        "tag_prior": lambda batch: prior[batch.tag_ids],
    }


def _most_frequent(
    batch: Batch, frequency: Float64[Tensor, " tag"], k: int
) -> Float64[Tensor, "batch slot"]:
    of_slot = torch.where(batch.tag_mask, frequency[batch.tag_ids], -1)
    order = of_slot.argsort(dim=1, descending=True, stable=True)  # of equal ones the first
    chosen = torch.zeros_like(of_slot).scatter_(1, order[:, :k], 1.0)
    return chosen * batch.tag_mask


def _padded(of_tag: Float64[Tensor, " tag"], device: torch.device) -> Float64[Tensor, " id"]:
    """With a 0 for the padding id."""
    return torch.cat([of_tag, of_tag.new_zeros(1)]).to(device)
