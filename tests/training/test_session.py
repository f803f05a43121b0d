"""One optimizer step of one process: what an overflow of fp16 leaves as it was."""

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
