"""Where the time of `training_rate.py` goes: core-seconds an image of each stage, each alone.

Processor time, not time on the clock, so that others on the machine disturb little; and taken while
all cores do the same (`training_rate.py` starts as many processes): they share cache and memory.

1. Loading in this process: reading, decoding, augmenting. Through one loader process: what that and
   this process take more is the way of a batch from one to the other. Of both a short length is
   taken off a long one, so that starting costs nothing. Ranks load for themselves.
2. The frozen forward pass; all else of forward and backward pass; the optimizer; with several ranks
   all of whom do this at once, as many bytes reduced as gradients have.
3. `framework` is what the training processes of the whole way take beyond the stages in them.

Cores / the sum of the stages is the rate that could be reached if all cores always had work. The
way from process to process and the framework are none of these stages, but what a system adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import mean, median

import psutil
import torch
import torch.distributed as dist
from torch import nn

from magneto_dist.batch import Batch
from magneto_dist.config import Config
from magneto_dist.data.feature_files import FeatureViews
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.loss import count_for_loss, ets_loss
from magneto_dist.model.backbone import Backbone
from magneto_dist.model.image_stream import frozen_regions
from magneto_dist.parts import derive_plan, initial_model, prepare
from magneto_dist.training.checkpoint import Progress
from magneto_dist.training.feature_cache import cached_features
from magneto_dist.training.heartbeat import Whereabouts
from magneto_dist.training.session import Session
from magneto_dist.world import World
from throughput_stages import gradient_buckets
from training_rate_data import Case
from training_rate_paper import (
    batches_of_paper,
    forward_backward_of_paper,
    frozen_part,
    network_of_paper,
    optimizer_of_paper,
)

STAGES = (
    "read, decode, augment",
    "frozen forward",
    "trained forward, backward",
    "optimizer",
    "all-reduce",
)
ADDED = ("to the training process", "framework")
_LOAD, _FROZEN, _TRAINED, _OPTIMIZER, _REDUCE = STAGES
_SEND, _FRAMEWORK = ADDED
_HERE = "in the training process"  # of loading and sending
_FEW_STEPS = 2
_LOADED_IMAGES = 1024

Split = dict[str, float]
"""Core-seconds an image by the name of a stage."""
Batches = Callable[[int, int], Iterable[object]]
"""(loader processes, steps) -> batches."""


def split_of_paper(case: Case) -> Split:
    """Stages of the paper's way."""
    network = network_of_paper(case)
    optimizer = optimizer_of_paper(network, case)
    item = next(iter(batches_of_paper(case, 0, 1)))
    backbone: nn.Sequential = network.image_stream.backbone  # type: ignore[union-attr,assignment]
    frozen = frozen_part(backbone, case.config.model)

    def compute() -> None:
        optimizer.zero_grad()
        forward_backward_of_paper(network, case, item)

    return {
        **_loading(partial(batches_of_paper, case), case.batch, ranks=1),
        **_training(
            lambda: frozen(item[0]),
            compute,
            optimizer,
            [],
            case.batch,
            case.set_up.repeats,
            in_compute=True,
        ),
    }


def split_of_ours(case: Case, *, cached: bool) -> Split:
    """Stages of this system, live or with cached features; the mean of all ranks."""
    data = replace(case.config.data, path=case.shards, feature_views=int(cached), num_workers=0)
    config = replace(case.config, data=replace(data, cache_dir=str(case.folder / "cache")))
    session = Session(config.train, config.optim.clip_norm)
    dataset, ranks = Dataset.open(case.shards), session.world.num_ranks
    plan = derive_plan(config, session, Progress())
    model = initial_model(config, dataset, None)
    features = None
    if cached:
        made = cached_features(config, session, dataset, "cpu", model, bool, Whereabouts())
        features = made.train
    wrapped, optimizer = prepare(config, session, model, plan)
    batches = partial(_our_batches, config, dataset, session.world, plan, features)
    batch = next(iter(batches(0, 1)))
    counts = count_for_loss(batch)
    frozen = None
    if batch.pixels is not None:
        backbone: Backbone = model.image_stream.backbone  # type: ignore[union-attr,assignment]
        frozen = torch.no_grad()(partial(frozen_regions, backbone, batch.pixels))
        batch = replace(batch, pixels=None, features=frozen())  # the rest goes on from there

    def compute() -> None:
        optimizer.zero_grad()
        with session.micro_step(wrapped, is_last=False):
            prediction = wrapped(**batch.inputs())
            session.backward(ets_loss(prediction, batch, counts, config.loss).total)

    hook = config.train.ddp_comm_hook
    buckets = gradient_buckets(model, hook, session.device) if ranks > 1 else []
    images = case.batch / ranks
    split = {
        **_loading(batches, images, ranks),
        **_training(frozen, compute, optimizer, buckets, images, case.set_up.repeats),
    }
    each = session.gather(split)
    session.close()
    return {stage: mean(of_rank[stage] for of_rank in each) for stage in split}


