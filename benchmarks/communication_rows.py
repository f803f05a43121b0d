"""The gradient of the tag embedding, of which a step touches few rows: ways to reduce it.

1. `build_zipf` makes a data set with as many tags as LS: 24,056, 43 an item, by Zipf's law.
   `rows_touched` counts what the real loader makes of it.
2. `WAYS` are reductions of such a gradient, in place: dense as DDP does it, and by rows.
3. `time_ways` times them on a gradient with the rows of a real batch; `train_ways` trains a model
   with each as a communication hook of DDP, and with `nn.Embedding(sparse=True)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from communication_model import TagDistribution
from communication_ranks import bytes_sent
from harness import compare
from magneto_dist.config import Config
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.sample import Sample
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources.demo_pictures import encode
from magneto_dist.data.writer import write_dataset
from magneto_dist.model.magneto import build_model
from magneto_dist.training.optim import build_optimizer
from magneto_dist.training.session import Session
from magneto_dist.vocabulary import Vocabulary
from magneto_dist.world import World

LS_TAGS = 24_056  # paper, section 4.1
STEPS = 4
_PICTURE_SIDE = 64


@dataclass(frozen=True)
class ZipfRow:
    """All that an item of `build_zipf` is made from."""

    index: int
    tags: TagDistribution
    max_tags: int


def build_zipf(out: Path, items: int, tags: TagDistribution, max_tags: int) -> None:
    """Writes `items` training and a few validation items with one picture and drawn tags."""
    splits = {
        split: [ZipfRow(first + i, tags, max_tags) for i in range(count)]
        for split, count, first in (("train", items, 0), ("validation", 8, items))
    }
    vocabulary = Vocabulary([_name(tag) for tag in range(tags.num_tags)])
    write_dataset(out, splits, _load, vocabulary, num_processes=1, source={"builder": "zipf"})


def _load(row: ZipfRow) -> Sample:
    rng = np.random.default_rng(row.index)
    count = min(max(rng.poisson(row.tags.tags_per_item), 1), row.max_tags)
    weight = np.arange(1, row.tags.num_tags + 1) ** -row.tags.exponent
    # Weighted draws without repetition: the tags whose exponential clocks ring first.
    clocks = rng.exponential(size=row.tags.num_tags) / weight
    chosen = np.argpartition(clocks, count)[:count]
    important = int(row.tags.important_per_item)
    picture = np.full((_PICTURE_SIDE, _PICTURE_SIDE, 3), row.index % 256, dtype=np.uint8)
    return Sample(
        key=f"{row.index:06d}",
        image=encode(picture, rng),
        tags=tuple(_name(tag) for tag in chosen),
        important=tuple(position < important for position in range(count)),
    )


def _name(tag: int) -> str:
    return f"tag{tag:05d}"


def batches_of_ids(config: Config, data: Path, items: int) -> Iterator[Tensor]:
    """The tag ids of one epoch's global batches of `items`, as the loader of a run makes them."""
    dataset = Dataset.open(str(data))
    settings = replace(
        config,
        model=replace(config.model, kind="tf-t"),  # reads no pictures
        data=replace(config.data, num_workers=0),
    )
    plan = BatchPlan(items, 1, items, 1)
    loader = Loader(dataset, "train", settings, World(), plan, training=True)
    for batch in loader.batches(1, dataset.num_samples("train") // items):
        yield batch.tag_ids


def rows_touched(batches: list[Tensor], ranks: int, num_tags: int) -> tuple[float, float]:
    """Different tags of a rank's part, and of the whole, of a global batch; means."""
    own = [_distinct(part, num_tags) for batch in batches for part in batch.chunk(ranks)]
    return mean(own), mean(_distinct(batch, num_tags) for batch in batches)


def _distinct(ids: Tensor, num_tags: int) -> int:
    return int((ids.unique() != num_tags).sum())


def reduce_dense(gradient: Tensor) -> None:
    """All-reduce of everything."""
    dist.all_reduce(gradient)


def reduce_union(gradient: Tensor) -> None:
    """All-reduce of the rows that any rank touched, after one of a byte per row."""
    touched = (gradient != 0).any(1).to(torch.uint8)
    dist.all_reduce(touched, op=dist.ReduceOp.MAX)
    rows = touched.nonzero().squeeze(1)
    packed = gradient[rows]
    dist.all_reduce(packed)
    gradient[rows] = packed


def reduce_gather(gradient: Tensor) -> None:
    """Every rank gets the touched rows of all, and adds them in the order of the ranks."""
    rows = (gradient != 0).any(1).nonzero().squeeze(1)
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    dist.all_gather_into_tensor(counts, torch.tensor([len(rows)]))
    most = int(counts.max())
    ids, values = rows.new_zeros(most), gradient.new_zeros(most, gradient.shape[1])
    ids[: len(rows)], values[: len(rows)] = rows, gradient[rows]
    all_ids = ids.new_empty(len(counts) * most)
    all_values = values.new_empty(len(counts) * most, gradient.shape[1])
    dist.all_gather_into_tensor(all_ids, ids)
    dist.all_gather_into_tensor(all_values, values)
    gradient.zero_()
    for rank, count in enumerate(counts.tolist()):
        part = slice(rank * most, rank * most + count)
        gradient.index_add_(0, all_ids[part], all_values[part])


def reduce_sparse(gradient: Tensor) -> None:
    """Gloo's all-reduce of a sparse tensor."""
    rows = (gradient != 0).any(1).nonzero().squeeze(1)
    sparse = torch.sparse_coo_tensor(
        rows[None], gradient[rows], gradient.shape, check_invariants=False
    )
    dist.all_reduce(sparse)
    gradient.copy_(sparse.to_dense())


WAYS: dict[str, Callable[[Tensor], None]] = {
    "dense": reduce_dense,
    "union": reduce_union,
    "gather": reduce_gather,
    "torch sparse": reduce_sparse,
}


def time_ways(config: Config, batch: list[list[int]], num_tags: int, rounds: int) -> dict[str, Any]:
    """Runs in each rank: times `WAYS` on a gradient with the rows of the rank's part of `batch`.

    Returns:
        "timings": as `harness.compare` gives them; "bytes": what this rank's sockets sent;
        "error": largest difference from the dense sum.
    """
    session = Session(config.train)
    rank, ranks = session.world.rank, session.world.num_ranks
    ids = torch.tensor(batch).chunk(ranks)[rank].unique()
    rows = ids[ids != num_tags]
    start = torch.zeros(num_tags + 1, config.model.d_model)
    generator = torch.Generator().manual_seed(rank)
    start[rows] = torch.randn(len(rows), start.shape[1], generator=generator)
    gradient, sent, sums = start.clone(), {}, {}
    for name, reduce in WAYS.items():
        gradient.copy_(start)
        before = bytes_sent()
        reduce(gradient)
        after = bytes_sent()
        sent[name] = after - before - (bytes_sent() - after)
        sums[name] = gradient.clone()
    calls = {name: partial(_timed, reduce, gradient, start) for name, reduce in WAYS.items()}
    timings = compare(calls, 1, rounds)
    session.close()
    return {
        "rows_of_rank": len(rows),
        "timings": [vars(timing) for timing in timings],
        "bytes": sent,
        "error": {name: float((s - sums["dense"]).abs().max()) for name, s in sums.items()},
    }


def _timed(reduce: Callable[[Tensor], None], gradient: Tensor, start: Tensor) -> None:
    gradient.copy_(start)  # in all alternatives: a 50th of the time of the dense one
    reduce(gradient)


def train_ways(config: Config, batch: list[list[int]], num_tags: int) -> dict[str, Any]:
    """Runs in each rank: trains the tag stream with SGD and momentum, each time by another way.

    Returns:
        By way: "error", the largest difference of a weight from dense, or what it failed with; of
        "sparse=True" also "momentum_rows", what its momentum holds, and what clipping says.
    """
    session = Session(config.train)
    ids = torch.tensor(batch).chunk(session.world.num_ranks)[session.world.rank]
    dense = _train(session, config, ids, num_tags, "dense")[0]
    found: dict[str, Any] = {}
    for name in ("union", "gather", "sparse=True"):
        try:
            weights, more = _train(session, config, ids, num_tags, name)
            found[name] = {"error": float((weights - dense).abs().max()), **more}
        except RuntimeError as error:
            found[name] = {"fails": str(error).splitlines()[0]}
    session.close()
    return found


def _train(
    session: Session, config: Config, ids: Tensor, num_tags: int, way: str
) -> tuple[Tensor, dict[str, Any]]:
    torch.manual_seed(0)
    model = build_model(replace(config.model, kind="tf-t", tag_layers=1, dropout=0.0), num_tags)
    vectors = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    vectors.sparse = way == "sparse=True"
    plan = BatchPlan(len(ids) * session.world.num_ranks, session.world.num_ranks, len(ids), 1)
    wrapped, optimizer = session.prepare(model, build_optimizer(model, config.optim), plan)
    if way in ("union", "gather"):
        wrapped.register_comm_hook((vectors.weight, WAYS[way]), row_hook)
    for step in range(STEPS):
        some = ids.roll(step, 0)[: 1 + step]  # other rows each time: momentum moves the rest
        with session.micro_step(wrapped, is_last=True):
            logits = wrapped(some, some != num_tags).tag_logits
            loss = torch.where(some != num_tags, logits - (some % 3 == 0).float(), 0).square()
            session.backward(loss.mean())
        session.step(wrapped, optimizer)
    more: dict[str, Any] = {}
    if vectors.sparse:
        momentum = optimizer.optimizer.state[vectors.weight]["momentum_buffer"]
        more["momentum_rows"] = momentum._nnz() if momentum.is_sparse else "dense"
        more["clipping"] = _clips(session, wrapped, some, num_tags)
    return vectors.weight.detach().clone(), more


def _clips(session: Session, model: nn.Module, ids: Tensor, num_tags: int) -> str:
    session.backward(model(ids, ids != num_tags).tag_logits.mean())
    try:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return "works"


def row_hook(state: tuple[Tensor, Callable[[Tensor], None]], bucket):
    """A communication hook of DDP: one weight's gradient by its own way, all others densely.

    DDP looks at the annotations of `bucket` and of what is returned, and does not read strings.
    """
    weight, reduce = state
    buffer = bucket.buffer().div_(dist.get_world_size())
    if any(parameter is weight for parameter in bucket.parameters()):
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            (reduce if parameter is weight else dist.all_reduce)(gradient)
    else:
        dist.all_reduce(buffer)
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(buffer)
    return future
