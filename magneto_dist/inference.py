"""A trained run applied to items, labelled or not: what it says of every tag of each.

1. `ScoringBatches`, in loader processes: items -> decoded batches; tags that the run does not know
   and tags that find no slot are set aside, not lost.
2. `predict`: batches -> `ItemPrediction`s, in the order of the items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from magneto_dist.batch import Prediction
from magneto_dist.config import Config
from magneto_dist.data.augment import evaluation_augmentation
from magneto_dist.data.decode_cpu import CpuDecoder
from magneto_dist.data.items import Items
from magneto_dist.data.micro_batch import GREY
from magneto_dist.data.sample import BadSample, Sample
from magneto_dist.data.tags import tag_rows
from magneto_dist.data.workers import run_loader
from magneto_dist.errors import InputError
from magneto_dist.trained_run import TrainedRun
from magneto_dist.vocabulary import Vocabulary

_DIGITS = 6  # of a probability: float32 has no more


@dataclass(frozen=True)
class ItemPrediction:
    """What a run says of one item. Lists run along `tags`."""

    key: str
    error: str | None = None
    """Why the item could not be scored; then nothing below is set."""
    tags: tuple[str, ...] = ()
    """The item's tags that were scored, in its order."""
    probability: tuple[float, ...] = ()
    """That the tag is important, at the temperature, if there is one."""
    image: tuple[float, ...] | None = None
    """The image stream's opinion; None: the model has no such stream beside another."""
    tag: tuple[float, ...] | None = None
    """The tag stream's opinion."""
    alpha: tuple[float, ...] | None = None
    """Weight of the image stream; None: the model has no gate."""
    unknown_tags: tuple[str, ...] = ()
    """Tags of the item that are not in the run's vocabulary."""
    cut_tags: tuple[str, ...] = ()
    """Tags beyond the run's longest list (tags.max_tags)."""
    picture: bytes | None = None
    """As it came; only if asked for."""

    def as_json(self, threshold: float) -> dict[str, Any]:
        """One line of the output: `predicted` holds the tags from `threshold` on, best first."""
        if self.error is not None:
            return {"key": self.key, "error": self.error}
        ranked = sorted(zip(self.probability, self.tags, strict=True), key=lambda pair: -pair[0])
        values: dict[str, Any] = {
            "key": self.key,
            "predicted": [tag for probability, tag in ranked if probability >= threshold],
            "tags": list(self.tags),
        }
        for name in ("probability", "image", "tag", "alpha"):
            numbers = getattr(self, name)
            if numbers is not None:
                values[name] = [round(number, _DIGITS) for number in numbers]
        for name in ("unknown_tags", "cut_tags"):
            if getattr(self, name):
                values[name] = list(getattr(self, name))
        return values


class _ScoringBatch(NamedTuple):
    items: list[ItemPrediction]
    """Not yet with anything that the model says."""
    tag_ids: Int64[Tensor, "batch slot"]
    tag_mask: Bool[Tensor, "batch slot"]
    pixels: UInt8[Tensor, "batch 3 height width"] | None

    def pin_memory(self) -> _ScoringBatch:
        return self._replace(
            tag_ids=self.tag_ids.pin_memory(),
            tag_mask=self.tag_mask.pin_memory(),
            pixels=None if self.pixels is None else self.pixels.pin_memory(),
        )


