"""Batches on their way into training: what need not wait for its step is done beside others.

1. On a CPU the frozen stages of the backbone look at the pictures of later batches, in threads,
   while the weights that are trained move: nothing that they make depends on those.
2. On a GPU the pictures of the next batch travel there while it computes.

What comes out is the same, bit for bit. Where the frozen stages are no whole (ZeRO-3), are compiled
with the rest, or have statistics that drift, batches come on a CPU as the loader made them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from threading import Event
from typing import Any

import torch
from torch import nn

from magneto_dist.batch import Batch
from magneto_dist.config import Config
from magneto_dist.data.ahead import Stopwatch, made_ahead
from magneto_dist.data.loader import Loader
from magneto_dist.data.workers import cores_per_rank
from magneto_dist.model.backbone import Backbone
from magneto_dist.model.image_stream import ImageStream, frozen_regions
from magneto_dist.precision import autocast
from magneto_dist.training.session import Session

_MOST_THREADS = 4  # each of which has the activations of a micro-batch

_Made = Generator[Batch, None, None]
_Way = Callable[[Iterator[Batch], Stopwatch, Event], _Made]


class Feed:
    """The batches of a loader, ready for their step.

    Args:
        loader: of this rank.
        config: train.overlap, and what training computes in.
        session: this process among its peers.
        model: as `Session.prepare` gave it.
        shows_pictures: whether somebody else than the model looks at pixels.
    """

    def __init__(
        self,
        loader: Loader,
        config: Config,
        session: Session,
        model: nn.Module,
        *,
        shows_pictures: bool = False,
    ) -> None:
        self.loader = loader
        self._waiting = Stopwatch()
        self._way = _in_its_step
        if not config.train.overlap:
            return
        if session.device.type == "cuda":
            self._way = partial(_copied_ahead, session.device)
        elif (backbone := _frozen_alone(config, session.unwrap(model))) is not None:
            look = partial(_seen_by_frozen_stages, backbone, shows_pictures)
            self._way = partial(
                computed_ahead, look, config, session, micro_steps=loader.micro_steps
            )

    @property
    def waited_s(self) -> float:
        """How long training has waited for the loader, up to now."""
        return self._waiting.elapsed_s

    def batches(self, first_step: int, last_step: int) -> _Made:
        """As the loader's, on the CPU but for what is large; to be closed."""
        closing = Event()
        batches = self.loader.batches(first_step, last_step, closing)
        return self._way(batches, self._waiting, closing)


def computed_ahead(
    compute: Callable[[Batch], Any],
    config: Config,
    session: Session,
    batches: Iterator[Batch],
    waiting: Stopwatch,
    closing: Event,
    *,
    micro_steps: int = 1,
) -> Generator[Any, None, None]:
    """`made_ahead` in threads that compute as training does, without gradients.

    As many as this rank has cores for, up to 4; one on a GPU. A step takes `micro_steps` batches at
    once, and as many are ready beyond those that are computed.
    """
    num_threads = 1
    if session.device.type == "cpu":
        cores = cores_per_rank(session.world.ranks_per_node)
        num_threads = min(max(cores // torch.get_num_threads(), 1), _MOST_THREADS)
    return made_ahead(
        batches,
        compute,
        depth=num_threads + micro_steps,
        num_threads=num_threads,
        settle_thread=partial(_settle_thread, config.train.precision, session.device),
        waiting=waiting,
        closing=closing,
    )


def _settle_thread(precision: str, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(_index_of(device))  # a new thread's is the first one
    torch.set_grad_enabled(False)
    # Never left: that would clear torch's cache of casts, which all threads share.
    autocast(precision, device).__enter__()


def _in_its_step(batches: Iterator[Batch], waiting: Stopwatch, _closing: Event) -> _Made:
    while True:
        with waiting.running():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _frozen_alone(config: Config, model: nn.Module) -> Backbone | None:
    """The backbone whose frozen stages can look at a picture before the rest of the model does."""
    stream = getattr(model, "image_stream", None)
    if not isinstance(stream, ImageStream) or config.train.compile or config.data.feature_views:
        return None
    return stream.backbone if stream.backbone.fold() else None


def _seen_by_frozen_stages(backbone: Backbone, keeps_pixels: bool, batch: Batch) -> Batch:
    if batch.pixels is None:
        return batch
    features = frozen_regions(backbone, batch.pixels)
    return replace(batch, features=features, pixels=batch.pixels if keeps_pixels else None)


def _copied_ahead(
    device: torch.device, batches: Iterator[Batch], waiting: Stopwatch, closing: Event
) -> _Made:
    """The batches with what is large on a GPU, copied from pinned memory beside its work."""
    index = _index_of(device)
    copies = _copy_stream(index)

    def copy(batch: Batch) -> tuple[Batch, Any]:
        with torch.cuda.stream(copies):
            return batch.large_to(device), copies.record_event()

    settle = partial(torch.cuda.set_device, index)  # a new thread's is the first one
    copied = made_ahead(
        batches, copy, depth=1, settle_thread=settle, waiting=waiting, closing=closing
    )
    for batch, arrived in copied:
        computes = torch.cuda.current_stream(device)
        computes.wait_event(arrived)
        for tensor in batch.large_tensors().values():
            tensor.record_stream(computes)  # its memory is not used again before that is done
        yield batch


def _index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@lru_cache
def _copy_stream(index: int) -> torch.cuda.Stream:
    """One a device: each stream has memory of its own that others cannot use."""
    return torch.cuda.Stream(index)
