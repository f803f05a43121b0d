"""Attention is one operator with padding in it, not products with a softmax between them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from magneto_dist.config import Config
from magneto_dist.config_io import load_config
from magneto_dist.loss import count_for_loss, ets_loss
from magneto_dist.model.encoder import pack_tags
from magneto_dist.model.magneto import build_model
from processes import REPOSITORY
from step_memory import noise

NUM_TAGS = 30
FUSED = "_scaled_dot_product_flash_attention_for_cpu"


class _Operators(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def small() -> Config:
    config = load_config(REPOSITORY / "configs" / "ls.yaml")
    model = replace(
        config.model, backbone="resnet18", backbone_weights="none", d_model=16, num_heads=2,
        d_ff=32, batch_norm_group_size=4, dropout=0.0,  # fused with dropout on GPUs alone
    )  # fmt: skip
    augment, train = (
        replace(config.augment, image_size=32),
        replace(config.train, global_batch_size=4),
    )
    return replace(config, model=model, augment=augment, train=train)


@pytest.mark.parametrize("packs", [False, True])
def test_attention_is_fused_where_lists_are_padded(packs):
    config = small()
    model = build_model(config.model, NUM_TAGS)
    if packs:
        pack_tags(model)
    batch = noise(config, NUM_TAGS)[0][0]
    batch.tag_mask[:, 20:] = False
    operators = _Operators()
    with operators:
        loss = ets_loss(model(**batch.inputs()), batch, count_for_loss(batch), config.loss)
        loss.total.backward()
    layers = 1 + config.model.image_layers + config.model.tag_layers
    assert operators.seen.count(FUSED) == layers
    assert operators.seen.count(f"{FUSED}_backward") == layers
    assert not {"_softmax", "_safe_softmax", "baddbmm"} & {*operators.seen}