@dataclass(frozen=True)
class ScoringBatches(torch.utils.data.Dataset[Any]):
    """Batches by their number; picklable."""

    items: Items
    vocabulary: Vocabulary
    config: Config
    batch_size: int
    with_pixels: bool
    num_pictures: int
    """So many first items keep their encoded picture."""

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch_size)

    def __getitem__(self, number: int) -> _ScoringBatch | InputError:
        first = number * self.batch_size
        numbers = range(first, min(first + self.batch_size, len(self.items)))
        try:
            samples = self.items.read(numbers)
        except InputError as error:  # as a value: torch would wrap a raised one
            return error
        known = [_known_tags(sample, self.vocabulary) for sample in samples]
        slots = tag_rows(
            [self.vocabulary.ids(tags) for tags in known],
            [[False] * len(tags) for tags in known],
            np.array(numbers, dtype=np.int64),
            num_tags=len(self.vocabulary),
            config=self.config.tags,
            seed=0,
            epoch=0,
            training=False,
            objective="important",
        )
        pixels, errors = self._pixels(samples)
        items = [
            self._item(sample, tags, error, keep_picture=number < self.num_pictures)
            for number, sample, tags, error in zip(numbers, samples, known, errors, strict=True)
        ]
        tag_ids, tag_mask = torch.from_numpy(slots.tag_ids), torch.from_numpy(slots.tag_mask)
        return _ScoringBatch(items, tag_ids, tag_mask, pixels)

    def _pixels(
        self, samples: Sequence[Sample | BadSample]
    ) -> tuple[UInt8[Tensor, "batch 3 height width"] | None, Sequence[str | None]]:
        sound: list[str | None] = [None] * len(samples)
        size = self.config.augment.image_size
        if not self.with_pixels:
            return None, sound
        if self.config.data.constant_image:
            return torch.full((len(samples), 3, size, size), GREY, dtype=torch.uint8), sound
        images = [(isinstance(sample, Sample) and sample.image) or b"" for sample in samples]
        augmentation = evaluation_augmentation(self.config.augment)
        decode = CpuDecoder(size, self.config.data.max_image_megapixels)
        return decode(images, [augmentation] * len(images))

    def _item(
        self,
        sample: Sample | BadSample,
        known: Sequence[str],
        error: str | None,
        keep_picture: bool,
    ) -> ItemPrediction:
        if isinstance(sample, BadSample):
            return ItemPrediction(sample.key, sample.reason)
        if error is None and not known:
            error = "no tag of it is in the run's vocabulary" if sample.tags else "has no tags"
        slots = self.config.tags.max_tags
        return ItemPrediction(
            sample.key,
            error,
            tags=tuple(known[:slots]),
            unknown_tags=tuple(tag for tag in sample.tags if tag not in self.vocabulary),
            cut_tags=tuple(known[slots:]),
            picture=sample.image if keep_picture else None,
        )


def predict(
    run: TrainedRun,
    items: Items,
    *,
    batch_size: int,
    num_workers: int,
    num_pictures: int = 0,
    temperature: float | None = None,
) -> Iterator[ItemPrediction]:
    """Scores all items, in their order, on the device of the run's model.

    Args:
        run: from `load_run`; its precision is used.
        items: to score; those without usable picture or tags come back with an error.
        batch_size: items per forward pass.
        num_workers: loader processes; 0: none.
        num_pictures: so many first items come back with their encoded picture.
        temperature: what the final output's log-odds are divided by; None: nothing.

    Raises:
        InputError: the items cannot be read, or a loader process was killed or hangs.
    """
    batches = ScoringBatches(
        items, run.vocabulary, run.config, batch_size, run.config.model.sees_pictures, num_pictures
    )
    device = next(run.model.parameters()).device
    loaded = run_loader(
        batches,
        range(len(batches)),
        num_workers=num_workers,
        prefetch=run.config.data.prefetch_batches,
        pin=device.type == "cuda",
        timeout_s=run.config.data.loader_timeout_s,
    )
    for batch in loaded:
        with torch.no_grad(), run.autocast(device):
            prediction = run.model(
                batch.tag_ids.to(device, non_blocking=True),
                batch.tag_mask.to(device, non_blocking=True),
                None if batch.pixels is None else batch.pixels.to(device, non_blocking=True),
            )
        yield from _with_scores(batch.items, prediction, temperature)


def _known_tags(sample: Sample | BadSample, vocabulary: Vocabulary) -> list[str]:
    tags = sample.tags if isinstance(sample, Sample) else ()
    return [tag for tag in dict.fromkeys(tags) if tag in vocabulary]


def _with_scores(
    items: Sequence[ItemPrediction], prediction: Prediction, temperature: float | None
) -> Iterator[ItemPrediction]:
    head = prediction.heads[0]
    scores = {"probability": prediction.probability(head)}
    if temperature is not None:
        positive, negative = prediction.log_probabilities(head)
        scores["probability"] = ((positive - negative) / temperature).sigmoid()
    if prediction.alpha is not None:
        scores |= {head: prediction.probability(head) for head in ("image", "tag")}
        scores["alpha"] = prediction.alpha
    rows = {name: values.tolist() for name, values in scores.items()}
    for row, item in enumerate(items):
        if item.error is not None:
            yield ItemPrediction(item.key, item.error, picture=item.picture)
        else:
            of_item = {name: tuple(rows[name][row][: len(item.tags)]) for name in rows}
            yield replace(item, **of_item)
