"""One optimizer step of one process: what an overflow of fp16 leaves, and the gradients' norm."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from magneto_dist.config import TrainConfig
from magneto_dist.data.order import BatchPlan
from magneto_dist.model.norm import GhostBatchNorm2d
from magneto_dist.training.loop import settle_batch_norms
from magneto_dist.training.session import Session
from magneto_dist.training.zero import held_part


@pytest.fixture
def scaled_session() -> Iterator[Session]:
    """A session that scales its loss as fp16 does, which accelerate itself offers on GPUs alone."""
    num_threads = torch.get_num_threads()
    session = Session(TrainConfig())
    session._accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    yield session
    session.close()
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(num_threads)


def test_an_overflow_moves_neither_weights_nor_statistics(scaled_session: Session) -> None:
    session = scaled_session
    torch.manual_seed(0)
    norm = GhostBatchNorm2d(2, group_size=2)
    model = nn.Sequential(nn.Conv2d(3, 2, 1), norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = BatchPlan(global_batch_size=2, num_ranks=1, micro_batch_size=2, micro_steps=1)
    model, optimizer = session.prepare(model, optimizer, plan)

    def step(factor: float) -> tuple[bool, dict[str, Tensor]]:
        with session.micro_step(model, is_last=True):
            session.backward(model(torch.randn(2, 3, 4, 4)).square().mean() * factor)
        stepped = session.step(model, optimizer)
        settle_batch_norms(session, model, skipped=stepped.skipped)
        assert not norm.group_statistics.any()
        return stepped.skipped, {name: t.clone() for name, t in model.state_dict().items()}

    before = {name: t.clone() for name, t in model.state_dict().items()}
    skipped, after = step(torch.inf)
    assert skipped
    assert all(after[name].equal(before[name]) for name in before)
    assert session.scaler_state()["scale"] == 4.0
    skipped, after = step(1.0)
    assert not skipped
    assert not any(after[name].equal(before[name]) for name in before if name != "0.bias")


def test_the_norm_is_that_of_unscaled_gradients_and_moves_nothing(
    scaled_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, steps = scaled_session, []
    for measures in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        model[0].bias.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        plan = BatchPlan(global_batch_size=2, num_ranks=1, micro_batch_size=2, micro_steps=1)
        before = [weight.detach().clone() for weight in model.parameters()]
        model, optimizer = session.prepare(model, optimizer, plan)
        # As on a GPU: accelerate unscales where it believes that it has scaled.
        monkeypatch.setattr(session._accelerator, "native_amp", True)
        monkeypatch.setattr(session._accelerator.state, "_mixed_precision", "fp16")
        with session.micro_step(model, is_last=True):
            session.backward(model(torch.ones(2, 3)).square().sum())
        stepped = session.step(model, optimizer, measures_norm=measures)
        monkeypatch.undo()
        moved = zip(before, model.parameters(), strict=True)
        squares = [((old - new) / 0.1).square().sum().item() for old, new in moved]
        steps.append((stepped.gradient_norm, squares))
    (none, expected), (norm, squares) = steps
    assert none is None
    assert squares == expected
    assert norm is not None
    assert norm.item() == pytest.approx(sum(squares) ** 0.5, rel=1e-5)


@pytest.mark.parametrize(("numel", "num_ranks"), [(5, 2), (6, 2), (1, 4), (9, 4)])
def test_what_nobody_has_written_is_no_part_of_a_weight(numel: int, num_ranks: int) -> None:
    """DeepSpeed rounds the parts up, and leaves the memory beyond the weight as it came."""
    size = -(-numel // num_ranks)
    padded = torch.full((size * num_ranks,), torch.nan)
    padded[:numel] = torch.arange(float(numel))
    held = []
    for rank in range(num_ranks):
        weight = nn.Parameter(torch.empty(0))
        weight.ds_numel, weight.ds_tensor = numel, padded[rank * size : (rank + 1) * size]  # type: ignore[attr-defined]
        held.append(held_part(weight, rank))
    assert torch.equal(torch.cat(held), torch.arange(float(numel)))
    whole = nn.Parameter(torch.ones(2, 3))
    assert held_part(whole, 1) is whole
