"""Commands that run in slices: never two at a time, whatever they start, and none is left."""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import pairwise

import psutil
import pytest

from magneto_dist.errors import InputError
from slices import run_in_slices

# Notes when it and a process of another session that it starts were awake, in steps of 10 ms.
AWAKE = """
import json, os, subprocess, sys, time
at = []
if len(sys.argv) == 1:
    print("warm", flush=True)
    command = [sys.executable, __file__, "child"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
for _ in range(60):
    at.append(time.perf_counter())
    time.sleep(0.01)
if len(sys.argv) == 1:
    at += json.loads(child.communicate()[0])
print(json.dumps(at), flush=True)
"""


def pythons(folder) -> list[int]:
    """Processes that run a script of `folder`."""
    return [
        process.pid
        for process in psutil.process_iter()
        if process.pid != os.getpid() and any(str(folder) in w for w in words(process))
    ]


def words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_commands_have_the_cores_in_turn(tmp_path):
    script = tmp_path / "wach.py"
    script.write_text(AWAKE)
    commands = {name: [sys.executable, str(script)] for name in ("one", "other")}
    ran = run_in_slices(commands, 0.1, os.environ)
    slices = sorted((*each, name) for name, run in ran.items() for each in run.slices)
    assert all(earlier[1] <= later[0] for earlier, later in pairwise(slices))
    for run in ran.values():
        at = json.loads(run.last_line)
        assert len(at) == 120
        warm = sorted(at)[1:]  # before the first slice it has said that it is warm
        outside = [t for t in warm if not any(a <= t <= b + 0.01 for a, b in run.slices)]
        assert len(outside) <= 10, "awake in slices of the other"
        assert len(run.slices) >= 4
        assert run.seconds(0, time.perf_counter()) == pytest.approx(
            sum(b - a for a, b in run.slices)
        )
        first, second, *_ = run.slices
        middle = (first[0] + first[1]) / 2
        assert run.seconds(middle, second[0]) == pytest.approx(first[1] - middle)


def test_a_command_that_fails_ends_all(tmp_path):
    script, broken = tmp_path / "wach.py", tmp_path / "kaputt.py"
    script.write_text(AWAKE)
    broken.write_text("print('warm', flush=True)\nraise SystemExit('error: no more paper')")
    commands = {"one": [sys.executable, str(script)], "other": [sys.executable, str(broken)]}
    with pytest.raises(InputError, match="other failed: no more paper"):
        run_in_slices(commands, 0.1, os.environ)
    assert pythons(tmp_path) == []


def test_a_command_that_ends_before_it_is_warm_has_failed(tmp_path):
    commands = {"one": [sys.executable, "-c", "raise SystemExit('error: too cold')"]}
    with pytest.raises(InputError, match="one failed: too cold"):
        run_in_slices(commands, 0.1, os.environ)
