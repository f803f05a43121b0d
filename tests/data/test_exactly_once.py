"""Each valid sample once an epoch, each broken one once in quarantine: the ledger, swept.

A fleet is simulated with the real parts: shards on disk, `Loader`, `Ledger`, `Quarantine`. Ranks
walk in step; a killed fleet leaves lines behind its last checkpoint, one of them torn; the next
one, of another size, cuts them back as the trainer does.

Everything is drawn together: samples and how they lie in shards of unequal sizes, batch size,
order, with and without pictures, what is broken or scratched, and fleets of 1 to 16 ranks with 0 to
4 loader processes, each killed at some step. In a fleet one drawn rank loads with these processes
and the others in this one. Processes of different ranks share nothing but the files that they read,
so that those of one rank among many can show all that there is to be seen, and a case takes a tenth
of the time. (`test_ledger_after_kills.py` has them in all ranks.)
"""

from __future__ import annotations

import io
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from magneto_dist.batch import Batch
from magneto_dist.config import AugmentConfig, Config, DataConfig, TagsConfig
from magneto_dist.data.decode_cpu import check_image_decodes
from magneto_dist.data.ledger import Ledger, Quarantine
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.sample import BadSample, Sample
from magneto_dist.data.shard_index import Member, ShardIndex, index_bytes
from magneto_dist.data.shards import Dataset
from magneto_dist.data.step_log import cut_back_all
from magneto_dist.data.writer import write_dataset
from magneto_dist.world import World
from shard_edits import note_index_hashes
from small_data import VOCABULARY, read_jsonl
from tar_samples import tar_contents

NUM_EPOCHS = 2
MAX_SAMPLES = 60
MAX_MEGAPIXELS = 0.1
# Thousands of small files, each synced: on a disk that others use, most of the time would be that.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
ANNOTATIONS = (b"{", b"[]", b'{"tags": 3}', b'{"tags": []}', b"\xff\xfe", b'{"tags": ["tag-01"]}')
"""No JSON, no tags, or no labels."""


@dataclass(frozen=True)
class Fleet:
    """What runs until it is killed."""

    num_ranks: int
    max_micro: int
    num_workers: int
    """Loader processes of one rank; the others have none."""
    worker_rank: int
    """Which rank that is, modulo their number."""
    saved_steps: int
    """Up to its last checkpoint."""
    lost_steps: int
    """Trained after it, before the kill."""


@dataclass(frozen=True)
class Damage:
    """What happens to the bytes of one member where it lies in its tar."""

    in_picture: bool
    """In the picture, where there is one; else in the annotation."""
    broken: int | None
    """Which of the ways that surely break it; None: it is scratched, and may survive that."""
    scratches: tuple[tuple[int, int], ...] = ()
    """Place (modulo the member's size) and new value of single bytes."""

    def __call__(self, content: bytes) -> bytes:
        """As many bytes as `content` has."""
        if self.broken is not None and self.in_picture:
            return PICTURES[self.broken % len(PICTURES)](content).ljust(len(content), b"\0")
        if self.broken is not None:
            return ANNOTATIONS[self.broken % len(ANNOTATIONS)].ljust(len(content))
        scratched = bytearray(content)
        for place, value in self.scratches:
            scratched[place % len(content)] = value
        return bytes(scratched)


@dataclass(frozen=True)
class Case:
    """A data set, and the fleets that train on it in turn; the last one ends the run."""

    num_samples: int
    samples_per_shard: int
    left_out: frozenset[int]
    """Samples that no index lists: shards are of different sizes, and some are empty."""
    has_pictures: bool
    damages: dict[int, Damage]
    """By sample."""
    global_batch_size: int
    num_streams: int
    window: int
    seed: int
    fleets: tuple[Fleet, ...]

    @property
    def samples(self) -> set[int]:
        """Those of the data set; never none."""
        return set(range(self.num_samples)) - self.left_out or {0}

    def damage(self, sample: int) -> Damage | None:
        """What happens to a sample."""
        damage = self.damages.get(sample)
        return damage and replace(damage, in_picture=damage.in_picture and self.has_pictures)


