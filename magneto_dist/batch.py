"""Every shape and dtype that crosses from data to model and from model to loss, stated once.

Axes: `batch` items of one micro-batch, `slot` the padded tag list (the paper's l), `height` and
`width` in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.nn.functional import logsigmoid

LEFT_OUT = "left out by a stage"


@dataclass(frozen=True)
class Reject:
    """A sample that could not be used: it is written to the quarantine, once a run and key.

    Or, with LEFT_OUT as its reason, one that the user does not want: no bad one.
    """

    key: str
    shard: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    A row with `sample_valid` False (padding of the last global batch, or a bad sample) has no
    tags, zero pixels and zero weight in loss and metrics; it keeps every rank at the same shapes.
    """

    tag_ids: Int64[Tensor, "batch slot"]
    """Ids of the vocabulary; the padding id where `tag_mask` is False."""
    tag_mask: Bool[Tensor, "batch slot"]
    """True where the slot holds a tag."""
    target: Bool[Tensor, "batch slot"]
    """True where the tag is important (supervised) or belongs to the item (pre-training)."""
    outlier: Bool[Tensor, "batch slot"]
    """True where the tag was added by us (tag-adding, outlier test), not by the data set."""
    sample_valid: Bool[Tensor, " batch"]
    """False for rows that count for nothing."""
    sample_ids: Int64[Tensor, " batch"]
    """Position of the sample in its split; -1 in padding rows."""
    tags_cut: Int64[Tensor, " batch"]
    """Tags of the item that found no slot."""
    targets_cut: Int64[Tensor, " batch"]
    """Of these, the ones whose target is True: evaluation counts them as not predicted."""
    pixels: UInt8[Tensor, "batch 3 height width"] | None
    """RGB, 0 to 255, not normalised (the model normalises, on its device); None: the data
    set has no pictures, the model does not look at them, or there are features instead."""
    keys: tuple[str, ...]
    """Sample keys, "" in padding rows."""
    step: int
    """Global step, from 1 (evaluation: step of its epoch)."""
    micro_step: int
    """Which micro-batch of the step this is, from 0."""
    epoch: int
    """From 0."""
    rejects: tuple[Reject, ...] = ()
    """Samples of this micro-batch that go to the quarantine."""
    all_valid: bool = False
    """Known on the CPU that every row is valid: the model need not be told which are."""
    features: Float[Tensor, "batch region channel"] | None = None
    """What the frozen stages of the backbone have made of the pictures; None: that is left to the
    model. Where it was read from disk it is float16 or bfloat16, and zero in rows that are not
    valid."""
    num_slots: int | None = None
    """Slots of a list before padding was trimmed (the paper's l), over which the published loss is
    averaged; None: as many as there are."""

    @property
    def real_tags(self) -> Bool[Tensor, "batch slot"]:
        """Slots that hold a tag of a valid row."""
        return self.tag_mask & self.sample_valid[:, None]

    def to(self, device: torch.device | str) -> Batch:
        """This batch with its tensors on `device`, copied without blocking from pinned memory."""
        return replace(
            self,
            **{name: t.to(device, non_blocking=True) for name, t in self._tensors().items()},
        )

    def large_to(self, device: torch.device | str) -> Batch:
        """As `to`, for pictures and their features alone."""
        large = {name: t.to(device, non_blocking=True) for name, t in self.large_tensors().items()}
        return replace(self, **large)

    def large_tensors(self) -> dict[str, Tensor]:
        """Pictures and their features, as far as they are there."""
        large = {"pixels": self.pixels, "features": self.features}
        return {name: tensor for name, tensor in large.items() if tensor is not None}

    def pin_memory(self) -> Batch:
        """This batch in page-locked memory."""
        return replace(self, **{name: t.pin_memory() for name, t in self._tensors().items()})

    def inputs(self) -> dict[str, Tensor | None]:
        """The arguments of a model's `forward`: nothing that tells it the answer."""
        return {
            "tag_ids": self.tag_ids,
            "tag_mask": self.tag_mask,
            "pixels": self.pixels,
            "features": self.features,
            "sample_valid": None if self.all_valid else self.sample_valid,
        }

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


class LogProbabilities(NamedTuple):
    """log p and log(1 - p) of one head, float32 (float64 in a float64 model)."""

    positive: Float[Tensor, "batch slot"]
    negative: Float[Tensor, "batch slot"]


class Prediction(NamedTuple):
    """What a model says of every slot; a part that the model does not have is None.

    Logits leave the model in its own precision. Probabilities are formed here in float32, outside
    autocast: the gate mixes probabilities (equation 1), so the mixture is taken in log space.
    """

    image_logits: Float[Tensor, "batch slot"] | None = None
    """Image-stream head, before the sigmoid: O_it of the paper."""
    tag_logits: Float[Tensor, "batch slot"] | None = None
    """Tag-stream head, before the sigmoid: O_t of the paper."""
    gate_logits: Float[Tensor, "batch slot"] | None = None
    """Gate, before the sigmoid: alpha = sigmoid(gate_logits) weighs the image stream."""

    @property
    def heads(self) -> tuple[str, ...]:
        """Heads that this model has, of "final", "image", "tag"; "final" needs the gate.

        A one-stream baseline has one head, and its output is the final one.
        """
        streams = [name for name in ("image", "tag") if self._logits(name) is not None]
        has_final = self.gate_logits is not None or len(streams) == 1
        return ("final", *streams) if has_final else tuple(streams)

    @property
    def alpha(self) -> Float[Tensor, "batch slot"] | None:
        """Weight of the image stream in [0, 1], float32; None without a gate."""
        return None if self.gate_logits is None else _full_precision(self.gate_logits).sigmoid()

    def probability(self, head: str) -> Float[Tensor, "batch slot"]:
        """Probability that each tag is important, in [0, 1], float32."""
        if head == "final" and self.alpha is not None:
            image, tag = self.probability("image"), self.probability("tag")
            return self.alpha * image + (1 - self.alpha) * tag
        return _full_precision(self._required_logits(head)).sigmoid()

    def log_probabilities(self, head: str) -> LogProbabilities:
        """log p and log(1 - p), exact for logits of any size.

        final (equation 1): log p = logaddexp(log alpha + log p_it, log(1 - alpha) + log p_t).
        """
        with torch.autocast(self._any_logits().device.type, enabled=False):
            if head == "final" and self.gate_logits is not None:
                gate = _full_precision(self.gate_logits)
                image, tag = self.log_probabilities("image"), self.log_probabilities("tag")
                log_alpha, log_rest = logsigmoid(gate), logsigmoid(-gate)
                return LogProbabilities(
                    torch.logaddexp(log_alpha + image.positive, log_rest + tag.positive),
                    torch.logaddexp(log_alpha + image.negative, log_rest + tag.negative),
                )
            logits = _full_precision(self._required_logits(head))
            return LogProbabilities(logsigmoid(logits), logsigmoid(-logits))

    def _logits(self, head: str) -> Tensor | None:
        return {"image": self.image_logits, "tag": self.tag_logits}[head]

    def _required_logits(self, head: str) -> Tensor:
        if head not in self.heads:
            raise ValueError(f"this model has the heads {self.heads}, not {head!r}")
        logits = self._any_logits() if head == "final" else self._logits(head)
        assert logits is not None
        return logits

    def _any_logits(self) -> Tensor:
        logits = self.image_logits if self.image_logits is not None else self.tag_logits
        assert logits is not None, "a prediction has at least one stream"
        return logits


def _full_precision(logits: Float[Tensor, ...]) -> Float[Tensor, ...]:
    return logits if logits.dtype == torch.float64 else logits.float()
