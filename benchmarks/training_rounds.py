"""Rounds of the real training loop on batches of one's choice, and of a bare one beside it.

1. `training_job` puts a run together from its real parts: session, telemetry, checkpoints.
2. `Rounds.loop` trains some steps of it (`training.loop.train`) and takes the time from after the
   first ones to the end of the last one; what comes after that (evaluation, saving) is no part.
3. `Rounds.bare` takes the same steps as one would with torch alone, without accelerate, logs,
   metrics and ledger.
"""

from __future__ import annotations

import io
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harness import Clock, now
from magneto_dist.batch import Batch
from magneto_dist.config import Config
from magneto_dist.data.ahead import Stopwatch
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.loss import count_for_loss, ets_loss
from magneto_dist.model.norm import commit_batch_norm_statistics
from magneto_dist.parts import initial_model, prepare
from magneto_dist.precision import HALF_DTYPES
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

    def loop(
        self, batches: Callable[[int, int], Iterator[Batch]], num_steps: int, *, of_feed: bool
    ) -> Taken:
        """The loop as it is.

        Args:
            batches: the micro-batches of this rank from one global step to another, inclusive.
            num_steps: whose time is taken.
            of_feed: they are those of the job, which knows how long it waits for its loader; else
                any wait for them is one for data.
        """
        first = self._progress.step + 1
        last = self._progress.step + self._warm_steps + num_steps
        source = _Watched(self.job, batches, first + self._warm_steps, of_feed)
        job = replace(
            self.job,
            config=replace(self.job.config, max_steps=last),
            feed=source,  # type: ignore[arg-type]
            evaluate=source.end,
        )
        self._progress = train(job, self._progress)
        return source.taken

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
            with torch.autocast(device.type, **_autocast(job.config)):
                prediction = model(**on_device.inputs())
            ets_loss(prediction, on_device, counts, job.config.loss).total.backward()
        job.optimizer.optimizer.step()
        job.optimizer.optimizer.zero_grad()
        commit_batch_norm_statistics(model, lambda packed: packed)


def repeated(fixed: Sequence[Sequence[Batch]]) -> Callable[[int, int], Iterator[Batch]]:
    """The micro-batches of some steps, over and over, as those of the steps that are asked for."""

    def batches(first_step: int, last_step: int) -> Iterator[Batch]:
        for step in range(first_step, last_step + 1):
            for batch in fixed[step % len(fixed)]:
                yield replace(batch, step=step)

    return batches


class _Watched:
    """A feed that looks at the clock: from when to when, and how long it was waited for."""

    def __init__(
        self,
        job: Job,
        batches: Callable[[int, int], Iterator[Batch]],
        first_timed_step: int,
        of_feed: bool,
    ) -> None:
        self.steps_per_epoch, self.empty_batch = job.feed.steps_per_epoch, job.feed.empty_batch
        self._device, self._make = job.session.device, batches
        self._first_timed_step, self._micro_steps = first_timed_step, job.plan.micro_steps
        self._feed = job.feed if of_feed else None
        self._watch = Stopwatch()
        self._waited_before_s, self._images = 0.0, 0
        self._start, self._end = Clock(0, 0), Clock(0, 0)

    @property
    def waited_s(self) -> float:
        """As `Feed.waited_s`."""
        return self._watch.elapsed_s if self._feed is None else self._feed.waited_s

    @property
    def taken(self) -> Taken:
        """Of the timed steps."""
        start, end = self._start, self._end
        wall_s, core_s = end.wall_s - start.wall_s, end.core_s - start.core_s
        return Taken(wall_s, core_s, self.waited_s - self._waited_before_s, self._images)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """As `Feed.batches`."""
        is_timed = False
        with closing(self._make(first_step, last_step)) as made:  # type: ignore[type-var]
            for step in range(first_step, last_step + 1):
                if step == self._first_timed_step:  # all that the step before has asked for is done
                    is_timed, self._start = True, now(self._device)
                    self._waited_before_s = self.waited_s
                for _ in range(self._micro_steps):
                    with self._watch.running():
                        batch = next(made)
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


def _autocast(config: Config) -> dict[str, Any]:
    dtype = HALF_DTYPES.get(config.train.precision)
    return {"enabled": dtype is not None, "dtype": dtype}
