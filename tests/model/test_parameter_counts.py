"""Parameters of every part, counted by hand from the paper's sizes (appendix A, NUS-WIDE)."""

from dataclasses import replace

import pytest
from torch import nn

from magneto_dist.config import ModelConfig
from magneto_dist.model.magneto import build_model

NUS_WIDE = ModelConfig(
    d_model=128,
    num_heads=4,
    d_ff=512,
    dropout=0.3,
    image_layers=1,
    tag_layers=2,
    backbone="resnet18",
    frozen_stages="all",
)
NUM_TAGS = 81

RESNET18 = 11_689_512 - (512 * 1000 + 1000)  # published count, without the classifier
EMBEDDING = (81 + 1) * 128
ATTENTION = 3 * (128 * 128 + 128) + (128 * 128 + 128)
FEED_FORWARD = (128 * 512 + 512) + (512 * 128 + 128)
LAYER_NORM = 2 * 128
ENCODER_LAYER = ATTENTION + FEED_FORWARD + 2 * LAYER_NORM
PROJECTION = 512 * 128 + 2 * 128  # no bias, but scale and shift of the batch norm
GATE = (256 * 512 + 512) + (512 * 1 + 1)
HEAD = 128 + 1


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def build(kind: str, **options) -> nn.Module:
    settings = {name: getattr(NUS_WIDE, name) for name in NUS_WIDE.__dataclass_fields__}
    return build_model(ModelConfig(**{**settings, "kind": kind}), NUM_TAGS, **options)


def test_parts_of_magneto() -> None:
    model = build("magneto")
    image = model.image_stream
    assert count(image.backbone) == RESNET18
    assert count(model.tag_embedding) == EMBEDDING
    assert count(image.projection) + count(image.projection_norm) == PROJECTION
    assert count(image.attention) == ATTENTION
    assert count(image.encoder) == ENCODER_LAYER
    assert count(model.tag_stream) == 2 * ENCODER_LAYER
    assert count(model.gate) == GATE
    assert count(model.image_head) == count(model.tag_head) == HEAD
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = EMBEDDING + PROJECTION + ATTENTION + 3 * ENCODER_LAYER + GATE + 2 * HEAD
    assert trained == expected == 869_507
    assert count(model) == RESNET18 + trained


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("tf-it", RESNET18 + EMBEDDING + PROJECTION + ATTENTION + ENCODER_LAYER + HEAD),
        ("tf-t", EMBEDDING + 2 * ENCODER_LAYER + HEAD),
        ("ff", EMBEDDING + 2 * (FEED_FORWARD + LAYER_NORM) + HEAD),
    ],
)
def test_baselines(kind: str, expected: int) -> None:
    assert count(build(kind)) == expected


def test_pre_training_has_no_gate() -> None:
    assert count(build("magneto")) - count(build("magneto", gate=False)) == GATE


def test_the_bilinear_mapping_adds_a_projection_and_a_norm() -> None:
    bilinear = build_model(replace(NUS_WIDE, mapping="bilinear"), NUM_TAGS)
    assert count(bilinear) - count(build("magneto")) == (128 * 128 + 128) + LAYER_NORM
    assert not any("product" in name for name in build("magneto").state_dict())
