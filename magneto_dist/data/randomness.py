"""Randomness that belongs to a sample, not to a process: pure functions of what is drawn for whom.

1. `seed_for` turns any parts (numbers, names) into a seed.
2. `random_bits` hashes (seed, epoch, purpose), sample id and column into 64 bits.
3. `uniform` reads these bits as numbers in [0, 1), `uniforms` for several purposes at once.

Nothing here has a state, so a draw is the same in any batch, worker, rank and restart.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping
from functools import lru_cache
from itertools import accumulate

import numpy as np
from jaxtyping import Float64, Int64, UInt64

# splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed for other generators (torch.manual_seed, numpy), equal on every machine.

    Parts are told apart by type, order and border: ("1",), (1,) and ("1", "") differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, str):
            content = b"s" + part.encode("utf-8")
        else:
            content = b"i" + str(operator.index(part)).encode("ascii")
        digest.update(len(content).to_bytes(8, "little") + content)
    return int.from_bytes(digest.digest(), "little") >> 1


def random_bits(
    seed: int, epoch: int, sample_ids: Int64[np.ndarray, " batch"], purpose: str, count: int
) -> UInt64[np.ndarray, "batch count"]:
    """64 random bits for every (sample, column); more columns leave the first ones as they are.

    Args:
        seed: of the run.
        epoch: from 0.
        sample_ids: what the draws belong to; any integers.
        purpose: what the draws are for; different purposes are independent.
        count: draws per sample.
    """
    return _bits(seed, epoch, sample_ids, {purpose: count})


def uniform(
    seed: int, epoch: int, sample_ids: Int64[np.ndarray, " batch"], purpose: str, count: int
) -> Float64[np.ndarray, "batch count"]:
    """Numbers from the uniform distribution on [0, 1), multiples of 2^-53; see `random_bits`.

    floor(u * n) is therefore below n for every n up to 2^53.
    """
    return uniforms(seed, epoch, sample_ids, {purpose: count})[0]


def uniforms(
    seed: int, epoch: int, sample_ids: Int64[np.ndarray, " batch"], counts: Mapping[str, int]
) -> list[Float64[np.ndarray, "batch _"]]:
    """`uniform` of each purpose and its count: the same numbers, with fewer calls of numpy."""
    bits = _bits(seed, epoch, sample_ids, counts)
    numbers = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    ends = list(accumulate(counts.values()))
    return [numbers[:, end - n : end] for n, end in zip(counts.values(), ends, strict=True)]


def _bits(
    seed: int, epoch: int, sample_ids: Int64[np.ndarray, " batch"], counts: Mapping[str, int]
) -> UInt64[np.ndarray, "batch count"]:
    """`random_bits` of every purpose, one after the other."""
    ids = np.asarray(sample_ids, dtype=np.int64).astype(np.uint64)
    keys, columns = _sequences(seed, epoch, tuple(counts.items()))
    # Mixed twice before columns are added: adjacent ids start at unrelated points of the sequence.
    states = _mix(keys ^ _mix(ids + _GOLDEN_GAMMA)[:, None])
    return _mix(states.repeat(tuple(counts.values()), axis=1) + columns)


@lru_cache(maxsize=64)
def _sequences(
    seed: int, epoch: int, counts: tuple[tuple[str, int], ...]
) -> tuple[UInt64[np.ndarray, " purpose"], UInt64[np.ndarray, " count"]]:
    """The key of each purpose, and what is added for each of its columns."""
    keys = [seed_for(seed, epoch, purpose) for purpose, _ in counts]
    columns = [np.arange(1, count + 1, dtype=np.uint64) for _, count in counts]
    return np.array(keys, dtype=np.uint64), np.concatenate(columns) * _GOLDEN_GAMMA


def _mix(x: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """The finaliser of splitmix64: a permutation of the 64-bit numbers, in place."""
    x ^= x >> np.uint64(30)
    x *= _MULTIPLIERS[0]
    x ^= x >> np.uint64(27)
    x *= _MULTIPLIERS[1]
    x ^= x >> np.uint64(31)
    return x