def claims_to_be_huge(content: bytes) -> bytes:
    size = content.index(b"\xff\xc0") + 5 if content[:2] == b"\xff\xd8" else 16
    return content[:size] + b"\xff" * 4 + content[size + 4 :]


PICTURES: tuple[Callable[[bytes], bytes], ...] = (
    lambda content: b"no picture",
    lambda content: content[: len(content) // 2],
    lambda content: content[:20],
    claims_to_be_huge,
)


FLEET = st.builds(
    Fleet,
    num_ranks=st.integers(1, 16),
    max_micro=st.integers(1, 16),
    num_workers=st.integers(0, 4),
    worker_rank=st.integers(0, 15),
    saved_steps=st.integers(0, 12),
    lost_steps=st.integers(0, 4),
)
SCRATCHES = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4)
DAMAGE = st.builds(Damage, st.booleans(), st.integers(0, 11)) | st.builds(
    Damage, st.booleans(), st.none(), SCRATCHES.map(tuple)
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_samples = draw(st.integers(1, MAX_SAMPLES))
    samples = st.integers(0, num_samples - 1)
    return Case(
        num_samples,
        samples_per_shard=draw(st.integers(1, 20)),
        left_out=draw(st.frozensets(samples, max_size=12)),
        has_pictures=draw(st.sampled_from([False, True, True])),
        damages=draw(st.dictionaries(samples, DAMAGE, max_size=20)),
        global_batch_size=draw(st.integers(1, 40)),
        num_streams=draw(st.sampled_from([1, 2, 8, 64])),
        window=draw(st.integers(1, 30)),
        seed=draw(st.integers(0, 2**32)),
        fleets=tuple(draw(st.lists(FLEET, min_size=1, max_size=4))),
    )


def check(case: Case) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        dataset = write(Path(folder) / "data", case)
        valid = {
            key
            for key, members in tar_contents(Path(dataset.root).glob("*.tar")).items()
            if is_sound(dataset, members)
        }
        every = {key_of(i) for i in case.samples}
        valid &= every
        damages = {key_of(i): case.damage(i) for i in case.samples}
        assert {key for key, damage in damages.items() if damage is None} <= valid
        assert not {key for key, d in damages.items() if d and d.broken is not None} & valid
        run_dir = Path(folder) / "run"
        run_dir.mkdir()
        train(dataset, run_dir, case)
        ledger = entries(run_dir / "ledger")
        for epoch in range(NUM_EPOCHS):
            trained = Counter(entry["key"] for entry in ledger if entry["epoch"] == epoch)
            assert trained == Counter(valid)
        quarantine = entries(run_dir / "quarantine")
        assert Counter(entry["key"] for entry in quarantine) == Counter(every - valid)
        assert all(entry["reason"] for entry in quarantine)


# The data set -----------------------------------------------------------------------------------


def write(folder: Path, case: Case) -> Dataset:
    write_dataset(
        folder,
        {"train": [(number, case.has_pictures) for number in range(case.num_samples)]},
        make_sample,
        VOCABULARY,
        samples_per_shard=case.samples_per_shard,
        num_processes=1,
        source={"builder": "test"},
    )
    dataset = Dataset.open(str(folder))
    sizes = []
    for number, shard in enumerate(dataset.shards("train")):
        first = number * case.samples_per_shard
        index = ShardIndex.from_bytes((folder / f"train-{number:06}.idx").read_bytes())
        with (folder / shard.file).open("r+b") as file:
            for row in range(shard.num_samples):
                if damage := case.damage(first + row):
                    rewrite(file, index.members(row)[0 if damage.in_picture else -1], damage)
        rows = [row for row in range(shard.num_samples) if first + row in case.samples]
        left = index_bytes([index.members(row) for row in rows])
        (folder / f"train-{number:06}.idx").write_bytes(left)
        sizes.append(len(rows))
    fields = json.loads((folder / "dataset.json").read_text())
    for shard, size in zip(fields["splits"]["train"], sizes, strict=True):
        shard.update(num_samples=size, num_labelled=size)
    (folder / "dataset.json").write_text(json.dumps(fields))
    note_index_hashes(folder)
    return Dataset.open(str(folder))


def rewrite(file: io.BufferedRandom, member: Member, damage: Damage) -> None:
    file.seek(member.offset)
    content = file.read(member.size)
    file.seek(member.offset)
    file.write(damage(content))


def is_sound(dataset: Dataset, members: dict[str, bytes]) -> bool:
    """What a scratched sample is by its bytes alone."""
    try:
        tags, important = dataset.annotation(members["json"])
        for extension in members.keys() - {"json"}:
            check_image_decodes(members[extension], MAX_MEGAPIXELS)
    except BadSample:
        return False
    return important is not None and not dataset.vocabulary.missing(tags)


def make_sample(row: tuple[int, bool]) -> Sample:
    number, has_picture = row
    tags = tuple(VOCABULARY.tags[(number + k) % len(VOCABULARY)] for k in range(3))
    image = picture(number) if has_picture else None
    return Sample(key_of(number), image, tags, (True, False, False))


@cache
def picture(number: int) -> bytes:
    """A JPEG, or every third time a PNG."""
    noise = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, "JPEG" if number % 3 else "PNG")
    return content.getvalue()


