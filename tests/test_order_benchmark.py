"""The benchmark of the order, in small: what it says of itself must come out as it says."""

from __future__ import annotations

import json
import subprocess
import sys

from processes import REPOSITORY


def test_order_benchmark_runs_and_its_counts_are_right():
    options = ["--items=5000", "--shard=300", "--batch=50", "--ranks=4", "--rounds=3"]
    output = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / "order.py"), *options],
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    ).stdout
    cost, end = json.JSONDecoder().raw_decode(output)
    resume, _ = json.JSONDecoder().raw_decode(output[end:].lstrip())
    assert cost["samples"] == 5000
    assert cost["every_id_once"]
    assert cost["state_bytes"] < 100
    assert [line["ranks"] for line in resume] == [1, 4]
    assert [line["samples_of_this_rank"] for line in resume] == [50, 16]
    assert all(0 < line["shards_of_this_rank"] <= 17 for line in resume)
    assert "full permutation" in output
