"""Composes order, stream, tags, augmentation and decoding into an iterator of Batch.

1. `Loader.batches` numbers the micro-batches of this rank from one step to another.
2. Loader processes (or this one) make them, see `micro_batch.py`.
3. With the CPU decoder they come with pixels; with DALI this process decodes, some batches ahead.

A micro-batch is a function of its number alone, so that neither the number of loader processes nor
the step at which a run starts changes it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from threading import Event
from typing import Literal

import numpy as np
import torch

from magneto_dist.batch import Batch
from magneto_dist.config import Config
from magneto_dist.data.ahead import made_ahead
from magneto_dist.data.decode_cpu import CpuDecoder, DecodedImages
from magneto_dist.data.encoded_images import EncodedImages
from magneto_dist.data.feature_files import FeatureViews
from magneto_dist.data.micro_batch import MicroBatches
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.pool import run_loader
from magneto_dist.data.shards import Dataset
from magneto_dist.data.stages import load_stages
from magneto_dist.data.workers import (
    cores_per_rank,
    default_num_workers,
    start_fork_server,
)
from magneto_dist.errors import InputError
from magneto_dist.world import World

_Decoder = Literal["none", "cpu", "dali_cpu", "dali_gpu"]
_PICTURES: dict[_Decoder, Literal["decoded", "encoded", "none"]] = {
    "none": "none",
    "cpu": "decoded",
    "dali_cpu": "encoded",
    "dali_gpu": "encoded",
}
"""What loader processes make of pictures."""


class Loader:
    """The batches of one split, as one rank sees them.

    Args:
        dataset: the data.
        split: train or validation.
        config: its sections data, augment and tags, its seed, train.objective, and whether the
            model sees pictures; if not, none are read.
        world: this rank among the others.
        plan: how global batches are cut.
        training: shuffle, augment, add and drop tags; False: the split in order, once.
        outliers: tags added to each item in evaluation (Table 3).
        augments: augment pictures; None: in training.
        features: of the split's pictures, read in place of them.

    Raises:
        InputError: the decoder or a stage that was asked for is not available.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        config: Config,
        world: World,
        plan: BatchPlan,
        *,
        training: bool,
        outliers: int = 0,
        augments: bool | None = None,
        features: FeatureViews | None = None,
    ) -> None:
        self.dataset, self._config, self._world = dataset, config, world
        self._decoder = _choose_decoder(dataset, config)
        self._micro_batches = MicroBatches(
            dataset,
            split,
            config,
            world.rank,
            plan,
            training=training,
            pictures="none" if features else _PICTURES[self._decoder],
            outliers=outliers,
            stages=load_stages(config.data.stages),
            augments=augments,
            features=features,
        )
        self.num_samples = dataset.num_samples(split)
        self.steps_per_epoch = plan.steps_per_epoch(self.num_samples)
        if self.num_workers > 0:
            start_fork_server()  # its imports take seconds, in which the model is built

    @property
    def decoder(self) -> str:
        """Who decodes pictures: what `data.decoder` has become on this machine."""
        return self._decoder

    @property
    def num_workers(self) -> int:
        """Loader processes of this rank; 0: none."""
        chosen = self._config.data.num_workers
        return default_num_workers(self._world.ranks_per_node) if chosen is None else chosen

    @property
    def micro_steps(self) -> int:
        """Micro-batches of a step."""
        return self._micro_batches.plan.micro_steps

    def batches(
        self, first_step: int, last_step: int, closing: Event | None = None
    ) -> Iterator[Batch]:
        """The micro-batches of this rank in the global steps `first_step` to `last_step` inclusive.

        In training the steps go on over the epochs; evaluation is the steps 1 to `steps_per_epoch`.
        Starting anywhere costs nothing. Closing the iterator ends its loader processes; while
        another thread waits in it that cannot be, and `closing`, when set, ends the wait.

        Raises:
            InputError: a shard cannot be read, or a loader process was killed or hangs.
        """
        first, end = first_step * self.micro_steps, (last_step + 1) * self.micro_steps
        return self.numbered(range(first, end), closing)

    def numbered(self, numbers: Sequence[int], closing: Event | None = None) -> Iterator[Batch]:
        """As `batches`: any micro-batches by their numbers, step * micro_steps + micro_step."""
        micro_batches = self._micro_batches
        closing = closing or Event()
        made = run_loader(
            micro_batches,
            numbers,
            num_workers=self.num_workers,
            prefetch=self._config.data.prefetch_batches,
            pin=micro_batches.pictures != "encoded" and torch.cuda.is_available(),
            timeout_s=self._config.data.loader_timeout_s,
            closing=closing,
        )
        if micro_batches.pictures != "encoded":
            return made
        decode = self._dali_decoder()
        return made_ahead(
            made,
            lambda item: micro_batches.with_pixels(item.batch, decode(item.images), item.shards),
            depth=self._config.data.dali_queue_depth,
            closing=closing,
        )

    def empty_batch(self) -> Batch:
        """A micro-batch of padding rows, with the shapes of all others."""
        padding = np.full(self._micro_batches.plan.micro_batch_size, -1, dtype=np.int64)
        encoded = self._micro_batches.encode(padding, step=1, micro_step=0, epoch=0)
        batch = encoded.batch
        if self._micro_batches.features is not None:
            return self._micro_batches.with_features(batch, encoded.shards)
        if self._decoder == "none":
            return batch
        size = self._config.augment.image_size
        pixels = torch.zeros(len(padding), 3, size, size, dtype=torch.uint8)
        return replace(batch, pixels=pixels)

    def _dali_decoder(self) -> Callable[[EncodedImages], DecodedImages]:
        # Here and not above: DALI takes seconds to import, and may not be there.
        from magneto_dist.data.decode_dali import DaliDecoder

        return DaliDecoder(
            CpuDecoder(self._config.augment.image_size, self._config.data.max_image_megapixels),
            device="gpu" if self._decoder == "dali_gpu" else "cpu",
            num_threads=cores_per_rank(self._world.ranks_per_node),
        )


def _choose_decoder(dataset: Dataset, config: Config) -> _Decoder:
    # For tags alone annotations are all that is read: at text speed, and a picture that is broken
    # costs no item.
    if not (dataset.has_images and config.model.sees_pictures) or config.data.constant_image:
        return "none"
    decoder, has_gpu, has_dali = config.data.decoder, torch.cuda.is_available(), _dali_is_there()
    if decoder == "auto":
        return "dali_gpu" if has_gpu and has_dali else "cpu"
    if decoder.startswith("dali") and not has_dali:
        raise InputError(f"--data.decoder {decoder} needs the package nvidia-dali-cuda130")
    if decoder == "dali_gpu" and not has_gpu:
        raise InputError("--data.decoder dali_gpu needs a CUDA device: use dali_cpu or cpu")
    return decoder


def _dali_is_there() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the package around it
        return False
