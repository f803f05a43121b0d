"""Saving while training goes on: what the thread writes, and what a run sees of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from magneto_dist.config import CheckpointConfig, Config, TrainConfig
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.errors import InputError
from magneto_dist.training.checkpoint import (
    Progress,
    find_damage,
    finish_renames,
    folder_of,
    load_optimizer,
    load_weights,
    newest_complete,
    read_progress,
    set_aside_later,
    steps,
)
from magneto_dist.training.checkpoint_writer import CheckpointWriter, Snapshot
from magneto_dist.training.session import Session
from magneto_dist.training.telemetry import Telemetry
from magneto_dist.training.weight_average import WeightAverage


class Run:
    """A convolution and a linear layer under SGD, and a writer of their checkpoints."""

    def __init__(self, session: Session, config: Config, telemetry: Telemetry) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
        model(torch.zeros(1, 3, 4, 4))
        model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        plan = BatchPlan(global_batch_size=2, num_ranks=1, micro_batch_size=2, micro_steps=1)
        self.model, self.optimizer = session.prepare(model, optimizer, plan)
        self.session, self.config, self.telemetry = session, config, telemetry

    def writer(self, when_complete: Callable[[int], None] = lambda step: None) -> CheckpointWriter:
        average = WeightAverage(self.model, self.config.train.ema_decay)
        given = self.session, self.config, self.model, self.optimizer, average, self.telemetry
        return CheckpointWriter(*given, when_complete)

    def train_step(self) -> None:
        self.session.backward(self.model(torch.randn(2, 3, 4, 4)).square().mean())
        self.session.step(self.model, self.optimizer)

    def state(self) -> dict[str, torch.Tensor]:
        momentum = self.optimizer.state_dict()["state"]
        both = dict(self.model.state_dict())
        both |= {f"momentum {i}": s["momentum_buffer"] for i, s in momentum.items()}
        return {name: tensor.clone() for name, tensor in both.items()}


@pytest.fixture
def make_run(demo_shards: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    num_threads = torch.get_num_threads()
    session = Session(TrainConfig())
    dataset = Dataset.open(str(demo_shards))
    plan = BatchPlan(global_batch_size=2, num_ranks=1, micro_batch_size=2, micro_steps=1)
    opened: list[Telemetry] = []

    def make(asynchronous: bool = True, keep: int = 2) -> Run:
        checkpoint = CheckpointConfig(asynchronous=asynchronous, keep=keep)
        config = Config(output_dir=str(tmp_path), checkpoint=checkpoint)
        loader = Loader(dataset, "train", config, session.world, plan, training=True)
        opened.append(Telemetry(tmp_path, session, config, Progress(), 10, loader))
        return Run(session, config, opened[-1])

    yield make
    for telemetry in opened:
        telemetry.__exit__()
    session.close()
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(num_threads)


def saved_state(run: Run, folder: Path) -> dict[str, torch.Tensor]:
    """What a fresh model and optimizer hold after reading a checkpoint."""
    fresh = Run(run.session, run.config, run.telemetry)
    load_weights(folder, fresh.session.unwrap(fresh.model))
    load_optimizer(fresh.session, folder, fresh.model, fresh.optimizer)
    return fresh.state()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_saved_is_the_state_of_its_step(
    make_run: Callable[..., Run], tmp_path: Path, asynchronous: bool
) -> None:
    run = make_run(asynchronous)
    states = {}
    with run.writer() as writer:
        for step in (1, 2, 3):
            run.train_step()
            states[step] = run.state()
            writer.save(Progress(step=step, num_ranks=1))
            assert asynchronous or find_damage(folder_of(tmp_path, step)) is None
        run.train_step()  # while the last one is written
        writer.wait()
    assert [path.name for path in steps(tmp_path)] == ["step-00000002", "step-00000003"]
    for step in (2, 3):
        folder = folder_of(tmp_path, step)
        assert find_damage(folder) is None
        read = saved_state(run, folder)
        assert read.keys() == states[step].keys()
        assert all(read[name].equal(states[step][name]) for name in read)


def test_training_goes_on_while_one_is_written_and_the_next_save_waits_for_it(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run, may_end, seen = make_run(), threading.Event(), []

    def when_complete(step: int) -> None:
        seen.append(step)
        assert may_end.wait(60)

    with run.writer(when_complete) as writer:
        run.train_step()
        writer.save(Progress(step=1, num_ranks=1))
        run.train_step()  # the thread is not done, and cannot be
        threading.Timer(0.2, may_end.set).start()
        writer.save(Progress(step=2, num_ranks=1))
        assert may_end.is_set()
        writer.wait()
    assert seen == [1, 2]


def test_an_error_of_the_thread_is_known_and_raised_by_the_next_wait(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run()
    full = OSError(28, "No space left on device")

    def when_complete(step: int) -> None:
        raise full

    with run.writer(when_complete) as writer:
        writer.save(Progress(step=1, num_ranks=1))
        while not writer.failed:
            threading.Event().wait(0.01)
        with pytest.raises(InputError, match="No space left on device"):
            writer.wait()
        assert not writer.failed


def test_a_run_that_ends_with_an_error_still_finishes_its_checkpoint(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run()

    def diverge() -> None:
        with run.writer() as writer:
            writer.save(Progress(step=1, num_ranks=1))
            raise InputError("diverged")

    with pytest.raises(InputError, match="diverged"):
        diverge()
    assert newest_complete(tmp_path) == folder_of(tmp_path, 1)


def test_a_checkpoint_of_the_same_step_is_replaced_and_never_missed(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run(keep=1)
    with run.writer() as writer:
        for evaluated in (False, True):
            writer.save(Progress(step=1, num_ranks=1, evaluated=evaluated))
        writer.wait()
    folder = folder_of(tmp_path, 1)
    assert read_progress(folder).evaluated
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    # Between both renames of the second save, a kill leaves this:
    temporary = folder.with_name(f".{folder.name}.tmp")
    folder.rename(temporary)
    folder.with_name(f".{folder.name}.old").mkdir()
    finish_renames(tmp_path)
    assert newest_complete(tmp_path) == folder
    # ... and while files are written, this:
    (temporary / "deepspeed").mkdir(parents=True)
    (temporary / "COMPLETE").write_text(json.dumps({"sha256": {}}))
    finish_renames(tmp_path)
    set_aside_later(tmp_path, 1)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_snapshots_reuse_their_memory_and_share_none_with_the_model() -> None:
    snapshot = Snapshot()
    weights = {"a": torch.ones(3, 2).T, "b": {0: torch.ones(2, dtype=torch.int64)}, "c": [1.5]}
    first = snapshot.take(weights)
    weights["a"] += 1
    assert first["a"].eq(1).all()
    second = snapshot.take(weights)
    assert second["a"].eq(2).all()
    assert second["c"] == [1.5]
    assert second["a"].data_ptr() == first["a"].data_ptr()
    weights["b"][0] = torch.ones(4)
    assert snapshot.take(weights)["b"][0].shape == (4,)
