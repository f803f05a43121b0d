"""Tag lists -> slots: tag adding & dropping (TAD), outliers, cutting and padding to l slots.

1. The ragged lists of a batch become padded arrays.
2. `_dropped`: tag-dropping (training of "important").
3. `_kept`: lists that are too long are cut.
4. `_num_added`: how many tags are added; `_tags_outside`: which.
5. `_assemble`: kept tags in their order, then added ones, then padding.

Paper: section 5.1 (TAD, outliers of Table 3) and 5.2 (irrelevant tags in pre-training); l is
Table 1's. All draws belong to (seed, epoch, sample), and none depends on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from magneto_dist.config import TagsConfig
from magneto_dist.data.randomness import uniforms


@dataclass(frozen=True)
class TagRows:
    """The tag part of a `Batch`, in numpy; see there for the meaning of the fields."""

    tag_ids: Int64[np.ndarray, "batch slot"]
    tag_mask: Bool[np.ndarray, "batch slot"]
    target: Bool[np.ndarray, "batch slot"]
    outlier: Bool[np.ndarray, "batch slot"]
    tags_cut: Int64[np.ndarray, " batch"]
    targets_cut: Int64[np.ndarray, " batch"]

    def trimmed(self) -> TagRows:
        """Without the slots that no row fills, at the end; one is left."""
        used = max(1, int(self.tag_mask.sum(1).max(initial=0)))
        slots = ("tag_ids", "tag_mask", "target", "outlier")
        return replace(self, **{name: getattr(self, name)[:, :used] for name in slots})


@dataclass(frozen=True)
class _Items:
    """A batch of tag lists, padded to the longest; `present` marks what is not padding."""

    ids: Int64[np.ndarray, "batch tag"]
    important: Bool[np.ndarray, "batch tag"]
    present: Bool[np.ndarray, "batch tag"]

    @property
    def num_tags(self) -> Int64[np.ndarray, " batch"]:
        return self.present.sum(1)

    @property
    def unimportant(self) -> Bool[np.ndarray, "batch tag"]:
        return self.present & ~self.important


class _Draws(NamedTuple):
    """Uniform numbers in [0, 1) of the samples of a batch, by purpose."""

    number_dropped: Float64[np.ndarray, "batch 1"]
    which_dropped: Float64[np.ndarray, "batch tag"]
    which_kept: Float64[np.ndarray, "batch tag"]
    number_added: Float64[np.ndarray, "batch 1"]
    which_added: Float64[np.ndarray, "batch slot"]


def tag_rows(
    tag_ids: Sequence[Sequence[int]],
    important: Sequence[Sequence[bool]],
    sample_ids: Int64[np.ndarray, " batch"],
    *,
    num_tags: int,
    config: TagsConfig,
    seed: int,
    epoch: int,
    training: bool,
    objective: Literal["important", "relevance"],
    outliers: int = 0,
) -> TagRows:
    """The slots of a batch of items; l = config.max_tags.

    "important", training: TAD. From 0 to floor(beta_hat * u) tags are dropped, u being the number
    of the item's unimportant tags; then from 0 to floor(beta * u) are added, as far as slots are
    free and the vocabulary lasts. Both numbers are uniform, both bounds exact. Of an item with more
    than l tags left, all important ones stay and a random choice of the rest (of the important
    ones, if they are too many).

    "important", evaluation: the first l tags stay, nothing is dropped, and `outliers` tags are
    added, as far as slots and vocabulary last (Table 3).

    "relevance" (pre-training), training and evaluation: all original tags are targets, and
    floor(irrelevant_ratio * n) tags, at least one, are added to an item with n tags. One slot is
    kept free for that: at most l - 1 original tags stay (one, if l is 1), a random choice in
    training, the first in evaluation.

    Added tags are unique and uniform over the vocabulary without the item's original tags, dropped
    and cut ones included. Nothing is added to an item without tags: such rows count for nothing.

    Args:
        tag_ids: per item, its unique tags.
        important: per item, which of them are important ("relevance" ignores it).
        sample_ids: whose draws are used; any number in padding rows.
        num_tags: size of the vocabulary, also the padding id.
        config: l and the ratios.
        seed: of the run.
        epoch: from 0; evaluation always uses the draws of epoch 0.
        training: whether tags are dropped, and how long lists are cut.
        objective: see above.
        outliers: tags added per item, for "important" in evaluation.

    Raises:
        ValueError: an item's tags are not unique or not in the vocabulary; `outliers` is given
            together with training or "relevance".
    """
    if outliers and (training or objective == "relevance"):
        raise ValueError('outliers are added in evaluation of the objective "important" only')
    items = _padded(tag_ids, important)
    width = items.ids.shape[1]
    purposes = {
        "tags: number dropped": 1,
        "tags: which dropped": width,
        "tags: which kept": width,
        "tags: number added": 1,
        "tags: which added": config.max_tags,
    }
    draws = _Draws(*uniforms(seed, epoch if training else 0, sample_ids, purposes))
    if objective == "relevance":
        items = _Items(items.ids, items.present, items.present)
    excluded = _sorted_tags(items, num_tags)

    left = items.present
    if training and objective == "important":
        left = left & ~_dropped(items, config, draws)
    room = max(config.max_tags - 1, 1) if objective == "relevance" else config.max_tags
    kept = _kept(left, items.important, room, draws.which_kept if training else None)

    wanted = _num_added(items, config, draws, training, objective, outliers)
    free = np.minimum(config.max_tags - kept.sum(1), num_tags - items.num_tags)
    added = _tags_outside(excluded, np.minimum(wanted, free), num_tags, draws.which_added)

    cut = left & ~kept
    return _assemble(items, kept, added, cut, num_tags, config.max_tags)


def _padded(tag_ids: Sequence[Sequence[int]], important: Sequence[Sequence[bool]]) -> _Items:
    lengths = np.array([len(ids) for ids in tag_ids], dtype=np.int64)
    present = np.arange(lengths.max(initial=0)) < lengths[:, None]
    padded_ids = np.zeros(present.shape, dtype=np.int64)
    padded_important = np.zeros(present.shape, dtype=bool)
    padded_ids[present] = np.fromiter(chain.from_iterable(tag_ids), np.int64)
    padded_important[present] = np.fromiter(chain.from_iterable(important), bool)
    return _Items(padded_ids, padded_important, present)


def _sorted_tags(items: _Items, num_tags: int) -> Int64[np.ndarray, "batch tag"]:
    """Each item's tags in ascending order, followed by padding ids."""
    ids = np.where(items.present, items.ids, num_tags)
    if ids.size and not 0 <= ids.min() <= ids[items.present].max(initial=0) < num_tags:
        raise ValueError(f"tag ids from {ids.min()} to {ids.max()}, but {num_tags} tags")
    ids.sort(axis=1)
    if np.any((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] < num_tags)):
        raise ValueError("an item holds a tag twice")
    return ids


