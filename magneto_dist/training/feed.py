"""Batches on their way into training: what need not wait for its step is done beside others.

1. On a CPU the frozen stages of the backbone look at the pictures of later batches, in threads,
   while the weights that are trained move: nothing that they make depends on those.
2. On a GPU the pictures of the next batch travel there while it computes.

What comes out is the same, bit for bit. Where the frozen stages are no whole (sharded, compiled
with the rest, statistics that drift) batches come as the loader made them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
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


class Feed:
    """The batches of a loader, ready for their step.

    Args:
        loader: of this rank.
        config: train.overlap, and what training computes in.
        session: this process among its peers.
        model: as `Session.prepare` gave it.
    """

    def __init__(self, loader: Loader, config: Config, session: Session, model: nn.Module) -> None:
        self.loader = loader
        self._waiting = Stopwatch()
        self._ahead = _way_ahead(config, session, session.unwrap(model))

    @property
    def steps_per_epoch(self) -> int:
        """As the loader's."""
        return self.loader.steps_per_epoch

    @property
    def waited_s(self) -> float:
        """How long training has waited for the loader, up to now."""
        return self._waiting.elapsed_s

    def empty_batch(self) -> Batch:
        """As the loader's."""
        return self.loader.empty_batch()

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """As the loader's, on the CPU but for what is large."""
        batches = self.loader.batches(first_step, last_step)
        if self._ahead is None:
            return self._watched(batches)
        return self._ahead(batches, waiting=self._waiting)

    def _watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            with self._waiting.running():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def _way_ahead(
    config: Config, session: Session, model: nn.Module
) -> Callable[..., Iterator[Batch]] | None:
    """What to do with batches before their step, if anything: `made_ahead`, but for the sources."""
    device = session.device
    if not config.train.overlap:
        return None
    if device.type == "cuda":
        return partial(_copied_ahead, device)
    stream = getattr(model, "image_stream", None)
    if config.train.compile or not isinstance(stream, ImageStream):
        return None
    if not stream.backbone.fold():
        return None
    return partial(
        computed_ahead(config, session), make=partial(_seen_by_frozen_stages, stream.backbone)
    )


def computed_ahead(config: Config, session: Session) -> Callable[..., Iterator[Any]]:
    """`made_ahead` in threads that compute as training does, without gradients.

    On a CPU as many as this rank has cores for, on a GPU one.
    """
    num_threads = 1
    if session.device.type == "cpu":
        cores = cores_per_rank(session.world.ranks_per_node)
        num_threads = max(cores // torch.get_num_threads(), 1)
    settle = partial(_settle_thread, config.train.precision, session.device)
    return partial(made_ahead, depth=num_threads + 1, num_threads=num_threads, settle_thread=settle)


def _settle_thread(precision: str, device: torch.device) -> None:
    torch.set_grad_enabled(False)
    # Never left: that would clear torch's cache of casts, which all threads share.
    autocast(precision, device).__enter__()


def _seen_by_frozen_stages(backbone: Backbone, batch: Batch) -> Batch:
    """The batch with `features`; its pixels stay, to be shown."""
    if batch.pixels is None or batch.features is not None:
        return batch
    return replace(batch, features=frozen_regions(backbone, batch.pixels))


def _copied_ahead(
    device: torch.device, batches: Iterator[Batch], waiting: Stopwatch
) -> Iterator[Batch]:
    """The batches with what is large on a GPU, copied from pinned memory beside its work."""
    copies = torch.cuda.Stream(device)

    def copy(batch: Batch) -> tuple[Batch, Any]:
        with torch.cuda.stream(copies):
            return batch.large_to(device), copies.record_event()

    for batch, arrived in made_ahead(batches, copy, depth=1, waiting=waiting):
        computes = torch.cuda.current_stream(device)
        computes.wait_event(arrived)
        for tensor in batch.large_tensors().values():
            tensor.record_stream(computes)  # its memory is not used again before that is done
        yield batch