def with_framework(split: Split, training_s: float) -> Split:
    """All stages and what is added, given what the training processes of the whole way take."""
    here = split[_HERE] + sum(split[stage] for stage in (_FROZEN, _TRAINED, _OPTIMIZER, _REDUCE))
    every = {**split, _FRAMEWORK: training_s - here}
    return {stage: every[stage] for stage in (*STAGES, *ADDED)}


def attainable(rounds: Sequence[tuple[Split, float]], cores: int) -> dict[str, float]:
    """Images/s that this machine allows, and which share of them was reached: medians of rounds.

    Args:
        rounds: of each what `with_framework` made of it, and the images/s reached in it.
        cores: that all processes share.
    """
    core_s = [sum(split[stage] for stage in STAGES) for split, _ in rounds]
    reached = [per_s for _, per_s in rounds]
    shares = [per_s * taken_s / cores for per_s, taken_s in zip(reached, core_s, strict=True)]
    return {
        "stages, core-ms": median(core_s) * 1e3,
        "attainable, images/s": cores / median(core_s),
        "reached, images/s": median(reached),
        "share": median(shares),
        "lowest share": min(shares),
        "highest share": max(shares),
    }


def medians(splits: Sequence[Split]) -> Split:
    """Stage by stage."""
    return {stage: median(split[stage] for split in splits) for stage in splits[0]}


def print_splits(splits: Mapping[str, Split], reached: Mapping[str, Mapping[str, float]]) -> None:
    """A table in core-milliseconds; `reached` is of `attainable`."""
    widths = {name: len(name) + 2 for name in splits}
    print(f"\n{'core-ms an image':<26}" + "".join(f"{n:>{w}}" for n, w in widths.items()))
    rows = {stage: {n: splits[n][stage] * 1e3 for n in splits} for stage in (*STAGES, *ADDED)}
    labels = next(iter(reached.values()))
    rows |= {label: {n: reached[n][label] for n in splits} for label in labels}
    for label, row in rows.items():
        print(f"{label:<26}" + "".join(f"{row[n]:>{w}.2f}" for n, w in widths.items()))


def _our_batches(
    config: Config,
    dataset: Dataset,
    world: World,
    plan: BatchPlan,
    features: FeatureViews | None,
    workers: int,
    steps: int,
) -> Iterator[Batch]:
    config = replace(config, data=replace(config.data, num_workers=workers))
    loader = Loader(dataset, "train", config, world, plan, training=True, features=features)
    return loader.batches(1, steps)


def _loading(batches: Batches, images: float, ranks: int) -> Split:
    """`images` are those of a rank in a step."""
    (load, _) = _loaded_apart(batches, 0, images)
    if ranks > 1:  # without loader processes, which would take cores from other ranks
        return {_LOAD: load, _SEND: 0.0, _HERE: load}
    here, there = _loaded_apart(batches, 1, images)
    return {_LOAD: load, _SEND: here + there - load, _HERE: here}


def _loaded_apart(batches: Batches, workers: int, images: float) -> tuple[float, float]:
    """Core-seconds an image of this process and of its loader processes, without their start."""
    more_steps = max(round(_LOADED_IMAGES / images), 1)
    few, all_of_them = (_loaded(batches, workers, n) for n in (_FEW_STEPS, _FEW_STEPS + more_steps))
    here, there = (
        (more - less) / (more_steps * images) for less, more in zip(few, all_of_them, strict=True)
    )
    return here, there


def _loaded(batches: Batches, workers: int, steps: int) -> tuple[float, float]:
    """Core-seconds of this process and of its loader processes for so many batches."""
    before_s = time.process_time()
    iterator = iter(batches(workers, steps))
    for _ in range(steps):
        next(iterator)
    here_s = time.process_time() - before_s
    times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return here_s, sum(t.user + t.system for t in times)


def _training(
    frozen: Callable[[], object] | None,
    compute: Callable[[], None],
    optimizer: torch.optim.Optimizer,
    buckets: Sequence[torch.Tensor],
    images: float,
    repeats: int,
    *,
    in_compute: bool = False,
) -> Split:
    """Medians; a first call warms up. `in_compute`: `compute` has what is frozen, taken off it."""

    reduce = (lambda: [dist.all_reduce(bucket) for bucket in buckets]) if buckets else None
    calls = {_FROZEN: frozen, _TRAINED: compute, _OPTIMIZER: optimizer.step, _REDUCE: reduce}
    taken_s: dict[str, list[float]] = {stage: [] for stage in calls}
    for _ in range(1 + repeats):  # in turn: no stage has a better minute of the machine
        for stage, call in calls.items():
            taken_s[stage].append(0.0 if call is None else _core_s(call))
    split = {stage: median(each_s[1:]) / images for stage, each_s in taken_s.items()}
    if in_compute:
        split[_TRAINED] -= split[_FROZEN]
    return split


def _core_s(call: Callable[[], object]) -> float:
    before_s = time.process_time()
    call()
    return time.process_time() - before_s
