"""Loader processes that hang outside of our code: the run ends with one clear line."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator

import pytest

from magneto_dist.config import AugmentConfig, Config, DataConfig
from magneto_dist.data.ahead import made_ahead
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.data.stream import Record
from magneto_dist.errors import InputError
from magneto_dist.world import World
from processes import TINY, launch, status
from warm import PATIENCE_S


def test_a_run_whose_disk_no_longer_answers_ends_with_a_clear_line(damaged, tmp_path):
    path = damaged.folder / "dataset.json"
    content = json.loads(path.read_text())
    for shard in content["splits"]["train"]:
        tar = damaged.folder / shard["name"]
        tar.unlink()
        os.mkfifo(tar)  # opening it takes for ever, as on a mount whose server is gone
        shard["num_bytes"] = 0
    path.write_text(json.dumps(content))
    options = ["--data.num_workers=2", "--data.loader_timeout_s=2"]
    process = launch(
        "train_ls.py",
        f"--data.path={damaged.folder}",
        f"--output_dir={tmp_path / 'run'}",
        *TINY,
        *options,
    )
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "gave no micro-batch for 2 s (--data.loader_timeout_s)" in line
    assert "Traceback" not in output
    assert status(tmp_path / "run")["state"] == "failed"


def sleeps(records: Iterator[Record]) -> Iterator[Record]:
    time.sleep(600)
    yield from records


_seen = []


def sleeps_later(records: Iterator[Record]) -> Iterator[Record]:
    """Only the first batch of a loader process comes."""
    if _seen:
        time.sleep(600)
    _seen.append(1)
    yield from records


def loader_with(folder, **data) -> Loader:
    return Loader(
        Dataset.open(str(folder)),
        "train",
        Config(
            augment=AugmentConfig(image_size=16),
            data=DataConfig(num_workers=1, decoder="cpu", **data),
        ),
        World(),
        BatchPlan.derive(8, 1, 8, 1),
        training=True,
    )


def test_a_stage_that_hangs_is_one_clear_error(small_dataset_dir):
    loader = loader_with(small_dataset_dir, loader_timeout_s=1.0, stages=(f"{__name__}:sleeps",))
    with pytest.raises(InputError, match="a stage of your own hangs"):
        next(loader.batches(1, 2))


def test_who_no_longer_wants_batches_does_not_wait_for_a_stage_that_hangs(small_dataset_dir):
    loader = loader_with(small_dataset_dir, stages=(f"{__name__}:sleeps_later",))
    closing = threading.Event()
    batches = made_ahead(
        loader.batches(1, 5, closing), lambda batch: batch, depth=2, closing=closing
    )
    next(batches)
    started_at_s = time.monotonic()
    batches.close()
    assert time.monotonic() - started_at_s < 60  # the stage sleeps ten times as long
