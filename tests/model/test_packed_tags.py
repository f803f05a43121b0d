"""Encoders on the tags alone: the same as on padded lists, and less work."""

import pytest
import torch
from torch import Tensor, nn

from magneto_dist.batch import Batch
from magneto_dist.config import LossConfig, ModelConfig
from magneto_dist.loss import count_for_loss, ets_loss
from magneto_dist.model.encoder import TransformerEncoder, pack_tags
from magneto_dist.model.magneto import build_model

SMALL = ModelConfig(
    d_model=16, num_heads=4, d_ff=24, dropout=0.0, tag_layers=2, image_layers=1,
    backbone="resnet18", backbone_stages=1, frozen_stages="all", batch_norm_group_size=2,
)  # fmt: skip
# Holes in a list, one item without tags, one with all slots.
MASK = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)


def encoder(*, dropout: float = 0.0) -> TransformerEncoder:
    torch.manual_seed(0)
    config = ModelConfig(d_model=16, num_heads=4, d_ff=24, dropout=dropout)
    return TransformerEncoder(config, num_layers=2).double().train()


def features(mask: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*mask.shape, 16, dtype=torch.float64, generator=generator)


def trained(module: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """Features of the tags, and gradients of weights and input, as far as tags count."""
    x = features(mask).requires_grad_()
    module.zero_grad()
    out = module(x, mask)[mask]
    out.square().sum().backward()
    assert x.grad is not None
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad[mask], **grads}


def test_packed_lists_give_what_padded_ones_give() -> None:
    network = encoder()
    padded = trained(network, MASK)
    names = list(network.state_dict())
    pack_tags(network)
    packed = trained(network, MASK)
    assert packed.keys() == padded.keys()
    assert len(packed) == 2 + sum(1 for _ in network.parameters())
    for name, tensor in padded.items():
        torch.testing.assert_close(packed[name], tensor, rtol=1e-11, atol=1e-13, msg=name)
    assert list(network.state_dict()) == names
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(network(features(MASK), MASK)[MASK], packed["out"])


def test_no_layer_sees_padding() -> None:
    network = encoder()
    pack_tags(network)
    seen = []
    for layer in network.layers:
        layer.get_submodule("linear1").register_forward_hook(lambda _, x, y: seen.append(len(y)))
    out = network(features(MASK), MASK)
    assert seen == [int(MASK.sum())] * 2
    assert not out[~MASK].any()


def test_a_batch_without_any_tag_has_gradients_of_zero() -> None:
    network, mask = encoder(), torch.zeros(3, 4, dtype=torch.bool)
    pack_tags(network)
    network(features(mask), mask).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in network.parameters())


def test_dropout_is_drawn_for_each_tag_and_by_the_seed() -> None:
    network = encoder(dropout=0.5)
    pack_tags(network)

    def out(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return network(features(MASK), MASK)

    assert torch.equal(out(3), out(3))
    assert not torch.equal(out(3), out(4))
    dropped = []
    network.layers[0].get_submodule("dropout").register_forward_hook(
        lambda _, x, y: dropped.append(((y == 0) & (x[0] != 0)).sum() / (x[0] != 0).sum())
    )
    for seed in range(200):
        out(seed)
    assert float(torch.stack(dropped).mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("kind", ["magneto", "tf-it", "tf-t"])
def test_a_whole_model_has_the_same_loss_and_gradients(kind: str) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(**{**vars(SMALL), "kind": kind}), 9).double().train()
    ids = torch.arange(16).reshape(4, 4).remainder(9).where(MASK, 9)
    zeros = torch.zeros(4, dtype=torch.int64)
    batch = Batch(
        tag_ids=ids, tag_mask=MASK, target=MASK & (ids % 2 == 0), outlier=torch.zeros_like(MASK),
        sample_valid=MASK.any(1), sample_ids=torch.arange(4), tags_cut=zeros, targets_cut=zeros,
        pixels=torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), keys=("",) * 4,
        step=1, micro_step=0, epoch=0,
    )  # fmt: skip

    def loss_and_gradients() -> list[Tensor]:
        model.zero_grad()
        prediction = model(**batch.inputs())
        loss = ets_loss(prediction, batch, count_for_loss(batch), LossConfig()).total
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    padded = loss_and_gradients()
    pack_tags(model)
    for ours, theirs in zip(loss_and_gradients(), padded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