def key_of(number: int) -> str:
    return f"sample_{number:03}"


# The run ----------------------------------------------------------------------------------------


def train(dataset: Dataset, run_dir: Path, case: Case) -> None:
    done = 0
    steps_per_epoch = -(-len(case.samples) // case.global_batch_size)
    last_step = NUM_EPOCHS * steps_per_epoch
    for number, fleet in enumerate(case.fleets):
        saved = min(done + fleet.saved_steps, last_step)
        reached = min(saved + fleet.lost_steps, last_step)
        if number == len(case.fleets) - 1:
            saved = reached = last_step
        for name in ("ledger", "quarantine"):
            (run_dir / name).mkdir(exist_ok=True)
            cut_back_all(run_dir / name, done)
        run_fleet(dataset, run_dir, case, fleet, range(done + 1, reached + 1), last_step)
        if reached > saved:
            tear(run_dir / "ledger", reached)
        done = saved


def run_fleet(
    dataset: Dataset, run_dir: Path, case: Case, fleet: Fleet, steps: range, last_step: int
) -> None:
    """Trains `steps`; loader processes are ahead of it when it ends, as they are in a real run."""
    plan = BatchPlan.derive(case.global_batch_size, fleet.num_ranks, fleet.max_micro, 1)
    ranks = range(fleet.num_ranks)
    ledgers = [Ledger(run_dir / "ledger" / f"rank-{rank:05d}.jsonl") for rank in ranks]
    quarantines = [Quarantine(run_dir / "quarantine" / f"rank-{rank:05d}.jsonl") for rank in ranks]
    with ExitStack() as closes:
        batches = [
            closes.enter_context(
                closing(
                    Loader(
                        dataset,
                        "train",
                        config(case, fleet, rank),
                        World(rank, len(ranks), rank, len(ranks)),
                        plan,
                        training=True,
                    ).batches(steps.start, last_step)
                )
            )
            for rank in ranks
        ]
        for _ in steps:
            for rank in ranks:
                keep(batches[rank], plan.micro_steps, ledgers[rank], quarantines[rank])
            for quarantine in quarantines:
                quarantine.flush()
    for log in (*ledgers, *quarantines):
        log.close()


def config(case: Case, fleet: Fleet, rank: int) -> Config:
    """As one rank of a fleet sees it."""
    has_workers = rank == fleet.worker_rank % fleet.num_ranks
    data = DataConfig(
        decoder="cpu",
        num_workers=fleet.num_workers if has_workers else 0,
        prefetch_batches=2,
        num_streams=case.num_streams,
        shuffle_window=case.window,
        max_image_megapixels=MAX_MEGAPIXELS,
    )
    return Config(
        seed=case.seed,
        data=data,
        augment=AugmentConfig(image_size=8),
        tags=TagsConfig(max_tags=8),
    )


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


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_every_sample_is_trained_on_or_quarantined_once(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_every_sample_is_trained_on_or_quarantined_once_in_a_long_sweep(case: Case) -> None:
    check(case)
