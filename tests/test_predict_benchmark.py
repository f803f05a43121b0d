"""The benchmark of kills, in small, on two processes; in full where time is no matter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from processes import REPOSITORY


def measured(*options: str, timeout_s: float) -> dict:
    output = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / "predict_kills.py"), *options],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout_s,
    ).stdout
    return json.loads(output[output.index("{\n") :])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("items", "ranks", "block_items"), [(1001, 2, 20), (100_000, 1, 1000)])
def test_each_row_comes_once_through_kills_in_memory_that_does_not_grow(items, ranks, block_items):
    options = (f"--items={items}", f"--ranks={ranks}", f"--block_items={block_items}")
    found = measured(*options, timeout_s=3000)
    assert found["each_row_once"]
    assert found["rows_by_times_in_output"] == {"1": items}
    assert found["failed"] == found["failed_expected"] == -(-items // 500)
    assert all(0 < done < items for done in found["killed_with_rows_done"])
    if items == 100_000:
        first, *_, last = [mb for _, mb in sorted(found["memory_MB_of_the_last_run"].items())][1:]
        assert last < 1.05 * first
