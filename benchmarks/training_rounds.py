"""Rounds of the real training loop on batches of one's choice, and of a bare one beside it.

1. `training_job` puts a run together from its real parts: session, telemetry, checkpoints.
2. `Rounds.loop` trains some steps of it (`training.loop.train`) and takes the time from after the
   first ones to the end of the last one; what comes after that (evaluation, saving) is no part.
3. `Rounds.bare` takes the same steps as one would with torch alone, without accelerate, logs,
   metrics and ledger.
"""

from __future__ import annotations

import io
import itertools
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import torch

from harness import Clock, now
from magneto_dist.batch import Batch
from magneto_dist.config import Config
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.loss import count_for_loss, ets_loss
from magneto_dist.model.norm import commit_batch_norm_statistics
from magneto_dist.parts import initial_model, prepare
from magneto_dist.precision import autocast
from magneto_dist.training.checkpoint import Progress
from magneto_dist.training.checkpoint_writer import CheckpointWriter
from magneto_dist.training.feed import Feed
from magneto_dist.training.heartbeat import Whereabouts
from magneto_dist.training.loop import Job, train
from magneto_dist.training.optim import Schedule
from magneto_dist.training.process import StopRequest
from magneto_dist.training.resume import settled_precision, with_precision
from magneto_dist.training.session import Session
from magneto_dist.training.telemetry import Telemetry
from magneto_dist.training.weight_average import WeightAverage

ENDLESS = 10**6  # epochs, or steps: a round ends where it is told to
LR = 1e-6  # the same work at any; at this one nothing diverges


class Taken(NamedTuple):
    """What some steps took on this rank."""

    wall_s: float
    core_s: float
    """Of all threads of this process and its loader processes."""
    data_wait_s: float
    images: float


def endless(config: Config) -> Config:
    """`config` for a run that neither ends nor evaluates nor saves by itself.

    Raises:
        InputError: the frozen stages cannot compute in what it says.
    """
    config = with_precision(config, settled_precision(config, None))
    return replace(
        config,
        optim=replace(config.optim, lr=LR, warmup_steps=0, schedule="constant"),
        train=replace(config.train, epochs=ENDLESS, eval_every_epochs=ENDLESS),
        checkpoint=replace(config.checkpoint, every_steps=ENDLESS, keep=1),
    )


@contextmanager
def training_job(
    config: Config,
    session: Session,
    dataset: Dataset,
    plan: BatchPlan,
    loader: Loader,
    folder: Path,
) -> Iterator[Job]:
    """A run with everything that `recipe.run_training` gives one, but evaluation.

    Args:
        config: see `endless`.
        session: this process among its peers.
        dataset: what it trains on.
        plan: how global batches are cut.
        loader: of the training split.
        folder: RUN_DIR.
    """
    model = initial_model(config, dataset, None)
    wrapped, optimizer = prepare(config, session, model, plan)
    average = WeightAverage(session.unwrap(wrapped), config.train.ema_decay, 0)
    whereabouts = Whereabouts()
    start = Progress(
        num_ranks=session.world.num_ranks,
        micro_batch_size=plan.micro_batch_size,
        micro_steps=plan.micro_steps,
        deepspeed=session.is_deepspeed,
        vocabulary_sha256=dataset.vocabulary.sha256,
    )
    with redirect_stderr(io.StringIO()):  # the bar of the run goes there, as much work as ever
        log = Telemetry(folder, session, config, start, ENDLESS, loader, whereabouts)
    with (
        log,
        CheckpointWriter(
            session, config, wrapped, optimizer, average, log, lambda step: None
        ) as checkpoints,
    ):
        yield Job(
            config=config,
            session=session,
            model=wrapped,
            optimizer=optimizer,
            schedule=Schedule(config.optim, ENDLESS),
            feed=Feed(loader, config, session, wrapped),
            plan=plan,
            telemetry=log,
            whereabouts=whereabouts,
            stop=_nobody_stops(),
            average=average,
            evaluate=lambda step: {},
            checkpoints=checkpoints,
        )


