"""Calibration and curves, finely binned, against torchmetrics and loops over single tags."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_average_precision,
    binary_calibration_error,
)

from magneto_dist.batch import LogProbabilities
from magneto_dist.scoring.calibration import (
    NUM_BINS,
    LogOdds,
    add_log_odds,
    borders,
    expected_calibration_error,
    fit_temperature,
    micro_average_precision,
    negative_log_likelihood,
    precision_recall,
    reliability,
)


def counted(logits: Tensor, target: Tensor, parts: int = 1) -> LogOdds:
    edges = borders()
    counts = torch.zeros(3, len(edges) + 1, dtype=torch.float64)
    for logit, of in zip(logits.chunk(parts), target.chunk(parts), strict=True):
        log_p = LogProbabilities(
            torch.nn.functional.logsigmoid(logit)[:, None],
            torch.nn.functional.logsigmoid(-logit)[:, None],
        )
        real = torch.ones(len(of), 1, dtype=torch.bool)
        add_log_odds(counts, log_p, of[:, None], real, edges)
    return LogOdds(counts)


def drawn(num: int, temperature: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-odds, and targets for which they are right at that temperature."""
    numbers = np.random.default_rng(seed)
    logits = torch.from_numpy(numbers.normal(0, 2.5, num))
    return logits, torch.from_numpy(numbers.random(num)) < (logits / temperature).sigmoid()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_calibration_error_is_that_of_torchmetrics(seed: int, temperature: float) -> None:
    logits, target = drawn(3_000, temperature, seed)
    got = expected_calibration_error(reliability(counted(logits, target)))
    exact = binary_calibration_error(logits.sigmoid(), target.long(), NUM_BINS, norm="l1")
    assert got == pytest.approx(exact.item(), abs=2e-5)


@given(st.lists(st.tuples(st.floats(-20, 20), st.booleans()), min_size=1, max_size=40))
def test_reliability_is_that_of_a_loop(tags: list[tuple[float, bool]]) -> None:
    logits = torch.tensor([logit for logit, _ in tags], dtype=torch.float64)
    target = torch.tensor([target for _, target in tags])
    got = reliability(counted(logits, target, parts=3 if len(tags) % 3 == 0 else 1))
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(NUM_BINS)]
    for probability, (_, is_target) in zip(logits.sigmoid().tolist(), tags, strict=True):
        place = sum(probability >= edge / NUM_BINS - 1e-12 for edge in range(1, NUM_BINS))
        bins[place].append((probability, is_target))
    for number, of_bin in enumerate(bins):
        assert got.tags[number] == len(of_bin)
        if of_bin:
            assert float(got.probability[number]) == pytest.approx(
                np.mean([p for p, _ in of_bin]), abs=2e-5
            )
            assert float(got.important[number]) == pytest.approx(np.mean([t for _, t in of_bin]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_found_and_the_best_of_all_tags(temperature: float) -> None:
    logits, target = drawn(20_000, temperature)
    fitted = fit_temperature(counted(logits, target))
    assert fitted == pytest.approx(temperature, rel=0.05)

    def exact_loss(at: float) -> float:
        return torch.nn.functional.binary_cross_entropy_with_logits(
            logits / at, target.double()
        ).item()

    assert exact_loss(fitted) < min(exact_loss(fitted * 1.01), exact_loss(fitted / 1.01))
    odds = counted(logits, target)
    assert negative_log_likelihood(odds, fitted) == pytest.approx(exact_loss(fitted), abs=5e-5)
    if temperature != 1:
        before, after = (expected_calibration_error(reliability(odds, t)) for t in (1.0, fitted))
        exact = binary_calibration_error((logits / fitted).sigmoid(), target.long(), NUM_BINS)
        assert after < before / 3
        assert after == pytest.approx(exact.item(), abs=2e-3)


def test_temperature_stays_within_its_limits() -> None:
    logits = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64)
    assert fit_temperature(counted(logits, logits > 0)) == pytest.approx(0.05)
    assert fit_temperature(counted(logits, logits < 0)) == pytest.approx(20)


@pytest.mark.parametrize("seed", [0, 1])
def test_average_precision_of_all_tags_is_that_of_torchmetrics(seed: int) -> None:
    logits, target = drawn(2_000, seed=seed)
    exact = binary_average_precision(logits.sigmoid(), target.long()).item()
    assert micro_average_precision(counted(logits, target)) == pytest.approx(exact, abs=2e-4)


def test_targets_that_found_no_slot_lower_recall() -> None:
    logits, target = torch.tensor([3.0, -3.0]).double(), torch.tensor([True, False])
    precision, recall = precision_recall(counted(logits, target), targets_cut=1)
    assert recall.max() == 0.5
    assert (precision.max(), precision.min()) == (1, 0.5)
    assert micro_average_precision(counted(logits, target), 1) == pytest.approx(0.5)


def test_infinite_log_odds_and_slots_without_a_tag_spoil_nothing() -> None:
    edges = borders()
    counts = torch.zeros(3, len(edges) + 1, dtype=torch.float64)
    log_p = LogProbabilities(
        torch.tensor([[0.0, -torch.inf, torch.nan, -0.5]]),
        torch.tensor([[-torch.inf, 0.0, torch.nan, -0.9]]),
    )
    real = torch.tensor([[True, True, False, False]])
    add_log_odds(counts, log_p, torch.tensor([[True, False, True, True]]), real, edges)
    odds = LogOdds(counts)
    assert counts.isfinite().all()
    assert (odds.positives.sum(), odds.negatives.sum()) == (1, 1)
    assert expected_calibration_error(reliability(odds)) < 1e-9
