"""Tag adding & dropping against a slow check of every promise, item by item."""

import math
from collections import Counter
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magneto_dist.config import TagsConfig
from magneto_dist.data.tags import TagRows, tag_rows

NUM_TAGS = 30
Item = tuple[list[int], list[bool]]

ITEMS = st.lists(st.integers(0, NUM_TAGS - 1), unique=True, max_size=NUM_TAGS).flatmap(
    lambda ids: st.tuples(
        st.just(ids), st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))
    )
)
BATCHES = st.lists(ITEMS, max_size=6)
RATIOS = st.sampled_from([0.0, 0.1, 0.29, 0.3, 0.5, 0.57, 1.0])
CONFIGS = st.builds(
    TagsConfig,
    max_tags=st.sampled_from([1, 2, 5, 16, 40]),
    beta_add=RATIOS | st.just(3.5),
    beta_drop=RATIOS,
    irrelevant_ratio=RATIOS,
)


def rows_of(items: list[Item], config: TagsConfig, **options) -> TagRows:
    """`tag_rows` with the options of a training step unless others are given."""
    options = {
        "sample_ids": np.arange(len(items)),
        "num_tags": NUM_TAGS,
        "seed": 0,
        "epoch": 0,
        "training": True,
        "objective": "important",
        **options,
    }
    return tag_rows(
        [ids for ids, _ in items],
        [important for _, important in items],
        config=config,
        **options,
    )


def check_and_split(
    rows: TagRows, items: list[Item], max_tags: int, num_tags: int = NUM_TAGS
) -> list[tuple[list[int], list[int]]]:
    """Checks what holds for all rows; per item its kept original tags and the added ones."""
    shape = (len(items), max_tags)
    assert rows.tag_ids.shape == rows.tag_mask.shape == shape
    assert rows.target.shape == rows.outlier.shape == shape
    assert rows.tags_cut.shape == rows.targets_cut.shape == shape[:1]
    assert rows.tag_ids.dtype == rows.tags_cut.dtype == rows.targets_cut.dtype == np.int64
    assert rows.tag_mask.dtype == rows.target.dtype == rows.outlier.dtype == bool
    result = []
    for i, (original, _) in enumerate(items):
        used = int(rows.tag_mask[i].sum())
        assert rows.tag_mask[i, :used].all()
        assert (rows.tag_ids[i, used:] == num_tags).all()
        assert not rows.target[i, used:].any()
        assert not rows.outlier[i, used:].any()
        ids = rows.tag_ids[i, :used].tolist()
        num_added = int(rows.outlier[i].sum())
        kept, added = ids[: used - num_added], ids[used - num_added :]
        assert rows.outlier[i, used - num_added : used].all(), "added tags stand behind the others"
        assert kept == [tag for tag in original if tag in kept], "original tags keep their order"
        assert len(set(added)) == len(added)
        assert not set(added) & set(original)
        assert all(0 <= tag < num_tags for tag in added)
        assert not rows.target[i, used - num_added :].any()
        result.append((kept, added))
    return result


@given(BATCHES, CONFIGS, st.integers(0, 5))
def test_every_promise_of_tad(items: list[Item], config: TagsConfig, epoch: int) -> None:
    rows = rows_of(items, config, epoch=epoch)
    for i, (kept, added) in enumerate(check_and_split(rows, items, config.max_tags)):
        original, flags = items[i]
        important = {tag for tag, flag in zip(original, flags, strict=True) if flag}
        num_unimportant = len(original) - len(important)
        most_dropped = math.floor(Fraction(str(config.beta_drop)) * num_unimportant)
        most_added = math.floor(Fraction(str(config.beta_add)) * num_unimportant)

        assert rows.target[i, : len(kept)].tolist() == [tag in important for tag in kept]
        num_cut = int(rows.tags_cut[i])
        num_dropped = len(original) - len(kept) - num_cut
        assert 0 <= num_dropped <= most_dropped
        assert num_cut == max(0, len(original) - num_dropped - config.max_tags)
        num_important_kept = len(important & set(kept))
        assert num_important_kept == min(len(important), config.max_tags)
        assert rows.targets_cut[i] == len(important) - num_important_kept
        assert len(added) <= min(most_added, config.max_tags - len(kept), NUM_TAGS - len(original))


@given(BATCHES, CONFIGS, st.integers(0, 4))
def test_evaluation_keeps_the_first_tags(
    items: list[Item], config: TagsConfig, outliers: int
) -> None:
    rows = rows_of(items, config, training=False, outliers=outliers)
    for i, (kept, added) in enumerate(check_and_split(rows, items, config.max_tags)):
        original, flags = items[i]
        assert kept == original[: config.max_tags]
        assert rows.target[i, : len(kept)].tolist() == flags[: config.max_tags]
        assert rows.tags_cut[i] == len(original[config.max_tags :])
        assert rows.targets_cut[i] == sum(flags[config.max_tags :])
        room = min(outliers, config.max_tags - len(kept), NUM_TAGS - len(original))
        assert len(added) == (room if original else 0)


