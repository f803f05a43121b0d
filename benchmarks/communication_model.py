"""What a step of distributed training sends, from the shapes of the weights alone, and how long.

1. `expected_payload`: the tensors that each way of training hands to collectives in a step.
2. `wire_bytes`: what a rank sends of a payload, where the ranks form a ring.
3. `row_bytes` and `touched_rows`: ways to send the gradient of an embedding.
4. `step_s`: a step on a link that is described by latency and bandwidth; nothing is measured here.

Bytes are of float32 weights and gradients, per optimizer step and rank. The payload of an
all-gather is what it makes, that of a reduce-scatter what it is given: the whole in both cases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64

DDP = ("ddp", "ddp fp16", "ddp bf16", "ddp power_sgd")
ZERO = ("zero1", "zero2", "zero3")
STRATEGIES = (*DDP, *ZERO)
FLOAT = 4  # bytes
_PERSISTENCE = 100_000
"""DeepSpeed's stage3_param_persistence_threshold: elements of a weight that stays on all ranks."""
_ALIGNMENT = 2  # DeepSpeed pads ZeRO-1's and -2's flat weights to a multiple of this a rank
_BACKWARD = 2 / 3  # of the time of a step's computation

Shape = tuple[int, ...]
Payload = dict[tuple[str, str], float]
"""(purpose, kind of collective) -> bytes."""


@dataclass(frozen=True)
class Shapes:
    """What of a model travels."""

    trained: Sequence[Shape]
    frozen: Sequence[Shape] = ()
    norm_channels: Sequence[int] = ()
    """Of each ghost batch norm."""
    sums: int = 0
    """Numbers in the loss and the metric sums of a logged step."""


def expected_payload(
    strategy: str, shapes: Shapes, num_ranks: int, micro_steps: int = 1, power_sgd_rank: int = 1
) -> Payload:
    """Bytes that a rank hands to collectives in one step that is logged, by purpose and kind.

    ZeRO-1 and -2 reduce gradients with an all-reduce, of which each rank keeps its part
    (DeepSpeed's `use_multi_rank_bucket_allreduce`). ZeRO-2 and -3 reduce in every micro-step.
    ZeRO-3 gathers a weight once a micro-step, not once for each direction, as long as the model
    has fewer elements than `stage3_max_reuse_distance` (1e9); weights of up to 100,000 elements
    stay whole and are gathered after the step, the trained ones.

    Raises:
        ValueError: unknown strategy.
    """
    own: Payload = {
        ("counts", "all_reduce"): 6 * 8,
        ("batch norm", "all_reduce"): FLOAT * sum(1 + 2 * c for c in shapes.norm_channels),
        ("metrics", "all_reduce"): 8 * shapes.sums,
    }
    trained = sum(map(math.prod, shapes.trained))
    if strategy == "ddp":
        of_strategy: Payload = {("gradients", "all_reduce"): FLOAT * trained}
    elif strategy in ("ddp fp16", "ddp bf16"):
        of_strategy = {("gradients", "all_reduce"): 2 * trained}
    elif strategy == "ddp power_sgd":
        sent = sum(power_sgd_elements(shape, power_sgd_rank) for shape in shapes.trained)
        of_strategy = {("gradients", "all_reduce"): FLOAT * sent}
    elif strategy in ("zero1", "zero2"):
        times = micro_steps if strategy == "zero2" else 1
        of_strategy = {
            ("gradients", "all_reduce"): FLOAT * trained * times,
            ("weights", "all_gather"): FLOAT * _padded(trained, _ALIGNMENT * num_ranks),
        }
    elif strategy == "zero3":
        of_strategy = _zero3(shapes, num_ranks, micro_steps)
    else:
        raise ValueError(f"unknown strategy {strategy!r}")
    return {key: size for key, size in (of_strategy | own).items() if size}


def _zero3(shapes: Shapes, num_ranks: int, micro_steps: int) -> Payload:
    def in_parts(some: Sequence[Shape]) -> int:
        return FLOAT * sum(_padded(math.prod(shape), num_ranks) for shape in some)

    every = [*shapes.trained, *shapes.frozen]
    gathered = [shape for shape in every if math.prod(shape) > _PERSISTENCE]
    kept = [shape for shape in every if math.prod(shape) <= _PERSISTENCE]
    return {
        ("gradients", "reduce_scatter"): micro_steps * in_parts(shapes.trained),
        ("weights", "all_gather"): micro_steps * in_parts(gathered) + in_parts(kept),
    }


