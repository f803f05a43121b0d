"""A run that goes on from any of its steps is, bit for bit, the run that nobody disturbed.

One undisturbed run per strategy keeps the checkpoint of every step. Copies of its folder, each with
one checkpoint, go on to the end, and must have made the same: every forward (what the model was
given, what it gave, the random state after it), losses, metrics, samples, weights, optimizer.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from processes import TINY, losses, validations
from warm import Warm, forwards_of

EPOCH_STEPS = 6
MICRO_STEPS = 2


@dataclass(frozen=True)
class Strategy:
    """How many processes train, and how."""

    name: str
    ranks: int = 1
    zero_stage: int = 0
    """0: no DeepSpeed."""
    fsdp: bool = False

    @property
    def environment(self) -> dict[str, str]:
        """What `accelerate launch` would say."""
        if self.fsdp:
            return {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        if not self.zero_stage:
            return {}
        return {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(self.zero_stage),
            "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage",
        }


@dataclass(frozen=True)
class Trainer:
    """Runs of one length by one strategy, each in a folder of its own."""

    warm: Warm
    data: Path
    folder: Path
    strategy: Strategy
    steps: int
    undisturbed: str = field(default="undisturbed", init=False)

    def train(self, name: str) -> None:
        ranks = self.strategy.ranks
        self.warm.run(
            "train_ls.py",
            *TINY,
            "--model.batch_norm_group_size=2",
            f"--train.max_micro_batch_size={16 // ranks // MICRO_STEPS}",
            "--optim.schedule=plateau",
            "--optim.plateau_patience=1",
            "--optim.lr=0.05",
            f"--train.ema_decay={0 if self.strategy.fsdp else 0.9}",
            "--data.ledger=true",
            "--checkpoint.every_steps=1",
            "--checkpoint.keep=1000",
            f"--max_steps={self.steps}",
            f"--data.path={self.data}",
            f"--output_dir={self.folder / name}",
            ranks=ranks,
            environment=self.strategy.environment,
            forwards=self.folder / f"{name}-forwards",
        )

    def go_on_from(self, step: int) -> str:
        """Copies the undisturbed run as it was when `step` was saved, and goes on; its name."""
        name, kept = f"from-{step}", f"step-{step:08d}"
        shutil.copytree(
            self.folder / self.undisturbed,
            self.folder / name,
            ignore=lambda _, names: [n for n in names if n.startswith("step-") and n != kept],
        )
        self.train(name)
        return name

    def assert_same(self, name: str, step: int) -> None:
        """`name` has gone on from `step`; nothing in it differs from the undisturbed run."""
        ours, theirs = self.folder / name, self.folder / self.undisturbed
        for rank in range(self.strategy.ranks):
            assert (
                self._forwards(name, rank)
                == (self._forwards(self.undisturbed, rank)[step * MICRO_STEPS :])
            )
            ledger = f"ledger/rank-{rank:05d}.jsonl"
            assert (ours / ledger).read_bytes() == (theirs / ledger).read_bytes()
        assert losses(ours) == losses(theirs)
        assert validations(ours) == validations(theirs)
        last = f"checkpoints/step-{self.steps:08d}"
        assert_same_checkpoint(ours / last, theirs / last)

    def _forwards(self, name: str, rank: int) -> list[dict[str, str]]:
        forwards = forwards_of(self.folder / f"{name}-forwards" / f"{rank}.jsonl")
        strategy = self.strategy
        settles_buckets = strategy.ranks > 1 and not (strategy.zero_stage or strategy.fsdp)
        return forwards[settles_buckets:]  # the first is of weight zero, at every start


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    all_weights = sorted(path.name for path in theirs.glob("*.safetensors"))
    assert "model.safetensors" in all_weights
    for weights in all_weights:
        assert (ours / weights).read_bytes() == (theirs / weights).read_bytes()
    files = sorted(path.relative_to(theirs) for path in theirs.rglob("*.pt"))
    assert files
    for file in files:
        assert_same_tensors(load(ours / file), load(theirs / file))
    assert progress(ours) == progress(theirs)


def load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)  # ours, DeepSpeed's included


def assert_same_tensors(ours: Any, theirs: Any) -> None:
    found, expected = tree_leaves(ours), tree_leaves(theirs)
    assert len(found) == len(expected)
    assert any(isinstance(leaf, torch.Tensor) for leaf in expected)
    for leaf, other in zip(found, expected, strict=True):
        if isinstance(other, torch.Tensor):
            assert leaf.equal(other)


def progress(checkpoint: Path) -> dict:
    """All of it but the time it took."""
    values = json.loads((checkpoint / "progress.json").read_bytes())
    return {name: value for name, value in values.items() if not name.endswith("_s")}


def check(trainer: Trainer, steps: range | tuple[int, ...]) -> None:
    trainer.train(trainer.undisturbed)
    assert len({tuple(f.values()) for f in trainer._forwards(trainer.undisturbed, 0)}) == (
        trainer.steps * MICRO_STEPS
    )
    for step in steps:
        name = trainer.go_on_from(step)
        trainer.assert_same(name, step)
        shutil.rmtree(trainer.folder / name)


@pytest.mark.parametrize(
    ("strategy", "steps"),
    [(Strategy("one"), (EPOCH_STEPS, EPOCH_STEPS + 3)), (Strategy("ddp", 2), (EPOCH_STEPS + 1,))],
    ids=lambda value: getattr(value, "name", ""),
)
def test_some_steps(
    warm: Warm, demo_shards: Path, tmp_path: Path, strategy: Strategy, steps: tuple[int, ...]
) -> None:
    check(Trainer(warm, demo_shards, tmp_path, strategy, 2 * EPOCH_STEPS - 1), steps)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("strategy", "every_steps"),
    [
        (Strategy("one"), 1),
        (Strategy("ddp-2", 2), 5),
        (Strategy("zero1-2", 2, zero_stage=1), 5),
        (Strategy("zero2-2", 2, zero_stage=2), 5),
        (Strategy("ddp-4", 4), 5),
        (Strategy("fsdp2-2", 2, fsdp=True), 5),
    ],
    ids=lambda value: getattr(value, "name", f"every-{value}"),
)
def test_every_step(
    warm: Warm, demo_shards: Path, tmp_path: Path, strategy: Strategy, every_steps: int
) -> None:
    steps = 40
    check(
        Trainer(warm, demo_shards, tmp_path, strategy, steps),
        range(every_steps, steps, every_steps),
    )
