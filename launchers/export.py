"""Writes a trained run as a folder for others: weights, vocabulary, model card and, if asked, more.

python launchers/export.py --run RUN_DIR --out DIR [--onnx] [--pt2] [--check TABLE_OR_SHARDS]
python launchers/export.py ... --threshold scores.json   # as evaluate.py has chosen it

--onnx and --pt2 write the whole model for ONNX Runtime and as torch.export has it. Each is compared
with the model on real items, and refused where probabilities differ by more than 1e-4.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from jsonargparse import ArgumentParser

from magneto_dist.config_io import clear_parser_errors
from magneto_dist.data.items import Items, ShardItems, open_items
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources.demo import ensure_demo
from magneto_dist.data.sources.table import TableColumns
from magneto_dist.decision import decision_of
from magneto_dist.errors import exit_with_clear_errors
from magneto_dist.export import CHECKED_ITEMS, Runtime, export_run
from magneto_dist.trained_run import TrainedRun, load_run


def main() -> None:
    """Command line -> --out."""
    parser = ArgumentParser(description=__doc__, exit_on_error=False)
    add = parser.add_argument
    add("--run", required=True, help="RUN_DIR; its checkpoint with the best validation F1")
    add("--out", required=True, help="folder to write; absent or empty")
    add("--onnx", action="store_true", help="write model.onnx; needs the extra `export`")
    add("--pt2", action="store_true", help="write model.pt2")
    add(
        "--check",
        help=f"data set (its validation split), table or folder of pictures, as for predict.py,"
        f" whose first {CHECKED_ITEMS} items these are compared on; default: the run's data set",
    )
    add(
        "--threshold",
        type=float | str,
        help="probability in [0, 1] of a predicted tag, or the JSON in which evaluate.py has"
        " written one, and the temperature of the probabilities; goes with the model; default: the"
        " run's",
    )
    with clear_parser_errors("export.py"):
        options = parser.parse_args()
    run = load_run(Path(options.run))
    decision = decision_of(options.threshold, run.decision, run.checkpoint_sha256)
    run = replace(run, decision=decision)
    runtimes: list[Runtime] = []
    if options.pt2:
        runtimes.append("pt2")
    if options.onnx:
        runtimes.append("onnx")
    with tempfile.TemporaryDirectory() as scratch:
        items = _items(run, options.check, Path(scratch)) if runtimes else None
        parity = export_run(run, Path(options.out), runtimes, items)
    print(f"{options.out}: written, from {run.checkpoint}")
    for runtime, found in parity.items():
        print(
            f"model.{runtime}: probabilities of {found.pictures} items differ by at most"
            f" {found.difference:.2g} from the model's in float32"
        )


def _items(run: TrainedRun, given: str | None, scratch: Path) -> Items:
    sees_pictures = run.config.model.sees_pictures
    if given is not None:
        return open_items(
            given,
            scratch,
            with_images=sees_pictures,
            split="validation",
            images=None,
            columns=TableColumns(),
        )
    data = run.config.data
    dataset = Dataset.open(data.path or str(ensure_demo()), data.cache_dir, data.cache_gb)
    return ShardItems(dataset, "validation", sees_pictures)


if __name__ == "__main__":
    exit_with_clear_errors(main)
