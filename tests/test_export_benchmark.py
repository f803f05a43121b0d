"""The benchmark of exported models, end to end on a few pictures."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from magneto_dist.data.shards import Dataset
from magneto_dist.data.stream import SampleReader
from warm import REPOSITORY

NUM_PICTURES = 36
BENCHMARK = [sys.executable, REPOSITORY / "benchmarks" / "export.py", "--skip_ls"]


def test_a_table_that_is_absent_ends_in_one_line(tmp_path: Path) -> None:
    command = [*BENCHMARK, "--photos", tmp_path / "absent.csv"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "absent.csv" in done.stderr


@pytest.mark.slow
def test_the_benchmark_compares_and_times_every_form(demo_shards: Path, tmp_path: Path) -> None:
    rows = []
    reader = SampleReader(Dataset.open(str(demo_shards)), "train", with_images=True)
    for raw in reader.read(np.arange(NUM_PICTURES)):
        assert raw.image
        (tmp_path / f"{raw.key}.jpg").write_bytes(raw.image)
        told = json.loads(raw.annotation)
        important = [t for t, flag in zip(told["tags"], told["important"], strict=True) if flag]
        rows.append([f"{raw.key}.jpg", ",".join(told["tags"]), ",".join(important)])
    with (tmp_path / "photos.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file_name", "tags", "important_tags"], *rows])
    options = ["--photos", tmp_path / "photos.csv", "--epochs", "1", "--rounds", "3"]
    done = subprocess.run([*BENCHMARK, *options], capture_output=True, text=True, check=True)
    assert f"{NUM_PICTURES} photographs" in done.stdout
    for form in ("torch.export", "ONNX Runtime"):
        (difference,) = re.findall(rf"{form}: off by at most (\S+)", done.stdout)
        assert 0 <= float(difference) < 1e-4
        assert len(re.findall(rf"batch \d+, {form}: \d+\.\d photographs/s", done.stdout)) == 2
