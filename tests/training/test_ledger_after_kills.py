"""The ledgers of a run that is killed again and again, and goes on with fewer processes."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from magneto_dist.data.shard_index import ShardIndex
from magneto_dist.data.sources import demo
from processes import TINY, launch, run, status
from warm import PATIENCE_S

ITEMS, BATCH = 240, 16
BROKEN = (3, 77, 200)
KILLED_AT = (3, 7, 10)
"""Steps, all in the first of two epochs."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 items to train on, three of whose pictures are broken."""
    folder = tmp_path_factory.mktemp("data") / "demo"
    demo.build(folder, items=ITEMS, num_processes=1)
    index = ShardIndex.from_bytes((folder / "train-000000.idx").read_bytes())
    with (folder / "train-000000.tar").open("r+b") as file:
        for row in BROKEN:
            file.seek(int(index.image_offset[row]))
            file.write(b"not a picture")
    return folder


def entries(folder: Path) -> list[dict]:
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def test_union_of_ledgers_is_exact_after_three_kills_and_with_fewer_processes(
    data: Path, tmp_path: Path
) -> None:
    options = [
        *TINY,
        "--data.num_workers=1",
        "--data.ledger=true",
        "--data.max_bad_fraction=0.1",
        "--checkpoint.every_steps=2",
        "--train.epochs=2",
        f"--data.path={data}",
        f"--output_dir={tmp_path}",
    ]
    for step in KILLED_AT:
        process = launch("train_ls.py", *options, ranks=2)
        deadline_s = time.monotonic() + PATIENCE_S
        while f'"step": {step},' not in read(tmp_path / "metrics.jsonl"):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        process.kill()
        process.communicate()
    assert status(tmp_path)["state"] == "running"
    run("train_ls.py", *options)

    index = ShardIndex.from_bytes((data / "train-000000.idx").read_bytes())
    keys = Counter(index.keys)
    assert len(keys) == keys.total() == ITEMS
    broken = Counter(index.keys[row] for row in BROKEN)
    ledger = entries(tmp_path / "ledger")
    for epoch in range(2):
        assert Counter(e["key"] for e in ledger if e["epoch"] == epoch) == keys - broken
    assert max(e["step"] for e in ledger) == 2 * ITEMS // BATCH
    assert Counter(e["key"] for e in entries(tmp_path / "quarantine")) == broken
    # Both have really trained: the second rank up to a kill, the first to the end.
    last_steps = {
        path.name: max(e["step"] for e in map(json.loads, path.read_text().splitlines()))
        for path in (tmp_path / "ledger").glob("*.jsonl")
    }
    assert KILLED_AT[0] < last_steps["rank-00001.jsonl"] <= KILLED_AT[-1] + 2
    assert last_steps["rank-00000.jsonl"] == 30


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
