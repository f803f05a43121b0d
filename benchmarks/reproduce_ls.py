"""The paper's experiments on its large data set, on any labelled one: ours beside the paper's.

python benchmarks/reproduce_ls.py --data DIR_OR_URL --work FOLDER
python benchmarks/reproduce_ls.py --data DIR_OR_URL --work FOLDER --experiments figure9 --seeds 0
python benchmarks/reproduce_ls.py --smoke --work FOLDER          # minutes, on the demo data

Figures 9 and 10, the outliers of section 5.1 and the F1 of the abstract. The paper's data set is
private: DIR_OR_URL is any data set whose items are labelled, as `launchers/shards.py build` and
`index` make them, trained with `configs/ls.yaml`. Runs lie in FOLDER/runs; what is done is not done
again, and what was stopped goes on when the same command is started again. The report, Markdown and
one page of HTML, comes to FOLDER/report, with --out to benchmarks/results/OUT.

Options of the form --section.field VALUE go to every training run, where they do not contradict
what the run is: --train.epochs 10, --train.precision fp16, --data.decoder dali_gpu,
--model.backbone_weights resnet50.pth.

--smoke trains everything on generated pictures, with a backbone that train_ls.py has trained on
other generated pictures before (by the same options, but for the model's). Numbers are then not
those of the paper; what can be seen is which of its claims show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from magneto_dist.errors import exit_with_clear_errors
from reproduce_command import reproduce
from reproduce_ls_grid import LS
from reproduce_runs import Job


def main(argv: Sequence[str] | None = None, run: Callable[[Job, Path], int] | None = None) -> None:
    """As `reproduce`."""
    reproduce(LS, __doc__, argv, run)


if __name__ == "__main__":
    exit_with_clear_errors(main)
