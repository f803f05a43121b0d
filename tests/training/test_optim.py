"""The learning rate against torch's own schedulers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magneto_dist.config import OptimConfig
from magneto_dist.training.optim import Schedule, build_optimizer


@given(
    st.lists(st.sampled_from([0.5, 0.9, 0.99995, 1.0, 1.5]), min_size=1, max_size=40),
    st.integers(0, 3),
)
def test_plateau_is_torchs(losses: list[float], patience: int) -> None:
    config = OptimConfig(lr=0.1, schedule="plateau", plateau_patience=patience)
    ours = Schedule(config, total_steps=100)
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        reference, factor=0.1, patience=patience, eps=0
    )
    for step, loss in enumerate(losses, start=1):
        ours.observe(loss)
        theirs.step(loss)
        restored = Schedule(config, total_steps=100)
        restored.load_state_dict(ours.state_dict())
        ours = restored
        assert ours.lr(step) == pytest.approx(reference.param_groups[0]["lr"], rel=1e-9)


def test_cosine_and_warmup() -> None:
    schedule = Schedule(OptimConfig(lr=2.0, warmup_steps=10, schedule="cosine"), total_steps=110)
    assert schedule.lr(1) == pytest.approx(0.2)
    assert schedule.lr(10) == pytest.approx(2.0)
    assert schedule.lr(60) == pytest.approx(1.0)
    assert schedule.lr(110) == pytest.approx(0.0)


def test_frozen_parameters_are_not_optimised() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(lr=0.5, momentum=0.8))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    schedule = Schedule(OptimConfig(lr=0.5), total_steps=1)
    assert schedule.apply(optimizer, 1) == optimizer.param_groups[0]["lr"] == 0.5
