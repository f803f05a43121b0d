"""Loss: equations 2 to 5 against plain loops; shares that add up however a batch is cut."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magneto_dist.batch import Batch, Prediction
from magneto_dist.config import LossConfig
from magneto_dist.loss import count_for_loss, ets_loss, trained_heads

CONFIGS = [
    LossConfig(kind=kind, auxiliary=auxiliary, normalisation=normalisation)
    for kind in ("bce", "bce-dice")
    for auxiliary in (True, False)
    for normalisation in ("slots", "tags")
]
MODELS = {"magneto": "itg", "pre-training": "it", "tf-it": "i", "tag-only": "t"}


def make_batch(seed: int, items: int, slots: int) -> Batch:
    """Random targets; some slots empty, some items without tags, some rows not valid."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, slots + 1, (items, 1), generator=generator)
    valid = torch.rand(items, generator=generator) < 0.8
    zeros = torch.zeros(items, dtype=torch.int64)
    return Batch(
        tag_ids=torch.zeros(items, slots, dtype=torch.int64),
        tag_mask=torch.arange(slots) < lengths,
        target=torch.rand(items, slots, generator=generator) < 0.4,
        outlier=torch.zeros(items, slots, dtype=torch.bool),
        sample_valid=valid,
        sample_ids=zeros,
        tags_cut=zeros,
        targets_cut=zeros,
        pixels=None,
        keys=("",) * items,
        step=1,
        micro_step=0,
        epoch=0,
    )


def make_prediction(seed: int, items: int, slots: int, parts: str = "itg") -> Prediction:
    generator = torch.Generator().manual_seed(seed + 1)

    def logits(part: str) -> torch.Tensor | None:
        x = 3 * torch.randn(items, slots, generator=generator, dtype=torch.float64)
        return x.requires_grad_() if part in parts else None

    return Prediction(logits("i"), logits("t"), logits("g"))


def rows(prediction: Prediction, batch: Batch, index: slice) -> tuple[Prediction, Batch]:
    tensors = {name: tensor[index] for name, tensor in batch._tensors().items()}
    part = Prediction(*(None if x is None else x[index] for x in prediction))
    return part, replace(batch, **tensors)


def reference_loss(prediction: Prediction, batch: Batch, config: LossConfig) -> float:
    """Equations 1 to 5 by plain loops over Python floats."""
    items, slots = batch.tag_mask.shape
    image, tag, gate = (None if x is None else x.tolist() for x in prediction)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    def probability(head: str, b: int, s: int) -> float:
        if head == "image":
            return sigmoid(image[b][s])
        if head == "tag":
            return sigmoid(tag[b][s])
        if gate is None:
            return sigmoid((image or tag)[b][s])
        alpha = sigmoid(gate[b][s])
        return alpha * sigmoid(image[b][s]) + (1 - alpha) * sigmoid(tag[b][s])

    if gate is not None:
        heads = ["final", "image", "tag"] if config.auxiliary else ["final"]
    else:
        heads = ["image", "tag"] if image is not None and tag is not None else ["final"]
    total = 0.0
    for head in heads:
        bce, dice, num_items, num_tags = 0.0, 0.0, 0, 0
        for b in range(items):
            if not batch.sample_valid[b]:
                continue
            num_items += 1
            overlap, size = 0.0, 0.0
            for s in range(slots):
                if not batch.tag_mask[b, s]:
                    continue
                num_tags += 1
                p, y = probability(head, b, s), int(batch.target[b, s])
                bce += -y * math.log(p) - (1 - y) * math.log(1 - p)
                overlap += y * p
                size += y + p
            smoothing = config.dice_smoothing
            dice += 1 - (2 * overlap + smoothing) / (size + smoothing)
        divisor = num_items * slots if config.normalisation == "slots" else num_tags
        total += bce / max(divisor, 1)
        if config.kind == "bce-dice":
            total += dice / max(num_items, 1)
    return total


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_loss_equals_plain_loops(config: LossConfig, model: str) -> None:
    for seed in range(5):
        batch, prediction = make_batch(seed, 6, 5), make_prediction(seed, 6, 5, MODELS[model])
        got = ets_loss(prediction, batch, count_for_loss(batch), config)
        expected = reference_loss(prediction, batch, config)
        assert got.total.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert sum(x.item() for x in got.heads.values()) == pytest.approx(expected, rel=1e-12)


def test_smoothing_is_the_one_configured() -> None:
    batch, prediction = make_batch(0, 6, 5), make_prediction(0, 6, 5)
    config = LossConfig(dice_smoothing=0.25)
    got = ets_loss(prediction, batch, count_for_loss(batch), config)
    assert got.total.item() == pytest.approx(reference_loss(prediction, batch, config), rel=1e-12)


