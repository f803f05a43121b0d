"""Ranks that do not agree, or one that cannot begin: all end at once, and one says why.

Both ranks are of two nodes where the place says so: each then looks after a disk of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from magneto_dist.data.sources import demo
from processes import TINY, status
from warm import Warm, places

BOUND_S = 60  # on a machine that is busy with other tests; two seconds or three on a free one


def options(data: Path | str, run_dir: Path, *more: str) -> list[str]:
    return [*TINY, "--max_steps=4", f"--data.path={data}", f"--output_dir={run_dir}", *more]


@pytest.fixture(scope="module")
def other_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with another number of items and the same vocabulary."""
    folder = tmp_path_factory.mktemp("other")
    demo.build(folder, items=40, num_processes=1)
    return folder


def refused(
    warm: Warm,
    usual: list[str],
    of_rank_1: list[str],
    environment: Mapping[str, str] | None = None,
) -> str:
    """What the main process says where rank 1 has other options or variables; all must end."""
    environments = [{}, environment or {}]
    started = [
        warm.start("train_ls.py", *command, environment={**place, **more})
        for command, place, more in zip((usual, of_rank_1), places(2), environments, strict=True)
    ]
    started_at_s = time.monotonic()
    codes = [warm.wait(each, BOUND_S) for each in started]
    assert codes == [2, 2], "\n".join(each.output for each in started)
    assert time.monotonic() - started_at_s < BOUND_S
    said, silent = (each.output for each in started)
    assert said.count("error: ") == 1, said
    assert "error: " not in silent
    assert "Traceback" not in said + silent
    return next(line for line in said.splitlines() if line.startswith("error: "))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--seed=1", "the ranks differ in --seed: 0 on rank 0; 1 on rank 1"),
        pytest.param(
            "--train.max_micro_batch_size=4",
            "the ranks differ in --train.max_micro_batch_size: 32 on rank 0; 4 on rank 1"
            " (2 things differ): start all ranks with the same command line",
            marks=pytest.mark.slow,
        ),
        ("--data.path=/nowhere", "rank 1 of 2: /nowhere: no data set there"),
    ],
)
def test_a_rank_with_another_setting_stops_all(
    warm: Warm, demo_shards: Path, tmp_path: Path, option: str, said: str
) -> None:
    usual = options(demo_shards, tmp_path)
    line = refused(warm, usual, [*usual, option])
    assert said in line
    assert status(tmp_path) == {"state": "failed", "step": 0, "reason": line[len("error: ") :]}
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_rank_with_other_data_stops_all(
    warm: Warm, demo_shards: Path, other_shards: Path, tmp_path: Path
) -> None:
    line = refused(warm, options(demo_shards, tmp_path), options(other_shards, tmp_path))
    assert "the ranks differ in the training data: " in line
    for data, items, rank in ((demo_shards, 90, 0), (other_shards, 40, 1)):
        assert f" ({items} items in {data}) on rank {rank}" in line


@pytest.mark.slow
def test_a_rank_with_the_same_data_elsewhere_trains(
    warm: Warm, demo_shards: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(demo_shards, elsewhere)
    started = [
        warm.start("train_ls.py", *options(data, tmp_path / "run"), environment=place)
        for data, place in zip((demo_shards, elsewhere), places(2), strict=True)
    ]
    assert [warm.wait(each, BOUND_S) for each in started] == [0, 0], started[0].output


@pytest.mark.slow
def test_a_rank_with_another_run_folder_stops_all(
    warm: Warm, demo_shards: Path, tmp_path: Path
) -> None:
    usual, other = (options(demo_shards, tmp_path / name) for name in ("run", "other"))
    line = refused(warm, usual, other)
    assert f"rank 1 of 2: --output_dir {tmp_path / 'other'} is not the folder that rank 0" in line


def test_a_rank_that_may_not_join_stops_all_before_they_are_a_group(
    warm: Warm, demo_shards: Path, tmp_path: Path
) -> None:
    usual = options(demo_shards, tmp_path)
    line = refused(warm, usual, usual, {"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert "rank 1 of 2: accelerate was launched with mixed precision bf16" in line


@pytest.mark.slow
def test_a_rank_with_another_strategy_stops_all(
    warm: Warm, demo_shards: Path, tmp_path: Path
) -> None:
    usual = options(demo_shards, tmp_path)
    fsdp2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    line = refused(warm, usual, usual, fsdp2)
    assert "the ranks differ in the strategy: no FSDP2, no DeepSpeed on rank 0; FSDP2 on r" in line


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[None]:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a file system of its own needs root and mount")
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system may not be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def serving(folder: Path, hangs: Callable[[str], bool] = lambda path: False) -> Iterator[str]:
    """The URL of a folder; for files that it `hangs` at the server never sends what they hold."""
    ended = threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if hangs(self.path):
                ended.wait()
            else:
                super().do_GET()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_node_whose_disk_is_too_small_for_its_cache_stops_all(
    warm: Warm, demo_shards: Path, tmp_path: Path
) -> None:
    for name in ("large", "small"):
        (tmp_path / name).mkdir()
    second_node = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with serving(demo_shards) as url, small_disk(tmp_path / "small", 64 * 1024):
        usual = options(url, tmp_path / "run", f"--data.cache_dir={tmp_path / 'large'}")
        other = [*usual, f"--data.cache_dir={tmp_path / 'small'}"]
        line = refused(warm, usual, other, second_node)
        assert "rank 1 of 2: the cache of shards (--data.cache_dir;" in line
        assert f"GB in {tmp_path / 'small'}, where 0.00 GB are free" in line


@pytest.mark.slow
def test_a_run_folder_without_room_for_a_checkpoint_stops_all(
    warm: Warm, demo_shards: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path, 256 * 1024):
        usual = options(demo_shards, tmp_path)
        line = refused(warm, usual, usual)
        assert "a checkpoint (weights and momentum) needs " in line
        assert status(tmp_path)["state"] == "failed"