@given(BATCHES, CONFIGS, st.booleans())
def test_pretraining_adds_irrelevant_tags(
    items: list[Item], config: TagsConfig, training: bool
) -> None:
    rows = rows_of(items, config, objective="relevance", training=training)
    for i, (kept, added) in enumerate(check_and_split(rows, items, config.max_tags)):
        original, _ = items[i]
        room = max(config.max_tags - 1, 1)
        assert rows.target[i, : len(kept)].all()
        assert len(kept) == min(len(original), room)
        assert rows.tags_cut[i] == rows.targets_cut[i] == len(original) - len(kept)
        if not training:
            assert kept == original[:room]
        wanted = max(1, math.floor(Fraction(str(config.irrelevant_ratio)) * len(original)))
        wanted = min(wanted, config.max_tags - len(kept), NUM_TAGS - len(original))
        assert len(added) == (wanted if original else 0)


@given(BATCHES, CONFIGS, st.booleans(), st.sampled_from(["important", "relevance"]), st.data())
def test_a_sample_does_not_see_its_batch(
    items: list[Item], config: TagsConfig, training: bool, objective: str, data: st.DataObject
) -> None:
    sample_ids = np.arange(100, 100 + len(items))
    chosen = data.draw(st.permutations(range(len(items))))[: data.draw(st.integers(0, 6))]
    options = {"training": training, "objective": objective, "epoch": 3}
    whole = rows_of(items, config, sample_ids=sample_ids, **options)
    part = rows_of([items[i] for i in chosen], config, sample_ids=sample_ids[chosen], **options)
    for name in TagRows.__dataclass_fields__:
        assert np.array_equal(getattr(whole, name)[chosen], getattr(part, name)), name


