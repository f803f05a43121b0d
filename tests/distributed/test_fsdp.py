"""FSDP2 on gloo ranks: it computes what one process does, and its checkpoints are anybody's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from processes import losses
from test_ranks import assert_final_weights_agree, assert_losses_agree, options
from warm import Warm

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DOUBLE = "--train.param_dtype=float64"


def test_runs_go_on_with_fsdp2_and_without(warm: Warm, demo_shards: Path, tmp_path: Path) -> None:
    """A small model does: what is special to backbones is tested with the other strategies."""
    last, more = 3, [DOUBLE, "--model.kind=tf-t", "--optim.clip_norm=0.5"]
    warm.run("train_ls.py", *options(demo_shards, tmp_path / "one", *more, f"--max_steps={last}"))
    keeps = {**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "false"}
    for step, ranks, environment in ((1, 2, FSDP2), (2, 1, {}), (last, 2, keeps)):
        given = options(demo_shards, tmp_path / "many", *more, f"--max_steps={step}")
        warm.run("train_ls.py", *given, ranks=ranks, environment=environment)
    ours, theirs = losses(tmp_path / "many"), losses(tmp_path / "one")
    assert list(ours) == list(theirs) == list(range(1, last + 1))
    assert ours == pytest.approx(theirs, rel=1e-12)
    momentum = [
        tree_leaves(torch.load(tmp_path / name / f"checkpoints/step-{last:08d}/optimizer.pt"))
        for name in ("many", "one")
    ]
    torch.testing.assert_close(*momentum, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_it_equals_one_process_in_float64(
    warm: Warm, demo_shards: Path, tmp_path: Path, ranks: int
) -> None:
    """With all that is special to it: frozen weights, accumulation, clipping, recomputation."""
    more = [DOUBLE, "--optim.clip_norm=0.5", "--model.frozen_stages=1"]
    warm.run("train_ls.py", *options(demo_shards, tmp_path / "one", *more))
    more += ["--train.max_micro_batch_size=4", "--train.activation_checkpointing=true"]
    given = options(demo_shards, tmp_path / "many", *more)
    warm.run("train_ls.py", *given, ranks=ranks, environment=FSDP2)
    assert_losses_agree(tmp_path / "many", tmp_path / "one", 1e-9)
    assert_final_weights_agree(tmp_path / "many", tmp_path / "one")


@pytest.mark.slow
def test_it_compiles(warm: Warm, demo_shards: Path, tmp_path: Path) -> None:
    more = ["--model.kind=tf-t", "--max_steps=3"]
    warm.run("train_ls.py", *options(demo_shards, tmp_path / "one", *more))
    more += ["--train.compile=true", "--train.max_micro_batch_size=4"]
    given = options(demo_shards, tmp_path / "many", *more)
    warm.run("train_ls.py", *given, ranks=2, environment=FSDP2)
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_parts_and_an_overflow_on_one_rank(warm: Warm, tmp_path: Path) -> None:
    worker = Path(__file__).with_name("fsdp_worker.py")
    warm.run(str(worker), str(tmp_path), ranks=2, environment=FSDP2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_bytes()) for rank in range(2))
    assert first["whole"] == second["whole"] == ["image_stream.backbone"]
    assert 0.45 < first["held"] / first["all"] < 0.55
    # In one step a gradient was infinite, in the part of one rank alone.
    assert first["skipped"] == second["skipped"] == [False, True, False]
    assert first["scale"] == second["scale"] == 4.0
    assert first["moved"] == second["moved"] == [True, False, True]
