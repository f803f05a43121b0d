"""Whole runs whose frozen stages compute in 16 bits: resumed, evaluated, on several ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from magneto_dist.config_io import load_config
from magneto_dist.hub import load_exported
from magneto_dist.model.folding import fast_precision
from magneto_dist.trained_run import load_run
from processes import TINY, losses, run, summary
from strategies import train

STEPS = 8
BF16 = ["--model.frozen_stages=1", "--model.frozen_precision=bf16"]


def options(data: Path, run_dir: Path, *more: str) -> list[str]:
    given = [
        "--optim.schedule=constant",
        "--train.eval_every_epochs=9",
        f"--data.path={data}",
        f"--output_dir={run_dir}",
    ]
    return [*TINY, *BF16, *given, f"--max_steps={STEPS}", *more]


def test_a_resumed_run_is_the_uninterrupted_one_and_is_evaluated_as_it_was_trained(
    demo_shards: Path, tmp_path: Path
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run("train_ls.py", *options(demo_shards, whole))
    run("train_ls.py", *options(demo_shards, halves, "--max_steps=3"))
    run("train_ls.py", *options(demo_shards, halves, "--model.frozen_precision=auto"))
    assert losses(halves) == losses(whole)
    weights = [
        load_file(d / f"checkpoints/step-{STEPS:08}/model.safetensors") for d in (whole, halves)
    ]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    assert load_config(halves / "config.yaml").model.frozen_precision == "bf16"

    # Not what float32 trains.
    run("train_ls.py", *options(demo_shards, tmp_path / "exact", "--model.frozen_precision=no"))
    assert losses(tmp_path / "exact")[1] == pytest.approx(losses(whole)[1], rel=1e-2)
    assert losses(tmp_path / "exact")[1] != losses(whole)[1]

    model = load_run(whole).model
    assert model.image_stream.backbone.frozen_dtype == torch.bfloat16  # type: ignore[union-attr]
    out = tmp_path / "evaluation.json"
    run("evaluate.py", f"--run={whole}", f"--out={out}")
    evaluated = json.loads(out.read_text())
    assert evaluated["validation"]["loss"] == summary(whole)["validation"]["loss"]


def test_auto_is_recorded_as_what_it_means_here(demo_shards: Path, tmp_path: Path) -> None:
    run("train_ls.py", *options(demo_shards, tmp_path, "--model.frozen_precision=auto"))
    assert load_config(tmp_path / "config.yaml").model.frozen_precision == fast_precision()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "tolerance"),
    # ZeRO-3 runs the stages as they are, which rounds in other places.
    [("ddp", 1e-3), ("fsdp2", 1e-3), ("zero2", 1e-3), ("zero3", 1e-2)],
)
def test_ranks_do_as_one_process_does(
    demo_shards: Path, tmp_path: Path, strategy: str, tolerance: float
) -> None:
    for name in ("single", strategy):
        train(name, demo_shards, tmp_path / name, *BF16, steps=4)
    ours, theirs = losses(tmp_path / strategy), losses(tmp_path / "single")
    assert ours == pytest.approx(theirs, rel=tolerance)


@pytest.mark.slow
def test_it_compiles(demo_shards: Path, tmp_path: Path) -> None:
    for name, compiles in (("eager", "false"), ("compiled", "true")):
        run("train_ls.py", *options(demo_shards, tmp_path / name, f"--train.compile={compiles}",
                                    "--max_steps=2", "--model.dropout=0"))  # fmt: skip
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-2)


@pytest.mark.slow
def test_it_is_exported(demo_shards: Path, tmp_path: Path) -> None:
    """As it was trained for torch; in float32 for ONNX Runtime."""
    run("train_ls.py", *options(demo_shards, tmp_path / "run", "--max_steps=1"))
    run("export.py", f"--run={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", "--onnx")
    ours, theirs = load_exported(tmp_path / "out"), load_run(tmp_path / "run")
    assert ours.config.model.frozen_precision == "bf16"
    ids = torch.arange(10).reshape(2, 5)
    mask = ids < 8
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        left, right = ours.model(ids, mask, pixels), theirs.model(ids, mask, pixels)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
