"""A rank that trains MAGNeto with a communication hook, and tells how its weights came out.

torchrun --nproc_per_node 2 tests/distributed/comm_hook_worker.py HOOK OUT.json D_FF
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from magneto_dist.config import ModelConfig, TrainConfig
from magneto_dist.data.order import BatchPlan
from magneto_dist.model.magneto import build_model
from magneto_dist.training.process import die_with_launcher
from magneto_dist.training.session import Session

STEPS, ITEMS, SLOTS, TAGS = 20, 8, 6, 30
MODEL = ModelConfig(kind="tf-t", d_model=16, num_heads=2, tag_layers=1, dropout=0.0)


def main(hook: str, out: Path, d_ff: int) -> None:
    die_with_launcher()
    session = Session(TrainConfig(ddp_comm_hook=hook, power_sgd_start_step=2), clip_norm=0.0)
    torch.manual_seed(0)
    model = build_model(replace(MODEL, d_ff=d_ff), TAGS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plan = BatchPlan(ITEMS * 2, num_ranks=2, micro_batch_size=ITEMS // 2, micro_steps=2)
    wrapped, optimizer = session.prepare(model, optimizer, plan)
    assert isinstance(wrapped, DistributedDataParallel)
    losses = [step(session, wrapped, optimizer) for _ in range(STEPS)]
    own = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    main_one = session.reduce_sum(own if session.is_main else torch.zeros_like(own))
    differ = session.reduce_sum((own != main_one).sum())
    if session.is_main:
        result = {"losses": losses, "differ": int(differ), "weights": own.tolist()}
        out.write_text(json.dumps(result))
    del wrapped, model, optimizer
    session.close()


def step(session: Session, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """One step on this rank's own items, which never change; returns the global loss."""
    generator = torch.Generator().manual_seed(1 + session.world.rank)
    total = torch.zeros(())
    for micro_step in range(2):
        ids = torch.randint(0, TAGS, (ITEMS // 2, SLOTS), generator=generator)
        with session.micro_step(model, is_last=micro_step == 1):
            loss = _loss(model(ids, torch.ones_like(ids, dtype=torch.bool)).tag_logits, ids)
            session.backward(loss)
        total += loss.detach()
    session.step(model, optimizer)
    return float(session.reduce_sum(total))


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    target = (ids % 3 == 0).float()
    return nn.functional.binary_cross_entropy_with_logits(logits, target) / 4


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))  # as a launcher does
