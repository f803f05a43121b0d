"""Writes a trained run as a folder for others: weights, vocabulary, model card and, if asked, more.

python launchers/export.py --run RUN_DIR --out DIR [--onnx] [--pt2] [--check TABLE_OR_SHARDS]

--onnx and --pt2 write the whole model for ONNX Runtime and as torch.export has it. Each is compared
with the model on real items, and refused where probabilities differ by more than 1e-4.
"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from magneto_dist.config_io import clear_parser_errors
from magneto_dist.data.items import Items, ShardItems, open_table
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources.demo import ensure_demo
from magneto_dist.data.sources.table import TableColumns
from magneto_dist.errors import exit_with_clear_errors
from magneto_dist.export import CHECKED_ITEMS, Runtime, export_run
from magneto_dist.trained_run import TrainedRun, load_run

_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


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
        help=f"data set (its validation split) or table (csv, tsv, jsonl, parquet) whose first"
        f" {CHECKED_ITEMS} items these are compared on; default: the run's data set",
    )
    with clear_parser_errors("export.py"):
        options = parser.parse_args()
    run = load_run(Path(options.run))
    runtimes: list[Runtime] = []
    if options.pt2:
        runtimes.append("pt2")
    if options.onnx:
        runtimes.append("onnx")
    items = _items(run, options.check) if runtimes else None
    parity = export_run(run, Path(options.out), runtimes, items)
    print(f"{options.out}: written, from {run.checkpoint}")
    for runtime, found in parity.items():
        print(
            f"model.{runtime}: probabilities of {found.pictures} items differ by at most"
            f" {found.difference:.2g} from the model's in float32"
        )


def _items(run: TrainedRun, given: str | None) -> Items:
    if given is not None and Path(given).suffix.lower() in _TABLES:
        return open_table(Path(given), None, TableColumns())
    data = run.config.data
    path = given or data.path or str(ensure_demo())
    dataset = Dataset.open(path, data.cache_dir, data.cache_gb)
    return ShardItems(dataset, "validation", run.config.model.sees_pictures)


if __name__ == "__main__":
    exit_with_clear_errors(main)