def power_sgd_elements(shape: Shape, rank: int) -> int:
    """Elements that stand for a gradient: those of P and Q, or all where that saves less than half.

    PowerSGD (Vogels et al. 2019) sees a gradient as a matrix of `shape[0]` rows; torch's
    `min_compression_rate` is 2.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    rank = min(rows, columns, rank)
    thin = (rows + columns) * rank
    return thin if 2 * thin < rows * columns else rows * columns


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def wire_bytes(kind: str, payload: float, num_ranks: int) -> float:
    """Bytes that each of `num_ranks` sends in a ring: (n - 1) / n of the payload, or twice that."""
    turns = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}[kind]
    return turns * (num_ranks - 1) / num_ranks * payload


def total_wire_bytes(payload: Payload, num_ranks: int) -> float:
    """`wire_bytes` of all collectives of a step."""
    return sum(wire_bytes(kind, size, num_ranks) for (_, kind), size in payload.items())


def row_bytes(way: str, num_ranks: int, table: Shape, own_rows: float, all_rows: float) -> float:
    """Bytes that a rank sends of an embedding's gradient.

    Args:
        way: "dense": all-reduce of the whole; "gather": every rank's touched rows with their ids
            (int64) go to all others; "union": all-reduce of a byte per row that says whether
            any rank touched it, then of these rows.
        num_ranks: of the ring.
        table: rows and columns.
        own_rows: touched by one rank.
        all_rows: touched by any rank.
    """
    rows, columns = table
    if way == "dense":
        return wire_bytes("all_reduce", FLOAT * rows * columns, num_ranks)
    if way == "gather":
        return (num_ranks - 1) * own_rows * (FLOAT * columns + 8)
    if way == "union":
        return wire_bytes("all_reduce", rows + FLOAT * all_rows * columns, num_ranks)
    raise ValueError(f"unknown way {way!r}")


@dataclass(frozen=True)
class TagDistribution:
    """How often which tag comes: Zipf's law, and uniformly added ones (TAD)."""

    num_tags: int
    """Of the vocabulary."""
    tags_per_item: float
    """Of the data set; LS has 43 on average (paper, section 5)."""
    exponent: float
    """The tag of rank k comes in proportion to k ** -exponent."""
    important_per_item: float
    """Never dropped."""
    beta_add: float
    beta_drop: float

    def share_of_items(self) -> Float64[np.ndarray, " tag"]:
        """Fraction of training items that hold each tag, after adding & dropping."""
        weight = np.arange(1, self.num_tags + 1) ** -self.exponent
        weight /= weight.sum()
        # An item takes tags as their clocks ring (weighted draws without repetition): by time t
        # tag k has come with probability 1 - exp(-t weight_k). So many that the mean is right.
        low, high = 0.0, 1e9
        for _ in range(100):
            middle = (low + high) / 2
            too_few = (1 - np.exp(-middle * weight)).sum() < self.tags_per_item
            low, high = (middle, high) if too_few else (low, middle)
        original = 1 - np.exp(-low * weight)
        unimportant = self.tags_per_item - self.important_per_item
        kept = 1 - self.beta_drop / 2 * unimportant / self.tags_per_item
        added = self.beta_add / 2 * unimportant / self.num_tags
        return 1 - (1 - kept * original) * (1 - added)

    def touched_rows(self, items: int) -> float:
        """Expected number of different tags in so many items."""
        return float((1 - (1 - self.share_of_items()) ** items).sum())


@dataclass(frozen=True)
class Link:
    """The slowest connection of the ring."""

    name: str
    gigabytes_per_s: float
    """1e9 bytes per second and direction, as a collective gets them."""
    latency_us: float
    """Per hop, software included."""


@dataclass(frozen=True)
class Sent:
    """A collective of a step: all calls of a kind and purpose together."""

    purpose: str
    kind: str
    payload: float
    """Bytes of all calls."""
    calls: float


@dataclass(frozen=True)
class Projection:
    """A step that nobody has measured."""

    compute_s: float
    communication_s: float
    exposed_s: float
    """Of the communication, what does not go on behind the computation."""
    step_s: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_s", self.compute_s + self.exposed_s)

    @property
    def efficiency(self) -> float:
        """Of weak scaling: speed per GPU as a fraction of that of one alone."""
        return self.compute_s / self.step_s


def collective_s(sent: Sent, num_ranks: int, link: Link) -> float:
    """Time in the alpha-beta model: of a ring; of an all-reduce also of a tree, if that is less."""
    if num_ranks == 1:
        return 0.0
    latency_s, bytes_per_s = link.latency_us * 1e-6, link.gigabytes_per_s * 1e9
    hops = (2 if sent.kind == "all_reduce" else 1) * (num_ranks - 1)
    ring_s = sent.calls * hops * latency_s
    ring_s += wire_bytes(sent.kind, sent.payload, num_ranks) / bytes_per_s
    if sent.kind != "all_reduce":
        return ring_s
    tree_s = sent.calls * 2 * math.ceil(math.log2(num_ranks)) * latency_s
    return min(ring_s, tree_s + 2 * sent.payload / bytes_per_s)


def project(
    strategy: str,
    collectives: Sequence[Sent],
    num_ranks: int,
    link: Link,
    compute_s: float,
    overlap: float,
) -> Projection:
    """A step of a strategy on a link.

    Of what may go on behind the computation, `overlap` does, as long as the computation lasts: in
    DDP the gradients behind the backward pass; in ZeRO-3 gradients and weights behind all of it.
    ZeRO-1 and -2 wait for both (DeepSpeed's `overlap_comm` is off there unless asked for).
    """
    window_s = {"ddp": _BACKWARD, "zero3": 1.0}.get(strategy.split()[0], 0.0) * compute_s
    times_s = {sent: collective_s(sent, num_ranks, link) for sent in collectives}
    may_hide_s = sum(s for sent, s in times_s.items() if sent.purpose in ("gradients", "weights"))
    total_s = sum(times_s.values())
    return Projection(compute_s, total_s, total_s - min(overlap * may_hide_s, window_s))


def table_lines(rows: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """Rows with the same keys as lines of text, columns aligned."""
    texts = [{key: _text(value) for key, value in row.items()} for row in rows]
    widths = {key: max(len(key), *(len(text[key]) for text in texts)) for key in texts[0]}
    for line in ({key: key for key in widths}, *texts):
        yield "  ".join(line[key].rjust(width) for key, width in widths.items())


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
