"""A rank under FSDP2 that scales its loss as fp16 does; tells what it holds and what moved.

ACCELERATE_USE_FSDP=true FSDP_VERSION=2 \\
    torchrun --nproc_per_node 2 tests/distributed/fsdp_worker.py OUT_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from magneto_dist.config import ModelConfig, OptimConfig, TrainConfig
from magneto_dist.data.order import BatchPlan
from magneto_dist.model.magneto import build_model
from magneto_dist.training.optim import build_optimizer
from magneto_dist.training.session import Session

MODEL = ModelConfig(
    backbone_stages=2, frozen_stages="all", d_model=16, num_heads=2, d_ff=32, dropout=0.0
)


def main(out: Path) -> None:
    session = Session(TrainConfig(), clip_norm=1.0)
    # accelerate itself offers it on GPUs alone.
    session._accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    torch.manual_seed(0)
    model = build_model(MODEL, num_tags=30)
    plan = BatchPlan(8, num_ranks=2, micro_batch_size=4, micro_steps=1)
    model, optimizer = session.prepare(model, build_optimizer(model, OptimConfig(lr=0.1)), plan)
    parts = [w for w in model.parameters() if isinstance(w, DTensor)]
    whole = {n for n, w in model.named_parameters() if not isinstance(w, DTensor)}
    result = {
        "whole": sorted({".".join(name.split(".")[:2]) for name in whole}),
        "held": sum(part.to_local().numel() for part in parts),
        "all": sum(part.numel() for part in parts),
        "skipped": [],
        "moved": [],
    }
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    ids = torch.randint(0, 30, (4, 6))
    for step in range(3):
        before = session.full_state(model)
        with session.micro_step(model, is_last=True):
            prediction = model(ids, torch.ones_like(ids, dtype=torch.bool), pixels)
            session.backward(torch.stack([*prediction]).square().mean())
        if step == 1 and session.world.rank == 1:
            gradient = max(parts, key=DTensor.numel).grad
            assert isinstance(gradient, DTensor)
            gradient.to_local()[0] = torch.inf
        result["skipped"].append(session.step(model, optimizer).skipped)
        after = session.full_state(model)
        moved = any(not after[name].equal(tensor) for name, tensor in before.items())
        result["moved"].append(session.from_main(lambda moved=moved: moved))
    result["scale"] = session.scaler_state()["scale"]
    (out / f"{session.world.rank}.json").write_text(json.dumps(result))
    del model, optimizer, parts
    session.close()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))  # as a launcher does
