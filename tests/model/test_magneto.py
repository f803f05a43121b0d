"""Properties of MAGNeto and its baselines: sets of tags, padding, gradients, freezing, export."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from magneto_dist.batch import Batch, Prediction
from magneto_dist.config import LossConfig, ModelConfig
from magneto_dist.errors import InputError
from magneto_dist.loss import count_for_loss, ets_loss
from magneto_dist.model.encoder import attention_padding
from magneto_dist.model.magneto import PRETRAINED_PARTS, build_model
from magneto_dist.model.norm import commit_batch_norm_statistics

NUM_TAGS = 12
TINY = ModelConfig(
    d_model=8,
    num_heads=2,
    d_ff=16,
    dropout=0.0,
    image_layers=1,
    tag_layers=2,
    backbone="resnet18",
    backbone_stages=2,
    frozen_stages=1,
    backbone_batch_norm="ghost",
    batch_norm_group_size=2,
)
KINDS = ("magneto", "tf-it", "tf-t", "ff", "bilinear")


def build(kind: str = "magneto", *, gate: bool = True, **settings) -> nn.Module:
    """A model of this kind; "bilinear": MAGNeto with this mapping."""
    if kind == "bilinear":
        kind, settings = "magneto", {"mapping": "bilinear", **settings}
    torch.manual_seed(0)
    return build_model(replace(TINY, kind=kind, **settings), NUM_TAGS, gate=gate)


def make_batch(lengths: list[int], slots: int = 5, valid: list[bool] | None = None) -> Batch:
    """Items with so many tags each, and random pictures."""
    generator = torch.Generator().manual_seed(1)
    items = len(lengths)
    mask = torch.arange(slots) < torch.tensor(lengths)[:, None]
    ids = torch.randint(0, NUM_TAGS, (items, slots), generator=generator)
    zeros = torch.zeros(items, dtype=torch.int64)
    return Batch(
        tag_ids=torch.where(mask, ids, NUM_TAGS),
        tag_mask=mask,
        target=mask & (torch.rand(items, slots, generator=generator) < 0.5),
        outlier=torch.zeros_like(mask),
        sample_valid=torch.tensor(valid or [True] * items),
        sample_ids=zeros,
        tags_cut=zeros,
        targets_cut=zeros,
        pixels=torch.randint(0, 256, (items, 3, 32, 32), dtype=torch.uint8, generator=generator),
        keys=("",) * items,
        step=1,
        micro_step=0,
        epoch=0,
    )


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    split = {name: tensor.split(size) for name, tensor in batch._tensors().items()}
    return [
        replace(batch, **{name: parts[i] for name, parts in split.items()})
        for i in range(len(batch.keys) // size)
    ]


def logits(prediction: Prediction) -> list[Tensor]:
    return [part for part in prediction if part is not None]


def gradients(model: nn.Module, batches: list[Batch], config: LossConfig) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    counts = torch.stack([count_for_loss(batch) for batch in batches]).sum(0)
    for batch in batches:
        ets_loss(model(**batch.inputs()), batch, counts, config).total.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in trained.values()), (
        f"without gradient: {[name for name, gradient in trained.items() if gradient is None]}"
    )
    return trained  # type: ignore[return-value]


MODELS = {kind: build(kind).double() for kind in KINDS}
"""Models in float64; tests that change one build their own."""


@settings(max_examples=10)
@given(order=st.permutations(range(5)), length=st.integers(1, 5))
@pytest.mark.parametrize("kind", KINDS)
def test_permuting_tags_permutes_outputs(kind: str, order: list[int], length: int) -> None:
    model = MODELS[kind].eval()
    batch = make_batch([length, 5])
    mixed = replace(batch, tag_ids=batch.tag_ids[:, order], tag_mask=batch.tag_mask[:, order])
    with torch.no_grad():
        straight, permuted = model(**batch.inputs()), model(**mixed.inputs())
    for a, b in zip(logits(straight), logits(permuted), strict=True):
        mask = mixed.tag_mask
        torch.testing.assert_close(a[:, order][mask], b[mask], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_more_padding_changes_nothing(kind: str, training: bool) -> None:
    model = MODELS[kind].train(training)
    narrow = make_batch([3, 5])
    wide = replace(
        narrow,
        tag_ids=nn.functional.pad(narrow.tag_ids, (0, 4), value=NUM_TAGS),
        **{
            name: nn.functional.pad(getattr(narrow, name), (0, 4), value=False)
            for name in ("tag_mask", "target", "outlier")
        },
    )
    with torch.no_grad():
        before, after = model(**narrow.inputs()), model(**wide.inputs())
    for a, b in zip(logits(before), logits(after), strict=True):
        mask = narrow.tag_mask
        torch.testing.assert_close(a[mask], b[:, :5][mask], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["magneto", "tf-it", "tf-t", "bilinear"])
def test_a_tag_sees_the_other_tags(kind: str) -> None:
    batch = make_batch([5, 5])
    other = batch.tag_ids.clone()
    other[0, 4] = (other[0, 4] + 1) % NUM_TAGS
    model = MODELS[kind].eval()
    a, b = model(**batch.inputs()), model(**replace(batch, tag_ids=other).inputs())
    assert all(
        bool((x[0, :4] != y[0, :4]).all()) for x, y in zip(logits(a), logits(b), strict=True)
    )


def test_in_ff_every_tag_stands_for_itself() -> None:
    batch = make_batch([5, 5])
    other = batch.tag_ids.clone()
    other[0, 4] = (other[0, 4] + 1) % NUM_TAGS
    model = MODELS["ff"].eval()
    a = model(**batch.inputs()).tag_logits
    b = model(**replace(batch, tag_ids=other).inputs()).tag_logits
    assert torch.equal(a[0, :4], b[0, :4])
    assert a[0, 4] != b[0, 4]


def test_heads_of_every_kind() -> None:
    heads = {kind: model(**make_batch([3, 2]).inputs()).heads for kind, model in MODELS.items()}
    assert heads == {
        "magneto": ("final", "image", "tag"),
        "tf-it": ("final", "image"),
        "tf-t": ("final", "tag"),
        "ff": ("final", "tag"),
        "bilinear": ("final", "image", "tag"),
    }
    assert build(gate=False)(**make_batch([3, 2]).inputs()).heads == ("image", "tag")


def test_alpha_weighs_the_image_stream() -> None:
    prediction = MODELS["magneto"].eval()(**make_batch([5, 3]).inputs())
    alpha = prediction.alpha
    assert bool(((alpha >= 0) & (alpha <= 1)).all())
    mixture = alpha * prediction.image_logits.sigmoid() + (1 - alpha) * (
        prediction.tag_logits.sigmoid()
    )
    assert torch.equal(prediction.probability("final"), mixture)


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_trained_parameter_has_a_gradient_for_every_batch(
    kind: str, gate: bool, auxiliary: bool
) -> None:
    model, config = build(kind, gate=gate), LossConfig(auxiliary=auxiliary)
    for lengths, valid in ([2, 5], [True, True]), ([0, 3], [False, True]), ([0, 0], [False, False]):
        batch = make_batch(lengths, valid=valid)
        found = gradients(model, [batch], config)
        assert all(bool(gradient.isfinite().all()) for gradient in found.values())
        assert any(bool(gradient.any()) for gradient in found.values()) == any(valid)


@pytest.mark.parametrize("kind", KINDS)
def test_items_without_tags_stay_finite_in_fused_kernels(kind: str) -> None:
    with torch.no_grad():  # torch then takes its fast path for encoder layers
        prediction = build(kind).eval()(**make_batch([0, 3]).inputs())
    assert all(bool(part.isfinite().all()) for part in logits(prediction))


def test_what_may_not_be_attended_to() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    expected = [[False, False, True], [False, True, True], [False, True, True]]
    assert attention_padding(mask).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    model = build(kind).double().train()
    batch = make_batch([4, 5, 0, 2])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(4)
    found = gradients(model, [batch], LossConfig())
    for part in sorted({name.split(".")[0] for name in trained}):
        names = [name for name in trained if name.startswith(part)]
        steps = {
            name: torch.randn(p.shape, generator=generator, dtype=p.dtype) * 1e-6
            for name, p in trained.items()
            if name in names
        }
        losses = []
        for sign in (1, -2, 1):  # forth, back, and home again
            with torch.no_grad():
                for name, step in steps.items():
                    trained[name] += sign * step
                counts = count_for_loss(batch)
                losses.append(ets_loss(model(**batch.inputs()), batch, counts, LossConfig()).total)
        slope = sum((found[name] * step).sum() for name, step in steps.items())
        assert slope != 0
        assert (losses[0] - losses[1]).item() / 2 == pytest.approx(float(slope), rel=1e-3), part


@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_a_zero_vector_that_is_not_trained(kind: str) -> None:
    model = build(kind)
    padding = model.tag_embedding.vectors.weight[NUM_TAGS]
    assert not padding.any()
    batch = make_batch([1, 5])
    found = gradients(model, [batch], LossConfig())["tag_embedding.vectors.weight"]
    assert not found[NUM_TAGS].any()
    used = batch.tag_ids[batch.tag_mask].unique()
    assert bool(found[used].any(1).all())


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_an_invalid_row_does_not_matter(kind: str) -> None:
    model = MODELS[kind].train()
    batch = make_batch([4, 0, 0, 3], valid=[True, False, False, True])
    assert batch.pixels is not None
    other = replace(batch, pixels=batch.pixels.clone())
    assert other.pixels is not None
    other.pixels[1:3] = 255
    first, second = (gradients(model, [b], LossConfig()) for b in (batch, other))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up_to_the_whole_batch(kind: str) -> None:
    model = build(kind).double()
    batch = make_batch([4, 5, 0, 3, 1, 2, 5, 0], valid=[True] * 7 + [False])
    results = []
    for size in (8, 4, 2):
        found = gradients(model, micro_batches(batch, size), LossConfig())
        sums = [b.clone() for name, b in model.named_buffers() if name.endswith("group_statistics")]
        commit_batch_norm_statistics(model, lambda packed: torch.zeros_like(packed))
        results.append([*found.values(), *sums])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_tags_that_look_at_a_picture_of_one_colour_differ_with_the_bilinear_mapping_alone() -> None:
    # All regions alike: whatever a tag attends to, it sees the same.
    batch = make_batch([5, 5])
    features = torch.ones(2, 4, 64).double()
    inputs = {**batch.inputs(), "pixels": None, "features": features}
    for kind, differ in ("magneto", False), ("bilinear", True):
        model = build(kind, frozen_stages="all").double().eval()
        image = model(**inputs).image_logits[0]
        assert bool((image.std() > 1e-3).item()) == differ, kind


def test_text_only_data_is_refused_where_pictures_are_needed() -> None:
    for kind in ("magneto", "tf-it"):
        with pytest.raises(InputError, match=r"--model\.kind tf-t and ff"):
            MODELS[kind](**replace(make_batch([2, 2]), pixels=None).inputs())
    for kind in ("tf-t", "ff"):
        MODELS[kind](**replace(make_batch([2, 2]), pixels=None).inputs())


def test_sync_batch_norm_trains_on_gpus_only() -> None:
    model = build(projection_batch_norm="sync")
    with pytest.raises(InputError, match=r"on CPU set --model\.projection_batch_norm"):
        model(**make_batch([2, 2]).inputs())
    model.eval()(**make_batch([2, 2]).inputs())


def test_the_seed_determines_the_initial_weights() -> None:
    first, second = build().state_dict(), build().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    layers = build("tf-t").tag_stream.encoder.layers
    assert not torch.equal(layers[0].linear1.weight, layers[1].linear1.weight)


@pytest.mark.parametrize("kind", ["magneto", "bilinear"])
def test_pretrained_parts_are_all_but_heads_and_gate(kind: str) -> None:
    pretrained, target = build(kind, gate=False).state_dict(), build(kind).state_dict()
    copied = {key for key in target if key.startswith(PRETRAINED_PARTS)}
    assert {key for key in pretrained if key.startswith(PRETRAINED_PARTS)} == copied
    rest = {key.split(".")[0] for key in target.keys() - copied}
    assert rest == {"image_head", "tag_head", "gate"}


def test_dropout_is_everywhere_the_same_and_off_in_evaluation() -> None:
    model = build(dropout=0.25)
    rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    rates |= {m.dropout for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    assert rates == {0.25}
    batch = make_batch([5, 5])
    one, two = model(**batch.inputs()), model(**batch.inputs())
    assert all(not torch.equal(a, b) for a, b in zip(logits(one), logits(two), strict=True))
    model.eval()
    one, two = model(**batch.inputs()), model(**batch.inputs())
    assert all(torch.equal(a, b) for a, b in zip(logits(one), logits(two), strict=True))


@pytest.mark.parametrize("kind", ["magneto", "bilinear"])
def test_autocast_trains(kind: str) -> None:
    model, batch = build(kind), make_batch([5, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = model(**batch.inputs())
    assert all(part.dtype == torch.bfloat16 for part in logits(prediction))
    loss = ets_loss(prediction, batch, count_for_loss(batch), LossConfig()).total
    exact = ets_loss(model(**batch.inputs()), batch, count_for_loss(batch), LossConfig()).total
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)


@pytest.mark.parametrize("kind", ["magneto", "ff", "bilinear"])
def test_a_model_can_be_exported(kind: str) -> None:
    model = build(kind).eval()
    shown, other = make_batch([3, 5]), make_batch([5, 0])
    inputs = [(b.tag_ids, b.tag_mask, b.pixels) for b in (shown, other)]
    program = torch.export.export(model, inputs[0])
    with torch.no_grad():
        got, expected = program.module()(*inputs[1]), model(*inputs[1])
    assert got.heads == expected.heads
    for a, b in zip(logits(got), logits(expected), strict=True):
        torch.testing.assert_close(a[other.tag_mask], b[other.tag_mask], rtol=1e-5, atol=1e-6)