def test_draws_change_with_sample_epoch_and_seed() -> None:
    item = (list(range(20)), [False] * 20)
    config = TagsConfig(max_tags=40, beta_add=0.5, beta_drop=0.5)
    variants = [
        rows_of([item], config, sample_ids=np.array([sample]), epoch=epoch, seed=seed)
        for sample, epoch, seed in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert len({rows.tag_ids.tobytes() for rows in variants}) == 4


@pytest.mark.parametrize("objective", ["important", "relevance"])
def test_evaluation_is_the_same_in_every_epoch(objective: str) -> None:
    item = (list(range(10)), [False] * 10)
    outliers = 2 if objective == "important" else 0
    first, second = (
        rows_of(
            [item], TagsConfig(), training=False, objective=objective, outliers=outliers, epoch=e
        )
        for e in (0, 7)
    )
    assert np.array_equal(first.tag_ids, second.tag_ids)
    assert first.outlier.sum() == (2 if objective == "important" else 5)


@pytest.mark.parametrize(
    ("beta", "unimportant", "bound"),
    [(0.3, 45, 13), (0.29, 100, 29), (0.57, 100, 57), (0.5, 13, 6), (0.3, 3, 0), (1.0, 7, 7)],
)
def test_the_bounds_are_exact(beta: float, unimportant: int, bound: int) -> None:
    # 0.3 of 45 is the paper's example; 0.29 * 100 and 0.57 * 100 are too small in floating point.
    item = (list(range(unimportant + 5)), [True] * 5 + [False] * unimportant)
    items = [item] * 4000
    config = TagsConfig(max_tags=300, beta_add=beta, beta_drop=beta)
    rows = rows_of(items, config, num_tags=1000)
    num_added = rows.outlier.sum(1)
    num_dropped = unimportant + 5 - (rows.tag_mask & ~rows.outlier).sum(1)
    for numbers in (num_added, num_dropped):
        assert_equally_often(Counter(numbers.tolist()), range(bound + 1))
    if bound:
        assert abs(np.corrcoef(num_added, num_dropped)[0, 1]) < 5 / math.sqrt(4000)


def assert_equally_often(counts: Counter, cells) -> None:
    """Pearson's chi-square of the cells, and nothing outside them."""
    cells = list(cells)
    assert set(counts) <= set(cells)
    expected = counts.total() / len(cells)
    statistic = sum((counts[cell] - expected) ** 2 / expected for cell in cells)
    freedom = len(cells) - 1
    assert abs(statistic - freedom) <= 5 * math.sqrt(2 * freedom)


def test_dropped_tags_are_uniform() -> None:
    # Two of five unimportant tags at most; the sets of each size are equally likely.
    items: list[Item] = [([3, 9, 4, 1, 7, 8], [False, True, False, False, False, False])] * 12_000
    rows = rows_of(items, TagsConfig(max_tags=8, beta_add=0.0, beta_drop=0.4))
    dropped: Counter = Counter()
    for kept, _ in check_and_split(rows, items, 8):
        dropped[tuple(sorted({3, 4, 1, 7, 8} - set(kept)))] += 1
        assert 9 in kept
    for size in range(3):
        sets = list(combinations([1, 3, 4, 7, 8], size))
        assert_equally_often(Counter({s: dropped[s] for s in sets}), sets)


def test_added_tags_are_uniform() -> None:
    # Vocabulary 0 ... 8, item {0, 3, 4, 8}: all sets from {1, 2, 5, 6, 7} are equally likely.
    items: list[Item] = [([3, 0, 8, 4], [False] * 4)] * 12_000
    rows = rows_of(items, TagsConfig(max_tags=8, beta_add=0.75, beta_drop=0.5), num_tags=9)
    added: Counter = Counter()
    for _, tags in check_and_split(rows, items, 8, num_tags=9):
        added[tuple(sorted(tags))] += 1
    for size in range(4):
        sets = list(combinations([1, 2, 5, 6, 7], size))
        assert_equally_often(Counter({s: added[s] for s in sets}), sets)


def test_added_tags_do_not_depend_on_dropped_ones() -> None:
    items: list[Item] = [([3, 0, 8, 4], [False] * 4)] * 12_000
    rows = rows_of(items, TagsConfig(max_tags=5, beta_add=0.25, beta_drop=0.25), num_tags=9)
    pairs: Counter = Counter()
    for kept, tags in check_and_split(rows, items, 5, num_tags=9):
        if len(kept) == 3 and tags:
            pairs[({0, 3, 4, 8} - set(kept)).pop(), tags[0]] += 1
    assert_equally_often(pairs, [(d, a) for d in (0, 3, 4, 8) for a in (1, 2, 5, 6, 7)])


def test_a_long_list_is_cut_at_random_in_training() -> None:
    flags = [False, True, False, False, True, False]
    items: list[Item] = [([10, 11, 12, 13, 14, 15], flags)] * 6000
    config = TagsConfig(max_tags=4, beta_add=1.0, beta_drop=0.0)
    cut: Counter = Counter()
    for kept, added in check_and_split(rows_of(items, config), items, 4):
        assert {11, 14} <= set(kept)
        assert not added, "an addition may not push an original tag out"
        cut[tuple(sorted({10, 12, 13, 15} - set(kept)))] += 1
    assert_equally_often(cut, combinations([10, 12, 13, 15], 2))


def test_too_many_important_tags_are_cut_at_random_in_training() -> None:
    items: list[Item] = [([10, 11, 12, 13, 14], [True, True, True, True, False])] * 6000
    rows = rows_of(items, TagsConfig(max_tags=2, beta_add=1.0, beta_drop=0.0))
    kept_sets = Counter(tuple(kept) for kept, _ in check_and_split(rows, items, 2))
    assert_equally_often(kept_sets, combinations([10, 11, 12, 13], 2))
    assert (rows.tags_cut == 3).all()
    assert (rows.targets_cut == 2).all()


def test_a_small_vocabulary_is_used_up() -> None:
    items: list[Item] = [([0, 1, 2, 3], [False] * 4)] * 50
    rows = rows_of(items, TagsConfig(max_tags=16), num_tags=6, training=False, outliers=5)
    for kept, added in check_and_split(rows, items, 16, num_tags=6):
        assert kept == [0, 1, 2, 3]
        assert sorted(added) == [4, 5]
    whole: list[Item] = [(list(range(6)), [False] * 6)]
    rows = rows_of(whole, TagsConfig(max_tags=16), num_tags=6, objective="relevance")
    assert check_and_split(rows, whole, 16, num_tags=6) == [(list(range(6)), [])]


def test_important_tags_alone_are_left_alone() -> None:
    items: list[Item] = [([5, 2, 9], [True] * 3)] * 200
    rows = rows_of(items, TagsConfig(max_tags=8, beta_add=3.0, beta_drop=1.0))
    assert check_and_split(rows, items, 8) == [([5, 2, 9], [])] * 200


@pytest.mark.parametrize("options", [{}, {"objective": "relevance"}, {"training": False}])
def test_no_items(options: dict) -> None:
    rows = rows_of([], TagsConfig(max_tags=8), **options)
    assert check_and_split(rows, [], 8) == []


def test_wrong_tags_are_refused() -> None:
    for ids, message in [([1, 2, 1], "twice"), ([NUM_TAGS], "30 tags"), ([-1], "30 tags")]:
        with pytest.raises(ValueError, match=message):
            rows_of([(ids, [False] * len(ids)), ([0], [True])], TagsConfig())


@pytest.mark.parametrize("options", [{"training": True}, {"objective": "relevance"}])
def test_outliers_belong_to_evaluation(options: dict) -> None:
    options = {"training": False, **options}
    with pytest.raises(ValueError, match="in evaluation"):
        rows_of([([0], [True])], TagsConfig(), outliers=1, **options)


def test_trimmed_rows_have_the_slots_that_the_longest_fills() -> None:
    items: list[Item] = [([4, 1], [True, False]), ([], []), ([2, 0, 3], [False, False, True])]
    rows = rows_of(items, TagsConfig(max_tags=8), training=False)
    trimmed = rows.trimmed()
    assert trimmed.tag_ids.shape == (3, 3)
    for name, values in vars(trimmed).items():
        whole = getattr(rows, name)
        assert (values == (whole[:, :3] if whole.ndim == 2 else whole)).all(), name
    assert not rows.tag_mask[:, 3:].any()
    empty = rows_of([items[1]], TagsConfig(max_tags=8), training=False)
    assert empty.trimmed().tag_ids.shape == (1, 1)
