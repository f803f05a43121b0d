"""A trained run applied to items, labelled or not: what it says of every tag of each.

1. `ScoringBatches`, in loader processes: items -> decoded batches; tags that the run does not know
   and tags that find no slot are set aside, not lost.
2. `predict`: batches -> `ItemPrediction`s, in the order of the items.
3. `attention_kept`: where the tags of a batch looked in its pictures, from the forward pass itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor, nn

from magneto_dist.batch import Prediction
from magneto_dist.config import Config
from magneto_dist.data.augment import evaluation_augmentation
from magneto_dist.data.decode_cpu import CpuDecoder
from magneto_dist.data.items import Items
from magneto_dist.data.micro_batch import GREY
from magneto_dist.data.pool import run_loader
from magneto_dist.data.sample import BadSample, Sample
from magneto_dist.data.tags import tag_rows
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
    important: tuple[bool, ...] | None = None
    """Which tags are known to be; None: not known."""
    picture: bytes | None = None
    """As it came; only if asked for."""
    attention: Float32[np.ndarray, "tag region"] | None = None
    """How much each tag looked at each region of the square that the model saw, row by row: the
    mean over the heads, 1 in all; only if asked for, None: the model has no such attention."""

    def as_json(self, threshold: float) -> dict[str, Any]:
        """One line of the output: `predicted` holds the tags from `threshold` on, best first."""
        if self.error is not None:
            return {"key": self.key, "error": self.error}
        ranked = sorted(zip(self.probability, self.tags, strict=True), key=lambda pair: -pair[0])
        values: dict[str, Any] = {
            "key": self.key,
            "predicted": [tag for probability, tag in ranked if probability >= threshold],
            "tags": list(self.tags),
            "kept": [probability >= threshold for probability in self.probability],
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
    """Batches by the numbers of their items; picklable."""

    items: Items
    vocabulary: Vocabulary
    config: Config
    keep_pictures: bool
    """Encoded, as they came."""

    def __getitem__(self, numbers: range) -> _ScoringBatch:
        samples = self.items.read(numbers)
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
            self._item(sample, tags, error)
            for sample, tags, error in zip(samples, known, errors, strict=True)
        ]
        tag_ids, tag_mask = torch.from_numpy(slots.tag_ids), torch.from_numpy(slots.tag_mask)
        return _ScoringBatch(items, tag_ids, tag_mask, pixels)

    def _pixels(
        self, samples: Sequence[Sample | BadSample]
    ) -> tuple[UInt8[Tensor, "batch 3 height width"] | None, Sequence[str | None]]:
        sound: list[str | None] = [None] * len(samples)
        size = self.config.augment.image_size
        if not self.config.model.sees_pictures:
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
            important=_known_flags(sample, known[:slots]),
            picture=sample.image if self.keep_pictures else None,
        )


def predict(
    run: TrainedRun,
    items: Items,
    blocks: Sequence[range],
    *,
    batch_size: int,
    num_workers: int,
    to_look_at: bool = False,
    temperature: float | None = None,
) -> Iterator[ItemPrediction]:
    """Scores items, in the order of the blocks, on the device of the run's model.

    Args:
        run: from `load_run`; its precision is used.
        items: to score; those without usable picture or tags come back with an error.
        blocks: numbers of the items; a batch lies in one block, so that what is said of an item
            does not depend on which blocks come before.
        batch_size: items per forward pass.
        num_workers: loader processes; 0: none.
        to_look_at: they come with their encoded picture and with attention.
        temperature: what the final output's log-odds are divided by; None: nothing.

    Raises:
        InputError: the items cannot be read, or a loader process was killed or hangs.
    """
    device = next(run.model.parameters()).device
    # Of a grey picture it would be shown on one that the model has not seen.
    has_attention = to_look_at and not run.config.data.constant_image
    loaded = run_loader(
        ScoringBatches(items, run.vocabulary, run.config, keep_pictures=to_look_at),
        [
            block[first : first + batch_size]
            for block in blocks
            for first in range(0, len(block), batch_size)
        ],
        num_workers=num_workers,
        prefetch=run.config.data.prefetch_batches,
        pin=device.type == "cuda",
        timeout_s=run.config.data.loader_timeout_s,
    )
    for batch in loaded:
        with ExitStack() as stack:
            kept = stack.enter_context(attention_kept(run.model)) if has_attention else []
            stack.enter_context(torch.no_grad())
            stack.enter_context(run.autocast(device))
            prediction = run.model(
                batch.tag_ids.to(device, non_blocking=True),
                batch.tag_mask.to(device, non_blocking=True),
                None if batch.pixels is None else batch.pixels.to(device, non_blocking=True),
            )
        attention = kept[0] if kept else None
        yield from _with_scores(batch.items, prediction, temperature, attention)


@contextmanager
def attention_kept(model: nn.Module) -> Iterator[list[Tensor]]:
    """The weights of tags over regions in each forward pass of the block, the mean over the heads.

    They are what the pass itself has computed with, each [batch, slot, region]; the list stays
    empty where no tag looks at a picture.
    """
    kept: list[Tensor] = []
    stream = getattr(model, "image_stream", None)
    if stream is None:
        yield kept
        return
    attention: nn.Module = stream.attention
    hooks = (
        attention.register_forward_pre_hook(
            lambda _module, args, kwargs: (args, {**kwargs, "need_weights": True}),
            with_kwargs=True,
        ),
        attention.register_forward_hook(lambda _module, _args, output: kept.append(output[1])),
    )
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _known_flags(sample: Sample, tags: Sequence[str]) -> tuple[bool, ...] | None:
    if sample.important is None:
        return None
    flags = dict(zip(sample.tags, sample.important, strict=True))
    return tuple(flags[tag] for tag in tags)


def _known_tags(sample: Sample | BadSample, vocabulary: Vocabulary) -> list[str]:
    tags = sample.tags if isinstance(sample, Sample) else ()
    return [tag for tag in dict.fromkeys(tags) if tag in vocabulary]


def _with_scores(
    items: Sequence[ItemPrediction],
    prediction: Prediction,
    temperature: float | None,
    attention: Tensor | None,
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
            num_tags = len(item.tags)
            of_item = {name: tuple(rows[name][row][:num_tags]) for name in rows}
            looks = None if attention is None else attention[row, :num_tags].float().cpu().numpy()
            yield replace(item, **of_item, attention=looks)
