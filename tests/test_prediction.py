"""Prediction: which heads a model has, and probabilities that stay exact in log space."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from magneto_dist.batch import Prediction

MODERATE = st.floats(-20, 20)
ANY_SIZE = st.floats(-60_000, 60_000)


def one_slot(image: float, tag: float, gate: float, dtype: torch.dtype) -> Prediction:
    return Prediction(*(torch.tensor([[x]], dtype=dtype) for x in (image, tag, gate)))


def decimal_sigmoid(logit: float) -> Decimal:
    return 1 / (1 + (-Decimal(logit)).exp())


def test_heads_follow_from_what_a_model_has() -> None:
    x = torch.zeros(1, 1)
    assert Prediction(x, x, x).heads == ("final", "image", "tag")
    assert Prediction(x, x).heads == ("image", "tag")
    assert Prediction(image_logits=x).heads == ("final", "image")
    assert Prediction(tag_logits=x).heads == ("final", "tag")


def test_a_head_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="not 'final'"):
        Prediction(torch.zeros(1, 1), torch.zeros(1, 1)).probability("final")


def test_the_final_head_of_a_baseline_is_its_stream() -> None:
    logits = torch.tensor([[0.3, -2.0]])
    assert torch.equal(Prediction(tag_logits=logits).probability("final"), logits.sigmoid())
    assert torch.equal(Prediction(image_logits=logits).probability("final"), logits.sigmoid())


@given(ANY_SIZE, ANY_SIZE, ANY_SIZE)
def test_final_is_exactly_the_mixture_of_equation_1(image: float, tag: float, gate: float) -> None:
    prediction = one_slot(image, tag, gate, torch.float32)
    alpha = prediction.alpha
    assert alpha is not None
    assert 0 <= alpha.item() <= 1
    mixture = alpha * prediction.probability("image") + (1 - alpha) * prediction.probability("tag")
    assert torch.equal(prediction.probability("final"), mixture)
    assert 0 <= mixture.item() <= 1


@given(MODERATE, MODERATE, MODERATE)
def test_log_probabilities_are_logs_of_the_mixture(image: float, tag: float, gate: float) -> None:
    alpha, p_image, p_tag = (1 / (1 + math.exp(-x)) for x in (gate, image, tag))
    q_image, q_tag, rest = (1 / (1 + math.exp(x)) for x in (image, tag, gate))
    got = one_slot(image, tag, gate, torch.float64).log_probabilities("final")
    assert got.positive.item() == pytest.approx(
        math.log(alpha * p_image + rest * p_tag), rel=1e-12, abs=1e-14
    )
    assert got.negative.item() == pytest.approx(
        math.log(alpha * q_image + rest * q_tag), rel=1e-12, abs=1e-14
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [80.0, 30_000.0])
@pytest.mark.parametrize("signs", [(a, b, c) for a in (1, -1) for b in (1, -1) for c in (1, -1)])
def test_extreme_logits_have_exact_logs_and_finite_gradients(
    signs: tuple[int, int, int], size: float, dtype: torch.dtype
) -> None:
    logits = [torch.tensor([[s * size]], dtype=dtype, requires_grad=True) for s in signs]
    got = Prediction(*logits).log_probabilities("final")
    with localcontext() as context:
        context.prec, context.Emin = 60, -1_000_000
        image, tag, gate = (decimal_sigmoid(x.item()) for x in logits)
        rest, q_image, q_tag = (decimal_sigmoid(-x.item()) for x in (logits[2], *logits[:2]))
        expected = (
            float((gate * image + rest * tag).ln()),
            float((gate * q_image + rest * q_tag).ln()),
        )
    assert got.positive.dtype == torch.float32
    assert got.positive.item() == pytest.approx(expected[0], rel=1e-6, abs=1e-6)
    assert got.negative.item() == pytest.approx(expected[1], rel=1e-6, abs=1e-6)
    gradients = torch.autograd.grad(got.positive.sum() + got.negative.sum(), logits)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_autocast_does_not_reach_probabilities() -> None:
    logits = [torch.randn(2, 3) for _ in range(3)]
    prediction = Prediction(*logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside: list[Tensor] = [*prediction.log_probabilities("final")]
        inside.append(prediction.probability("final"))
    outside = [*prediction.log_probabilities("final"), prediction.probability("final")]
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_float64_stays_float64() -> None:
    prediction = one_slot(0.1, 0.2, 0.3, torch.float64)
    assert prediction.probability("final").dtype == torch.float64
    assert prediction.log_probabilities("final").negative.dtype == torch.float64
