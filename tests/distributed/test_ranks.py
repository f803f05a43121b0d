"""N ranks equal one, in float64 and to the last rows: gloo processes under torchrun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from processes import TINY, launch, launch_through, losses, run, status, summary
from warm import PATIENCE_S, Warm

STEPS = 20


def options(data: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *TINY,
        "--model.dropout=0",  # drawn per rank, so that it alone may differ
        f"--data.path={data}",
        f"--output_dir={run_dir}",
        f"--max_steps={STEPS}",
        "--optim.schedule=constant",  # cosine depends on max_steps, which one test changes
        *more,
    ]


def assert_final_weights_agree(run_dir: Path, other: Path) -> None:
    ours, theirs = (
        load_file(folder / f"checkpoints/step-{STEPS:08d}/model.safetensors")
        for folder in (run_dir, other)
    )
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-10, msg=name)


def assert_losses_agree(run_dir: Path, other: Path, relative: float) -> None:
    ours, theirs = losses(run_dir), losses(other)
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    for step in ours:
        assert ours[step] == pytest.approx(theirs[step], rel=relative), step


def samples_of_steps(run_dir: Path) -> dict[int, list[str]]:
    """Keys of every global step, rank after rank: the rows of the global batch in their order."""
    keys: dict[int, list[str]] = {}
    for path in sorted((run_dir / "ledger").glob("*.jsonl")):
        for entry in map(json.loads, path.read_text().splitlines()):
            keys.setdefault(entry["step"], []).append(entry["key"])
    return keys


@pytest.fixture(scope="module")
def one_process(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run of one process, in float64 and float32."""
    folder = tmp_path_factory.mktemp("one")
    for dtype in ("float64", "float32"):
        more = [f"--train.param_dtype={dtype}", "--data.ledger=true"]
        run("train_ls.py", *options(demo_shards, folder / dtype, *more))
    return {dtype: folder / dtype for dtype in ("float64", "float32")}


def test_two_ranks_have_the_loss_curve_of_one(
    demo_shards: Path, one_process: dict[str, Path], tmp_path: Path
) -> None:
    more = ["--train.param_dtype=float64", "--data.ledger=true"]
    run("train_ls.py", *options(demo_shards, tmp_path, *more), ranks=2)
    assert_losses_agree(tmp_path, one_process["float64"], 1e-9)
    assert_final_weights_agree(tmp_path, one_process["float64"])
    assert summary(tmp_path)["world_size"] == 2
    lines = [
        json.loads(line)
        for rank in (0, 1)
        for line in (tmp_path / f"ledger/rank-{rank:05d}.jsonl").read_text().splitlines()
    ]
    keys = [line["key"] for line in lines if line["epoch"] == 0]
    assert len(keys) == len(set(keys)) == 90


def test_accumulation_and_three_ranks_equal_one(
    demo_shards: Path, one_process: dict[str, Path], tmp_path: Path
) -> None:
    more = ["--train.param_dtype=float64", "--train.max_micro_batch_size=4"]
    run("train_ls.py", *options(demo_shards, tmp_path, *more), ranks=3)
    assert_losses_agree(tmp_path, one_process["float64"], 1e-9)
    assert_final_weights_agree(tmp_path, one_process["float64"])


def test_bf16_learns(demo_shards: Path, one_process: dict[str, Path], tmp_path: Path) -> None:
    run("train_ls.py", *options(demo_shards, tmp_path, "--train.precision=bf16"))
    ours, reference = losses(tmp_path), losses(one_process["float32"])
    assert ours[STEPS] == pytest.approx(reference[STEPS], rel=0.1)
    assert ours[STEPS] < ours[1]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
def test_grown_and_shrunk_run_keeps_its_batches(
    warm: Warm,
    demo_shards: Path,
    one_process: dict[str, Path],
    tmp_path: Path,
    dtype: str,
    tolerance: float,
) -> None:
    for ranks, last_step in ((2, 8), (1, 14), (2, STEPS)):  # 6 steps an epoch
        more = [f"--train.param_dtype={dtype}", f"--max_steps={last_step}", "--data.ledger=true"]
        warm.run("train_ls.py", *options(demo_shards, tmp_path, *more), ranks=ranks)
    assert_losses_agree(tmp_path, one_process[dtype], tolerance)
    assert samples_of_steps(tmp_path) == samples_of_steps(one_process[dtype])
    lines = (tmp_path / "ledger/rank-00001.jsonl").read_text().splitlines()
    steps = {json.loads(line)["step"] for line in lines}
    assert steps == {*range(1, 9), *range(15, STEPS + 1)}


def test_what_is_wrong_is_said_once(demo_shards: Path, tmp_path: Path) -> None:
    refused = options(demo_shards, tmp_path, "--resume=/nowhere/step-00000001")
    process = launch("train_ls.py", *refused, ranks=2)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert status(tmp_path)["state"] == "failed"
    assert output.count("error: ") == 1, output
    assert "/nowhere" in status(tmp_path)["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("asked_for", [1, 2])
def test_accelerate_on_cpu_that_starts_fewer_processes_than_asked_for_is_refused(
    demo_shards: Path, tmp_path: Path, asked_for: int
) -> None:
    through = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    through += [f"--num_processes={asked_for}"]
    command = ("train_ls.py", *options(demo_shards, tmp_path, "--max_steps=1"))
    output, _ = (process := launch_through(through, *command)).communicate(timeout=PATIENCE_S)
    assert (process.returncode == 0) == (asked_for == 1), output
    assert ("error: `accelerate launch` starts one process on CPU" in output) == (asked_for > 1)
    assert ("torchrun --nproc_per_node" in output) == (asked_for > 1)
