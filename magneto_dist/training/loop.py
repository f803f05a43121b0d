"""The one training loop. Supervised training, NUS-WIDE and pre-training hand it different parts.

1. Fetch the micro-batches of a step; reduce their counts once, so that every loss is global.
2. Forward and backward of each; the optimizer steps.
3. Where due: evaluate, let the schedule observe the loss, save (written while training goes on).
4. If somebody on any rank asked to stop, every rank saves at the same step.
5. A loss that is not finite stops the run where it is logged, and before anything is saved.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from magneto_dist.batch import Batch
from magneto_dist.config import Config
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.randomness import seed_for
from magneto_dist.errors import PreemptedError
from magneto_dist.loss import count_for_loss, ets_loss
from magneto_dist.metrics import metric_sums
from magneto_dist.model.norm import commit_batch_norm_statistics, reset_batch_norm_statistics
from magneto_dist.training.checkpoint import Progress
from magneto_dist.training.checkpoint_writer import CheckpointWriter
from magneto_dist.training.divergence import require_finite_state
from magneto_dist.training.feed import Feed
from magneto_dist.training.heartbeat import Whereabouts
from magneto_dist.training.optim import Schedule
from magneto_dist.training.process import StopRequest
from magneto_dist.training.session import Session
from magneto_dist.training.telemetry import Telemetry
from magneto_dist.training.weight_average import WeightAverage


@dataclass(frozen=True)
class Job:
    """What the loop works with; `evaluate` and `checkpoints` have collectives."""

    config: Config
    session: Session
    model: nn.Module
    optimizer: Any
    schedule: Schedule
    feed: Feed
    """Of the training split."""
    plan: BatchPlan
    telemetry: Telemetry
    whereabouts: Whereabouts
    stop: StopRequest
    average: WeightAverage
    evaluate: Callable[[int], dict]
    """Validation metrics at a step, the same on all ranks."""
    checkpoints: CheckpointWriter

    @property
    def total_steps(self) -> int:
        """The step at which the run is done."""
        steps = self.config.train.epochs * self.feed.loader.steps_per_epoch
        return min(steps, self.config.max_steps or steps)


class Counts(NamedTuple):
    """Sums over the global batch, as plain numbers."""

    items: float
    """Valid samples."""
    tags: float
    """Real tags of valid samples."""
    tags_cut: float
    """Tags that found no slot."""
    targets_cut: float
    """Important ones among them."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step leaves behind, not yet reduced over ranks."""

    loss: Tensor
    """This rank's part of the global loss."""
    sums: dict[str, Tensor]
    """Metric sums of this rank's rows; empty where nothing is logged."""
    gradient_norm: Tensor | None
    """Global, before clipping, where it was computed."""
    skipped: bool
    """Whether fp16 gradients overflowed, so that no weight moved."""


def train(job: Job, progress: Progress) -> Progress:
    """Trains from `progress` to the end of the run.

    Raises:
        PreemptedError: stopped by a signal after saving.
        InputError: the loss is not finite any more, too many samples are bad, or a checkpoint
            could not be written.
    """
    _settle_gradient_buckets(job)
    if _evaluation_is_due(job, progress.step) and not progress.evaluated:
        require_finite_state(job.session, job.model, progress.step, loss=None)
        progress = _evaluate_and_save(job, progress)
    with closing(job.feed.batches(progress.step + 1, job.total_steps)) as batches:
        progress = _train_steps(job, progress, batches)
    job.checkpoints.wait()
    return progress


def _train_steps(job: Job, progress: Progress, batches: Iterator[Batch]) -> Progress:
    for step in range(progress.step + 1, job.total_steps + 1):
        with job.telemetry.waiting_for_data(step, job.feed):
            micro_batches = list(itertools.islice(batches, job.plan.micro_steps))
        counts, stop, save_failed = _reduce_counts(job, micro_batches)
        if save_failed:
            job.checkpoints.wait()  # raises, on every rank
        lr = job.schedule.apply(job.optimizer, step)
        result = train_step(job, micro_batches, counts, log=job.telemetry.logs(step))
        progress = replace(
            progress,
            step=step,
            evaluated=False,
            trained_items=progress.trained_items + int(counts.items),
            tags_cut=progress.tags_cut + int(counts.tags_cut),
            targets_cut=progress.targets_cut + int(counts.targets_cut),
            skipped_steps=progress.skipped_steps + result.skipped,
        )
        progress = job.telemetry.step_done(progress, micro_batches, result, lr)
        saves_now = step % job.config.checkpoint.every_steps == 0
        if stop or saves_now or _evaluation_is_due(job, step):
            require_finite_state(job.session, job.model, step, result.loss)
        if _evaluation_is_due(job, step):
            # Asked to stop, a scheduler may give us less time than an evaluation takes.
            progress = progress if stop else _evaluate_and_save(job, progress)
        elif saves_now and not stop:
            job.checkpoints.save(progress)
        if stop:
            job.checkpoints.save(progress)
            job.checkpoints.wait()
            raise PreemptedError(f"stopped by a signal after step {step}; everything is saved")
    return progress


