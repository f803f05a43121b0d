"""A rank that has done everything ends well, whatever gloo's threads still hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from warm import PATIENCE_S, free_port

LEAVING = 3


def test_gloo_does_not_abort_ranks_as_they_leave() -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("leaving_ranks.py")), str(LEAVING)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
        env={**os.environ, **meeting, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout == f"{[0] * LEAVING}\n", done.stderr
