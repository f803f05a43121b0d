"""Runs that compute on the tags that are there: the same training, and as exact to resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_hostile_checkpoints import hash_anew

from magneto_dist.config_io import load_config
from magneto_dist.data.shards import Dataset
from magneto_dist.training.resume import checkpoint_to_resume
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


def test_a_run_from_before_the_loss_was_mended_is_told_so(
    demo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = options(demo_shards, tmp_path / "run", "--tags.trim_padding=true", "--max_steps=1")
    run("train_ls.py", *packed)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    config, dataset = load_config(checkpoint / "config.yaml"), Dataset.open(str(demo_shards))
    assert checkpoint_to_resume(config, dataset) == checkpoint
    assert capsys.readouterr().err == ""
    recorded = (checkpoint / "config.yaml").read_text()
    older = recorded.replace("  mapping: attention\n", "")
    assert older != recorded
    (checkpoint / "config.yaml").write_text(older)
    hash_anew(checkpoint, "config.yaml")
    assert checkpoint_to_resume(config, dataset) == checkpoint
    (line,) = capsys.readouterr().err.splitlines()
    assert "step-00000001 was trained when --tags.trim_padding true" in line
    (checkpoint / "config.yaml").write_text(
        older.replace("trim_padding: true", "trim_padding: false")
    )
    hash_anew(checkpoint, "config.yaml")
    plain = replace(config, tags=replace(config.tags, trim_padding=False))
    assert checkpoint_to_resume(plain, dataset) == checkpoint
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_sharded_weights_are_used_by_their_modules(demo_shards: Path, tmp_path: Path) -> None:
    """FSDP2 and ZeRO-3 train on trimmed lists; nothing is packed there."""
    for name in ("single", "fsdp2", "zero3"):
        train(name, demo_shards, tmp_path / name, "--tags.trim_padding=true", steps=4)
    for name in ("fsdp2", "zero3"):
        ours, theirs = losses(tmp_path / name), losses(tmp_path / "single")
        assert ours == pytest.approx(theirs, rel=1e-4)