def train_step(
    job: Job, micro_batches: Sequence[Batch], counts: Counts, *, log: bool
) -> StepResult:
    """One optimizer step over the micro-batches of this rank.

    Args:
        job: the parts of the run.
        micro_batches: on CPU or pinned memory.
        counts: of the global batch.
        log: whether the metrics of this step will be logged.
    """
    session, config = job.session, job.config
    # Made there: a copy of two numbers from the CPU would wait for all that the device has to do.
    normaliser = torch.stack(
        [
            torch.full((), count, dtype=torch.float64, device=session.device)
            for count in (counts.items, counts.tags)
        ]
    )
    loss, sums = torch.zeros((), device=session.device), {}
    # Every rank takes the same way through the model: ZeRO adds gradients of the ranks up in the
    # order in which they come, and would else add those of different weights.
    num_rows = len(micro_batches) * job.plan.micro_batch_size * session.world.num_ranks
    all_valid = counts.items == num_rows
    for batch in micro_batches:
        job.whereabouts.at("training")
        batch = replace(batch, all_valid=all_valid).to(session.device)
        # Dropout belongs to its place in the run, so that a resumed run draws what it would have.
        rank = session.world.rank
        _seed_dropout(seed_for(config.seed, batch.step, batch.micro_step, rank), session.device)
        with session.micro_step(job.model, is_last=batch.micro_step == job.plan.micro_steps - 1):
            prediction = job.model(**batch.inputs())
            part = ets_loss(prediction, batch, normaliser, config.loss).total
            session.backward(part)
        loss = loss + part.detach()
        if log:
            new = metric_sums(prediction, batch, config.train.threshold)
            sums = {name: value + sums.get(name, 0) for name, value in new.items()}
    stepped = session.step(job.model, job.optimizer, measures_norm=log)
    settle_batch_norms(session, job.model, skipped=stepped.skipped)
    if not stepped.skipped:
        job.average.update()
    return StepResult(loss, sums, stepped.gradient_norm, stepped.skipped)


def _seed_dropout(seed: int, device: torch.device) -> None:
    if device.type == "cpu":
        # The same draws; `manual_seed` would note a stack trace for GPUs that are not there.
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def settle_batch_norms(session: Session, model: nn.Module, *, skipped: bool) -> None:
    """Moves the running statistics with the weights, or, where these did not move, not at all.

    An overflow may lie in the activations already, and would stay in the statistics for good.
    """
    if skipped:
        reset_batch_norm_statistics(model)
    else:
        commit_batch_norm_statistics(model, session.reduce_sum)


def _reduce_counts(job: Job, micro_batches: Sequence[Batch]) -> tuple[Counts, bool, bool]:
    """Counts of the global batch, and whether any rank was asked to stop or a save has failed.

    One collective for all of them.
    """
    items_and_tags = torch.stack([count_for_loss(batch) for batch in micro_batches]).sum(0)
    tags_cut = sum(int(batch.tags_cut.sum()) for batch in micro_batches)
    targets_cut = sum(int(batch.targets_cut.sum()) for batch in micro_batches)
    flags = [job.stop.signal is not None, job.checkpoints.failed]
    local = torch.cat([items_and_tags, items_and_tags.new_tensor([tags_cut, targets_cut, *flags])])
    if job.session.world.num_ranks > 1:
        local = job.session.reduce_sum(local)
    *counts, stop, save_failed = local.tolist()  # with ranks on GPUs, a device synchronisation
    return Counts(*counts), stop > 0, save_failed > 0


def _evaluation_is_due(job: Job, step: int) -> bool:
    if step == 0:
        return False
    every_steps = job.config.train.eval_every_epochs * job.feed.loader.steps_per_epoch
    return step % every_steps == 0 or step >= job.total_steps


def _evaluate_and_save(job: Job, progress: Progress) -> Progress:
    with job.average.swapped_in():
        metrics = job.evaluate(progress.step)
    job.schedule.observe(metrics["loss"])
    f1 = metrics[next(h for h in ("final", "image", "tag") if h in metrics)]["paper"]["f1"]
    if f1 > progress.best_f1:
        progress = replace(progress, best_step=progress.step, best_f1=f1)
    progress = replace(
        progress, evaluated=True, validation=metrics, schedule=job.schedule.state_dict()
    )
    job.checkpoints.save(progress)
    return progress


def _settle_gradient_buckets(job: Job) -> None:
    """A forward and backward of weight zero at every process start, where DDP trains.

    DDP reorders its buckets after the first backward; without this a resumed run of three or more
    ranks would add gradients in another order than one that went on, and differ in the last bits.
    """
    if not job.session.is_ddp:
        return
    batch = job.feed.loader.empty_batch().to(job.session.device)
    counts = torch.ones(2, dtype=torch.float64, device=job.session.device)
    with job.session.micro_step(job.model, is_last=True):
        loss = ets_loss(job.model(**batch.inputs()), batch, counts, job.config.loss).total
        job.session.backward(loss * 0)
    job.optimizer.zero_grad()
    reset_batch_norm_statistics(job.model)
