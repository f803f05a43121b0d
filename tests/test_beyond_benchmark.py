"""The benchmark of options beyond the paper: its second data set, and what it tells."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import skewed_demo
from magneto_dist.data.sources import demo
from magneto_dist.data.sources.demo_pictures import SHAPES
from processes import REPOSITORY


def test_skewed_items_belong_to_their_row() -> None:
    row = demo.DemoRow(0, "train", 3)
    assert skewed_demo.load_item(row) == skewed_demo.load_item(row)
    assert skewed_demo.load_item(row) != skewed_demo.load_item(row._replace(split="validation"))


def test_skewed_concepts_differ_in_frequency_and_items_have_more_tags() -> None:
    rows = [demo.DemoRow(0, "train", index) for index in range(150)]
    skewed, plain = (
        [load(row) for row in rows] for load in (skewed_demo.load_item, demo.load_item)
    )
    important = Counter(
        tag for item in skewed for tag, flag in zip(item.tags, item.important, strict=True) if flag
    )
    assert important[SHAPES[0]] > 5 * max(important[SHAPES[-1]], 1)
    assert important["sea"] > 5 * max(important["mountain"], 1)
    assert not any(important[tag] for tag in (*demo.OUTLIERS, *demo.GENERAL_TAGS))
    num_tags = [sum(len(item.tags) for item in items) for items in (skewed, plain)]
    assert 1.4 < num_tags[0] / num_tags[1] < 1.7
    assert max(len(item.tags) for item in skewed) <= 24


@pytest.mark.slow
def test_it_compares_seed_by_seed_and_goes_on(tmp_path: Path) -> None:
    work, command = tmp_path / "work", [
        sys.executable,
        str(REPOSITORY / "benchmarks" / "beyond_paper.py"),
        *("--items", "32", "--epochs", "1", "--views", "1", "--seeds", "0", "1"),
    ]  # fmt: skip
    command += ["--work", str(work), "--", "--train.global_batch_size=16"]
    outputs = [
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=400).stdout
        for _ in range(2)
    ]
    tables = [output[output.index("\ndemo, %") :] for output in outputs]
    assert tables[0] == tables[1]
    assert outputs[1].count("is finished: ") == 9  # the backbone, and 2 data sets x 2 x 2 seeds
    summaries = [work / f"runs/demo-published-{seed}/summary.json" for seed in (0, 1)]
    f1 = [json.loads(path.read_text())["validation"]["final"]["paper"]["f1"] for path in summaries]
    line = next(line for line in tables[0].splitlines() if line.startswith("f1 final"))
    assert float(line.split()[2]) == pytest.approx(100 * sum(f1) / 2, abs=0.01)
