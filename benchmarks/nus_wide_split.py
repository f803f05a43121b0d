"""Where the time of `nus_wide_epoch.py` goes: core-seconds an image of each stage, each alone.

Processor time of one core, not time on the clock, so that others on the machine disturb little.
`framework` is what the training process of the whole way takes beyond the stages that run in it.

1. Loading in this process: reading, decoding, augmenting. Through one loader process: what that and
   this process take more is the way of a batch from one to the other. Two lengths of the same are
   subtracted, so that starting costs nothing.
2. The frozen forward pass; forward and backward pass of the rest on its features; the optimizer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import psutil
import torch
from torch import Tensor, nn

from magneto_dist.batch import Batch
from magneto_dist.config import Config
from magneto_dist.data.feature_files import FeatureViews
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.loss import count_for_loss, ets_loss
from magneto_dist.model.backbone import Backbone
from magneto_dist.model.encoder import pack_tags
from magneto_dist.model.image_stream import region_features
from magneto_dist.model.magneto import build_model
from magneto_dist.training.feature_cache import cached_features
from magneto_dist.training.heartbeat import Whereabouts
from magneto_dist.training.optim import build_optimizer
from magneto_dist.training.session import Session
from magneto_dist.world import World
from nus_wide_paper import (
    BATCH,
    CONFIG,
    batches_of_paper,
    forward_backward_of_paper,
    network_of_paper,
    optimizer_of_paper,
)

STAGES = (
    "read, decode, augment",
    "to the training process",
    "frozen forward",
    "trained forward, backward",
    "optimizer",
    "framework",
)
_LOAD, _SEND, _FROZEN, _TRAINED, _OPTIMIZER, _FRAMEWORK = STAGES
_RECEIVE = "receive"  # the training process's part of _SEND
_FEW_STEPS = 2
_REPEATS = 12

Split = dict[str, float]
"""Core-seconds an image by the name of a stage."""
Batches = Callable[[int, int], Iterable[object]]
"""(loader processes, steps) -> batches."""


def split_of_paper(folder: Path, steps: int) -> Split:
    """Stages of the paper's way."""
    batches = partial(batches_of_paper, folder)
    network = network_of_paper()
    optimizer = optimizer_of_paper(network)
    pixels, *tags = next(iter(batches(0, 1)))
    backbone: nn.Module = network.image_stream.backbone  # type: ignore[union-attr,assignment]
    frozen = _cpu_s(lambda: backbone(pixels))
    network.image_stream.backbone = _Given(backbone(pixels))  # type: ignore[union-attr]
    trained = _cpu_s(lambda: forward_backward_of_paper(network, [pixels, *tags]))
    return {**_loading(batches, steps), **_training(frozen, trained, optimizer)}


def split_of_ours(folder: Path, steps: int, *, cached: bool) -> Split:
    """Stages of this system, live or with cached features."""
    data = replace(
        CONFIG.data, path=str(folder / "shards"), feature_views=int(cached), num_workers=0
    )
    config = replace(CONFIG, data=replace(data, cache_dir=str(folder / "cache")))
    config = replace(config, model=replace(config.model, backbone_weights="none"))
    dataset = Dataset.open(str(config.data.path))
    session = Session(config.train, config.optim.clip_norm)
    torch.manual_seed(0)
    model = build_model(config.model, len(dataset.vocabulary))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pack_tags(model)  # as training does
    features = None
    if cached:
        made = cached_features(config, session, dataset, "cpu", model, bool, Whereabouts())
        features = made.train
    batches = partial(_our_batches, config, dataset, features)
    batch = next(iter(_our_batches(config, dataset, None, 0, 1)))
    backbone = next(module for module in model.modules() if isinstance(module, Backbone))
    assert batch.pixels is not None
    see = partial(region_features, backbone, batch.pixels)
    frozen = 0.0 if cached else _cpu_s(see)
    given = replace(batch, features=see())

    def forward_backward() -> None:
        loss = ets_loss(model(**given.inputs()), given, count_for_loss(given), config.loss)
        loss.total.backward()

    trained = _cpu_s(forward_backward)
    optimizer = build_optimizer(model, config.optim)
    return {**_loading(batches, steps), **_training(frozen, trained, optimizer)}


def with_framework(split: Split, training_process_s: float) -> Split:
    """All stages, given what the training process of the whole way takes an image."""
    here = split[_RECEIVE] + split[_FROZEN] + split[_TRAINED] + split[_OPTIMIZER]
    every = {**split, _FRAMEWORK: training_process_s - here}
    return {stage: every[stage] for stage in STAGES}


def medians(splits: Sequence[Split]) -> Split:
    """Stage by stage."""
    return {stage: median(split[stage] for split in splits) for stage in splits[0]}


def print_splits(
    splits: Mapping[str, Split], attainable: Mapping[str, Mapping[str, float]]
) -> None:
    """A table in core-milliseconds."""
    names = list(splits)
    print(f"\n{'core-ms an image':<28}" + "".join(f"{name:>18}" for name in names))
    for stage in STAGES:
        print(f"{stage:<28}" + "".join(f"{splits[n][stage] * 1e3:18.2f}" for n in names))
    print(f"{'sum':<28}" + "".join(f"{sum(splits[n].values()) * 1e3:18.2f}" for n in names))
    for label in next(iter(attainable.values())):
        print(f"{label:<28}" + "".join(f"{attainable[n][label]:18.2f}" for n in names))


def _our_batches(
    config: Config, dataset: Dataset, features: FeatureViews | None, workers: int, steps: int
) -> Iterator[Batch]:
    config = replace(config, data=replace(config.data, num_workers=workers))
    plan = BatchPlan.derive(BATCH, 1, BATCH, config.model.batch_norm_group_size)
    loader = Loader(dataset, "train", config, World(), plan, training=True, features=features)
    return loader.batches(1, steps)


def _loading(batches: Batches, steps: int) -> Split:
    few, all_of_them = (_loaded(batches, 1, number) for number in (_FEW_STEPS, steps))
    here, there = (
        (more - less) / ((steps - _FEW_STEPS) * BATCH)
        for less, more in zip(few, all_of_them, strict=True)
    )
    alone, _ = _loaded(batches, 0, steps)
    load = alone / (steps * BATCH)
    return {_LOAD: load, _SEND: here + there - load, _RECEIVE: here}


def _loaded(batches: Batches, workers: int, steps: int) -> tuple[float, float]:
    """Core-seconds of this process and of its loader processes for so many batches."""
    before_s = time.process_time()
    iterator = iter(batches(workers, steps))
    for _ in range(steps):
        next(iterator)
    here_s = time.process_time() - before_s
    times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return here_s, sum(t.user + t.system for t in times)


def _training(frozen_s: float, trained_s: float, optimizer: torch.optim.Optimizer) -> Split:
    optimizer_s = _cpu_s(optimizer.step)  # gradients are there
    return {_FROZEN: frozen_s, _TRAINED: trained_s, _OPTIMIZER: optimizer_s}


def _cpu_s(call: Callable[[], object]) -> float:
    """Median core-seconds of a call, an image of the batch."""
    taken_s = []
    for _ in range(_REPEATS):
        before_s = time.process_time()
        call()
        taken_s.append(time.process_time() - before_s)
    return median(taken_s[2:]) / BATCH


class _Given(nn.Module):
    """What the backbone has made before."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features

    def forward(self, pixels: Tensor) -> Tensor:
        return self.features
