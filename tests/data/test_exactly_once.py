"""Each valid sample once an epoch, each broken one once in quarantine: the ledger, swept.

A fleet is simulated with the real parts: shards on disk, `Loader`, `Ledger`, `Quarantine`. Ranks
walk in step; a killed fleet leaves lines behind its last checkpoint, one of them torn; the next
one, of another size, cuts them back as the trainer does.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_data import VOCABULARY, read_jsonl

from magneto_dist.batch import Batch
from magneto_dist.config import Config, DataConfig, TagsConfig
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.sample import Sample
from magneto_dist.data.shard_index import ShardIndex
from magneto_dist.data.shards import Dataset
from magneto_dist.data.step_log import cut_back_all
from magneto_dist.data.stream import Ledger, Quarantine
from magneto_dist.data.writer import write_dataset
from magneto_dist.world import World

NUM_EPOCHS = 2
BROKEN = (b"{", b"[]", b'{"tags": 3}', b'{"tags": []}', b"\xff\xfe", b'{"tags": ["tag-01"]}')


@dataclass(frozen=True)
class Fleet:
    """What runs until it is killed."""

    num_ranks: int
    max_micro: int
    num_workers: int
    saved_steps: int
    """Up to its last checkpoint."""
    lost_steps: int
    """Trained after it, before the kill."""


@dataclass(frozen=True)
class Case:
    """A data set, and the fleets that train on it in turn; the last one ends the run."""

    num_samples: int
    samples_per_shard: int
    broken: frozenset[int]
    global_batch_size: int
    num_streams: int
    window: int
    seed: int
    fleets: tuple[Fleet, ...]


def cases(max_ranks: int, num_workers: st.SearchStrategy[int]) -> st.SearchStrategy[Case]:
    fleet = st.builds(
        Fleet,
        num_ranks=st.integers(1, max_ranks),
        max_micro=st.integers(1, 16),
        num_workers=num_workers,
        saved_steps=st.integers(0, 6),
        lost_steps=st.integers(0, 4),
    )
    return st.builds(
        Case,
        num_samples=st.integers(1, 60),
        samples_per_shard=st.integers(1, 20),
        broken=st.frozensets(st.integers(0, 59), max_size=12),
        global_batch_size=st.integers(1, 40),
        num_streams=st.sampled_from([1, 2, 8, 64]),
        window=st.integers(1, 30),
        seed=st.integers(0, 2**32),
        fleets=st.lists(fleet, min_size=1, max_size=4).map(tuple),
    )


def check(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dataset = write(Path(folder) / "data", case)
        run_dir = Path(folder) / "run"
        run_dir.mkdir()
        train(dataset, run_dir, case)
        broken = {key_of(i) for i in case.broken if i < case.num_samples}
        valid = {key_of(i) for i in range(case.num_samples)} - broken
        ledger = entries(run_dir / "ledger")
        for epoch in range(NUM_EPOCHS):
            trained = Counter(entry["key"] for entry in ledger if entry["epoch"] == epoch)
            assert trained == Counter(valid)
        assert Counter(entry["key"] for entry in entries(run_dir / "quarantine")) == Counter(broken)


def write(folder: Path, case: Case) -> Dataset:
    write_dataset(
        folder,
        {"train": range(case.num_samples)},
        make_sample,
        VOCABULARY,
        samples_per_shard=case.samples_per_shard,
        num_processes=1,
        source={"builder": "test"},
    )
    for sample_id in case.broken & set(range(case.num_samples)):
        shard, row = divmod(sample_id, case.samples_per_shard)
        name = folder / f"train-{shard:06}"
        index = ShardIndex.from_bytes(name.with_suffix(".idx").read_bytes())
        content = BROKEN[sample_id % len(BROKEN)]
        with name.with_suffix(".tar").open("r+b") as file:
            file.seek(int(index.annotation_offset[row]))
            file.write(content.ljust(int(index.annotation_size[row])))
    return Dataset.open(str(folder))


def train(dataset: Dataset, run_dir: Path, case: Case) -> None:
    done = 0
    steps_per_epoch = -(-case.num_samples // case.global_batch_size)
    last_step = NUM_EPOCHS * steps_per_epoch
    for number, fleet in enumerate(case.fleets):
        saved = min(done + fleet.saved_steps, last_step)
        reached = min(saved + fleet.lost_steps, last_step)
        if number == len(case.fleets) - 1:
            saved = reached = last_step
        for name in ("ledger", "quarantine"):
            (run_dir / name).mkdir(exist_ok=True)
            cut_back_all(run_dir / name, done)
        run_fleet(dataset, run_dir, case, fleet, done + 1, reached)
        if reached > saved:
            tear(run_dir / "ledger", reached)
        done = saved


def run_fleet(
    dataset: Dataset, run_dir: Path, case: Case, fleet: Fleet, first: int, last: int
) -> None:
    plan = BatchPlan.derive(case.global_batch_size, fleet.num_ranks, fleet.max_micro, 1)
    data = DataConfig(
        num_streams=case.num_streams, shuffle_window=case.window, num_workers=fleet.num_workers
    )
    config = Config(seed=case.seed, data=data, tags=TagsConfig(max_tags=8))
    ranks = range(fleet.num_ranks)
    batches = [
        Loader(
            dataset, "train", config, World(rank, len(ranks), rank, len(ranks)), plan, training=True
        ).batches(first, last)
        for rank in ranks
    ]
    ledgers = [Ledger(run_dir / "ledger" / f"rank-{rank:05d}.jsonl") for rank in ranks]
    quarantines = [Quarantine(run_dir / "quarantine" / f"rank-{rank:05d}.jsonl") for rank in ranks]
    for _ in range(first, last + 1):
        for rank in ranks:
            keep(batches[rank], plan.micro_steps, ledgers[rank], quarantines[rank])
        for quarantine in quarantines:
            quarantine.flush()
    for log in (*ledgers, *quarantines):
        log.close()


def keep(
    batches: Iterator[Batch], micro_steps: int, ledger: Ledger, quarantine: Quarantine
) -> None:
    """One optimizer step of one rank."""
    for _ in range(micro_steps):
        batch = next(batches)
        for reject in batch.rejects:
            quarantine.write(split="train", epoch=batch.epoch, step=batch.step, reject=reject)
        valid = batch.sample_valid.tolist()
        keys = [key for key, is_valid in zip(batch.keys, valid, strict=True) if is_valid]
        ledger.write(epoch=batch.epoch, step=batch.step, keys=keys)


def tear(folder: Path, step: int) -> None:
    """Leaves the line that was being written when the power went."""
    line = json.dumps({"epoch": 0, "step": step, "key": "torn"})
    with (folder / "rank-00000.jsonl").open("a") as file:
        file.write(line[: len(line) // 2])


def entries(folder: Path) -> list[dict]:
    return [entry for path in sorted(folder.glob("*.jsonl")) for entry in read_jsonl(path)]


def make_sample(number: int) -> Sample:
    tags = tuple(VOCABULARY.tags[(number + k) % len(VOCABULARY)] for k in range(3))
    return Sample(key_of(number), None, tags, (True, False, False))


def key_of(number: int) -> str:
    return f"sample_{number:03}"


@settings(max_examples=25)
@given(cases(max_ranks=16, num_workers=st.just(0)))
def test_every_sample_is_trained_on_or_quarantined_once(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
@given(cases(max_ranks=16, num_workers=st.just(0)))
def test_every_sample_is_trained_on_or_quarantined_once_in_a_long_sweep(case: Case) -> None:
    check(case)


@settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow])
@given(cases(max_ranks=2, num_workers=st.integers(1, 4)))
def test_loader_processes_change_nothing_of_that(case: Case) -> None:
    check(replace(case, fleets=case.fleets[:2]))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(cases(max_ranks=3, num_workers=st.integers(0, 4)))
def test_loader_processes_change_nothing_of_that_in_a_long_sweep(case: Case) -> None:
    check(case)
