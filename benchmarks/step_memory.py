"""Training steps by themselves, and the memory that they take on this machine's GPU.

1. `training_job` puts together what `training.loop.train_step` works with, from the real parts.
2. `measure` takes two steps of it and asks torch's allocator; `predicted_memory.py` takes the same
   ones on fake tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from magneto_dist.batch import Batch
from magneto_dist.config import Config
from magneto_dist.data.order import BatchPlan
from magneto_dist.model.backbone import recompute_activations
from magneto_dist.model.magneto import build_model
from magneto_dist.training.heartbeat import Whereabouts
from magneto_dist.training.loop import Counts, Job, train_step
from magneto_dist.training.optim import build_optimizer
from magneto_dist.training.session import OptimizerStep, Session
from magneto_dist.training.weight_average import WeightAverage
from magneto_dist.world import World

MICRO_BATCHES = (1, 2)
"""Of the two steps. The first leaves momentum behind, its successor's second micro-batch meets the
gradients of the one before; those after it would meet nothing new."""


def plan_of(config: Config) -> BatchPlan:
    """The global batch of `config`, cut for one process."""
    train = config.train
    return BatchPlan.derive(
        train.global_batch_size, 1, train.max_micro_batch_size, config.model.batch_norm_group_size
    )


def model_of(config: Config, num_tags: int) -> nn.Module:
    """The model that a run of `config` trains, on torch's default device."""
    model = build_model(config.model, num_tags)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.train.activation_checkpointing:
        recompute_activations(model)
    return model


def training_job(config: Config, session: Session, model: Any, optimizer: Any) -> Job:
    """The parts of a run that `train_step` uses; it does not look at the others.

    An average of the weights (train.ema_decay) is left out: as much as those that are trained.
    """
    others = ("schedule", "feed", "telemetry", "stop", "evaluate", "checkpoints")
    unused: dict[str, Any] = dict.fromkeys(others)
    return Job(
        config=config,
        session=session,
        model=model,
        optimizer=optimizer,
        plan=plan_of(config),
        average=WeightAverage(nn.Identity(), decay=0),
        whereabouts=Whereabouts(),
        **unused,
    )


def noise(config: Config, num_tags: int) -> list[list[Batch]]:
    """The micro-batches of each step, on CPU: random pixels and tags."""
    plan, slots, size = plan_of(config), config.tags.max_tags, config.augment.image_size
    rows = plan.micro_batch_size
    return [
        [
            Batch(
                tag_ids=torch.randint(num_tags, (rows, slots)),
                tag_mask=torch.ones(rows, slots, dtype=torch.bool),
                target=torch.rand(rows, slots) < 0.5,
                outlier=torch.zeros(rows, slots, dtype=torch.bool),
                sample_valid=torch.ones(rows, dtype=torch.bool),
                sample_ids=torch.arange(rows),
                tags_cut=torch.zeros(rows, dtype=torch.int64),
                targets_cut=torch.zeros(rows, dtype=torch.int64),
                pixels=torch.randint(256, (rows, 3, size, size), dtype=torch.uint8),
                keys=("",) * rows,
                step=step,
                micro_step=micro_step,
                epoch=0,
            )
            for micro_step in range(min(most, plan.micro_steps))
        ]
        for step, most in enumerate(MICRO_BATCHES, start=1)
    ]


def take_steps(job: Job, batches: Sequence[Sequence[Batch]]) -> None:
    """Trains on the micro-batches of each step."""
    for micro_batches in batches:
        items = len(micro_batches) * job.plan.micro_batch_size
        counts = Counts(items, items * job.config.tags.max_tags, 0, 0)
        train_step(job, micro_batches, counts, log=False)


class BareSession(Session):
    """One process, and any device: accelerate knows only those that are there.

    Of fp16's loss scaler it has nothing: three numbers on the device, and it unscales in place.
    """

    def __init__(self, device: torch.device, model: nn.Module) -> None:
        self.world, self._place, self._model = World(), device, model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._place

    @contextlib.contextmanager
    def micro_step(self, model: object, *, is_last: bool) -> Iterator[None]:
        """As it comes."""
        yield

    def backward(self, loss: Tensor) -> None:
        """Without a scaler."""
        loss.backward()

    def step(
        self, model: object, optimizer: torch.optim.Optimizer, *, measures_norm: bool = False
    ) -> OptimizerStep:
        """Moves the weights and gives the gradients' memory back."""
        optimizer.step()
        optimizer.zero_grad()
        return OptimizerStep(None, skipped=False)

    def unwrap(self, model: object) -> nn.Module:
        """The model without autocast."""
        return self._model

    def reduce_sum(self, tensor: Tensor) -> Tensor:
        """Of one process."""
        return tensor


@dataclass(frozen=True)
class Measured:
    """By torch's allocator, in bytes."""

    allocated: int
    """Of tensors and workspaces at the peak."""
    reserved: int
    """What the allocator had taken from the GPU for it."""
    context: int
    """What else of the GPU is in use: CUDA context, kernels, libraries, other processes."""
    ran_out: bool
    """The limit was too small; the other numbers are those until then."""


def measure(
    config: Config, num_tags: int, limit_bytes: int | None, snapshot: str | None = None
) -> Measured:
    """Two steps on this machine's GPU, through accelerate; once a process.

    Args:
        config: whose steps.
        num_tags: size of the vocabulary.
        limit_bytes: what the allocator may take from the GPU, to stand for a smaller one.
        snapshot: file for `torch.cuda.memory._dump_snapshot` (see pytorch.org/memory_viz).
    """
    total = torch.cuda.mem_get_info()[1]
    if limit_bytes is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total))
    if snapshot:
        torch.cuda.memory._record_memory_history()
    session = Session(config.train, config.optim.clip_norm)
    model = model_of(config, num_tags)
    optimizer = build_optimizer(model, config.optim)
    wrapped, optimizer = session.prepare(model, optimizer, plan_of(config))
    job, batches = training_job(config, session, wrapped, optimizer), noise(config, num_tags)
    ran_out = _runs_out(lambda: _train_with_momentum(job, batches))
    torch.cuda.synchronize()
    if snapshot:
        torch.cuda.memory._dump_snapshot(snapshot)
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    in_use = total - torch.cuda.mem_get_info()[0]  # by everybody on this GPU
    return Measured(allocated, reserved, in_use - torch.cuda.memory_reserved(), ran_out)


def _train_with_momentum(job: Job, batches: Sequence[Sequence[Batch]]) -> None:
    """fp16 skips steps until its loss scale fits; before the first real one is no momentum."""
    for _ in range(20):
        has_momentum = bool(job.optimizer.state)
        take_steps(job, batches)
        if has_momentum:
            return


def _runs_out(call: Callable[[], object]) -> bool:
    try:
        call()
    except torch.OutOfMemoryError:
        return True
    return False
