"""What holds for every test, and a tiny data set."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from processes import TINY, end_what_is_left, run
from warm import Warm, end_shared, shared

# Before torch is imported: several test processes share the cores, and threads that wait spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Background jobs of a shell ignore Ctrl-C, and so would all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Shared runners stall now and then: how long an example takes is no property of the code.
settings.register_profile("default", deadline=None)
settings.load_profile("default")


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: many tests wait for processes that they have started."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.fixture(autouse=True)
def _end_what_is_left() -> Iterator[None]:
    yield
    end_what_is_left()


@pytest.fixture(scope="session", autouse=True)
def _end_shared() -> Iterator[None]:
    yield
    end_shared()


@pytest.fixture(scope="session")
def demo_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo data set with 90 training and 22 validation items."""
    from magneto_dist.data.sources import demo

    folder = tmp_path_factory.mktemp("demo")
    demo.build(folder, items=90, num_processes=1)
    return folder


@pytest.fixture(scope="session")
def warm() -> Warm:
    """A process from which launchers fork: for tests that start many."""
    return shared()


@pytest.fixture(scope="session")
def run_dir(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on them, never moved."""
    folder = tmp_path_factory.mktemp("runs") / "geübt"
    options = [*TINY, f"--data.path={demo_shards}", f"--output_dir={folder}", "--max_steps=4"]
    run("train_ls.py", *options)
    return folder
