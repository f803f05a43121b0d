"""Ranks in words, and what they say together."""

from __future__ import annotations

import pytest

from magneto_dist.errors import InputError, ReportedError
from magneto_dist.training.preflight import Fact, require_agreement
from magneto_dist.training.ranks import joint_error, name_ranks


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([1], "rank 1"),
        ([0, 1], "ranks 0-1"),
        ([5, 0, 3, 4, 9], "ranks 0, 3-5, 9"),
        (range(64), "ranks 0-63"),
    ],
)
def test_names(ranks: list[int], words: str) -> None:
    assert name_ranks(ranks) == words


def test_what_some_meet_is_said_once_with_their_names():
    assert joint_error(["", ""], is_main=True) is None
    error = joint_error(["", "no such folder", "no such folder"], is_main=True)
    assert str(error) == "ranks 1-2 of 3: no such folder"
    assert not isinstance(error, ReportedError)
    assert isinstance(joint_error(["", "no such folder"], is_main=False), ReportedError)
    assert str(joint_error(["full", "full"], is_main=True)) == "full"


def test_the_first_difference_is_told_with_all_its_values():
    facts = [
        {"torch": Fact("1", "install"), "--seed": Fact(seed, "same command", " here")}
        for seed in ("7", "7", "8", "9")
    ]
    require_agreement(facts[:2])
    with pytest.raises(InputError) as error:
        require_agreement(facts)
    assert str(error.value) == (
        "the ranks differ in --seed: 7 here on ranks 0-1; 8 here on rank 2; 9 here on rank 3:"
        " same command"
    )
    with pytest.raises(InputError, match=r"unknown on rank 1 \(2 things differ\): install"):
        require_agreement([facts[0], {}])
