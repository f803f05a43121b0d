"""What holds for every test, and a tiny data set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported: several test processes share the cores, and threads that wait spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Shared runners stall now and then: how long an example takes is no property of the code.
settings.register_profile("default", deadline=None)
settings.load_profile("default")


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: many tests wait for processes that they have started."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.fixture(scope="session")
def demo_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo data set with 90 training and 22 validation items."""
    from magneto_dist.data.sources import demo

    folder = tmp_path_factory.mktemp("demo")
    demo.build(folder, items=90, num_processes=1)
    return folder
