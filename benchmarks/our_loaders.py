"""This loader with each of its decoders, and its decoder alone, on the photographs of `loader.py`.

`OURS` yields the number of pictures in each batch of one epoch, by the name of the loader.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg

from magneto_dist.config import AugmentConfig, Config, DataConfig, Decoder, TrainConfig
from magneto_dist.data.augment import training_augmentations
from magneto_dist.data.decode_cpu import CpuDecoder
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.world import World

SAMPLES_PER_SHARD = 256
_READ_AHEAD_STEPS = 8  # two shards


@dataclass(frozen=True)
class Setting:
    """What every loader is asked for."""

    folder: Path
    """With the photographs in all forms."""
    size: int
    """Height and width of a crop, pixels."""
    policy: bool
    """Apply AutoAugment."""
    batch_size: int
    num_workers: int
    """Processes, or threads of DALI, beside the consuming one."""
    url: str
    """Where `folder` is served."""

    @property
    def shards(self) -> list[str]:
        """The tars."""
        return sorted(map(str, (self.folder / "shards").glob("*.tar")))


def _ours(
    decoder: Decoder, setting: Setting, remote: Literal["no", "cached", "cold"] = "no"
) -> Iterator[int]:
    size, cache = setting.batch_size, setting.folder / "cache"
    data = DataConfig(decoder=decoder, num_workers=setting.num_workers)
    if remote == "cold":
        cache = setting.folder / "cold_cache"
        shutil.rmtree(cache, ignore_errors=True)
        # By default a batch draws from 64 places, here from every shard.
        data = replace(
            data,
            num_streams=1,
            shuffle_window=SAMPLES_PER_SHARD,
            read_ahead_steps=_READ_AHEAD_STEPS,
        )
    config = Config(
        augment=AugmentConfig(
            image_size=setting.size, policy="imagenet" if setting.policy else "none"
        ),
        data=data,
        train=TrainConfig(global_batch_size=size),
    )
    root = str(setting.folder / "shards") if remote == "no" else f"{setting.url}/shards"
    dataset = Dataset.open(root, cache_dir=str(cache))
    plan = BatchPlan.derive(size, 1, size, 1)
    loader = Loader(dataset, "train", config, World(), plan, training=True)
    for batch in loader.batches(1, loader.steps_per_epoch):
        yield len(batch.sample_ids)


def _decode_only(setting: Setting, augmented: bool) -> Iterator[int]:
    """Processes decode batches that lie in memory, and say only that it is done."""
    context = multiprocessing.get_context("fork")
    images = [path.read_bytes() for path in sorted((setting.folder / "files").iterdir())]
    batches = len(images) // setting.batch_size
    done, taken = context.Queue(), context.Value("q", 0)
    for _ in range(setting.num_workers):
        arguments = (setting, images, batches, augmented, done, taken)
        context.Process(target=_decode_batches, args=arguments, daemon=True).start()
    for _ in range(batches):
        yield done.get()


def _decode_batches(
    setting: Setting,
    images: Sequence[bytes],
    batches: int,
    augmented: bool,
    done: multiprocessing.Queue[int],
    taken: Synchronized[int],
) -> None:
    config = AugmentConfig(image_size=setting.size, policy="imagenet" if setting.policy else "none")
    augmentations = training_augmentations(0, 0, np.arange(len(images)), config)
    decoder = CpuDecoder(setting.size, 100.0)
    while True:
        with taken.get_lock():  # none is done before the others: that would leave a core idle
            batch, taken.value = taken.value, taken.value + 1
        if batch >= batches:
            return
        rows = slice(batch * setting.batch_size, (batch + 1) * setting.batch_size)
        if augmented:
            decoder(images[rows], augmentations[rows])
        else:
            for image in images[rows]:
                simplejpeg.decode_jpeg(image, strict=False)
        done.put(setting.batch_size)


OURS: dict[str, Callable[[Setting], Iterator[int]]] = {
    "decoding alone": lambda setting: _decode_only(setting, augmented=False),
    "bare loop of the cpu decoder": lambda setting: _decode_only(setting, augmented=True),
    "magneto_dist, cpu": lambda setting: _ours("cpu", setting),
    "magneto_dist, cpu, cached from HTTP": lambda setting: _ours("cpu", setting, "cached"),
    "magneto_dist, cpu, downloaded from HTTP": lambda setting: _ours("cpu", setting, "cold"),
    "magneto_dist, dali_cpu": lambda setting: _ours("dali_cpu", setting),
    "magneto_dist, dali_gpu": lambda setting: _ours("dali_gpu", setting),
}
