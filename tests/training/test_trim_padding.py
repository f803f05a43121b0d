"""Runs that compute on the tags that are there: the same training, and as exact to resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from processes import TINY, losses, run
from strategies import train

STEPS = 7  # an epoch of 6 and one more


def options(data: Path, run_dir: Path, *more: str) -> list[str]:
    given = [f"--data.path={data}", f"--output_dir={run_dir}", f"--max_steps={STEPS}"]
    return [*TINY, "--optim.schedule=constant", "--train.eval_every_epochs=9", *given, *more]


def test_trimmed_and_packed_lists_train_as_padded_ones_do(
    demo_shards: Path, tmp_path: Path
) -> None:
    more = ["--model.dropout=0", "--train.param_dtype=float64"]
    run("train_ls.py", *options(demo_shards, tmp_path / "padded", *more))
    more.append("--tags.trim_padding=true")
    run("train_ls.py", *options(demo_shards, tmp_path / "packed", *more))
    run("train_ls.py", *options(demo_shards, tmp_path / "ranks", *more), ranks=2)
    padded = losses(tmp_path / "padded")
    assert losses(tmp_path / "packed") == pytest.approx(padded, rel=1e-9)
    assert losses(tmp_path / "ranks") == pytest.approx(padded, rel=1e-9)


def test_a_resumed_run_is_the_uninterrupted_one(demo_shards: Path, tmp_path: Path) -> None:
    packed = "--tags.trim_padding=true"
    run("train_ls.py", *options(demo_shards, tmp_path / "whole", packed))
    run("train_ls.py", *options(demo_shards, tmp_path / "halves", packed, "--max_steps=3"))
    run("train_ls.py", *options(demo_shards, tmp_path / "halves", packed))
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_sharded_weights_are_used_by_their_modules(demo_shards: Path, tmp_path: Path) -> None:
    """FSDP2 and ZeRO-3 train on trimmed lists; nothing is packed there."""
    for name in ("single", "fsdp2", "zero3"):
        train(name, demo_shards, tmp_path / name, "--tags.trim_padding=true", steps=4)
    for name in ("fsdp2", "zero3"):
        ours, theirs = losses(tmp_path / name), losses(tmp_path / "single")
        assert ours == pytest.approx(theirs, rel=1e-4)