def _dropped(items: _Items, config: TagsConfig, draws: _Draws) -> Bool[np.ndarray, "batch tag"]:
    """Tag-dropping: which unimportant tags go."""
    largest = _floor_of_ratio(config.beta_drop, items.unimportant.sum(1))
    num_dropped = _up_to(largest, draws.number_dropped)
    return _first(num_dropped, items.unimportant, draws.which_dropped)


def _kept(
    left: Bool[np.ndarray, "batch tag"],
    important: Bool[np.ndarray, "batch tag"],
    room: int,
    draws: Float64[np.ndarray, "batch tag"] | None,
) -> Bool[np.ndarray, "batch tag"]:
    """Which tags stay where more than `room` are left; without `draws` the first ones."""
    batch, width = left.shape
    if width <= room:
        return left
    if draws is None:
        priority = np.broadcast_to(np.arange(width, dtype=np.float64), left.shape)
    else:
        priority = draws - important  # important ones below 0, before the rest
    return _first(np.full(batch, room), left, priority)


def _num_added(
    items: _Items,
    config: TagsConfig,
    draws: _Draws,
    training: bool,
    objective: str,
    outliers: int,
) -> Int64[np.ndarray, " batch"]:
    """How many tags would be added if there were room."""
    if objective == "relevance":
        wanted = np.maximum(_floor_of_ratio(config.irrelevant_ratio, items.num_tags), 1)
    elif training:
        largest = _floor_of_ratio(config.beta_add, items.unimportant.sum(1))
        wanted = _up_to(largest, draws.number_added)
    else:
        wanted = np.full(len(items.ids), outliers)
    return np.where(items.num_tags > 0, wanted, 0)


