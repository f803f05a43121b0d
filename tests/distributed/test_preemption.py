"""Signals to any process of a job, and the death of any: everything is saved, nothing is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from magneto_dist.training.checkpoint import find_damage
from processes import TINY, launch_through, losses, status, wait_for_step
from warm import PATIENCE_S, Warm, free_port, places

STEPS, SAVE_STEPS = 14, 4
BOUND_S = 60  # on a machine that is busy with other tests; a second or two on a free one


def options(data: Path, run_dir: Path, *more: str) -> list[str]:
    every = [f"--checkpoint.every_steps={SAVE_STEPS}", f"--max_steps={STEPS}"]
    return [*TINY, *every, f"--data.path={data}", f"--output_dir={run_dir}", *more]


@pytest.fixture(scope="module")
def undisturbed(warm: Warm, demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    warm.run("train_ls.py", *options(demo_shards, run_dir), ranks=2)
    return run_dir


def assert_same_run(run_dir: Path, other: Path) -> None:
    assert status(run_dir)["state"] == "done"
    assert losses(run_dir) == losses(other)
    name = f"checkpoints/step-{STEPS:08d}/model.safetensors"
    ours, theirs = load_file(run_dir / name), load_file(other / name)
    assert all(ours[key].equal(theirs[key]) for key in theirs)


def assert_saved(run_dir: Path) -> None:
    """Stopped by a signal, with no completed step lost."""
    stopped = status(run_dir)
    assert stopped["state"] == "preempted"
    assert stopped["step"] == max(losses(run_dir))
    assert find_damage(run_dir / f"checkpoints/step-{stopped['step']:08d}") is None


def torchrun(*flags: str) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    return [*command, f"--master_port={free_port()}", *flags]


def rank(process: subprocess.Popen[str], number: int) -> psutil.Process:
    """The process of a rank under a process launcher."""
    children = psutil.Process(process.pid).children()
    return next(child for child in children if child.environ().get("RANK") == str(number))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_any_rank_stops_all_at_the_same_step(
    warm: Warm, demo_shards: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = ("train_ls.py", *options(demo_shards, tmp_path))
    ranks = [warm.start(*command, environment=place) for place in places(2)]
    wait_for_line(tmp_path / "metrics.jsonl", '"step": 5,')
    ranks[1].send_signal(number)
    assert [warm.wait(started, BOUND_S) for started in ranks] == [75, 75], ranks[1].output
    assert f"{number.name}: saving" in ranks[1].output
    assert f"{number.name}: saving" not in ranks[0].output
    assert_saved(tmp_path)
    warm.run(*command, ranks=2)
    assert_same_run(tmp_path, undisturbed)


def wait_for_line(path: Path, content: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not (path.exists() and content in path.read_text()):
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


@pytest.mark.slow
def test_a_signal_to_torchrun_and_every_loader_process_saves(
    warm: Warm, demo_shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """What a scheduler does that signals all processes of a job."""
    command = options(demo_shards, tmp_path, "--data.num_workers=1")
    process = launch_through(torchrun(), "train_ls.py", *command)
    wait_for_step(process, tmp_path, 2)
    for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]:
        each.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=BOUND_S)
    assert process.returncode != 0, output
    assert_saved(tmp_path)
    assert 2 < status(tmp_path)["step"] < STEPS
    warm.run("train_ls.py", *options(demo_shards, tmp_path), ranks=2)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_torchrun_restarts_when_a_rank_is_killed(
    demo_shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    through = torchrun(*meeting, "--max-restarts=1", "--monitor-interval=0.2")
    # Else the new processes find addresses of the old ones, where these do not start as fast.
    through = ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", *through]
    process = launch_through(through, "train_ls.py", *options(demo_shards, tmp_path))
    wait_for_step(process, tmp_path, 6)
    rank(process, 1).kill()
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    assert_same_run(tmp_path, undisturbed)


def test_nothing_outlives_a_killed_torchrun_and_the_next_launch_goes_on(
    warm: Warm, demo_shards: Path, tmp_path: Path
) -> None:
    # Left alone it would train for hours.
    endless = ("--train.epochs=99999", "--max_steps=999999", "--optim.schedule=constant")
    command = options(demo_shards, tmp_path, "--data.num_workers=1", *endless)
    process = launch_through(torchrun(), "train_ls.py", *command)
    wait_for_step(process, tmp_path, 5)
    family = psutil.Process(process.pid).children(recursive=True)
    # two ranks, each with a fork server, a loader process and what keeps track of shared memory
    assert len(family) >= 8
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=BOUND_S)
    left = [each.cmdline() for each in alive]
    for each in alive:
        each.kill()
    process.communicate()
    assert not left
    assert_saved(tmp_path)
    last = status(tmp_path)["step"] + 2
    more = [*endless, f"--max_steps={last}"]
    warm.run("train_ls.py", *options(demo_shards, tmp_path, *more), ranks=2)
    assert list(losses(tmp_path)) == list(range(1, last + 1))
