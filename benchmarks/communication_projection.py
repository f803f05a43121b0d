"""What follows from the traffic that was measured, for many GPUs: a projection, no measurement."""

from __future__ import annotations

import argparse
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from command_line import above_zero, between
from communication_model import (
    STRATEGIES,
    Link,
    Sent,
    Shapes,
    expected_payload,
    project,
    table_lines,
)
from communication_rows import LS_TAGS
from magneto_dist.config import ModelConfig
from magneto_dist.config_io import load_config
from magneto_dist.errors import InputError
from magneto_dist.model.magneto import build_model

CONFIGS = Path(__file__).parent.parent / "configs"
LINKS = (
    Link("PCIe 3.0 x16", 12.0, 5.0),
    Link("25 GbE", 2.9, 25.0),
    Link("100 Gb/s", 11.5, 5.0),
    Link("NVLink", 130.0, 2.0),
)
RANKS = (8, 64, 512)


def links_of(given: Sequence[Sequence[str]] | None) -> Sequence[Link]:
    """Those that `--link` describes, each by name, GB/s and microseconds; None: `LINKS`.

    Raises:
        InputError: what should be a number is none, or too small.
    """
    links = []
    for name, gigabytes_per_s, latency_us in given or ():
        try:
            links.append(Link(name, above_zero(gigabytes_per_s), between(0, 1e6)(latency_us)))
        except (ValueError, ArgumentTypeError) as error:
            raise InputError(f"--link {name} {gigabytes_per_s} {latency_us}: {error}") from None
    return links or LINKS


def make_projection(
    traffic: Sequence[dict[str, Any]],
    shapes: Shapes,
    flops: float,
    links: Sequence[Link],
    given: argparse.Namespace,
) -> dict[str, Any]:
    """Weak scaling of LS on every link, from the collectives that were counted in two ranks.

    Args:
        traffic: rows of `communication.measure_traffic`; those of "ls" are used.
        shapes: of its weights.
        flops: of a training step, for one item.
        links: that GPUs are joined by.
        given: the other assumptions.
    """
    rows = []
    for items in given.items:
        compute_s = items * flops / (given.peak_tflops * 1e12 * given.efficiency)
        for link in links:
            for row in traffic:
                if row["model"] != "ls":
                    continue
                calls = {(p["purpose"], p["kind"]): p["calls"] for p in row["collectives"]}
                for ranks in RANKS:
                    expected = expected_payload(row["strategy"], shapes, ranks)
                    sent = [
                        Sent(*key, payload, calls.get(key, 1.0))
                        for key, payload in expected.items()
                        if key[0] != "metrics"  # logged every 50 steps
                    ]
                    one = project(row["strategy"], sent, ranks, link, compute_s, given.overlap)
                    rows.append(
                        {
                            "items_per_gpu": items,
                            "link": link.name,
                            "strategy": row["strategy"],
                            "gpus": ranks,
                            **asdict(one),
                            "efficiency": one.efficiency,
                        }
                    )
    print("\nPROJECTION, not measured: efficiency of weak scaling (computation / step)")
    print("\n".join(table_lines(_wide(rows))))
    return {
        "is_a_projection": True,
        "assumptions": {
            "flops_per_item": flops,
            "flops_source": "torch.utils.flop_counter, LS model at 224 px and 64 slots, forward and"
            " backward; a multiplication and an addition are two",
            "peak_tflops": given.peak_tflops,
            "efficiency_of_peak": given.efficiency,
            "overlap": given.overlap,
            "backward_share_of_computation": 2 / 3,
            "links": [asdict(link) for link in links],
            "model": "alpha-beta: hops * latency + bytes / bandwidth; ring, for an all-reduce a"
            " tree where that is faster; the slowest link of the ring carries its bytes alone; no"
            " stragglers, no cost of compression, no waiting for data",
        },
        "rows": rows,
    }


def _wide(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    table: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("items_per_gpu", "link", "strategy"))
        line = table.setdefault(key, dict(zip(("items/GPU", "link", "strategy"), key, strict=True)))
        line[f"{row['gpus']} GPUs"] = round(row["efficiency"], 3)
    return list(table.values())


def flops_per_item(model_config: ModelConfig) -> float:
    """Of a training step of LS at its full picture size, counted by torch, per item."""
    config = load_config(CONFIGS / "ls.yaml")
    model, side = build_model(model_config, LS_TAGS), config.augment.image_size
    ids = torch.zeros(2, config.tags.max_tags, dtype=torch.int64)
    pixels = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        prediction = model(ids, torch.ones_like(ids, dtype=torch.bool), pixels)
        sum(logits.sum() for logits in prediction if logits is not None).backward()
    return counter.get_total_flops() / 2


def plot(projection: dict[str, Any], out: Path) -> None:
    """Efficiency over GPUs: a column for each link, a row for each number of items per GPU."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows = projection["rows"]
    items = list(dict.fromkeys(row["items_per_gpu"] for row in rows))
    links = projection["assumptions"]["links"]
    figure, axes = plt.subplots(
        len(items), len(links), figsize=(3.6 * len(links), 3.4 * len(items) + 1), sharex=True,
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    styles = dict(zip(STRATEGIES, ("o-", "s--", "x:", "d-.", "^-", "v--", "*-"), strict=True))
    for i, count in enumerate(items):
        for j, link in enumerate(links):
            axis = axes[i, j]
            for strategy, style in styles.items():
                points = [
                    (row["gpus"], row["efficiency"])
                    for row in rows
                    if (row["items_per_gpu"], row["link"], row["strategy"])
                    == (count, link["name"], strategy)
                ]
                axis.plot(*zip(*points, strict=True), style, label=strategy, alpha=0.8)
            axis.set_title(
                f"{link['name']} ({link['gigabytes_per_s']:g} GB/s, {link['latency_us']:g} µs)\n"
                f"{count} items per GPU",
                fontsize=9,
            )
            axis.set_xscale("log", base=2)
            axis.set_xticks(RANKS, [str(n) for n in RANKS])
            axis.set_ylim(0, 1.03)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("GPUs (weak scaling)")
    figure.supylabel("computation / step time")
    assumed = projection["assumptions"]
    figure.suptitle(
        "PROJECTION, not measured: LS model, float32; computation at"
        f" {assumed['efficiency_of_peak']:.0%} of {assumed['peak_tflops']:g} TFLOP/s,"
        f" overlap {assumed['overlap']:g}"
    )
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(styles)
    )
    figure.savefig(out, dpi=110)
    plt.close(figure)
