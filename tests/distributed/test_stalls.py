"""A rank that does not come: the others name it within a bound, end, and the run goes on."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from magneto_dist.errors import EXIT_STALLED
from processes import TINY, launch_through, losses, status
from processes import wait_for_step as wait_for_logged_step
from test_preflight import serving
from warm import PATIENCE_S, Forked, Warm, free_port, places

STEPS, SAVE_STEPS = 14, 4
TIMEOUT_S = 3.0
BOUND_S = 60  # on a machine that is busy with other tests


def options(data: Path | str, run_dir: Path, *more: str) -> list[str]:
    every = [f"--checkpoint.every_steps={SAVE_STEPS}", f"--max_steps={STEPS}"]
    every += [f"--train.collective_timeout_s={TIMEOUT_S}", "--optim.schedule=constant"]
    return [*TINY, *every, f"--data.path={data}", f"--output_dir={run_dir}", *more]


ENDLESS = ("--train.epochs=99999", "--max_steps=999999")


def start(warm: Warm, *commands: list[str]) -> list[Forked]:
    pairs = zip(commands, places(len(commands)), strict=True)
    return [warm.start("train_ls.py", *command, environment=place) for command, place in pairs]


def wait_for_step(started: list[Forked], run_dir: Path, step: int) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    path = run_dir / "metrics.jsonl"
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert not started[0].has_ended, started[0].output
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def named(started: list[Forked]) -> str:
    """The line that one of them, whoever found it, has said."""
    lines = "".join(each.output for each in started).splitlines()
    (line,) = (line for line in lines if line.startswith("error: "))
    assert f"(--train.collective_timeout_s {TIMEOUT_S:g})" in line
    return line


@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_and_the_run_goes_on(
    warm: Warm, demo_shards: Path, tmp_path: Path, stopped: int
) -> None:
    command = options(demo_shards, tmp_path)
    started = start(warm, *2 * [[*command, *ENDLESS]])
    wait_for_step(started, tmp_path, 6)
    started[stopped].send_signal(signal.SIGSTOP)
    stopped_at_s = time.monotonic()
    other = 1 - stopped
    assert warm.wait(started[other], BOUND_S) == EXIT_STALLED, started[other].output
    assert TIMEOUT_S / 2 < time.monotonic() - stopped_at_s < BOUND_S
    assert f"rank {stopped} of 2 (at step " in named(started)
    if stopped == 1:
        assert status(tmp_path)["state"] == "failed"
        assert "rank 1 of 2 (at step " in status(tmp_path)["reason"]
    assert not started[stopped].has_ended
    started[stopped].send_signal(signal.SIGKILL)  # as torchrun does when it starts all anew
    assert warm.wait(started[stopped]) == -signal.SIGKILL
    last = status(tmp_path)["step"] + 3
    warm.run("train_ls.py", *command, *ENDLESS, f"--max_steps={last}", ranks=2)
    assert status(tmp_path) == {"state": "done", "step": last, "reason": ""}
    assert list(losses(tmp_path)) == list(range(1, last + 1))


@pytest.mark.slow
def test_a_rank_that_hangs_in_its_data_is_named_and_ends_too(
    warm: Warm, demo_shards: Path, tmp_path: Path
) -> None:
    """It lives, and says so; its data set is the same, but its server sends no training shard."""
    with serving(demo_shards, hangs=lambda path: "train-" in path and ".tar" in path) as url:
        cache = f"--data.cache_dir={tmp_path / 'cache'}"
        run_dir = tmp_path / "run"
        ranks = start(warm, options(demo_shards, run_dir), options(url, run_dir, cache))
        assert [warm.wait(each, BOUND_S) for each in ranks] == [EXIT_STALLED] * 2, ranks[0].output
    said = "rank 1 of 2 (at step 1, data) did not come any further for 9 s"
    assert said in named(ranks)
    assert said in status(run_dir)["reason"]


@pytest.mark.slow
def test_a_job_that_is_stopped_and_continued_as_a_whole_goes_on(
    warm: Warm, demo_shards: Path, tmp_path: Path
) -> None:
    started = start(warm, *2 * [options(demo_shards, tmp_path, "--max_steps=200")])
    wait_for_step(started, tmp_path, 6)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for each in started:
            each.send_signal(number)
        time.sleep(2.5 * TIMEOUT_S if number == signal.SIGSTOP else 0)
    assert [warm.wait(each, BOUND_S) for each in started] == [0, 0], started[0].output
    assert status(tmp_path)["state"] == "done"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_starts_all_anew_when_a_rank_is_stopped(demo_shards: Path, tmp_path: Path) -> None:
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *meeting]
    variables = ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=2"]
    through = ["env", *variables, *torchrun, "--max-restarts=1", "--monitor-interval=0.2"]
    command = options(demo_shards, tmp_path, "--max_steps=40", "--train.epochs=99")
    process = launch_through(through, "train_ls.py", *command)
    try:
        wait_for_logged_step(process, tmp_path, 6)
        children = psutil.Process(process.pid).children()
        next(each for each in children if each.environ().get("RANK") == "1").suspend()
        output, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert output.count("rank 1 of 2 (at step ") == 1
    assert status(tmp_path)["state"] == "done"
    assert list(losses(tmp_path)) == list(range(1, 41))
