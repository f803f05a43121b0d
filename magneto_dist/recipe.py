"""From a Config to a trained model: puts the parts of a run together, in order.

1. Join the processes; take the run folder (one writer); watch over each other.
2. Open the data, derive the micro-batches, make sure that all ranks mean the same; build model and
   optimizer. What one rank meets here stops all.
3. Resume from the newest complete checkpoint, or initialise; compute features where they are to be
   cached.
4. Train; evaluate as the loop asks; write summary and final table.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from magneto_dist.batch import Reject
from magneto_dist.config import Config
from magneto_dist.data.feature_files import FeatureViews
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.errors import PreemptedError
from magneto_dist.evaluation import collecting_rejects, evaluate_model
from magneto_dist.parts import derive_plan, initial_model, open_data, prepare
from magneto_dist.report import examples_figure, final_table
from magneto_dist.training.board import write_hparams
from magneto_dist.training.checkpoint import (
    AVERAGED_WEIGHTS,
    Progress,
    load_optimizer,
    read_progress,
    read_tensors,
    set_aside_later,
    steps,
)
from magneto_dist.training.checkpoint_writer import CheckpointWriter
from magneto_dist.training.feature_cache import cached_features
from magneto_dist.training.feed import Feed
from magneto_dist.training.heartbeat import Watchdog, Whereabouts
from magneto_dist.training.loop import Job, train
from magneto_dist.training.optim import Schedule
from magneto_dist.training.preflight import check_agreement, require_checkpoint_space
from magneto_dist.training.process import StopRequest, die_with_launcher
from magneto_dist.training.resume import (
    checkpoint_to_resume,
    fingerprint,
    settled_precision,
    with_precision,
)
from magneto_dist.training.run_folder import RunFolder
from magneto_dist.training.session import Session
from magneto_dist.training.telemetry import Telemetry
from magneto_dist.training.weight_average import WeightAverage


def run_training(config: Config) -> None:
    """Trains as `config` says and leaves a complete run folder.

    Raises:
        InputError: bad configuration or input, before anything is written where possible.
        PreemptedError: stopped by a signal after saving.
        StalledError: a rank did not come.
    """
    die_with_launcher()
    stop = StopRequest()
    session = Session(config.train, config.optim.clip_norm)
    whereabouts = Whereabouts(is_patient=config.train.compile)
    run_dir, timeout_s = Path(config.output_dir), config.train.collective_timeout_s
    try:
        with (
            _run_folder(session, config) as run,
            Watchdog(session, run_dir, timeout_s, whereabouts, _failure_writer(run)),
        ):
            _train_in_folder(config, session, stop, run, whereabouts)
    except PreemptedError as preempted:
        traceback.clear_frames(preempted.__traceback__)  # they hold the model
        session.close()
        raise
    session.close()


@contextmanager
def _run_folder(session: Session, config: Config) -> Iterator[RunFolder | None]:
    """The run folder, held by the main process; its status tells how the run ended."""
    held: list[RunFolder] = []
    session.from_main(lambda: held.append(RunFolder(Path(config.output_dir))))
    run = held[0] if held else None
    try:
        yield run
    except BaseException as error:
        if run is not None:
            state = "preempted" if isinstance(error, PreemptedError) else "failed"
            run.write_failure(state, _newest_step(run.path), str(error) or type(error).__name__)
        raise
    finally:
        if run is not None:
            run.close()


def _newest_step(run_dir: Path) -> int:
    folders = steps(run_dir)
    return int(folders[-1].name.removeprefix("step-")) if folders else 0


def _train_in_folder(
    config: Config,
    session: Session,
    stop: StopRequest,
    run: RunFolder | None,
    whereabouts: Whereabouts,
) -> None:
    dataset = session.on_all(lambda: open_data(config))
    whereabouts.at("start")
    checkpoint = session.from_main(lambda: checkpoint_to_resume(config, dataset))
    # Of the main process: machines of ranks may differ.
    precision = session.from_main(partial(settled_precision, config, checkpoint))
    config = session.on_all(partial(with_precision, config, precision))
    whereabouts.at("start")
    start = session.on_all(lambda: read_progress(checkpoint) if checkpoint else Progress())
    plan = derive_plan(config, session, start)
    if run is not None and plan.idle_ranks:
        print(
            f"warning: {plan.idle_ranks} of {plan.num_ranks} processes have nothing to do: a global"
            f" batch of {plan.global_batch_size} gives work to {plan.num_ranks - plan.idle_ranks}"
            f" with --model.batch_norm_group_size {config.model.batch_norm_group_size}; lower that,"
            " or raise --train.global_batch_size",
            file=sys.stderr,
        )
    loader = session.on_all(
        lambda: Loader(dataset, "train", config, session.world, plan, training=True)
    )
    check_agreement(session, config, loader, plan, start)
    total_steps = _total_steps(config, loader)
    if checkpoint and start.step >= total_steps and start.evaluated:
        if run is not None:
            if run.has_summary_of(start.step):
                run.write_status("done", start.step)
            else:  # killed just before it was written
                _finish(run, start, config, session, loader)
            print(f"{config.output_dir} is finished: {start.step} of {total_steps} steps are done")
        return
    session.from_main(lambda: _begin(run, start, config, dataset))
    model = session.on_all(lambda: initial_model(config, dataset, checkpoint))
    session.from_main(lambda: require_checkpoint_space(config, model))
    whereabouts.at("start")
    features = None
    if config.data.feature_views:
        features = cached_features(
            config,
            session,
            dataset,
            loader.decoder,
            model,
            lambda: stop.signal is not None,
            whereabouts,
        )
        loader = Loader(
            dataset, "train", config, session.world, plan, training=True, features=features.train
        )
        whereabouts.at("start")
    schedule = Schedule(config.optim, total_steps)
    wrapped, optimizer = prepare(config, session, model, plan)
    if checkpoint:
        load_optimizer(session, checkpoint, wrapped, optimizer)
        session.warn_of_lost_state()
        schedule.load_state_dict(start.schedule)
    average = WeightAverage(
        session.unwrap(wrapped), config.train.ema_decay, start.step - start.skipped_steps
    )
    if checkpoint and config.train.ema_decay:
        averages = checkpoint / AVERAGED_WEIGHTS
        session.on_all(lambda: average.load(read_tensors(averages)))
    start = replace(
        start,
        num_ranks=session.world.num_ranks,
        micro_batch_size=plan.micro_batch_size,
        micro_steps=plan.micro_steps,
        deepspeed=session.is_deepspeed,
        data_fingerprint=fingerprint(dataset),
        vocabulary_sha256=dataset.vocabulary.sha256,
        schedule=schedule.state_dict(),
    )
    run_dir = Path(config.output_dir)
    with (
        Telemetry(run_dir, session, config, start, total_steps, loader, whereabouts) as log,
        CheckpointWriter(
            session, config, wrapped, optimizer, average, log, _status_writer(run)
        ) as writer,
    ):
        job = Job(
            config=config,
            session=session,
            model=wrapped,
            optimizer=optimizer,
            schedule=schedule,
            feed=Feed(loader, config, session, wrapped),
            plan=plan,
            telemetry=log,
            whereabouts=whereabouts,
            stop=stop,
            average=average,
            evaluate=_Evaluation(
                config,
                session,
                dataset,
                plan,
                wrapped,
                log,
                None if features is None else features.validation,
            ),
            checkpoints=writer,
        )
        end = train(job, start)
    if run is not None:
        _finish(run, end, config, session, loader)


def _total_steps(config: Config, loader: Loader) -> int:
    steps = config.train.epochs * loader.steps_per_epoch
    return min(steps, config.max_steps or steps)


def _begin(run: RunFolder | None, start: Progress, config: Config, dataset: Dataset) -> None:
    assert run is not None, "the main process holds it"
    set_aside_later(run.path, start.step)
    run.write_settings(config, dataset.vocabulary)
    run.write_status("running", start.step)


@dataclass(frozen=True)
class _Evaluation:
    """Called by the loop at a step: validation metrics, the same on all ranks."""

    config: Config
    session: Session
    dataset: Dataset
    plan: BatchPlan
    model: nn.Module
    telemetry: Telemetry
    features: FeatureViews | None

    def __call__(self, step: int) -> dict:
        config, world = self.config, self.session.world
        loader = Loader(
            self.dataset,
            "validation",
            config,
            world,
            self.plan,
            training=False,
            features=self.features,
        )
        rejects: list[Reject] = []
        feed = Feed(loader, config, self.session, self.model, shows_pictures=True)
        self.telemetry.whereabouts.at("evaluation")
        with self.telemetry.paused(), closing(feed.batches(1, loader.steps_per_epoch)) as made:
            batches = collecting_rejects(made, rejects)
            batches = self.telemetry.whereabouts.at_each("evaluation", batches)
            metrics, curves, examples = evaluate_model(
                self.model,
                batches,
                device=self.session.device,
                reduce=self.session.reduce_sum,
                config=config,
                num_tags=len(self.dataset.vocabulary),
                num_examples=config.log.pictures if self.telemetry.shows_pictures else 0,
            )
            self.telemetry.evaluation_done(step, metrics, curves, rejects)
            if examples:
                figure = examples_figure(examples, self.dataset.vocabulary, config.train.threshold)
                self.telemetry.show(step, figure)
        return metrics


def _status_writer(run: RunFolder | None) -> Callable[[int], None]:
    """Records how far the run is on disk, in the process that holds its folder."""
    return lambda step: None if run is None else run.write_status("running", step)


def _failure_writer(run: RunFolder | None) -> Callable[[str], None]:
    """Records why the run ends, in the process that holds its folder."""
    return lambda reason: (
        None if run is None else run.write_failure("failed", _newest_step(run.path), reason)
    )


def _finish(
    run: RunFolder, end: Progress, config: Config, session: Session, loader: Loader
) -> None:
    if config.log.tensorboard:
        write_hparams(run.path / "tensorboard", config)
    summary = _summary(end, session, loader)
    run.write_summary(summary)
    run.write_status("done", end.step)
    print(final_table(end.validation))
    print(f"run folder: {run.path}   ({summary['images_per_second']:.0f} images/s)")


def _summary(end: Progress, session: Session, loader: Loader) -> dict[str, Any]:
    return {
        "step": end.step,
        "epoch": (end.step - 1) // loader.steps_per_epoch,
        "world_size": session.world.num_ranks,
        "images_per_second": end.trained_items / max(end.train_s, 1e-9),
        "data_wait_fraction": end.data_wait_s / max(end.train_s, 1e-9),
        "trained_items": end.trained_items,
        "tags_cut": end.tags_cut,
        "targets_cut": end.targets_cut,
        "skipped_steps": end.skipped_steps,
        "best": {"step": end.best_step, "f1": end.best_f1},
        "validation": end.validation,
    }
