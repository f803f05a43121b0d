"""Exactly once, whatever the shards, batch size, ranks and micro-steps: swept without processes."""

import math
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magneto_dist.data.order import BatchPlan, Order, micro_batch_sample_ids
from magneto_dist.errors import InputError

SHARD_SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 7, 20, 61]), max_size=8).map(tuple)
ORDERS = st.builds(
    Order,
    shard_sizes=SHARD_SIZES,
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
    num_streams=st.sampled_from([1, 2, 8, 64]),
    window=st.sampled_from([1, 2, 5, 2048]),
)
PLANS = st.builds(
    lambda batch, ranks, group, more: BatchPlan.derive(batch, ranks, group + more, group),
    batch=st.integers(1, 50),
    ranks=st.integers(1, 9),
    group=st.integers(1, 9),
    more=st.integers(0, 20),
)


def slots(order: Order, plan: BatchPlan, epoch: int, step: int) -> np.ndarray:
    """The slots of all ranks and micro-steps of a step, in the order of the contract."""
    return np.concatenate(
        [
            micro_batch_sample_ids(order, plan, epoch, step, rank, micro_step)
            for rank in range(plan.num_ranks)
            for micro_step in range(plan.micro_steps)
        ]
    )


def epoch_slots(order: Order, plan: BatchPlan, epoch: int) -> list[np.ndarray]:
    return [
        slots(order, plan, epoch, step) for step in range(plan.steps_per_epoch(order.num_samples))
    ]


