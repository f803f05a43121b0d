"""The paper's experiments on NUS-WIDE, reproduced: one report, ours beside the paper's numbers.

python benchmarks/reproduce_nus_wide.py --data DIR --work FOLDER
python benchmarks/reproduce_nus_wide.py --data DIR --work FOLDER --experiments table2 figure3
python benchmarks/reproduce_nus_wide.py --smoke --work FOLDER          # minutes, on the demo data

DIR is what `launchers/shards.py build nus-wide` has made. Runs lie in FOLDER/runs; what is done is
not done again, and what was stopped goes on when the same command is started again. The report,
Markdown and one page of HTML, comes to FOLDER/report, with --out to benchmarks/results/OUT.

Options of the form --section.field VALUE go to every training run, where they do not contradict
what the run is: --train.epochs 60, --data.decoder dali_gpu, --model.backbone_weights resnet18.pth.

--smoke trains everything on generated pictures, with a backbone that train_ls.py has trained on
other generated pictures before (by the same options, but for the model's). Numbers are then not
those of the paper; what can be seen is which of its claims show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from magneto_dist.errors import exit_with_clear_errors
from reproduce_command import reproduce
from reproduce_nus_wide_grid import NUS_WIDE
from reproduce_runs import Job


def main(argv: Sequence[str] | None = None, run: Callable[[Job, Path], int] | None = None) -> None:
    """As `reproduce`."""
    reproduce(NUS_WIDE, __doc__, argv, run)


if __name__ == "__main__":
    exit_with_clear_errors(main)
