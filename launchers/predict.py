"""Applies a trained run to pictures and their tags: which tags are the important ones?

python launchers/predict.py --run RUN_DIR --input TABLE.csv --out FILE.jsonl --html FILE.html
python launchers/predict.py --run RUN_DIR --input FOLDER_OF_PICTURES --out FILE.parquet
torchrun --nproc_per_node 8 -- launchers/predict.py --run RUN_DIR --input SHARDS --out FILE.csv
python launchers/predict.py ... --threshold scores.json   # as evaluate.py has chosen it

One line per item, in the order of the input: "row" (from 0), "key" (of shards; else the path),
"predicted" (tags, best first), "tags" and, along them, "kept", "probability", "image", "tag" (both
streams) and "alpha" (weight of the picture), where the model has them; "unknown_tags" and
"cut_tags" were not scored; or "row", "key" and "error". The same command goes on after a kill, on
any number of processes that see the same disk; what is done is in FILE.parts until all is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt, restricted_number_type

from magneto_dist.config_io import clear_parser_errors
from magneto_dist.data.items import StoredItems, open_items
from magneto_dist.data.sources.table import TableColumns
from magneto_dist.data.workers import default_num_workers
from magneto_dist.decision import decision_of
from magneto_dist.errors import InputError, exit_with_clear_errors
from magneto_dist.gallery import MAX_ITEMS
from magneto_dist.prediction_file import Plan, PredictionFile
from magneto_dist.prediction_run import predict_to_file, predict_to_page
from magneto_dist.trained_run import TrainedRun, load_run
from magneto_dist.training.process import die_with_launcher, launched_world

_PageItems = restricted_number_type("_PageItems", int, [(">=", 1), ("<=", MAX_ITEMS)])


def main() -> None:
    """Command line -> --html, then --out."""
    with clear_parser_errors("predict.py"):
        options = _parser().parse_args()
    die_with_launcher()
    world, file = launched_world(), PredictionFile(Path(options.out))
    if options.html and not Path(options.html).parent.is_dir():
        raise InputError(f"--html {options.html}: there is no such folder; make it first")
    device = f"cuda:{world.rank_of_node}" if torch.cuda.is_available() else "cpu"
    run = load_run(Path(options.run), device)
    sha256 = run.checkpoint_sha256
    decision = decision_of(options.threshold, run.decision, sha256, warns=world.is_main)
    threshold, temperature = decision.calibrated_threshold, decision.temperature
    num_workers = options.num_workers
    if num_workers is None:
        num_workers = default_num_workers(world.ranks_per_node)
    try:
        with file.opened() as scratch:
            items = _items(options, run, scratch)
            hashes = sha256, items.sha256
            cut = len(items), threshold, temperature, options.block_items
            done_before = file.begin(Plan(*hashes, *cut))
            if options.html and world.is_main:
                shown = predict_to_page(
                    run,
                    items,
                    Path(options.html),
                    threshold=threshold,
                    temperature=temperature,
                    num_items=options.html_items,
                    batch_size=options.batch_size,
                )
                print(f"{options.html}: the first {shown:,} items to look at", flush=True)
            if done_before is None:
                sizes = {"batch_size": options.batch_size, "num_workers": num_workers}
                predict_to_file(run, items, file, world, temperature=temperature, **sizes)
                summary = file.join()
            else:
                summary = done_before if world.is_main else None
    except OSError as error:
        raise InputError(f"{error.filename or file.path}: {error.strerror}") from None
    if summary is not None:  # else another rank will say so
        done = "was done before, " if done_before else ""
        anew = "; remove it to score anew" if done_before else ""
        counts = f"{summary.items:,} items, of which {summary.failed:,} failed"
        print(f"{file.path}: {done}{counts}{anew}")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, exit_on_error=False)
    add = parser.add_argument
    add("--run", required=True, help="RUN_DIR; its checkpoint with the best validation F1")
    add(
        "--input",
        required=True,
        help="data set (folder or URL), table (csv, tsv, jsonl, parquet), or folder of pictures"
        " with metadata.csv (or .jsonl ...), or with the tags of NAME.jpg in NAME.txt or NAME.json",
    )
    add("--out", required=True, help=".jsonl, .csv or .parquet; replaced when all is done")
    add("--html", help="page with the first items to look at; written before --out")
    add("--html_items", type=_PageItems, default=200, help=f"on that page, at most {MAX_ITEMS}")
    add("--split", type=Literal["train", "validation"], default="validation", help="of a data set")
    add("--images", help="folder that paths in a table start from; default: the table's")
    add("--columns", type=TableColumns, default=TableColumns(), help="of a table")
    add(
        "--threshold",
        type=float | str,
        help="probability in [0, 1] of a predicted tag, or the JSON in which evaluate.py has"
        " written one, and the temperature of the probabilities; default: the run's",
    )
    add("--batch_size", type=PositiveInt, default=64, help="items per forward pass")
    add("--block_items", type=PositiveInt, default=2048, help="items that a kill may lose")
    add("--num_workers", type=NonNegativeInt, help="loader processes; default: cores - 1, up to 8")
    return parser


def _items(options: Namespace, run: TrainedRun, scratch: Path) -> StoredItems:
    return open_items(
        options.input,
        scratch,
        with_images=run.config.model.sees_pictures,
        split=options.split,
        images=Path(options.images) if options.images else None,
        columns=options.columns,
    )


if __name__ == "__main__":
    exit_with_clear_errors(main)
