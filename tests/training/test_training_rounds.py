"""What the overhead of the loop is measured against does the same arithmetic, to the last bit."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from threading import Event

import pytest
import torch

from magneto_dist.config_io import load_config
from magneto_dist.data.loader import Loader
from magneto_dist.data.shards import Dataset
from magneto_dist.parts import derive_plan
from magneto_dist.training.checkpoint import Progress
from magneto_dist.training.feed import Feed
from magneto_dist.training.session import Session
from processes import REPOSITORY
from training_rounds import Ready, Rounds, endless, ready, training_job


def test_bare_steps_are_those_of_the_loop(demo_shards, tmp_path):
    config = load_config(REPOSITORY / "configs" / "demo.yaml")
    config = endless(
        replace(
            config,
            data=replace(config.data, num_workers=0, ledger=True),
            # The loop seeds dropout, a bare one does not.
            model=replace(config.model, dropout=0.0, batch_norm_group_size=8),
            train=replace(config.train, global_batch_size=16, max_micro_batch_size=8),
        )
    )
    config = replace(config, optim=replace(config.optim, lr=0.05))
    session = Session(config.train, config.optim.clip_norm)
    dataset = Dataset.open(str(demo_shards))
    plan = derive_plan(config, session, Progress())
    assert plan.micro_steps == 2
    loader = Loader(dataset, "train", config, session.world, plan, training=True)
    fixed = [list(itertools.islice(loader.batches(1, 1), plan.micro_steps))]
    weights, taken = {}, {}
    for name in ("loop", "bare"):
        folder = tmp_path / name
        with training_job(config, session, dataset, plan, loader, folder) as job:
            rounds = Rounds(job, warm_steps=1)
            if name == "loop":
                taken[name] = rounds.loop(2, ready(job, fixed, overlap=False))
            else:
                taken[name] = rounds.bare(fixed, 2)
            weights[name] = {k: v.clone() for k, v in job.model.state_dict().items()}
    assert weights["loop"].keys() == weights["bare"].keys()
    for name, weight in weights["loop"].items():
        assert torch.equal(weight, weights["bare"][name]), name
    assert taken["loop"].images == taken["bare"].images == 32
    assert taken["loop"].core_s > 0
    # The ledger was on, and names the samples of the warm step, too.
    ledger = tmp_path / "loop" / "ledger" / "rank-00000.jsonl"
    assert len(ledger.read_text().splitlines()) == 3 * 16
    assert taken["bare"].data_wait_s == 0


def test_waiting_is_the_time_in_which_batches_are_made(demo_shards, tmp_path):
    config = load_config(REPOSITORY / "configs" / "demo.yaml")
    config = endless(
        replace(
            config,
            data=replace(config.data, num_workers=0),
            train=replace(config.train, global_batch_size=16, max_micro_batch_size=16),
        )
    )
    session = Session(config.train, config.optim.clip_norm)
    dataset = Dataset.open(str(demo_shards))
    plan = derive_plan(config, session, Progress())
    loader = Loader(dataset, "train", config, session.world, plan, training=True)

    class Slow(Ready):
        def batches(self, first_step: int, last_step: int, closing: Event | None = None):
            for batch in super().batches(first_step, last_step):
                time.sleep(0.2)
                yield batch

    fixed = [list(loader.batches(1, 1))]
    with training_job(config, session, dataset, plan, loader, tmp_path / "run") as job:
        feed = Feed(Slow(fixed, loader), config, session, job.model)
        taken = Rounds(job, warm_steps=1).loop(3, feed)
    assert taken.data_wait_s == pytest.approx(0.6, abs=0.3)  # 3 of 4 steps
    assert taken.wall_s > taken.data_wait_s