class Rounds:
    """Trains a job on, round by round.

    Args:
        job: of `training_job`.
        warm_steps: taken before the time of a round is taken.
    """

    def __init__(self, job: Job, warm_steps: int) -> None:
        self.job, self._warm_steps = job, warm_steps
        self._progress = Progress()

    def loop(self, num_steps: int, feed: Feed | None = None) -> Taken:
        """The loop as it is.

        Args:
            num_steps: whose time is taken.
            feed: in place of the job's own.
        """
        first = self._progress.step + 1
        last = self._progress.step + self._warm_steps + num_steps
        watched = _Watched(self.job, feed or self.job.feed, first + self._warm_steps)
        job = replace(
            self.job,
            config=replace(self.job.config, max_steps=last),
            feed=watched,  # type: ignore[arg-type]
            evaluate=watched.end,
        )
        self._progress = train(job, self._progress)
        return watched.taken

    def bare(self, fixed: Sequence[Sequence[Batch]], num_steps: int) -> Taken:
        """The same steps, of one process, as one would write them with torch alone."""
        with self.job.telemetry.paused():
            for number in range(self._warm_steps):
                self._bare_step(fixed[number % len(fixed)])
            start = now(self.job.session.device)
            for number in range(num_steps):
                self._bare_step(fixed[number % len(fixed)])
            end = now(self.job.session.device)
        images = num_steps * self.job.plan.global_batch_size
        return Taken(end.wall_s - start.wall_s, end.core_s - start.core_s, 0.0, images)

    def _bare_step(self, micro_batches: Sequence[Batch]) -> None:
        """What the mathematics of a step needs: global counts, gradients, momentum, statistics."""
        job, device = self.job, self.job.session.device
        model = job.session.unwrap(job.model)
        counts = torch.stack([count_for_loss(batch) for batch in micro_batches]).sum(0).to(device)
        for batch in micro_batches:
            on_device = batch.to(device)
            with autocast(job.config.train.precision, device):
                prediction = model(**on_device.inputs())
            ets_loss(prediction, on_device, counts, job.config.loss).total.backward()
        job.optimizer.optimizer.step()
        job.optimizer.optimizer.zero_grad()
        commit_batch_norm_statistics(model, lambda packed: packed)


def ready(job: Job, fixed: Sequence[Sequence[Batch]], *, overlap: bool = True) -> Feed:
    """A feed of micro-batches that lie ready: those of some steps, over and over.

    Args:
        job: whose model they are for.
        fixed: by step.
        overlap: False: nothing is done ahead of its step.
    """
    train_config = replace(job.config.train, overlap=overlap and job.config.train.overlap)
    config = replace(job.config, train=train_config)
    loader: Any = Ready(fixed, job.feed.loader)
    return Feed(loader, config, job.session, job.model)


@dataclass(frozen=True)
class Ready:
    """In place of a loader."""

    fixed: Sequence[Sequence[Batch]]
    """Micro-batches by step."""
    loader: Loader
    """Whose they are."""

    def batches(
        self, first_step: int, last_step: int, closing: Event | None = None
    ) -> Iterator[Batch]:
        """As `Loader.batches`."""
        for step in range(first_step, last_step + 1):
            for batch in self.fixed[step % len(self.fixed)]:
                yield replace(batch, step=step)

    @property
    def steps_per_epoch(self) -> int:
        """As the loader's."""
        return self.loader.steps_per_epoch

    @property
    def micro_steps(self) -> int:
        """As the loader's."""
        return self.loader.micro_steps

    def empty_batch(self) -> Batch:
        """As the loader's."""
        return self.loader.empty_batch()


class _Watched:
    """A feed that looks at the clock: from when to when, and how long its loader was waited for."""

    def __init__(self, job: Job, feed: Feed, first_timed_step: int) -> None:
        self._feed, self.loader = feed, feed.loader
        self._device, self._micro_steps = job.session.device, job.plan.micro_steps
        self._first_timed_step = first_timed_step
        self._waited_before_s, self._images = 0.0, 0
        self._start, self._end = Clock(0, 0), Clock(0, 0)

    @property
    def waited_s(self) -> float:
        """As `Feed.waited_s`."""
        return self._feed.waited_s

    @property
    def taken(self) -> Taken:
        """Of the timed steps."""
        start, end = self._start, self._end
        wall_s, core_s = end.wall_s - start.wall_s, end.core_s - start.core_s
        return Taken(wall_s, core_s, self.waited_s - self._waited_before_s, self._images)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """As `Feed.batches`, but endless: at the end of a round loaders have as much to do."""
        is_timed = False
        with closing(self._feed.batches(first_step, ENDLESS)) as made:
            for step in range(first_step, last_step + 1):
                if step == self._first_timed_step:  # all that the step before has asked for is done
                    is_timed, self._start = True, now(self._device)
                    self._waited_before_s = self.waited_s
                for batch in itertools.islice(made, self._micro_steps):
                    if is_timed:
                        self._images += int(batch.sample_valid.sum())
                    yield batch

    def end(self, step: int) -> dict:
        """Called by the loop after its last step, in place of an evaluation."""
        self._end = now(self._device)
        return {"loss": 0.0, "final": {"paper": {"f1": 0.0}}}


def _nobody_stops() -> StopRequest:
    """Of a run; a signal ends the benchmark, as it ends any script."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    stop = StopRequest()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return stop
