"""What a run tells while it goes on: bar, metrics.jsonl, TensorBoard, ledger, quarantine.

Every rank keeps its own ledger and quarantine; the main process writes the rest. Numbers are global
and reduced only at the steps that are logged.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from magneto_dist.batch import LEFT_OUT, Batch, Reject
from magneto_dist.binning import Curves
from magneto_dist.config import Config
from magneto_dist.data.ledger import Ledger, Quarantine
from magneto_dist.data.loader import Loader
from magneto_dist.data.step_log import StepLog, cut_back_all
from magneto_dist.errors import InputError
from magneto_dist.metrics import summarise
from magneto_dist.training.board import Board
from magneto_dist.training.checkpoint import Progress
from magneto_dist.training.divergence import require_finite_loss
from magneto_dist.training.feed import Feed
from magneto_dist.training.heartbeat import Whereabouts
from magneto_dist.training.session import Session
from magneto_dist.training.step_profile import StepProfile

if TYPE_CHECKING:
    from magneto_dist.training.loop import StepResult


class Telemetry:
    """Logs of one run, cut back to where it goes on from.

    The ledger names the samples of every step that was taken, those of a step that fp16 skipped
    included: they were fed, though no weight moved. `skipped_steps` counts such steps, from the
    beginning of the run.

    Args:
        run_dir: RUN_DIR.
        session: this process among its peers.
        config: settings of the run.
        start: where the run goes on from.
        total_steps: last global step of the run.
        loader: of the training split.
        whereabouts: of this process, noted where the phase changes.
    """

    def __init__(
        self,
        run_dir: Path,
        session: Session,
        config: Config,
        start: Progress,
        total_steps: int,
        loader: Loader,
        whereabouts: Whereabouts | None = None,
    ) -> None:
        self._session, self._config = session, config
        self.whereabouts = whereabouts or Whereabouts()
        self._total_steps, self._steps_per_epoch = total_steps, loader.steps_per_epoch
        self._max_bad = {
            split: max(1, int(config.data.max_bad_fraction * loader.dataset.num_samples(split)))
            for split in ("train", "validation")
        }
        self._closing = ExitStack()
        session.from_main(lambda: _cut_back(run_dir, start))  # also the files of former ranks
        file = f"rank-{session.world.rank:05d}.jsonl"
        self._quarantine = self._open(Quarantine(run_dir / "quarantine" / file))
        self._ledger = None
        if config.data.ledger:
            self._ledger = self._open(Ledger(run_dir / "ledger" / file))
        self._metrics = self._board = self._profile = self._bar = None
        if session.is_main:
            self._open_main(run_dir, start)
        self._wait_s = self._stall_s = 0.0
        self._mark_s = time.perf_counter()
        self._window = (start.trained_items, start.train_s, start.data_wait_s)

    def _open_main(self, run_dir: Path, start: Progress) -> None:
        metrics = self._metrics = self._open(StepLog(run_dir / "metrics.jsonl"))
        if self._config.log.tensorboard:
            lines = metrics.entries_from(start.step)
            self._board = self._open(Board(run_dir / "tensorboard", start, lines))
        if self._config.log.profile_steps:
            folder, device = run_dir / "profile", self._session.device
            self._profile = self._open(StepProfile(folder, self._config.log, start.step, device))
            if start.step + self._config.log.profile_after_steps >= self._total_steps:
                print(
                    f"warning: no step is profiled: only {self._total_steps - start.step} are left,"
                    f" and --log.profile_after_steps {self._config.log.profile_after_steps} of them"
                    " come before: lower that",
                    file=sys.stderr,
                )
        self._bar = self._open(
            tqdm(total=self._total_steps, initial=start.step, unit="step", dynamic_ncols=True)
        )

    def _open(self, log: Any) -> Any:
        self._closing.callback(log.close)
        return log

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    @contextmanager
    def waiting_for_data(self, step: int, feed: Feed) -> Iterator[None]:
        """Counts as waiting for the data of `step` what `feed` waits for its loader inside."""
        if self._profile is not None:
            with self._not_counted():
                self._profile.begins(step)
        self.whereabouts.at("data", step)
        waited_s = feed.waited_s
        with nullcontext() if self._profile is None else self._profile.waiting():
            yield
        self._wait_s += feed.waited_s - waited_s
        self.whereabouts.at("training")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (evaluation, saving) is not training time."""
        with self._not_counted():
            if self._profile is not None:
                self._profile.interrupted()
            yield

    @contextmanager
    def _not_counted(self) -> Iterator[None]:
        started_at_s = time.perf_counter()
        yield
        self._mark_s += time.perf_counter() - started_at_s

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Time inside is what a checkpoint costs: training stands still."""
        self.whereabouts.at("saving")
        started_at_s = time.perf_counter()
        with self.paused():
            yield
        self._stall_s += time.perf_counter() - started_at_s

    def logs(self, step: int) -> bool:
        """Whether the metrics of this step are logged."""
        return step % self._config.log.every_steps == 0 or step == self._total_steps

    def step_done(
        self, progress: Progress, micro_batches: Sequence[Batch], result: StepResult, lr: float
    ) -> Progress:
        """Records a completed optimizer step; returns `progress` with its times.

        Raises:
            InputError: more bad samples than `data.max_bad_fraction` allows; at a logged step, a
                loss that is not finite.
        """
        self._record_samples(micro_batches)
        now_s = time.perf_counter()
        progress = replace(
            progress,
            train_s=progress.train_s + now_s - self._mark_s,
            data_wait_s=progress.data_wait_s + self._wait_s,
        )
        self._mark_s, self._wait_s = now_s, 0.0
        if self._bar is not None:
            self._bar.update()
        if self.logs(progress.step):
            self._log_step(progress, result, lr)
        if self._profile is not None:
            with self._not_counted():
                self._profile.ends(progress.step)
        return progress

    @property
    def shows_pictures(self) -> bool:
        """Whether `show` has somewhere to show them."""
        return self._board is not None

    def evaluation_done(
        self, step: int, metrics: dict, curves: Curves, rejects: Sequence[Reject]
    ) -> None:
        """Records what all ranks found, nested metrics and curves, and this rank's bad samples.

        Raises:
            InputError: more bad samples than `data.max_bad_fraction` allows, or a loss that is not
                finite.
        """
        require_finite_loss(self._session, step, metrics["loss"], "validation loss")
        epoch = (step - 1) // self._steps_per_epoch
        self._record_rejects("validation", rejects, epoch, step)
        if self._metrics is not None:
            self._write(step, "validation", flatten(metrics))
        if self._board is not None:
            self._board.curves(step, curves)

    def show(self, step: int, figure: Any) -> None:
        """Puts validation pictures into TensorBoard."""
        if self._board is not None:
            self._board.pictures(step, figure)

    def flush(self) -> None:
        """Waits until everything written so far is on disk."""
        for log in (self._quarantine, self._ledger, self._metrics):
            if log is not None:
                log.flush()
        if self._board is not None:
            self._board.flush()

    def _record_samples(self, micro_batches: Sequence[Batch]) -> None:
        for batch in micro_batches:
            self._record_rejects("train", batch.rejects, batch.epoch, batch.step)
            if self._ledger is not None:
                valid = batch.sample_valid.tolist()
                keys = [key for key, is_valid in zip(batch.keys, valid, strict=True) if is_valid]
                self._ledger.write(epoch=batch.epoch, step=batch.step, keys=keys)

    def _record_rejects(self, split: str, rejects: Sequence[Reject], epoch: int, step: int) -> None:
        rejects = [reject for reject in rejects if reject.reason != LEFT_OUT]
        for reject in rejects:
            self._quarantine.write(split=split, epoch=epoch, step=step, reject=reject)
        if rejects and (num_bad := self._quarantine.num_keys[split]) > self._max_bad[split]:
            raise InputError(
                f"{num_bad} bad samples of {split!r} on this rank, more than"
                f" --data.max_bad_fraction {self._config.data.max_bad_fraction} allows; the last is"
                f" {rejects[-1].key} in {rejects[-1].shard}: {rejects[-1].reason}; all are in"
                f" {self._quarantine.path.parent}"
            )

    def _log_step(self, progress: Progress, result: StepResult, lr: float) -> None:
        names = sorted(result.sums)
        # Loss and metric sums travel in one reduction; a device synchronisation.
        packed = [result.loss.double().reshape(1), *(result.sums[n].reshape(-1) for n in names)]
        sizes = [part.numel() for part in packed]
        reduced = self._session.reduce_sum(torch.cat(packed)).cpu().split(sizes)
        require_finite_loss(self._session, progress.step, reduced[0].item())  # NaN is no JSON
        if self._metrics is None:
            return
        sums = {
            name: part.reshape(result.sums[name].shape)
            for name, part in zip(names, reduced[1:], strict=True)
        }
        items, train_s, wait_s = self._window
        window_s = max(progress.train_s - train_s, 1e-9)
        values = {
            "loss": reduced[0].item(),
            "lr": lr,
            "skipped_steps": progress.skipped_steps,
            "images_per_second": (progress.trained_items - items) / window_s,
            "data_wait_fraction": (progress.data_wait_s - wait_s) / window_s,
            "checkpoint_stall_s": self._stall_s,  # since the line before
            **flatten(summarise(sums)),
        }
        if result.gradient_norm is not None and result.gradient_norm.isfinite():
            # fp16 overflows now and then; such a step is skipped, and its norm is no number
            values["gradient_norm"] = float(result.gradient_norm)
        self._window = (progress.trained_items, progress.train_s, progress.data_wait_s)
        self._stall_s = 0.0
        self._write(progress.step, "train", values)
        self._show(values)

    def _write(self, step: int, split: str, values: dict[str, float]) -> None:
        assert self._metrics is not None
        epoch = (step - 1) // self._steps_per_epoch
        self._metrics.append({"step": step, "epoch": epoch, "split": split, **values})
        if self._board is not None:
            self._board.scalars(step, split, values)

    def _show(self, values: dict[str, float]) -> None:
        assert self._bar is not None
        f1 = next(
            values[k] for k in (f"{h}/paper/f1" for h in ("final", "image", "tag")) if k in values
        )
        self._bar.set_postfix_str(
            f"loss {values['loss']:.3f}, F1 {f1:.3f}, {values['images_per_second']:.0f} images/s,"
            f" data wait {values['data_wait_fraction']:.0%}"
        )


def _cut_back(run_dir: Path, start: Progress) -> None:
    # A kill between an evaluation and its checkpoint has left the evaluation's lines.
    step, evaluated = start.step, start.evaluated
    metrics = StepLog(run_dir / "metrics.jsonl")  # alone: files of the user may lie beside it
    metrics.cut_back(step, evaluated=evaluated)
    metrics.close()
    for folder in ("ledger", "quarantine"):
        cut_back_all(run_dir / folder, step, evaluated=evaluated)


def flatten(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics as `final/paper/f1: 0.9`; leaves out what has no value."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        elif value is not None:
            flat[prefix + name] = float(value)
    return flat
