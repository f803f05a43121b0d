"""Which sample stands where: pure functions of (seed, epoch, step), without I/O and without state.

1. `BatchPlan.derive` cuts a global batch into micro-batches, once per run and number of ranks.
2. `Order.sample_ids` maps the rows of an epoch to sample ids:
   row -> span and position in it -> place in the span's shuffled window -> place in the epoch's
   permuted shards -> sample id.
3. `micro_batch_sample_ids` cuts step s of the epoch, rows [s * B, (s + 1) * B), over ranks and
   micro-steps.

An epoch is S spans (canonical streams) of equal size, and its rows take from them in turn. What a
global batch holds, and in which order, does not depend on the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from jaxtyping import Int32, Int64

from magneto_dist.data.randomness import random_bits
from magneto_dist.errors import InputError

_STEPS_AT_ONCE = 16


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: rank by rank, and within a rank micro-step by micro-step."""

    global_batch_size: int
    """Samples per optimizer step over all ranks, called B here."""
    num_ranks: int
    micro_batch_size: int
    """Rows per forward pass and rank, padding included."""
    micro_steps: int
    """Micro-batches per optimizer step and rank."""

    def __post_init__(self) -> None:
        rows_per_step = self.num_ranks * self.micro_steps * self.micro_batch_size
        if not 1 <= self.global_batch_size <= rows_per_step:
            raise ValueError(f"{self} has {rows_per_step} rows for a global batch")

    @classmethod
    def derive(
        cls,
        global_batch_size: int,
        num_ranks: int,
        max_micro_batch_size: int,
        group_size: int,
    ) -> BatchPlan:
        """The plan with the fewest micro-steps, and of these the one with the least padding.

        Whole groups of `group_size` rows (ghost batch norm) go to a micro-batch; a global batch
        smaller than a group is one micro-batch of one rank.

        Raises:
            InputError: a micro-batch may not hold a group.
        """
        group_size = min(group_size, global_batch_size)
        if max_micro_batch_size < group_size:
            raise InputError(
                f"--train.max_micro_batch_size {max_micro_batch_size} is below"
                f" --model.batch_norm_group_size {group_size}: a micro-batch holds at least one"
                " group; raise the first or lower the second"
            )
        groups_per_rank = _ceil_div(_ceil_div(global_batch_size, group_size), num_ranks)
        micro_steps = _ceil_div(groups_per_rank, max_micro_batch_size // group_size)
        groups_per_micro_batch = _ceil_div(groups_per_rank, micro_steps)
        return cls(
            global_batch_size,
            num_ranks,
            micro_batch_size=groups_per_micro_batch * group_size,
            micro_steps=micro_steps,
        )

    @property
    def idle_ranks(self) -> int:
        """Ranks that never get a sample, because the others already hold the global batch."""
        rows_per_rank = self.micro_steps * self.micro_batch_size
        return self.num_ranks - _ceil_div(self.global_batch_size, rows_per_rank)

    def steps_per_epoch(self, num_samples: int) -> int:
        """Global steps of an epoch; the last one may be short. Independent of the ranks."""
        return _ceil_div(num_samples, self.global_batch_size)

    def epoch_of(self, step: int, num_samples: int) -> tuple[int, int]:
        """Global step (from 1) -> epoch and step in the epoch (both from 0).

        Raises:
            InputError: the split is empty.
        """
        if num_samples == 0:
            raise InputError("the split to train on holds no samples; check it with `shards stats`")
        return divmod(step - 1, self.steps_per_epoch(num_samples))


@dataclass(frozen=True)
class Order:
    """The sequence of sample ids of every epoch of a split.

    A sample id is the position of a sample in its split. Without `shuffle` the sequence is
    0, 1, 2, ... in every epoch.
    """

    shard_sizes: tuple[int, ...]
    """Samples per shard, in the order of the split."""
    seed: int
    shuffle: bool
    num_streams: int = 64
    """Spans S into which an epoch is cut; a power of two."""
    window: int = 2048
    """Samples permuted together within a span."""

    def __post_init__(self) -> None:
        if self.num_streams < 1 or self.num_streams & (self.num_streams - 1):
            raise ValueError(f"num_streams {self.num_streams} is not a power of two")
        if self.window < 1:
            raise ValueError(f"window {self.window} is not positive")

    @cached_property
    def num_samples(self) -> int:
        """Samples of the split, the rows of an epoch."""
        return sum(self.shard_sizes)

    def sample_ids(self, epoch: int, rows: Int64[np.ndarray, " row"]) -> Int64[np.ndarray, " row"]:
        """The sample in each of `rows` (from 0) of an epoch.

        Raises:
            IndexError: a row is outside the epoch.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.num_samples:
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {self.num_samples}")
        if not self.shuffle:
            return rows
        return self._at_permuted_place(epoch, self._place(epoch, rows))

    def layout(self, first_row: int, last_row: int) -> Int64[np.ndarray, " row"]:
        """The rows [first_row, last_row) in the order in which they are cut over the ranks.

        Shuffled: sorted by bit-reversed span. Any run of 2^k rows that starts at a multiple of
        2^k visits every residue modulo 2^k once; bit reversal sorts by residue first. So the j-th
        of 2^k equal parts always holds the same spans, also where a batch is smaller than S.
        """
        if not self.shuffle:
            return np.arange(first_row, last_row)
        first_span = first_row % self.num_streams
        return first_row + _layout(first_span, last_row - first_row, self.num_streams)

    def _place(self, epoch: int, rows: Int64[np.ndarray, " row"]) -> Int64[np.ndarray, " row"]:
        """Row -> place in the epoch's permuted shards."""
        span, position = rows % self.num_streams, rows // self.num_streams
        window, position_in_window = position // self.window, position % self.window
        for index in np.unique(window):
            here = window == index
            permutation = self._window_permutation(epoch, int(index))
            position_in_window[here] = permutation[span[here], position_in_window[here]]
        smaller, num_larger = divmod(self.num_samples, self.num_streams)
        span_start = span * smaller + np.minimum(span, num_larger)  # larger spans come first
        return span_start + window * self.window + position_in_window

    def _window_permutation(self, epoch: int, index: int) -> Int32[np.ndarray, "span window"]:
        return _window_permutation(
            self.seed, epoch, index, self.num_samples, self.num_streams, self.window
        )

    def _at_permuted_place(
        self, epoch: int, places: Int64[np.ndarray, " row"]
    ) -> Int64[np.ndarray, " row"]:
        shards, ends = _permuted_shards(self.shard_sizes, self.seed, epoch)
        k = np.searchsorted(ends, places, side="right")  # skips empty shards
        return self._shard_ends[shards[k]] - (ends[k] - places)

    @cached_property
    def _shard_ends(self) -> Int64[np.ndarray, " shard"]:
        return np.cumsum(self.shard_sizes, dtype=np.int64)


def micro_batch_sample_ids(
    order: Order, plan: BatchPlan, epoch: int, step_in_epoch: int, rank: int, micro_step: int
) -> Int64[np.ndarray, " micro_batch"]:
    """The sample ids of one micro-batch; -1 in padding rows.

    The rows of the step fill the slots without gaps, rank by rank and within a rank micro-step by
    micro-step; slots after the last row are padding.
    """
    block, place = divmod(step_in_epoch, _STEPS_AT_ONCE)
    return _sample_ids_of_block(order, plan, epoch, block, rank)[place, micro_step].copy()


# To find the samples of one step takes numpy as long as to find those of many. Two entries for
# where a rank is, and two for where it will be (read-ahead).
@lru_cache(maxsize=4)
def _sample_ids_of_block(
    order: Order, plan: BatchPlan, epoch: int, block: int, rank: int
) -> Int64[np.ndarray, "step micro_step micro_batch"]:
    """Those of one rank in _STEPS_AT_ONCE steps, as far as the epoch has so many."""
    rows_of_rank = plan.micro_steps * plan.micro_batch_size
    rows = np.full((_STEPS_AT_ONCE, rows_of_rank), -1, dtype=np.int64)
    for place in range(_STEPS_AT_ONCE):
        first_row = (block * _STEPS_AT_ONCE + place) * plan.global_batch_size
        last_row = min(first_row + plan.global_batch_size, order.num_samples)
        if first_row < last_row:
            of_step = order.layout(first_row, last_row)
            of_rank = of_step[rank * rows_of_rank : (rank + 1) * rows_of_rank]
            rows[place, : of_rank.size] = of_rank
    is_used = rows >= 0
    rows[is_used] = order.sample_ids(epoch, rows[is_used])
    return rows.reshape(_STEPS_AT_ONCE, plan.micro_steps, plan.micro_batch_size)


@lru_cache(maxsize=16)
def _layout(first_span: int, num_rows: int, num_streams: int) -> Int64[np.ndarray, " row"]:
    """`Order.layout` of rows that begin with this span, counted from the first of them."""
    spans = (first_span + np.arange(num_rows)) % num_streams
    return np.argsort(_bit_reversal(num_streams)[spans], kind="stable")


# Permutations are the order of our own hashes, not numpy's generator: they may never change. All
# spans are in the same window at the same time, so that a few entries serve a whole epoch; one
# takes 4 * S * window bytes.
@lru_cache(maxsize=4)
def _window_permutation(
    seed: int, epoch: int, index: int, num_samples: int, num_streams: int, window: int
) -> Int32[np.ndarray, "span window"]:
    """The permutation within window `index` of every span."""
    spans = np.arange(num_streams)
    sizes = num_samples // num_streams + (spans < num_samples % num_streams) - index * window
    width = min(window, int(sizes.max()))
    bits = random_bits(seed, epoch, spans, f"order within window {index}", width)
    # Spans differ by one in size: what a shorter one lacks stays behind all others.
    bits[np.arange(width) >= sizes[:, None]] = np.iinfo(np.uint64).max
    return np.argsort(bits, axis=1, kind="stable").astype(np.int32)


@lru_cache(maxsize=4)
def _permuted_shards(
    shard_sizes: tuple[int, ...], seed: int, epoch: int
) -> tuple[Int64[np.ndarray, " shard"], Int64[np.ndarray, " shard"]]:
    """The shards in the order of an epoch, and where each of them ends there."""
    ids = np.arange(len(shard_sizes))
    shards = np.argsort(random_bits(seed, epoch, ids, "order of shards", 1)[:, 0], kind="stable")
    return shards, np.cumsum(np.asarray(shard_sizes, dtype=np.int64)[shards])


@lru_cache(maxsize=4)
def _bit_reversal(size: int) -> Int64[np.ndarray, " size"]:
    """0 ... size - 1 with their bits in reverse; `size` is a power of two."""
    reversal = np.zeros(1, dtype=np.int64)
    while reversal.size < size:
        reversal = np.concatenate([2 * reversal, 2 * reversal + 1])
    return reversal


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
