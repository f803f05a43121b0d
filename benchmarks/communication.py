"""What does distributed training send, does theory say the same, and what follows for many GPUs?

python benchmarks/communication.py --out communication

1. Traffic: bytes per optimizer step and rank of every strategy, measured in real training runs of
   2 and 4 processes on gloo, against formulas: what collectives are handed (gradients, weights,
   other), what a rank would send of that in a ring, and what the kernel sent (socket).
2. Embedding: the tag embedding's gradient by rows instead of densely: bytes, time, and whether the
   weights come out the same.
3. Projection (no measurement): a step on 8, 64 and 512 GPUs = computation + communication that is
   not hidden, from the traffic of 1. All assumptions are options.

An MB is 1e6 bytes. Needs Linux, and a torch whose process groups have `register_pre_hook` (2.14).
Takes several minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")

import torch
from tqdm import tqdm

from command_line import above_zero, at_least, between, parser
from communication_model import (
    FLOAT,
    STRATEGIES,
    Shapes,
    TagDistribution,
    expected_payload,
    row_bytes,
    table_lines,
    total_wire_bytes,
)
from communication_projection import LINKS, flops_per_item, links_of, make_projection, plot
from communication_ranks import Traffic, run_ranks, shapes_of, traffic_of
from communication_rows import (
    LS_TAGS,
    batches_of_ids,
    build_zipf,
    rows_touched,
    time_ways,
    train_ways,
)
from harness import RESULTS, save
from magneto_dist.config import Config
from magneto_dist.config_io import load_config
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources import demo
from magneto_dist.errors import exit_with_clear_errors
from magneto_dist.metrics import metric_sums
from magneto_dist.model.magneto import build_model
from magneto_dist.world import World

CONFIGS = Path(__file__).parent.parent / "configs"
MICRO_BATCH = 4  # rows; what is sent does not depend on it
LS_BATCH = 256  # items; paper, appendix A.1


def main() -> None:
    """Command line -> tables, and with --out a file and a plot."""
    given = _options().parse_args()
    links = links_of(given.link)
    found: dict[str, Any] = {"question": "bytes and time of communication in distributed training"}
    with TemporaryDirectory() as folder:
        sizes = _sizes(Path(folder), given)
        found["traffic"] = list(measure_traffic(sizes, given.quick))
        _show("traffic, MB per step and rank", found["traffic"])
        if not given.quick:
            found["embedding"] = measure_embedding(sizes["ls"], given)
            ls = sizes["ls"]
            flops = flops_per_item(ls.config.model)
            found["projection"] = make_projection(
                found["traffic"], ls.shapes(), flops, links, given
            )
    if given.out:
        save(given.out, found)
    if given.out and not given.quick:
        plot(found["projection"], RESULTS / f"{given.out}.png")
    if given.quick:
        print(json.dumps(found["traffic"]))


def _options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--quick", action="store_true", help="part 1 of DDP and ZeRO-1, small model")
    add = made.add_argument_group("assumptions").add_argument
    add("--zipf", type=between(0, 10), default=1.0, help="exponent of tag frequencies (default: 1)")
    add("--items", type=at_least(1), nargs="+", default=[256, 32], help="per GPU and step (default:"
        " both 256 and 32)")  # fmt: skip
    add("--peak_tflops", type=above_zero, default=13.45, help="of a GPU, float32 (default: 13.45,"
        " the paper's RTX 2080 Ti)")  # fmt: skip
    add("--efficiency", type=between(0.001, 1), default=0.4, help="fraction of the peak that"
        " training reaches (default: 0.4)")  # fmt: skip
    add("--overlap", type=between(0, 1), default=0.75, help="fraction of communication that may"
        " hide behind computation (default: 0.75, all but the embedding, the last)")  # fmt: skip
    links = "; ".join(f"{k.name} {k.gigabytes_per_s:g} {k.latency_us:g}" for k in LINKS)
    add("--link", nargs=3, action="append", metavar=("NAME", "GB/S", "US"), help="1e9 B/s per"
        " direction, as collectives reach it; microseconds of latency per hop; several times for"
        f" several links (default: {links})")  # fmt: skip
    return made


class Size:
    """A model and the data that it is trained on."""

    def __init__(self, name: str, config: Config, data: Path) -> None:
        self.name = name
        self.config = replace(config, data=replace(config.data, path=str(data)))
        self.data = data

    def of(self, num_ranks: int, micro_steps: int) -> Config:
        """The configuration of a run in which each rank has so many micro-batches."""
        train = replace(
            self.config.train,
            global_batch_size=MICRO_BATCH * num_ranks * micro_steps,
            max_micro_batch_size=MICRO_BATCH,
        )
        return replace(self.config, train=train)

    @cache  # noqa: B019 - there are two
    def shapes(self) -> Shapes:
        """Of the weights, batch norms and metrics."""
        dataset = Dataset.open(str(self.data))
        model = build_model(self.config.model, len(dataset.vocabulary))
        settings = self.of(1, 1)
        plan = BatchPlan(MICRO_BATCH, 1, MICRO_BATCH, 1)
        batch = Loader(dataset, "train", settings, World(), plan, training=True).empty_batch()
        with torch.no_grad():
            sums = metric_sums(model(**batch.inputs()), batch, 0.5)
        return shapes_of(model, sums=1 + sum(value.numel() for value in sums.values()))


def _sizes(folder: Path, given: argparse.Namespace) -> dict[str, Size]:
    config = load_config(CONFIGS / "demo.yaml")
    demo.build(folder / "demo", items=64, num_processes=1)
    sizes = {"demo": Size("demo", _small(config), folder / "demo")}
    if not given.quick:
        config = load_config(CONFIGS / "ls.yaml")
        build_zipf(folder / "ls", 4 * LS_BATCH, tags_of(config, given.zipf), config.tags.max_tags)
        sizes["ls"] = Size("ls", _small(config), folder / "ls")
    return sizes


def _small(config: Config) -> Config:
    """Small pictures and groups, few tags, no weights to download: what is sent stays the same."""
    return replace(
        config,
        model=replace(config.model, backbone_weights="none", batch_norm_group_size=MICRO_BATCH),
        augment=replace(config.augment, image_size=32, policy="none"),
        tags=replace(config.tags, max_tags=8),
    )


def tags_of(config: Config, exponent: float) -> TagDistribution:
    """LS in numbers: 24,056 tags, 43 per item (paper, sections 4.1 and 5); 5 of them important."""
    return TagDistribution(
        LS_TAGS, 43.0, exponent, 5.0, config.tags.beta_add, config.tags.beta_drop
    )


def measure_traffic(sizes: dict[str, Size], quick: bool) -> Iterator[dict[str, Any]]:
    """A row for each model, strategy, number of ranks and of micro-steps."""
    runs = [(strategy, "demo", 2, 1) for strategy in ("ddp", "zero1")]
    if not quick:
        cases = (("demo", 2, 1), ("demo", 2, 2), ("demo", 4, 1), ("ls", 2, 1))
        runs = [(strategy, *case) for case in cases for strategy in STRATEGIES]
    for strategy, name, ranks, micro_steps in tqdm(runs, desc="training runs"):
        size = sizes[name]
        traffic = traffic_of(strategy, ranks, size.of(ranks, micro_steps))
        yield traffic_row(strategy, size, ranks, micro_steps, traffic)


def traffic_row(
    strategy: str, size: Size, ranks: int, micro_steps: int, traffic: Sequence[Traffic]
) -> dict[str, Any]:
    """Measured against expected. Collectives are the same on all ranks, sockets not quite."""
    measured = traffic[0].payload
    expected = expected_payload(strategy, size.shapes(), ranks, micro_steps)
    ring = total_wire_bytes(measured, ranks)
    by_socket = sum(t.socket_bytes for t in traffic) / ranks
    return {
        "model": size.name,
        "strategy": strategy,
        "ranks": ranks,
        "micro_steps": micro_steps,
        "collectives": [
            {
                "purpose": purpose,
                "kind": kind,
                "dtype": traffic[0].dtypes[purpose, kind],
                "calls": traffic[0].calls[purpose, kind],
                "bytes": measured[purpose, kind],
                "expected_bytes": expected.get((purpose, kind), 0.0),
            }
            for purpose, kind in sorted(measured)
        ],
        "missing": [list(key) for key in expected if key not in measured],
        "same_on_all_ranks": all(t.payload == measured for t in traffic),
        "ring_bytes": ring,
        "expected_ring_bytes": total_wire_bytes(expected, ranks),
        "socket_bytes": by_socket,
    }


def _show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{title}")
    shown = []
    for row in rows:
        line = {key: row[key] for key in ("model", "strategy", "ranks", "micro_steps")}
        for purpose in ("gradients", "weights"):
            parts = [part for part in row["collectives"] if part["purpose"] == purpose]
            line[purpose] = sum(part["bytes"] for part in parts) / 1e6
            line[f"{purpose} off %"] = _off(parts)
        own = [p for p in row["collectives"] if p["purpose"] not in ("gradients", "weights")]
        line["other"] = sum(part["bytes"] for part in own) / 1e6
        line["ring"], line["socket"] = row["ring_bytes"] / 1e6, row["socket_bytes"] / 1e6
        line["socket off %"] = 100 * (row["socket_bytes"] / row["ring_bytes"] - 1)
        shown.append(line)
    print("\n".join(table_lines(shown)), flush=True)


def _off(parts: Sequence[dict[str, Any]]) -> float | str:
    expected = sum(part["expected_bytes"] for part in parts)
    if not expected:
        return "-" if not parts else "not expected"
    return 100 * (sum(part["bytes"] for part in parts) / expected - 1)


def measure_embedding(size: Size, given: argparse.Namespace) -> dict[str, Any]:
    """Ways to reduce the tag embedding's gradient, at the LS batch."""
    config = load_config(CONFIGS / "ls.yaml")
    tags, table = tags_of(config, given.zipf), (LS_TAGS + 1, config.model.d_model)
    batches = list(batches_of_ids(config, size.data, LS_BATCH))
    gradients = FLOAT * sum(torch.Size(shape).numel() for shape in size.shapes().trained)
    bytes_of = {"embedding": FLOAT * table[0] * table[1], "all_gradients": gradients}
    counted = []
    for ranks in (1, 2, 4, 8, 16):
        own, union = rows_touched(batches, ranks, LS_TAGS)
        counted.append(
            {
                "ranks": ranks,
                "rows of a rank": own,
                "formula": tags.touched_rows(LS_BATCH // ranks),
                "rows of all": union,
                "formula of all": tags.touched_rows(LS_BATCH),
            }
        )
    print("\nrows of the embedding that a batch of 256 touches")
    print("\n".join(table_lines(counted)))
    by_size = [
        _row_line(ranks, tags, table, items_per_rank, gradients)
        for ranks, items_per_rank in [
            *((n, LS_BATCH // n) for n in (2, 4, 8, 16)),
            *((n, LS_BATCH) for n in (2, 4, 8, 16, 32, 64, 128, 256, 512)),
        ]
    ]
    print("\nMB per step and rank of the embedding's gradient (formula)")
    print("\n".join(table_lines(by_size)))
    ids = batches[0].tolist()
    timed = run_ranks(2, time_ways, config, ids, LS_TAGS, given.rounds)
    own_rows = max(rank["rows_of_rank"] for rank in timed)
    union = rows_touched(batches[:1], 2, LS_TAGS)[1]
    times = [
        {
            "way": timing["name"],
            "ms": 1e3 / timing["per_s"],
            "speed": timing["ratio"],
            "socket MB": sum(rank["bytes"][timing["name"]] for rank in timed) / 2e6,
            "formula MB": (
                row_bytes(timing["name"], 2, table, own_rows, union) / 1e6
                if timing["name"] != "torch sparse"
                else row_bytes("gather", 2, table, own_rows, union) / 1e6
            ),
            "error": max(rank["error"][timing["name"]] for rank in timed),
        }
        for timing in timed[0]["timings"]
    ]
    print("\nreducing it in 2 processes on gloo, 128 items each")
    print("\n".join(table_lines(times)))
    trained = run_ranks(2, train_ways, config, ids[:16], LS_TAGS)
    print(f"\ntrained with it, against dense: {json.dumps(trained[0])}", flush=True)
    return {
        "tags": asdict(tags),
        "table": list(table),
        "bytes": bytes_of,
        "rows": counted,
        "formula_mb": by_size,
        "timed": times,
        "timings": timed[0]["timings"],
        "trained": trained[0],
    }


def _row_line(
    ranks: int, tags: TagDistribution, table: tuple[int, int], items: int, gradients: int
) -> dict[str, Any]:
    own, union = tags.touched_rows(items), tags.touched_rows(items * ranks)
    sent = {way: row_bytes(way, ranks, table, own, union) for way in ("dense", "union", "gather")}
    all_dense = 2 * (ranks - 1) / ranks * gradients
    return {
        "ranks": ranks,
        "items per rank": items,
        **{way: size / 1e6 for way, size in sent.items()},
        "union saves % of all gradients": 100 * (sent["dense"] - sent["union"]) / all_dense,
        "gather saves %": 100 * (sent["dense"] - sent["gather"]) / all_dense,
    }


if __name__ == "__main__":
    exit_with_clear_errors(main)
