"""Threshold and temperature on their way from evaluate.py to whoever uses the model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magneto_dist.decision import Decision, decision_of
from magneto_dist.errors import InputError

CHECKPOINT, DEFAULT = "ab12", Decision(0.5)


def write(path: Path, decision: Decision, checkpoint: str) -> str:
    content = {"checkpoint_sha256": checkpoint, **decision.as_json()}
    path.write_text(json.dumps({"decision": content}))
    return str(path)


def test_what_was_written_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for decision in (Decision(0.37), Decision(0.6, 1.7)):
        path = write(tmp_path / "größe.json", decision, CHECKPOINT)
        assert decision_of(path, DEFAULT, CHECKPOINT) == decision
    assert decision_of(None, DEFAULT, CHECKPOINT) == DEFAULT
    assert decision_of(0.25, DEFAULT, CHECKPOINT) == Decision(0.25)
    assert capsys.readouterr().err == ""


def test_that_of_another_checkpoint_comes_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "d.json", Decision(0.37), "another")
    assert decision_of(path, DEFAULT, CHECKPOINT) == Decision(0.37)
    assert "another checkpoint" in capsys.readouterr().err


@given(st.floats(1e-6, 1 - 1e-6), st.floats(0.05, 20), st.floats(-12, 12))
def test_a_temperature_changes_no_prediction(
    threshold: float, temperature: float, odds: float
) -> None:
    def probability(log_odds: float) -> float:
        return 1 / (1 + math.exp(-log_odds))

    if abs(probability(odds) - threshold) < 1e-9:  # rounding may decide
        return
    moved = Decision(threshold, temperature).calibrated_threshold
    predicted = probability(odds) >= threshold
    calibrated = probability(odds / temperature)
    assert (calibrated >= moved) == predicted or abs(calibrated - moved) < 1e-12


def test_the_ends_stay_where_they_are() -> None:
    for end in (0.0, 1.0):
        assert Decision(end, 3.0).calibrated_threshold == end
    assert Decision(0.3).calibrated_threshold == 0.3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("no json", "holds no decision"),
        ("[]", "holds no decision"),
        ('{"decision": {"threshold": 0.5}}', "holds no decision"),
        ('{"threshold": 0.5}', "holds no decision"),
        ('{"decision": {"threshold": "x", "temperature": 1, "checkpoint_sha256": ""}}', "holds no"),
        ('{"decision": {"threshold": 7, "temperature": 1, "checkpoint_sha256": ""}}', "between 0"),
        ('{"decision": {"threshold": NaN, "temperature": 1, "checkpoint_sha256": ""}}', "between"),
        ('{"decision": {"threshold": 0.5, "temperature": 0, "checkpoint_sha256": ""}}', "above 0"),
        ('{"decision": {"threshold": 0.5, "temperature": NaN, "checkpoint_sha256": ""}}', "above"),
    ],
)
def test_files_that_hold_none_are_refused(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "d.json"
    path.write_text(content)
    with pytest.raises(InputError, match=says):
        decision_of(str(path), DEFAULT, CHECKPOINT)


def test_absent_files_and_impossible_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No such file.*evaluate\.py wrote"):
        decision_of(str(tmp_path / "absent.json"), DEFAULT, CHECKPOINT)
    for number in (-0.1, 1.1):
        with pytest.raises(InputError, match="between 0 and 1"):
            decision_of(number, DEFAULT, CHECKPOINT)
