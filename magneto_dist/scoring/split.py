"""A trained run scored on a split of a data set, which need not be the one it was trained on.

1. `require_scorable`: the data set speaks the run's vocabulary and says what is important.
2. `score_split`: every item once, over all ranks; threshold and temperature are chosen.
3. `results.py` makes JSON of it, `report.py` and `plots.py` what people read.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from magneto_dist.batch import LEFT_OUT, Batch, Reject
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.parallel import progress_bar
from magneto_dist.data.randomness import seed_for
from magneto_dist.data.shards import Dataset
from magneto_dist.decision import Decision
from magneto_dist.errors import InputError
from magneto_dist.evaluation import collecting_rejects
from magneto_dist.scoring import calibration
from magneto_dist.scoring.baselines import Baseline, baselines, count_training_tags
from magneto_dist.scoring.sums import Scores, ScoreSums
from magneto_dist.scoring.thresholds import grid
from magneto_dist.trained_run import TrainedRun
from magneto_dist.training.checkpoint import read_progress
from magneto_dist.training.session import Session

SAME_ITEMS = "the same items"
OTHER_HALF = "the other half (by a hash of the key)"
_SEED = 0  # of resamples and halves: the same for every run that is compared


@dataclass(frozen=True)
class ScoringOptions:
    """What to score, and what to choose on the way."""

    split: str = "validation"
    """train (without augmentation) or validation."""
    decision: Decision = field(default_factory=lambda: Decision(0.5))
    """Threshold, and the temperature if there is one."""
    chooses_threshold: bool = False
    """Take the threshold with the highest F1 per item instead."""
    calibrates: bool = False
    """Fit a temperature."""
    halves: bool = False
    """Choose on one half of the items and score the other, so that what was chosen is new to it."""
    baselines: bool = True
    """Score baselines that need no training; they read the tags of the training split."""
    resamples: int = 1000
    """Of the bootstrap; 0: no intervals."""
    outliers: int = 0
    """Foreign tags added to each item (Table 3 of the paper)."""
    batch_size: int | None = None
    """Items per forward pass and rank; None: as when the checkpoint was written."""


@dataclass(frozen=True)
class SplitScores:
    """A split that was scored."""

    scores: Scores
    threshold: int
    """Number of the threshold that was used."""
    decision: Decision
    """Threshold and temperature, as given or chosen."""
    chosen: tuple[str, ...]
    """Which of both were chosen, by name."""
    chosen_on: str | None
    """Which items they were chosen on; None: they were given."""
    checkpoint_sha256: str
    """For which checkpoint."""
    origin: dict[str, Any]
    """Run, data, how and how fast it was scored."""


def require_scorable(run: TrainedRun, dataset: Dataset, options: ScoringOptions) -> None:
    """Checks that scores of `run` on a split would mean something.

    Raises:
        InputError: another vocabulary, no items, no labels where the run needs them, or outliers
            for a run of pre-training.
    """
    split, outliers = options.split, options.outliers
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


def without_baselines(run: TrainedRun, dataset: Dataset, wanted: bool | None) -> str | None:
    """Why there are no baselines that need no training; None: there are.

    Raises:
        InputError: they are `wanted`, and cannot be had.
    """
    num_items = dataset.num_samples("train") if "train" in dataset.splits else 0
    if wanted is False:
        return "--baselines false"
    if run.config.train.objective != "important":
        reason = "the run was pre-trained, and has not learned what is important"
    elif num_items == 0 or dataset.num_labelled("train") < num_items:
        reason = f"{dataset.root} has no training split whose items are all labelled"
    elif dataset.tar_storage.is_remote and wanted is None:
        return "they would read all of the training split; ask for them with --baselines true"
    else:
        return None
    if wanted:
        raise InputError(f"--baselines true: {reason}")
    return reason


def score_split(
    run: TrainedRun, session: Session, dataset: Dataset, options: ScoringOptions
) -> SplitScores:
    """Scores every item of a split once; every rank calls and gets the same figures.

    Args:
        run: its config says how to load and to score (data, augment, tags, precision).
        session: this process among its peers.
        dataset: as `require_scorable` accepts it.
        options: what to score.

    Raises:
        InputError: a shard cannot be read, or no item (of a half) can be scored.
    """
    naive = _baselines(run, session, dataset) if options.baselines else {}
    loader, size = _loader(run, session, dataset, options)
    rejects: list[Reject] = []
    batches = progress_bar(
        loader.steps_per_epoch,
        options.split,
        collecting_rejects(loader.batches(1, loader.steps_per_epoch), rejects),
        unit="batch",
        shown=session.is_main,
    )
    started_at_s = time.perf_counter()
    sums = _scores(run, session, batches, options, naive)
    elapsed_s = time.perf_counter() - started_at_s
    for reject in rejects:
        if reject.reason != LEFT_OUT:
            print(f"not scored: {reject.key} in {reject.shard}: {reject.reason}", file=sys.stderr)
    items = [int(each.sums["items"]) for each in sums]
    if 0 in items:
        why = "one half has none: use --choose_on all" if sum(items) else "see above, or the stages"
        raise InputError(
            f"{dataset.root}: {sum(items)} of {dataset.num_samples(options.split)} items of"
            f" {options.split!r} can be scored; {why}"
        )
    threshold, decision = _choose(sums[-1], options)
    chosen = ("threshold",) * options.chooses_threshold + ("temperature",) * options.calibrates
    chosen_on = (OTHER_HALF if options.halves else SAME_ITEMS) if chosen else None
    origin = {
        "run": str(run.checkpoint.parent.parent),
        "checkpoint": run.checkpoint.name,
        "data": dataset.root,
        "split": options.split,
        "outliers": options.outliers,
        "threshold": decision.threshold,
        "precision": run.config.train.precision,
        "batch_size": size,
        "world_size": session.world.num_ranks,
        "items": items[0],
        "items_not_scored": dataset.num_samples(options.split) - sum(items),
        "items_per_second": sum(items) / elapsed_s,
    }
    return SplitScores(
        sums[0], threshold, decision, chosen, chosen_on, run.checkpoint_sha256, origin
    )


def _loader(
    run: TrainedRun, session: Session, dataset: Dataset, options: ScoringOptions
) -> tuple[Loader, int]:
    """The batches of the split, and how many items each has."""
    size = options.batch_size or read_progress(run.checkpoint).micro_batch_size
    num_ranks = session.world.num_ranks
    plan = BatchPlan.derive(size * num_ranks, num_ranks, size, group_size=1)
    loader = Loader(
        dataset,
        options.split,
        run.config,
        session.world,
        plan,
        training=False,
        outliers=options.outliers,
    )
    return loader, size


def _baselines(run: TrainedRun, session: Session, dataset: Dataset) -> dict[str, Baseline]:
    tags = count_training_tags(dataset, run.config, session)
    return baselines(tags, session.device)


def _scores(
    run: TrainedRun,
    session: Session,
    batches: Iterable[Batch],
    options: ScoringOptions,
    naive: dict[str, Baseline],
) -> list[Scores]:
    """What to report; with halves, what to choose on beside it, else that is the same."""
    model, device = run.model.to(session.device), session.device
    sums: list[ScoreSums] = []
    for batch in batches:
        batch = batch.to(device)
        with torch.no_grad(), run.autocast(device):
            prediction = model(**batch.inputs())
        if not sums:
            sums = [_no_sums(run, options, prediction.heads, naive, device)]
            if options.halves:
                only_choose = replace(options, resamples=0)
                sums.append(_no_sums(run, only_choose, prediction.heads, {}, device))
        if not options.halves:
            sums[0].update(prediction, batch)
        else:
            chooses = torch.tensor([_in_first_half(key) for key in batch.keys], device=device)
            sums[0].update(prediction, _only(batch, ~chooses))
            sums[1].update(prediction, _only(batch, chooses))
    return [each.reduced(session.reduce_sum) for each in sums]


def _no_sums(
    run: TrainedRun,
    options: ScoringOptions,
    heads: tuple[str, ...],
    naive: dict[str, Baseline],
    device: torch.device,
) -> ScoreSums:
    thresholds = grid(options.decision.threshold)
    used = int((thresholds == options.decision.threshold).nonzero())
    return ScoreSums(
        heads,
        naive,
        num_tags=len(run.vocabulary),
        thresholds=thresholds,
        loss=run.config.loss,
        resampled=slice(None) if options.chooses_threshold else slice(used, used + 1),
        num_resamples=options.resamples,
        seed=_SEED,
        device=device,
    )


def _in_first_half(key: str) -> bool:
    """A property of the key alone, for half of all keys."""
    return seed_for(_SEED, "half", key) % 2 == 0


def _only(batch: Batch, rows: torch.Tensor) -> Batch:
    """The batch with these rows alone valid."""
    return replace(batch, sample_valid=batch.sample_valid & rows, all_valid=False)


def _choose(chooser: Scores, options: ScoringOptions) -> tuple[int, Decision]:
    given, thresholds = options.decision, chooser.thresholds.tolist()
    threshold = thresholds.index(given.threshold)
    if options.chooses_threshold:
        threshold = chooser.best(chooser.main)
    temperature = given.temperature
    if options.calibrates:
        temperature = calibration.fit_temperature(chooser.odds(chooser.heads[0]))
    return threshold, Decision(thresholds[threshold], temperature)


def _require_same_vocabulary(run: TrainedRun, dataset: Dataset) -> None:
    difference = dataset.vocabulary.difference_from(run.vocabulary)
    if difference is not None:
        raise InputError(
            f"{dataset.root}: its vocabulary is not that of the run"
            f" {run.checkpoint.parent.parent}: {difference}; build the data set with the run's"
            " vocabulary.txt"
        )