def test_which_heads_are_trained() -> None:
    x = torch.zeros(1, 1)
    both, one = LossConfig(), LossConfig(auxiliary=False)
    assert trained_heads(Prediction(x, x, x), both) == ("final", "image", "tag")
    assert trained_heads(Prediction(x, x, x), one) == ("final",)
    assert trained_heads(Prediction(x, x), both) == ("image", "tag")
    assert trained_heads(Prediction(x, x), one) == ("image", "tag")
    assert trained_heads(Prediction(tag_logits=x), both) == ("final",)
    assert trained_heads(Prediction(image_logits=x), one) == ("final",)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradients_are_those_of_finite_differences(config: LossConfig) -> None:
    batch, prediction = make_batch(3, 4, 3), make_prediction(3, 4, 3)
    counts = count_for_loss(batch)
    assert counts[1] > 3

    def loss(*logits: torch.Tensor) -> torch.Tensor:
        return ets_loss(Prediction(*logits), batch, counts, config).total

    assert torch.autograd.gradcheck(loss, tuple(prediction))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, 8), max_size=4),
    config=st.sampled_from(CONFIGS),
    model=st.sampled_from(sorted(MODELS)),
)
def test_shares_of_any_cut_add_up(
    seed: int, cuts: list[int], config: LossConfig, model: str
) -> None:
    batch, prediction = make_batch(seed, 8, 4), make_prediction(seed, 8, 4, MODELS[model])
    leaves = [x for x in prediction if x is not None]
    whole = ets_loss(prediction, batch, count_for_loss(batch), config)
    edges = [0, *sorted(cuts), 8]
    parts = [rows(prediction, batch, slice(a, b)) for a, b in pairwise(edges)]
    counts = torch.stack([count_for_loss(part) for _, part in parts]).sum(0)
    shares = [ets_loss(part, micro, counts, config) for part, micro in parts]
    total = torch.stack([share.total for share in shares]).sum()
    torch.testing.assert_close(total, whole.total, rtol=1e-12, atol=1e-12)
    for head, value in whole.heads.items():
        added = torch.stack([share.heads[head] for share in shares]).sum()
        torch.testing.assert_close(added, value, rtol=1e-12, atol=1e-12)
    wanted, got = torch.autograd.grad(whole.total, leaves), torch.autograd.grad(total, leaves)
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    extra=st.integers(1, 6),
    kind=st.sampled_from(["bce", "bce-dice"]),
    garbage=st.sampled_from([0.0, -1e30, math.inf, math.nan]),
)
def test_padding_changes_nothing_but_the_published_divisor(
    seed: int, extra: int, kind: str, garbage: float
) -> None:
    batch, prediction = make_batch(seed, 5, 4), make_prediction(seed, 5, 4)
    fillers = [
        torch.full((5, extra), garbage, dtype=torch.float64, requires_grad=True) for _ in range(3)
    ]
    empty = torch.zeros(5, extra, dtype=torch.bool)
    wide = replace(
        batch,
        tag_ids=torch.cat([batch.tag_ids, empty.long()], 1),
        tag_mask=torch.cat([batch.tag_mask, empty], 1),
        target=torch.cat([batch.target, ~empty], 1),
        outlier=torch.cat([batch.outlier, empty], 1),
    )
    leaves = list(prediction)
    wider = Prediction(*(torch.cat(pair, 1) for pair in zip(leaves, fillers, strict=True)))
    for normalisation in ("tags", "slots"):
        config = LossConfig(kind=kind, normalisation=normalisation)  # type: ignore[arg-type]
        before = ets_loss(prediction, batch, count_for_loss(batch), config).total
        after = ets_loss(wider, wide, count_for_loss(wide), config).total
        gradients = torch.autograd.grad(after, fillers, retain_graph=True, allow_unused=True)
        assert not any(bool(g.any()) for g in gradients if g is not None), "padding is pulled"
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(after, leaves))
        if normalisation == "tags":
            torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
        elif kind == "bce":
            torch.testing.assert_close(after * (4 + extra), before * 4, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_trimmed_padding_changes_nothing(config: LossConfig) -> None:
    batch, prediction = make_batch(3, 5, 9), make_prediction(3, 5, 9)
    batch = replace(batch, tag_mask=batch.tag_mask & (torch.arange(9) < 6))
    names = ("tag_ids", "tag_mask", "target", "outlier")
    fewer = {name: getattr(batch, name)[:, :6] for name in names}
    trimmed = replace(batch, num_slots=9, **fewer)
    of_trimmed = Prediction(*(None if x is None else x[:, :6] for x in prediction))
    counts = count_for_loss(batch)
    whole = ets_loss(prediction, batch, counts, config)
    ours = ets_loss(of_trimmed, trimmed, counts, config)
    torch.testing.assert_close(ours, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_invalid_rows_and_empty_items_have_no_loss_and_no_gradient(config: LossConfig) -> None:
    batch, prediction = make_batch(1, 3, 4), make_prediction(1, 3, 4)
    full = torch.ones(3, 4, dtype=torch.bool)
    nothing_valid = replace(batch, tag_mask=full, sample_valid=torch.zeros(3, dtype=torch.bool))
    no_tags = replace(batch, tag_mask=~full, sample_valid=torch.ones(3, dtype=torch.bool))
    assert count_for_loss(nothing_valid).tolist() == [0, 0]
    assert count_for_loss(no_tags).tolist() == [3, 0]
    for empty in (nothing_valid, no_tags):
        loss = ets_loss(prediction, empty, count_for_loss(empty), config).total
        assert loss.item() == 0
        for gradient in torch.autograd.grad(loss, list(prediction), allow_unused=True):
            assert gradient is not None, "every head stays in the graph: DDP waits for each"
            assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_extreme_logits_of_any_precision_train(config: LossConfig, dtype: torch.dtype) -> None:
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    batch = replace(
        make_batch(0, 8, 2),
        tag_mask=torch.ones(8, 2, dtype=torch.bool),
        target=torch.tensor([[True, False]]).expand(8, 2),
        sample_valid=torch.ones(8, dtype=torch.bool),
    )
    for size in (80.0, 30_000.0):
        logits = [
            (size * signs[:, k : k + 1]).expand(8, 2).to(dtype).requires_grad_() for k in range(3)
        ]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = ets_loss(Prediction(*logits), batch, count_for_loss(batch), config).total
        assert loss.dtype == torch.float32
        assert math.isfinite(loss.item())
        gradients = torch.autograd.grad(loss, logits)
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
        # Where both streams are wrong and sure, both are told so, however far out they are.
        wrong = (signs[:, 0] < 0) & (signs[:, 1] < 0)
        pull = (gradients[0] + gradients[1])[wrong, 0].float()
        assert bool((pull < -1e-3).all())
