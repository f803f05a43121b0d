"""Applies a trained run to pictures and their tags: which tags are the important ones?

python launchers/predict.py --run RUN_DIR --input TABLE.csv --out FILE.jsonl --html FILE.html
python launchers/predict.py --run RUN_DIR --input DIR_OR_URL --split train --out FILE.jsonl
python launchers/predict.py ... --threshold scores.json   # as evaluate.py has chosen it

One line per item, in the order of the input: "key", "predicted" (tags, best first), "tags" and,
along them, "probability", "image", "tag" (both streams) and "alpha" (weight of the picture), where
the model has them; "unknown_tags" and "cut_tags" were not scored; or "key" and "error".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from tqdm import tqdm

from magneto_dist.config_io import clear_parser_errors
from magneto_dist.data.items import Items, ShardItems, open_table
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources.table import TableColumns
from magneto_dist.data.workers import default_num_workers
from magneto_dist.errors import InputError, exit_with_clear_errors
from magneto_dist.files import atomic_file, write_atomically
from magneto_dist.gallery import gallery
from magneto_dist.inference import ItemPrediction, predict
from magneto_dist.scoring.decision import Decision, decision_of
from magneto_dist.trained_run import TrainedRun, load_run

_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


def main() -> None:
    """Command line -> --out and --html."""
    with clear_parser_errors("predict.py"):
        options = _parser().parse_args()
    outputs = [Path(path) for path in (options.out, options.html) if path]
    for path in outputs:
        if not path.parent.is_dir():
            raise InputError(f"{path}: there is no folder {path.parent}; make it first")
    run = load_run(Path(options.run), "cuda" if torch.cuda.is_available() else "cpu")
    decision = decision_of(options.threshold, run.config.train.threshold, run.checkpoint_sha256)
    items = _items(options, run)
    try:
        shown, failed = _predict(run, items, decision, options)
        if options.html:
            largest = run.config.data.max_image_megapixels
            page = gallery(shown, decision.calibrated_threshold, largest)
            write_atomically(Path(options.html), page.encode())
    except OSError as error:
        raise InputError(f"{error.filename or outputs[0]}: {error.strerror}") from None
    print(
        f"{', '.join(map(str, outputs))}: written, {len(items):,} items of which {failed:,} failed"
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, exit_on_error=False)
    add = parser.add_argument
    add("--run", required=True, help="RUN_DIR; its checkpoint with the best validation F1")
    add(
        "--input",
        required=True,
        help="data set (folder or URL) or table (csv, tsv, jsonl, parquet)",
    )
    add("--out", required=True, help="JSON lines, one per item; replaced when all is done")
    add("--html", help="page with the first items to look at")
    add("--html_items", type=PositiveInt, default=200, help="items on that page")
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
    add("--num_workers", type=NonNegativeInt, help="loader processes; default: cores - 1, up to 8")
    return parser


def _items(options: Namespace, run: TrainedRun) -> Items:
    if Path(options.input).suffix.lower() in _TABLES:
        images = Path(options.images) if options.images else None
        return open_table(Path(options.input), images, options.columns)
    dataset = Dataset.open(options.input)
    if run.config.model.sees_pictures and not dataset.has_images:
        raise InputError(f"{options.input}: has no pictures, which {run.checkpoint} needs")
    return ShardItems(dataset, options.split, run.config.model.sees_pictures)


def _predict(
    run: TrainedRun, items: Items, decision: Decision, options: Namespace
) -> tuple[list[ItemPrediction], int]:
    """Writes --out; returns what the page shows, and how many items failed."""
    threshold, shown, failed = decision.calibrated_threshold, [], 0
    num_shown = options.html_items if options.html else 0
    num_workers = default_num_workers(1) if options.num_workers is None else options.num_workers
    predictions = predict(
        run,
        items,
        batch_size=options.batch_size,
        num_workers=num_workers,
        num_pictures=num_shown,
        temperature=decision.temperature,
    )
    with atomic_file(Path(options.out)) as file:
        for item in tqdm(predictions, total=len(items), unit="item", dynamic_ncols=True):
            line = json.dumps(item.as_json(threshold), ensure_ascii=False)
            file.write(line.encode("utf-8", "replace") + b"\n")
            if len(shown) < num_shown:
                shown.append(item)
            if item.error is not None:
                failed += 1
                tqdm.write(f"not scored: {item.key}: {item.error}", file=sys.stderr)
    return shown, failed


if __name__ == "__main__":
    exit_with_clear_errors(main)
