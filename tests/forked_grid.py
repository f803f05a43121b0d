"""`reproduce_ls.py` as a process group of its own, its launchers forks of it: nothing to import.

python tests/forked_grid.py OPTIONS_OF_REPRODUCE_LS
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import reproduce_ls
from magneto_dist.errors import exit_with_clear_errors
from reproduce_runs import Processes

if __name__ == "__main__":
    os.setsid()
    exit_with_clear_errors(lambda: reproduce_ls.main(None, Processes("fork")))
