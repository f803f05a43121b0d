"""A trained run scored on a split of a data set, which need not be the one it was trained on.

1. `require_scorable`: the data set speaks the run's vocabulary and says what is important.
2. `score_split`: every item once, over all ranks.
3. `write_scores`: metrics and where they come from, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from magneto_dist.batch import LEFT_OUT, Reject
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.errors import InputError
from magneto_dist.evaluation import collecting_rejects, evaluate_model
from magneto_dist.files import write_atomically
from magneto_dist.trained_run import TrainedRun
from magneto_dist.training.checkpoint import read_progress
from magneto_dist.training.session import Session


def require_scorable(run: TrainedRun, dataset: Dataset, split: str, outliers: int = 0) -> None:
    """Checks that scores of `run` on a split would mean something.

    Raises:
        InputError: another vocabulary, no items, no labels where the run needs them, or outliers
            for a run of pre-training.
    """
    _require_same_vocabulary(run, dataset)
    num_items = dataset.num_samples(split)
    if num_items == 0:
        raise InputError(f"{dataset.root}: the split {split!r} has no items")
    is_supervised = run.config.train.objective == "important"
    num_unlabelled = num_items - dataset.num_labelled(split)
    if is_supervised and num_unlabelled:
        raise InputError(
            f"{dataset.root}: {num_unlabelled} of {num_items} items of {split!r} have no"
            " 'important' labels to score against; use launchers/predict.py for those"
        )
    if outliers and not is_supervised:
        raise InputError(
            f"--outliers {outliers}: {run.checkpoint} was pre-trained to tell foreign tags from"
            " own ones, and gets foreign ones as it is; leave it at 0"
        )


def score_split(
    run: TrainedRun,
    session: Session,
    dataset: Dataset,
    split: str,
    batch_size: int | None = None,
    outliers: int = 0,
) -> dict[str, Any]:
    """Scores every item of a split once; every rank calls and gets the same metrics.

    Args:
        run: its config says how to load and to score (data, augment, tags, threshold, precision).
        session: this process among its peers.
        dataset: as `require_scorable` accepts it.
        split: train (without augmentation) or validation.
        batch_size: items per forward pass and rank; None: as when the checkpoint was written.
        outliers: foreign tags added to each item (Table 3 of the paper).

    Returns:
        The metrics of `evaluate` under the name of the split, as in `summary.json`, beside where
        they come from and how fast they came (items per second, of all ranks, start included).
    """
    config, world = run.config, session.world
    size = batch_size or read_progress(run.checkpoint).micro_batch_size
    plan = BatchPlan.derive(size * world.num_ranks, world.num_ranks, size, group_size=1)
    loader = Loader(dataset, split, config, world, plan, training=False, outliers=outliers)
    rejects: list[Reject] = []
    batches = tqdm(
        collecting_rejects(loader.batches(1, loader.steps_per_epoch), rejects),
        total=loader.steps_per_epoch,
        unit="batch",
        dynamic_ncols=True,
        disable=not session.is_main,
    )
    started_at_s = time.perf_counter()
    with run.autocast(session.device):
        metrics, _ = evaluate_model(
            run.model.to(session.device),
            batches,
            device=session.device,
            reduce=session.reduce_sum,
            config=config,
            num_tags=len(run.vocabulary),
        )
    elapsed_s = time.perf_counter() - started_at_s
    for reject in rejects:
        if reject.reason != LEFT_OUT:
            print(f"not scored: {reject.key} in {reject.shard}: {reject.reason}", file=sys.stderr)
    return {
        "run": str(run.checkpoint.parent.parent),
        "checkpoint": run.checkpoint.name,
        "data": dataset.root,
        "split": split,
        "outliers": outliers,
        "threshold": config.train.threshold,
        "precision": config.train.precision,
        "batch_size": size,
        "world_size": world.num_ranks,
        "items": metrics["items"],
        "items_not_scored": dataset.num_samples(split) - metrics["items"],
        "items_per_second": metrics["items"] / elapsed_s,
        split: metrics,
    }


def write_scores(path: Path, scores: dict[str, Any]) -> None:
    """Replaces the JSON file `path`.

    Raises:
        InputError: it cannot be written.
    """
    content = json.dumps(scores, indent=2, ensure_ascii=False) + "\n"
    try:
        write_atomically(path, content.encode())
    except OSError as error:
        raise InputError(f"--out {path}: {error.strerror}") from None


def _require_same_vocabulary(run: TrainedRun, dataset: Dataset) -> None:
    difference = dataset.vocabulary.difference_from(run.vocabulary)
    if difference is not None:
        raise InputError(
            f"{dataset.root}: its vocabulary is not that of the run"
            f" {run.checkpoint.parent.parent}: {difference}; build the data set with the run's"
            " vocabulary.txt"
        )
