"""What distributed training sends: the formulas, and that real runs send it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch.distributed as dist

from communication_model import (
    Link,
    Sent,
    Shapes,
    TagDistribution,
    collective_s,
    expected_payload,
    power_sgd_elements,
    project,
    row_bytes,
    total_wire_bytes,
    wire_bytes,
)
from processes import REPOSITORY

SHAPES = Shapes(trained=[(1000, 300), (300,)], frozen=[(400, 400)], norm_channels=[8], sums=10)
LINK = Link("test", gigabytes_per_s=1.0, latency_us=10.0)


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(dist.ProcessGroup, "register_pre_hook"), reason="torch without collective hooks"
)
def test_two_ranks_send_what_the_formulas_say() -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "communication.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [row["strategy"] for row in rows] == ["ddp", "zero1"]
    for row in rows:
        assert row["missing"] == []
        assert row["same_on_all_ranks"]
        parts = {part["purpose"]: part for part in row["collectives"]}
        scalars = parts.pop("scalars", {"bytes": 0})
        assert scalars["bytes"] <= 64  # DeepSpeed's norm
        assert parts.keys() == {"gradients", "counts", "batch norm", "metrics"} | (
            {"weights"} if row["strategy"] == "zero1" else set()
        )
        for part in parts.values():
            assert part["bytes"] == part["expected_bytes"], part
        assert row["socket_bytes"] == pytest.approx(row["ring_bytes"], rel=0.02)
    ddp, zero1 = rows
    assert zero1["socket_bytes"] == pytest.approx(1.5 * ddp["socket_bytes"], rel=0.02)


def test_payload_of_ddp_and_its_hooks() -> None:
    gradients = ("gradients", "all_reduce")
    elements = 1000 * 300 + 300
    assert expected_payload("ddp", SHAPES, 2)[gradients] == 4 * elements
    assert expected_payload("ddp fp16", SHAPES, 2)[gradients] == 2 * elements
    assert expected_payload("ddp power_sgd", SHAPES, 2)[gradients] == 4 * (1300 + 300)
    # accumulation: gradients travel once a step
    assert expected_payload("ddp", SHAPES, 2, 3) == expected_payload("ddp", SHAPES, 2, 1)
    own = expected_payload("ddp", SHAPES, 2)
    assert own["counts", "all_reduce"] == 48
    assert own["batch norm", "all_reduce"] == 4 * 17
    assert own["metrics", "all_reduce"] == 80


def test_payload_of_zero() -> None:
    elements = 1000 * 300 + 300
    one, two = (expected_payload(stage, SHAPES, 4, 2) for stage in ("zero1", "zero2"))
    padded = -(-elements // 8) * 8
    assert one["weights", "all_gather"] == two["weights", "all_gather"] == 4 * padded
    assert two["gradients", "all_reduce"] == 2 * one["gradients", "all_reduce"] == 8 * elements
    three = expected_payload("zero3", SHAPES, 7, 1)
    parts = 4 * (-(-300_000 // 7) * 7 + -(-300 // 7) * 7)
    assert three["gradients", "reduce_scatter"] == parts
    with pytest.raises(ValueError, match="zero4"):
        expected_payload("zero4", SHAPES, 2)


@pytest.mark.parametrize(
    ("shape", "rank", "elements"),
    [
        ((1000, 300), 1, 1300),
        ((1000, 300), 4, 5200),
        ((64, 32, 3, 3), 2, 2 * (64 + 288)),
        ((300,), 1, 300),
        ((4, 4), 1, 16),  # (4 + 4) * 2 is not less than 16
        ((5, 4), 1, 9),
        ((6, 5), 99, 30),
    ],
)
def test_elements_of_power_sgd(shape: tuple[int, ...], rank: int, elements: int) -> None:
    assert power_sgd_elements(shape, rank) == elements


def test_bytes_in_a_ring() -> None:
    assert wire_bytes("all_reduce", 100, 4) == 150
    assert wire_bytes("all_gather", 100, 4) == wire_bytes("reduce_scatter", 100, 4) == 75
    assert wire_bytes("all_reduce", 100, 1) == 0
    payload = {("gradients", "reduce_scatter"): 100.0, ("weights", "all_gather"): 100.0}
    assert total_wire_bytes(payload, 4) == wire_bytes("all_reduce", 100, 4)


def test_bytes_of_rows() -> None:
    table = (1000, 16)
    dense = row_bytes("dense", 2, table, 10, 15)
    assert dense == 64_000
    assert row_bytes("gather", 2, table, 10, 15) == 10 * (64 + 8)
    assert row_bytes("union", 2, table, 10, 15) == 1000 + 15 * 64
    assert row_bytes("union", 8, table, 1000, 1000) > row_bytes("dense", 8, table, 1000, 1000)
    # where n ranks have more rows together than twice the table, a gather is worse than dense
    assert row_bytes("gather", 64, table, 50, 800) > row_bytes("dense", 64, table, 50, 800)
    with pytest.raises(ValueError, match="sparse"):
        row_bytes("sparse", 2, table, 1, 1)


def test_touched_rows_against_draws() -> None:
    tags = TagDistribution(500, 12.0, 1.0, 2.0, beta_add=0.0, beta_drop=0.0)
    share = tags.share_of_items()
    assert share.sum() == pytest.approx(12, rel=1e-6)
    rng = np.random.default_rng(0)
    weight = 1 / np.arange(1, 501)
    counted = []
    for _ in range(50):
        clocks = rng.exponential(size=(20, 500)) / weight
        counted.append(len(np.unique(clocks.argsort(1)[:, :12])))
    assert tags.touched_rows(20) == pytest.approx(np.mean(counted), rel=0.03)
    added = TagDistribution(500, 12.0, 1.0, 2.0, beta_add=0.5, beta_drop=0.0)
    assert added.share_of_items().sum() == pytest.approx(12 + 2.5, rel=0.02)
    dropped = TagDistribution(500, 12.0, 1.0, 2.0, beta_add=0.0, beta_drop=0.5)
    assert dropped.share_of_items().sum() == pytest.approx(12 - 2.5, rel=1e-6)


def test_time_of_a_collective() -> None:
    sent = Sent("gradients", "all_reduce", 1e9, calls=2)
    ring_s = 2 * 2 * 3 * 10e-6 + 1.5
    assert collective_s(sent, 4, LINK) == pytest.approx(ring_s)
    assert collective_s(sent, 1, LINK) == 0
    small = Sent("counts", "all_reduce", 48, calls=1)  # latency alone: a tree
    assert collective_s(small, 512, LINK) == pytest.approx(2 * 9 * 10e-6, rel=0.01)
    gather = Sent("weights", "all_gather", 1e9, calls=1)
    assert collective_s(gather, 4, LINK) == pytest.approx(3 * 10e-6 + 0.75)


def test_projection_hides_no_more_than_there_is_time_for() -> None:
    sent = [Sent("gradients", "all_reduce", 1e9, calls=1)]
    whole_s = collective_s(sent[0], 8, LINK)
    hidden = project("ddp", sent, 8, LINK, compute_s=100.0, overlap=0.75)
    assert hidden.exposed_s == pytest.approx(0.25 * whole_s)
    assert hidden.efficiency == pytest.approx(100 / (100 + 0.25 * whole_s))
    short = project("ddp", sent, 8, LINK, compute_s=0.3, overlap=0.75)
    assert short.exposed_s == pytest.approx(whole_s - 0.2)  # the backward pass takes 0.2 s
    waits = project("zero1", sent, 8, LINK, compute_s=100.0, overlap=0.75)
    assert waits.exposed_s == pytest.approx(whole_s)
    alone = project("ddp", sent, 1, LINK, compute_s=1.0, overlap=0.0)
    assert alone.efficiency == 1