def slow_sequence(order: Order, epoch: int) -> list[set[int]]:
    """Per row the samples that may stand there: those of its window, found by plain loops."""
    shards = permuted_shards(order, epoch)
    places = [sample for shard in shards for sample in shard]
    smaller, num_larger = divmod(len(places), order.num_streams)
    windows: list[list[set[int]]] = []
    start = 0
    for span in range(order.num_streams):
        size = smaller + (span < num_larger)
        content = places[start : start + size]
        start += size
        windows.append(
            [set(content[i : i + order.window]) for i in range(0, size, order.window)],
        )
    return [
        windows[row % order.num_streams][row // order.num_streams // order.window]
        for row in range(len(places))
    ]


def permuted_shards(order: Order, epoch: int) -> list[list[int]]:
    """The shards as lists of ids in the order of an epoch, seen through an order without windows.

    With one span and windows of one sample, the sequence is the permuted shards themselves.
    """
    plain = Order(order.shard_sizes, order.seed, shuffle=True, num_streams=1, window=1)
    ids = plain.sample_ids(epoch, np.arange(plain.num_samples)).tolist()
    starts = np.cumsum([0, *order.shard_sizes])
    shard_of = {
        i: k for k in range(len(order.shard_sizes)) for i in range(starts[k], starts[k + 1])
    }
    shards: dict[int, list[int]] = {}
    for i in ids:
        shards.setdefault(shard_of[i], []).append(i)
    assert [i for shard in shards.values() for i in shard] == ids, "a shard is torn apart"
    assert all(shard == sorted(shard) for shard in shards.values())
    return list(shards.values())


@given(ORDERS, PLANS, st.integers(0, 3))
def test_each_sample_once_an_epoch(order: Order, plan: BatchPlan, epoch: int) -> None:
    ids = np.concatenate([np.array([], dtype=np.int64), *epoch_slots(order, plan, epoch)])
    assert ids.dtype == np.int64
    assert np.array_equal(np.sort(ids[ids >= 0]), np.arange(order.num_samples))


@given(ORDERS, PLANS)
def test_padding_stands_behind_all_samples(order: Order, plan: BatchPlan) -> None:
    steps = epoch_slots(order, plan, 0)
    sizes = []
    for ids in steps:
        num_samples = int((ids >= 0).sum())
        assert (ids[:num_samples] >= 0).all()
        assert (ids[num_samples:] == -1).all()
        sizes.append(num_samples)
    assert all(size == plan.global_batch_size for size in sizes[:-1])
    assert sum(sizes) == order.num_samples


@given(ORDERS, PLANS, st.integers(0, 3), st.integers(1, 9), st.integers(1, 4))
def test_ranks_do_not_change_a_global_batch(
    order: Order, plan: BatchPlan, epoch: int, ranks: int, group: int
) -> None:
    size = plan.global_batch_size
    other = BatchPlan.derive(size, ranks, max_micro_batch_size=size + group, group_size=group)
    for ids, same in zip(
        epoch_slots(order, plan, epoch), epoch_slots(order, other, epoch), strict=True
    ):
        assert np.array_equal(ids[ids >= 0], same[same >= 0])


@given(ORDERS, st.integers(0, 3), st.data())
def test_random_access_equals_sequence(order: Order, epoch: int, data: st.DataObject) -> None:
    sequence = order.sample_ids(epoch, np.arange(order.num_samples))
    rows = data.draw(
        st.lists(st.integers(0, order.num_samples - 1)) if order.num_samples else st.just([])
    )
    for other_epoch in (epoch + 1, epoch + 2):  # what was asked before leaves no trace
        order.sample_ids(other_epoch, np.array(rows, dtype=np.int64))
    assert np.array_equal(order.sample_ids(epoch, np.array(rows, dtype=np.int64)), sequence[rows])


@given(ORDERS, st.integers(0, 3))
def test_a_row_comes_from_its_window(order: Order, epoch: int) -> None:
    if not order.shuffle:
        rows = np.arange(order.num_samples)
        assert np.array_equal(order.sample_ids(epoch, rows), rows)
        return
    allowed = slow_sequence(order, epoch)
    ids = order.sample_ids(epoch, np.arange(order.num_samples)).tolist()
    assert all(i in window for i, window in zip(ids, allowed, strict=True))


def test_the_sequence_never_changes() -> None:
    # A run that is resumed with another version of this package must not meet a sample twice.
    order = Order((3, 0, 5, 9, 4), seed=1, shuffle=True, num_streams=4, window=4)
    first, second = (order.sample_ids(epoch, np.arange(21)).tolist() for epoch in (0, 1))
    # fmt: off
    assert first == [6, 2, 12, 19, 3, 8, 14, 16, 4, 9, 13, 17, 5, 1, 11, 18, 7, 10, 15, 20, 0]
    assert second == [3, 20, 10, 0, 4, 18, 11, 1, 6, 8, 12, 15, 5, 19, 13, 16, 7, 9, 14, 2, 17]
    # fmt: on
    plan = BatchPlan(global_batch_size=8, num_ranks=2, micro_batch_size=4, micro_steps=1)
    # Rows 0 ... 7 belong to the spans 0 1 2 3 0 1 2 3; bit-reversed the spans stand as 0 2 1 3.
    assert slots(order, plan, 0, 0).tolist() == [6, 3, 12, 14, 2, 8, 19, 16]


def test_epochs_and_seeds_differ() -> None:
    sequences = {
        (seed, epoch): Order((100,) * 10, seed, shuffle=True).sample_ids(epoch, np.arange(1000))
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    keys = list(sequences)
    for i, a in enumerate(keys):
        for b in keys[:i]:
            assert (sequences[a] == sequences[b]).mean() < 0.02
        assert (sequences[a] == np.arange(1000)).mean() < 0.02


def test_a_window_is_shuffled_uniformly() -> None:
    # One window of six samples over 2,000 epochs: every sample is equally often on every row.
    order = Order((6,), seed=0, shuffle=True, num_streams=1)
    counts = np.zeros((6, 6))
    for epoch in range(2000):
        counts[np.arange(6), order.sample_ids(epoch, np.arange(6))] += 1
    statistic = ((counts - 2000 / 6) ** 2 / (2000 / 6)).sum()
    assert abs(statistic - 25) < 5 * math.sqrt(2 * 25)


def test_shards_are_permuted_uniformly() -> None:
    order = Order((1,) * 6, seed=0, shuffle=True, num_streams=1, window=1)
    counts = np.zeros((6, 6))
    for epoch in range(2000):
        counts[np.arange(6), order.sample_ids(epoch, np.arange(6))] += 1
    statistic = ((counts - 2000 / 6) ** 2 / (2000 / 6)).sum()
    assert abs(statistic - 25) < 5 * math.sqrt(2 * 25)


@pytest.mark.parametrize("num_nodes", [2, 4, 8])
@pytest.mark.parametrize("batch_size", [8, 32, 64, 256, 24])
def test_a_node_reads_its_own_part_of_the_epoch(num_nodes: int, batch_size: int) -> None:
    order = Order((50,) * 40, seed=0, shuffle=True, window=8)
    unshuffled_windows = Order(order.shard_sizes, order.seed, shuffle=True, num_streams=1, window=1)
    place_of = np.empty(order.num_samples, dtype=np.int64)
    place_of[unshuffled_windows.sample_ids(0, np.arange(order.num_samples))] = np.arange(
        order.num_samples
    )
    span_sizes = [len(part) for part in np.array_split(np.arange(order.num_samples), 64)]
    span_of_place = np.repeat(np.arange(64), span_sizes)
    plan = BatchPlan.derive(batch_size, num_nodes, 16, group_size=1)
    spans_of_node: list[set[int]] = [set() for _ in range(num_nodes)]
    for step in range(order.num_samples // batch_size):  # the short last batch is cut otherwise
        ids = slots(order, plan, 0, step).reshape(num_nodes, -1)
        for node in range(num_nodes):
            spans_of_node[node] |= set(span_of_place[place_of[ids[node]]].tolist())
    assert [len(spans) for spans in spans_of_node] == [64 // num_nodes] * num_nodes
    assert set.union(*spans_of_node) == set(range(64))


@given(st.integers(0, 300), st.sampled_from([1, 2, 16, 64]))
def test_spans_are_equal_to_one(num_samples: int, num_streams: int) -> None:
    # With windows of one sample and one shard, span s of the epoch holds ascending ids.
    order = Order((num_samples,), 0, shuffle=True, num_streams=num_streams, window=1)
    ids = order.sample_ids(0, np.arange(num_samples))
    spans = [ids[s::num_streams] for s in range(num_streams)]
    assert np.array_equal(np.concatenate(spans), np.arange(num_samples))
    sizes = [span.size for span in spans]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_memory_does_not_grow_with_samples_or_ranks() -> None:
    num_samples, num_ranks = 700_000, 64
    tracemalloc.start()
    try:
        order = Order((1000,) * (num_samples // 1000), seed=0, shuffle=True)
        plan = BatchPlan.derive(1024, num_ranks, 256, group_size=16)
        for epoch in range(2):
            for step in range(0, plan.steps_per_epoch(num_samples), 61):
                for rank in range(num_ranks):
                    micro_batch_sample_ids(order, plan, epoch, step, rank, 0)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes / num_samples < 24


def test_an_order_travels_to_a_worker() -> None:
    order = Order((5, 6), seed=0, shuffle=True)
    rows = np.arange(11)
    ids = order.sample_ids(2, rows)
    copy = pickle.loads(pickle.dumps(order))
    assert copy == order
    assert np.array_equal(copy.sample_ids(2, rows), ids)


def test_rows_outside_the_epoch_are_refused() -> None:
    order = Order((5,), seed=0, shuffle=True)
    for row in (-1, 5):
        with pytest.raises(IndexError, match="of 5"):
            order.sample_ids(0, np.array([row]))


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="48 is not a power of two"):
        Order((5,), 0, shuffle=True, num_streams=48)
    with pytest.raises(ValueError, match="window 0"):
        Order((5,), 0, shuffle=True, window=0)


def best_plan_by_trying(batch: int, ranks: int, most: int, group: int) -> tuple[int, int]:
    """(micro-batch size, micro-steps) with the fewest micro-steps, then the least padding."""
    group = min(group, batch)
    candidates = [
        (steps, ranks * steps * size - batch, size)
        for size in range(group, most + 1, group)
        for steps in range(1, batch + 1)
        if ranks * steps * size >= batch
    ]
    steps, _, size = min(candidates)
    return size, steps


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 60), st.integers(1, 20))
def test_a_plan_is_the_best_one(batch: int, ranks: int, most: int, group: int) -> None:
    if most < min(group, batch):
        with pytest.raises(
            InputError, match=r"train\.max_micro_batch_size.*model\.batch_norm_group_size"
        ):
            BatchPlan.derive(batch, ranks, most, group)
        return
    plan = BatchPlan.derive(batch, ranks, most, group)
    assert (plan.global_batch_size, plan.num_ranks) == (batch, ranks)
    assert plan.micro_batch_size % min(group, batch) == 0
    assert (plan.micro_batch_size, plan.micro_steps) == best_plan_by_trying(
        batch, ranks, most, group
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 16, 64, 1000])
@pytest.mark.parametrize("batch", [1, 31, 256, 1000, 65_536])
def test_any_batch_size_on_any_number_of_ranks(batch: int, ranks: int) -> None:
    plan = BatchPlan.derive(batch, ranks, 64, 16)
    assert plan.num_ranks * plan.micro_steps * plan.micro_batch_size >= batch
    assert plan.micro_batch_size <= 64


def test_a_plan_with_too_few_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="has 8 rows"):
        BatchPlan(global_batch_size=9, num_ranks=2, micro_batch_size=4, micro_steps=1)


@given(PLANS)
def test_idle_ranks_are_those_without_a_sample(plan: BatchPlan) -> None:
    order = Order(shard_sizes=(plan.global_batch_size,), seed=0, shuffle=True, num_streams=2)
    of_rank = slots(order, plan, epoch=0, step=0).reshape(plan.num_ranks, -1)
    assert plan.idle_ranks == sum((of_rank < 0).all(1))


@given(st.integers(1, 50), st.integers(1, 200), st.integers(1, 500))
def test_steps_count_from_one_and_epochs_from_zero(batch: int, samples: int, step: int) -> None:
    plan = BatchPlan.derive(batch, 1, batch, 1)
    epochs = [e for e in range(501) for _ in range(0, samples, batch)]
    in_epoch = [i for e in range(501) for i, _ in enumerate(range(0, samples, batch))]
    assert plan.epoch_of(step, samples) == (epochs[step - 1], in_epoch[step - 1])


def test_an_empty_split_has_no_steps() -> None:
    plan = BatchPlan.derive(8, 1, 8, 1)
    assert plan.steps_per_epoch(0) == 0
    with pytest.raises(InputError, match="no samples"):
        plan.epoch_of(1, 0)
