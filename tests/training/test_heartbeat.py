"""When ranks that wait for each other are a stall, and who is named."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from magneto_dist.training.heartbeat import (
    PATIENCE,
    Phase,
    Whereabouts,
    _Beat,
    _Seen,
    find_stall,
)

TIMEOUT_S = 10.0
EVERYBODY = "all 3 ranks have waited for each other at step 2"


def beat(number: int, *phases: Phase) -> _Beat:
    """A rank that has gone through these phases of step 2, the run having begun with step 1."""
    whereabouts = Whereabouts()
    whereabouts.at("data", 1)
    for phase in phases:
        whereabouts.at(phase, 2)
    return _Beat(number, whereabouts.place)


def stalled_after(beats: Sequence[Sequence[_Beat]], round_s: float = 1.0) -> tuple[int, str]:
    """The round in which it is a stall, and who is named, of each round's beats."""
    seen: dict[int, _Seen] = {}
    for round_number, now in enumerate(beats):
        seen = {
            rank: seen[rank].again(each, round_s) if rank in seen else _Seen(each)
            for rank, each in enumerate(now)
        }
        if reason := find_stall(seen, TIMEOUT_S):
            return round_number, reason.partition(" of ")[0].partition(" (")[0]
    return -1, ""


def test_a_rank_without_a_sign_of_life_is_named_wherever_it_was():
    for phases in (("data",), ("data", "training"), ("data", "training", "evaluation")):
        rounds = [[beat(n, "data", "training"), beat(7, *phases)] for n in range(40)]
        assert stalled_after(rounds) == (10, "rank 1")


def test_a_rank_that_lives_and_is_behind_is_named_after_its_patience():
    ahead, behind = ("data", "training", "training"), ("data", "training")
    rounds = [[beat(n, *ahead), beat(n, *behind), beat(n, *ahead)] for n in range(40)]
    assert stalled_after(rounds) == (10, "rank 1")
    rounds = [[beat(n, *ahead), beat(n, "data"), beat(n, *ahead)] for n in range(40)]
    assert stalled_after(rounds) == (PATIENCE * 10, "rank 1")


def test_a_rank_that_is_only_slow_is_waited_for():
    batches: list[Phase] = ["evaluation"] * 40
    rounds = [[beat(n, *batches), beat(n, *batches[: n // 9])] for n in range(300)]
    assert stalled_after(rounds) == (-1, "")


def test_ranks_that_all_wait_are_a_stall_and_nobody_is_named():
    rounds = [[beat(n, "data", "training")] * 3 for n in range(40)]
    assert stalled_after(rounds) == (10, EVERYBODY)
    rounds = [[beat(n, "data", "training", "saving")] * 3 for n in range(40)]
    assert stalled_after(rounds) == (PATIENCE * 10, EVERYBODY)
    rounds = [[beat(n, "data")] * 3 for n in range(100)]  # slow, but nobody waits for another
    assert stalled_after(rounds) == (-1, "")


@pytest.mark.parametrize("first_step", [1, 5])
def test_the_first_step_of_a_start_may_take_its_time(first_step: int) -> None:
    whereabouts = Whereabouts()
    assert whereabouts.place.is_patient
    for step, is_patient in ((first_step, True), (first_step + 1, False)):
        whereabouts.at("data", step)
        whereabouts.at("training")
        assert (whereabouts.place.step, whereabouts.place.is_patient) == (step, is_patient)
    whereabouts.at("saving")
    assert whereabouts.place.is_patient


def test_a_last_sign_of_life_after_the_others_began_to_look_changes_nothing():
    place = ("data", "training")
    rounds = [[beat(n, *place), beat(min(n, 2), *place)] for n in range(40)]
    assert stalled_after(rounds) == (12, "rank 1")
