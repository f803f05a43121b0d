"""One micro-batch as a function of its number: sample ids -> rows -> tag slots -> pixels.

1. `MicroBatches.encode` makes everything but pixels, and keeps the pictures as they came beside it.
2. `MicroBatches.with_pixels` adds the pixels; a picture that does not decode makes its row invalid.
   Or `with_features` adds what a frozen backbone has made of them before, with the same errors.

All run in loader processes, except that DALI decodes in the training process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from magneto_dist.batch import Batch, Reject
from magneto_dist.config import Config
from magneto_dist.data.augment import (
    Augmentation,
    evaluation_augmentation,
    training_augmentations,
)
from magneto_dist.data.decode_cpu import CpuDecoder, DecodedImages
from magneto_dist.data.encoded_images import EncodedImages, encoded_images
from magneto_dist.data.feature_files import FeatureViews
from magneto_dist.data.order import BatchPlan, Order, micro_batch_sample_ids
from magneto_dist.data.read_ahead import ReadAhead
from magneto_dist.data.sample import Sample
from magneto_dist.data.shards import Dataset
from magneto_dist.data.stream import Record, SampleReader, Stage, load_rows
from magneto_dist.data.tags import tag_rows

GREY = 127

Row = Record | Reject | None
"""A usable sample, why there is none, or padding."""
_NO_SAMPLE = Sample("", None, (), None)
"""In place of a reject or of padding."""


@dataclass(frozen=True)
class ForDali:
    """A micro-batch whose JPEGs another process decodes."""

    batch: Batch
    images: EncodedImages
    shards: tuple[str, ...]
    """The shard of each row, "" in padding rows."""


@dataclass(frozen=True)
class Encoded:
    """A micro-batch whose pictures are as they came."""

    batch: Batch
    images: tuple[bytes, ...]
    """One per row, JPEG, PNG or WebP; empty where the row is not valid."""
    augmentations: tuple[Augmentation, ...]
    """One per row."""
    shards: tuple[str, ...]
    """The shard of each row, "" in padding rows."""


@dataclass(frozen=True)
class MicroBatches(torch.utils.data.Dataset):
    """The micro-batches of one rank by number: step * micro_steps + micro_step.

    Gives a Batch, or ForDali where pictures are decoded elsewhere; an InputError is raised where a
    shard cannot be read.
    """

    dataset: Dataset
    split: str
    config: Config
    rank: int
    plan: BatchPlan
    training: bool
    """Shuffle, augment, add and drop tags; False: the split in order."""
    pictures: Literal["decoded", "encoded", "none"]
    """What is made of them here; none: text alone (the data set or the model), all grey, or there
    are features instead."""
    outliers: int = 0
    """Tags added to each item in evaluation (Table 3)."""
    stages: tuple[Stage, ...] = ()
    """The user's."""
    augments: bool | None = None
    """Augment pictures; None: in training."""
    features: FeatureViews | None = None
    """Of the pictures, computed before; they take the place of pixels."""

    @cached_property
    def order(self) -> Order:
        """Which sample stands in which row of an epoch."""
        return Order(
            self.dataset.shard_sizes(self.split),
            seed=self.config.seed,
            shuffle=self.training,
            num_streams=self.config.data.num_streams,
            window=self.config.data.shuffle_window,
        )

    def __len__(self) -> int:
        """Micro-batches of an epoch; numbers go on over the epochs."""
        return self.plan.steps_per_epoch(self.order.num_samples) * self.plan.micro_steps

    def __getitem__(self, number: int) -> Batch | ForDali:
        step, micro_step = divmod(number, self.plan.micro_steps)
        epoch, sample_ids = self._sample_ids(number)
        if self._read_ahead is not None:
            later = number + self.config.data.read_ahead_steps * self.plan.micro_steps
            wanted = (sample_ids, self._sample_ids(later)[1])
            self._read_ahead.want(name for ids in wanted for name in self._reader.files(ids))
        encoded = self.encode(sample_ids, step=step, micro_step=micro_step, epoch=epoch)
        if self.features is not None:
            return self.with_features(encoded.batch, encoded.shards)
        if self.pictures == "none":
            return encoded.batch
        if self.pictures == "encoded":
            images = encoded_images(encoded.images, encoded.augmentations, self._cpu_decoder)
            return ForDali(encoded.batch, images, encoded.shards)
        images = self._cpu_decoder(encoded.images, encoded.augmentations)
        return self.with_pixels(encoded.batch, images, encoded.shards)

    def _sample_ids(self, number: int) -> tuple[int, Int64[np.ndarray, " batch"]]:
        """Epoch and rows of a micro-batch."""
        step, micro_step = divmod(number, self.plan.micro_steps)
        epoch, step_in_epoch = self.plan.epoch_of(step, self.order.num_samples)
        return epoch, micro_batch_sample_ids(
            self.order, self.plan, epoch, step_in_epoch, self.rank, micro_step
        )

    def encode(
        self, sample_ids: Int64[np.ndarray, " batch"], *, step: int, micro_step: int, epoch: int
    ) -> Encoded:
        """Everything but pixels (grey ones, where pictures do not matter).

        Raises:
            InputError: a shard cannot be read.
        """
        rows: list[Row] = load_rows(
            sample_ids,
            self._reader,
            self.stages,
            needs_images=self._looks_at_pictures,
            needs_labels=self.config.train.objective == "important",
            vocabulary=self.dataset.vocabulary,
        )
        samples = [row.sample if isinstance(row, Record) else _NO_SAMPLE for row in rows]
        is_valid = [sample is not _NO_SAMPLE for sample in samples]
        sample_valid = torch.from_numpy(np.array(is_valid))  # torch is slow with lists
        batch = Batch(
            **self._tag_slots(samples, sample_ids, epoch),
            sample_valid=sample_valid,
            sample_ids=torch.from_numpy(sample_ids),
            pixels=self._grey(sample_valid),
            keys=tuple(map(_key, rows)),
            step=step,
            micro_step=micro_step,
            epoch=epoch,
            rejects=tuple(row for row in rows if isinstance(row, Reject)),
            all_valid=all(is_valid),
            num_slots=self.config.tags.max_tags,
        )
        return Encoded(
            batch,
            images=tuple(sample.image or b"" for sample in samples),
            augmentations=tuple(self._augmentations(sample_ids, epoch)),
            shards=tuple("" if row is None else row.shard for row in rows),
        )

    def with_pixels(self, batch: Batch, images: DecodedImages, shards: Sequence[str]) -> Batch:
        """The batch with its pictures, `shards` being those of its rows."""
        return self._reject(images.errors, replace(batch, pixels=images.pixels), shards)

    def with_features(self, batch: Batch, shards: Sequence[str]) -> Batch:
        """The batch with the features of its pictures, `shards` being those of its rows."""
        assert self.features is not None
        features, errors = self.features.read(batch.epoch, batch.sample_ids, batch.sample_valid)
        return self._reject(errors, replace(batch, features=features), shards)

    def _reject(self, errors: Sequence[str | None], batch: Batch, shards: Sequence[str]) -> Batch:
        """The batch without the rows whose pictures have an error."""
        failed = [
            (row, error)
            for row, error in enumerate(errors)
            if error is not None and batch.sample_valid[row]
        ]
        rejects = (Reject(batch.keys[row], shards[row], error) for row, error in failed)
        batch = replace(batch, rejects=(*batch.rejects, *rejects))
        return self._without([row for row, _ in failed], batch) if failed else batch

    def _tag_slots(
        self, samples: Sequence[Sample], sample_ids: Int64[np.ndarray, " batch"], epoch: int
    ) -> dict[str, Tensor]:
        vocabulary = self.dataset.vocabulary
        slots = tag_rows(
            [vocabulary.ids(sample.tags) for sample in samples],
            [sample.important or [False] * len(sample.tags) for sample in samples],
            sample_ids,
            num_tags=len(vocabulary),
            config=self.config.tags,
            seed=self.config.seed,
            epoch=epoch,
            training=self.training,
            objective=self.config.train.objective,
            outliers=self.outliers,
        )
        if self.config.tags.trim_padding and not self.config.train.compile:
            slots = slots.trimmed()
        return {name: torch.from_numpy(values) for name, values in vars(slots).items()}

    def _augmentations(
        self, sample_ids: Int64[np.ndarray, " batch"], epoch: int
    ) -> list[Augmentation]:
        augments = self.training if self.augments is None else self.augments
        if not augments:
            return [evaluation_augmentation(self.config.augment)] * len(sample_ids)
        return training_augmentations(self.config.seed, epoch, sample_ids, self.config.augment)

    def _grey(
        self, sample_valid: Bool[Tensor, " batch"]
    ) -> UInt8[Tensor, "batch 3 height width"] | None:
        shows_grey = self.config.data.constant_image and self.config.model.sees_pictures
        if not (self.dataset.has_images and shows_grey):
            return None
        size = self.config.augment.image_size
        grey = sample_valid.to(torch.uint8) * GREY
        return grey[:, None, None, None].repeat(1, 3, size, size)

    def _without(self, rows: list[int], batch: Batch) -> Batch:
        """`batch` with these rows made invalid; a row that counts for nothing has no tags."""
        values = {
            "tag_ids": self.dataset.vocabulary.padding_id,
            "tag_mask": False,
            "target": False,
            "outlier": False,
            "sample_valid": False,
            "tags_cut": 0,
            "targets_cut": 0,
        }
        blank = {name: getattr(batch, name).clone() for name in values}
        for name, value in values.items():
            blank[name][rows] = value
        return replace(batch, **blank, all_valid=False)

    @cached_property
    def _reader(self) -> SampleReader:
        sizes_will_do = self.features is not None
        with_images = "sizes" if sizes_will_do else self._looks_at_pictures
        return SampleReader(self.dataset, self.split, with_images=with_images)

    @property
    def _looks_at_pictures(self) -> bool:
        return self.pictures != "none" or self.features is not None

    @cached_property
    def _read_ahead(self) -> ReadAhead | None:
        storage = self.dataset.tar_storage
        return ReadAhead(storage) if storage.is_remote else None

    @cached_property
    def _cpu_decoder(self) -> CpuDecoder:
        return CpuDecoder(self.config.augment.image_size, self.config.data.max_image_megapixels)


def _key(row: Row) -> str:
    if row is None:
        return ""
    return row.sample.key if isinstance(row, Record) else row.key
