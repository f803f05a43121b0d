"""Draws that belong to a sample: the stream never changes, is uniform, and is independent."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magneto_dist.data.randomness import random_bits, seed_for, uniform, uniforms

NUM = 20_000
IDS = np.arange(NUM)


def assert_uniform(counts: np.ndarray) -> None:
    """Pearson's chi-square of equally likely cells, 5 standard deviations wide."""
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


def cells(x: np.ndarray, y: np.ndarray, num: int = 16) -> np.ndarray:
    return np.histogram2d(x, y, bins=num, range=((0, 1), (0, 1)))[0]


def test_the_stream_never_changes() -> None:
    # A run that is resumed with another version of this package must go on with the same draws.
    bits = random_bits(1, 2, np.array([0, 5]), "crop", 2)
    assert [hex(b) for b in bits.ravel()] == [
        "0x543500fcf0456ed6",
        "0xeec26d7cd82a654d",
        "0x37339691ad49c5b4",
        "0xd36fb16e49b8f437",
    ]
    assert uniform(1, 2, np.array([5]), "crop", 1)[0] == 0.21563092285695173
    assert [seed_for(0), seed_for("1"), seed_for(7, "initial weights")] == [
        6123453654292721103,
        8648745265436499755,
        2533325874281572743,
    ]


def test_bits_agree_with_plain_integers() -> None:
    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    gamma = 0x9E3779B97F4A7C15
    # The published sequence of splitmix64 from state 0.
    assert mix(gamma) == 0xE220A8397B1DCDAF
    for sample_id in (0, 1, 2**40, -1):
        state = mix(seed_for(3, 4, "p") ^ mix((sample_id + gamma) % 2**64))
        bits = random_bits(3, 4, np.array([sample_id]), "p", 3)[0]
        assert [int(b) for b in bits] == [mix((state + c * gamma) % 2**64) for c in (1, 2, 3)]


@given(
    st.lists(st.integers(-1, 2**40), max_size=20),
    st.integers(0, 20),
    st.integers(0, 8),
    st.integers(0, 8),
)
def test_a_draw_depends_on_nothing_but_its_sample(
    ids: list[int], cut: int, count: int, more: int
) -> None:
    sample_ids = np.array(ids, dtype=np.int64)
    whole = uniform(0, 1, sample_ids, "p", count)
    parts = [uniform(0, 1, part, "p", count) for part in (sample_ids[:cut], sample_ids[cut:])]
    assert whole.shape == (len(ids), count)
    assert np.array_equal(whole, np.concatenate(parts))
    assert np.array_equal(whole, uniform(0, 1, sample_ids, "p", count + more)[:, :count])


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 5), min_size=1, max_size=5))
def test_draws_for_several_purposes_are_those_of_each(counts: dict[str, int]) -> None:
    sample_ids = np.array([3, -1, 2**40])
    together = uniforms(5, 6, sample_ids, counts)
    for draws, (purpose, count) in zip(together, counts.items(), strict=True):
        alone = random_bits(5, 6, sample_ids, purpose, count) >> np.uint64(11)
        assert draws.shape == (3, count)
        assert np.array_equal(draws, alone / 2**53)


@pytest.mark.parametrize("draws", [IDS, IDS * 64, IDS + 10**12], ids=["dense", "strided", "far"])
def test_draws_are_uniform(draws: np.ndarray) -> None:
    u = uniform(0, 0, draws, "p", 3)
    assert u.dtype == np.float64
    assert u.min() >= 0
    assert u.max() < 1
    for column in u.T:
        assert_uniform(np.histogram(column, bins=100, range=(0, 1))[0])
        # Kolmogorov-Smirnov distance, at its 1e-5 quantile.
        steps = np.arange(1, NUM + 1) / NUM
        assert np.abs(np.sort(column) - steps).max() < 2.47 / math.sqrt(NUM)


def test_every_bit_is_fair() -> None:
    bits = random_bits(0, 0, IDS, "p", 1)[:, 0]
    ones = [(bits >> np.uint64(b) & np.uint64(1)).sum() for b in range(64)]
    assert np.abs(np.array(ones) - NUM / 2).max() < 5 * math.sqrt(NUM) / 2


@pytest.mark.parametrize(
    "other",
    [
        uniform(0, 1, IDS, "p", 1)[:, 0],
        uniform(1, 0, IDS, "p", 1)[:, 0],
        uniform(0, 0, IDS, "q", 1)[:, 0],
        uniform(0, 0, IDS, "p", 2)[:, 1],
        uniform(0, 0, IDS + 1, "p", 1)[:, 0],
        uniform(0, 0, IDS + 64, "p", 1)[:, 0],
        uniform(0, 0, IDS + 1, "p", 2)[:, 1],
    ],
    ids=["epoch", "seed", "purpose", "column", "next sample", "64th sample", "diagonal"],
)
def test_draws_are_independent(other: np.ndarray) -> None:
    draws = uniform(0, 0, IDS, "p", 1)[:, 0]
    assert_uniform(cells(draws, other))
    assert abs(np.corrcoef(draws, other)[0, 1]) < 5 / math.sqrt(NUM)


def test_no_two_draws_coincide() -> None:
    bits = [
        random_bits(s, e, IDS[:500], p, 20).ravel() for s in (0, 1) for e in (0, 1) for p in "pq"
    ]
    assert np.unique(np.concatenate(bits)).size == 8 * 500 * 20


def test_seeds_tell_their_parts_apart() -> None:
    parts = [(), (1,), ("1",), (1, ""), ("", 1), (11,), (1, 1), ("a", "b"), ("ab",), (-1,), (0,)]
    seeds = [seed_for(*p) for p in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= s < 2**63 for s in seeds)
    assert seed_for(np.int64(5), "x") == seed_for(5, "x")


def test_a_part_that_is_no_number_and_no_name_is_refused() -> None:
    with pytest.raises(TypeError):
        seed_for(0.5)  # type: ignore[arg-type]
