"""Every way of training gives what one process gives, and the losses that it has always given."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from processes import losses, run, status
from strategies import (
    ELSEWHERE,
    GOLDEN,
    STEPS,
    STRATEGIES,
    assert_losses_have_not_moved,
    known_losses,
    train,
)
from test_ranks import assert_final_weights_agree, assert_losses_agree, options


@pytest.fixture(scope="module")
def run_of(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run folder of a strategy, which is started once, whatever process tests it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "strategies"
    folder.mkdir(exist_ok=True)

    def run_dir(strategy: str) -> Path:
        with FileLock(folder / f"{strategy}.lock"):
            if not (folder / strategy / "summary.json").exists():
                steps = STEPS if strategy in GOLDEN else 20
                train(strategy, demo_shards, folder / strategy, steps=steps)
        return folder / strategy

    return run_dir


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / f"checkpoints/step-{step:08d}/model.safetensors")


@pytest.mark.parametrize(
    "strategy",
    [
        # The launch alone takes long.
        pytest.param(s, marks=() if s in GOLDEN else pytest.mark.slow)
        for s in STRATEGIES[1:]
    ],
)
def test_two_ranks_that_accumulate_equal_one_process(
    run_of: Callable[[str], Path], strategy: str
) -> None:
    one, two = run_of("single"), run_of(strategy)
    assert status(two)["state"] == "done"
    state, expected = weights(two, 5), weights(one, 5)
    assert state.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(state[name], expected[name], rtol=0, atol=1e-6, msg=name)
    ours, reference = losses(two), losses(one)
    for step in range(1, 21):
        assert ours[step] == pytest.approx(reference[step], rel=1e-4), step
    moved = weights(one, 20)["tag_head.weight"] - weights(one, 5)["tag_head.weight"]
    assert moved.abs().max() > 1e-4  # so that agreement to 1e-6 says something


@pytest.mark.slow
def test_bf16_of_deepspeed_is_that_of_autocast(
    run_of: Callable[[str], Path], demo_shards: Path, tmp_path: Path
) -> None:
    bf16 = "--train.precision=bf16"
    for strategy in ("single", "zero2"):
        train(strategy, demo_shards, tmp_path / strategy, bf16, steps=5)
    state, expected = weights(tmp_path / "zero2", 5), weights(tmp_path / "single", 5)
    float32 = weights(run_of("single"), 5)
    for name in ("tag_head.weight", "image_head.weight"):
        assert state[name].dtype == torch.float32
        # Alike, and nothing like as near to float32.
        rounding = (expected[name] - float32[name]).abs().max()
        assert (state[name] - expected[name]).abs().max() < rounding, name


@pytest.mark.parametrize("strategy", GOLDEN)
def test_losses_have_not_moved(run_of: Callable[[str], Path], strategy: str) -> None:
    known, exact = known_losses(strategy)
    assert_losses_have_not_moved(list(losses(run_of(strategy)).values()), known, exact=exact)


@pytest.mark.parametrize("strategy", GOLDEN)
def test_a_loss_that_moves_is_noticed(strategy: str) -> None:
    known, _ = known_losses(strategy)
    assert len(known) == STEPS
    assert sum(known[-10:]) < sum(known[:10])
    assert_losses_have_not_moved(known, known, exact=True)
    last_bit = [*known[:-1], math.nextafter(known[-1], 0)]
    assert_losses_have_not_moved(last_bit, known, exact=False)
    too_far = [known[0] * (1 + 1.1 * ELSEWHERE), *known[1:]]
    for ours, exact in ((last_bit, True), (too_far, False)):
        with pytest.raises(AssertionError, match=r"strategies\.py"):
            assert_losses_have_not_moved(ours, known, exact=exact)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_no_weights_in_parts_are_saved_that_are_not_finite(
    demo_shards: Path, tmp_path: Path, strategy: str
) -> None:
    too_fast = ["--optim.lr=1e38", "--optim.weight_decay=1e10"]
    with pytest.raises(AssertionError, match="left weights not finite"):
        train(strategy, demo_shards, tmp_path / "run", *too_fast, steps=1)
    assert status(tmp_path / "run")["state"] == "failed"
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [4, 8, 12])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_and_micro_batches_equal_one_process_in_float64(
    demo_shards: Path, tmp_path: Path, ranks: int, micro_batch: int
) -> None:
    """At 12 rows a micro-batch the last one of every step is not full either."""
    double = "--train.param_dtype=float64"
    run("train_ls.py", *options(demo_shards, tmp_path / "one", double))
    more = [double, f"--train.max_micro_batch_size={micro_batch}"]
    run("train_ls.py", *options(demo_shards, tmp_path / "many", *more), ranks=ranks)
    assert_losses_agree(tmp_path / "many", tmp_path / "one", 1e-9)
    assert_final_weights_agree(tmp_path / "many", tmp_path / "one")