def _tags_outside(
    excluded: Int64[np.ndarray, "batch tag"],
    count: Int64[np.ndarray, " batch"],
    num_tags: int,
    draws: Float64[np.ndarray, "batch slot"],
) -> Int64[np.ndarray, "batch added"]:
    """`count` tags per item, none of `excluded` (sorted, padded); after them padding ids.

    Floyd's sampling without replacement (Bentley and Floyd, 1987) chooses ranks among the tags
    that are not excluded: for j = n - count ... n - 1 it takes a uniform rank of 0 ... j, or j
    itself if that rank is already taken. Every set of ranks is equally likely.
    """
    most = count.max(initial=0)
    num_allowed = num_tags - (excluded < num_tags).sum(1)
    ranks = np.full((len(count), most), -1, dtype=np.int64)
    for i in range(most):
        last = num_allowed - count + i  # j; beyond an item's count the result is not used
        rank = (draws[:, i] * (last + 1)).astype(np.int64)
        is_taken = (ranks[:, :i] == rank[:, None]).any(1)
        ranks[:, i] = np.where(is_taken, last, rank)
    # The tag of rank r is r plus the number of excluded tags below it; the k-th excluded tag (from
    # 0) has e_k - k allowed ones below it, so it lies below that tag if e_k - k <= r. One search
    # does for all items: each has a range of numbers of its own.
    width = excluded.shape[1]
    allowed_below = np.where(excluded < num_tags, excluded - np.arange(width), num_tags)
    range_start = np.arange(len(count))[:, None] * (num_tags + 1)
    below = np.searchsorted((allowed_below + range_start).ravel(), ranks + range_start, "right")
    tags = ranks + below - np.arange(len(count))[:, None] * width
    return np.where(np.arange(most) < count[:, None], tags, num_tags)


def _assemble(
    items: _Items,
    kept: Bool[np.ndarray, "batch tag"],
    added: Int64[np.ndarray, "batch added"],
    cut: Bool[np.ndarray, "batch tag"],
    num_tags: int,
    max_tags: int,
) -> TagRows:
    """Kept tags in their order, then added ones, then padding."""
    is_added = added < num_tags
    slot = np.arange(max_tags)
    num_kept = kept.sum(1)[:, None]
    is_kept = slot < num_kept
    outlier = ~is_kept & (slot < num_kept + is_added.sum(1)[:, None])
    # Marks of slots and of tags hold equally many a row, and both are gone through row by row.
    tag_ids = np.full(outlier.shape, num_tags, dtype=np.int64)
    tag_ids[is_kept] = items.ids[kept]
    tag_ids[outlier] = added[is_added]
    target = np.zeros(outlier.shape, dtype=bool)
    target[is_kept] = items.important[kept]
    return TagRows(
        tag_ids=tag_ids,
        tag_mask=is_kept | outlier,
        target=target,
        outlier=outlier,
        tags_cut=cut.sum(1),
        targets_cut=(cut & items.important).sum(1),
    )


def _first(
    count: Int64[np.ndarray, " batch"],
    candidates: Bool[np.ndarray, "batch tag"],
    priority: Float64[np.ndarray, "batch tag"],
) -> Bool[np.ndarray, "batch tag"]:
    """The `count` candidates of lowest priority per item, or all if there are fewer."""
    order = np.argsort(np.where(candidates, priority, np.inf), axis=1, kind="stable")
    chosen = np.zeros_like(candidates)
    in_order = np.arange(candidates.shape[1]) < count[:, None]
    chosen[np.arange(len(order))[:, None], order] = in_order
    return chosen & candidates


def _up_to(
    largest: Int64[np.ndarray, " batch"], draws: Float64[np.ndarray, "batch 1"]
) -> Int64[np.ndarray, " batch"]:
    """One integer per sample, uniform from 0 to `largest` inclusive."""
    return (draws[:, 0] * (largest + 1)).astype(np.int64)


def _floor_of_ratio(ratio: float, counts: Int64[np.ndarray, "..."]) -> Int64[np.ndarray, "..."]:
    """floor(ratio * count), exact for the decimal number that the user wrote.

    No float takes part: 0.29 * 100 is 28.999999999999996 in floating point.
    """
    return _floors(ratio, int(counts.max(initial=0)))[counts]


@lru_cache(maxsize=256)
def _floors(ratio: float, largest: int) -> Int64[np.ndarray, " count"]:
    exact = Fraction(str(ratio))
    floors = [exact.numerator * n // exact.denominator for n in range(largest + 1)]
    return np.array(floors, dtype=np.int64)
