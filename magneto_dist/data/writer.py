"""Writes a data set: rows of any kind become samples, samples become shards.

1. `write_dataset` cuts the rows of each split into shards, and keeps what an earlier, interrupted
   call with the same input has finished (`build_folder.py`).
2. `ShardWriter` loads and checks the rows of one shard, in one of several processes, and writes the
   tar and its index (`shard_writer.py`).
3. `_Totals` checks what only shows over all shards: keys that occur twice, too many bad rows.
4. `dataset.json` is written last: a folder that has it is whole.

Bytes depend on the rows alone, not on processes, clock or machine.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from magneto_dist.data import build_folder
from magneto_dist.data.build_folder import FinishedShard, ShardPlan
from magneto_dist.data.build_space import (
    SpaceLeft,
    check_shard_megabytes,
    clear_full_disk,
    picture_sizes,
    require_space_for,
)
from magneto_dist.data.dataset_file import (
    DATASET_FILE,
    SPLITS,
    VOCABULARY_FILE,
    Shard,
    dataset_bytes,
)
from magneto_dist.data.image_bytes import DEFAULT_MAX_MEGAPIXELS
from magneto_dist.data.parallel import run_tasks
from magneto_dist.data.sample import Sample
from magneto_dist.data.shard_writer import ShardWriter, refuse_some_images
from magneto_dist.data.shards import Dataset
from magneto_dist.data.shrink import NO_SHRINK, Shrink
from magneto_dist.data.unique_keys import UniqueKeys
from magneto_dist.errors import InputError
from magneto_dist.files import write_atomically
from magneto_dist.vocabulary import Vocabulary

Row = TypeVar("Row")
SKIPPED_FILE = "skipped.jsonl"


class WriteReport(NamedTuple):
    """What became of the rows."""

    written: int
    """Samples in the data set."""
    skipped: list[tuple[str, str]]
    """Key (or split and row, where the key is not known) and reason of each row that is not."""


def write_dataset(
    out: Path,
    splits: Mapping[str, Sequence[Row]],
    load: Callable[[Row], Sample],
    vocabulary: Vocabulary,
    *,
    samples_per_shard: int = 2048,
    shard_megabytes: float | None = None,
    image_bytes: Callable[[Row], int] | None = None,
    num_processes: int,
    source: dict[str, Any],
    max_skipped_fraction: float = 0.05,
    max_image_megapixels: float = DEFAULT_MAX_MEGAPIXELS,
    shrink: Shrink = NO_SHRINK,
    load_threads: int = 1,
) -> WriteReport:
    """Writes a data set to the folder `out`; after a kill the same call goes on where it was.

    The shards of a split hold its rows in order, each as many as its limits allow, less the bad
    ones; these are listed in `skipped.jsonl`. Either all samples have a picture, or none has.

    Args:
        out: folder; made if absent.
        splits: for each of train and validation its rows, of anything that can be pickled.
        load: makes a sample of a row; picklable, runs in other processes; may raise BadSample.
        vocabulary: every tag there is.
        samples_per_shard: rows per shard, at most.
        shard_megabytes: of pictures per shard (1e6 bytes), at most, by their sizes before
            shrinking; a larger picture has a shard of its own. None: no such limit.
        image_bytes: the size of a row's picture, 0 where it is bad; runs in threads of this
            process, raises an InputError where it is not known. Needed for `shard_megabytes`;
            without shrinking, the free disk space is checked by it first. None: not known.
        num_processes: that load, check and write; 1: this one.
        source: JSON that says what is built; an unfinished build of another source is refused.
        max_skipped_fraction: bad rows, as a fraction of all, above which building fails; one bad
            row is always allowed.
        max_image_megapixels: larger pictures (1e6 pixels, by their header) are bad.
        shrink: makes pictures smaller.
        load_threads: of each process that load rows ahead, where loading means waiting.

    Raises:
        InputError: no rows; a tag outside the vocabulary; a key twice; too many bad rows; pictures
            in some samples only; something else in `out`; the disk is full, or will be.
    """
    num_rows = _check_rows(splits, samples_per_shard)
    sizes, max_bytes = None, math.inf
    if shard_megabytes is not None:
        check_shard_megabytes(shard_megabytes)
        sizes, max_bytes = picture_sizes(splits, image_bytes), shard_megabytes * 1e6
    elif shrink.shorter_side is None:
        with contextlib.suppress(InputError):  # not known: then the space is checked as it goes
            sizes = picture_sizes(splits, image_bytes)
    if shrink.shorter_side is not None:
        source = {**source, "shrink": asdict(shrink)}
    plans = build_folder.plan_shards(splits, samples_per_shard, vocabulary, sizes, max_bytes)
    input_sha256 = build_folder.input_sha256(plans)
    if build_folder.is_finished(out, source, input_sha256):
        return _read_report(out)
    totals = _Totals(out, max_skipped=max(1, int(num_rows * max_skipped_fraction)))
    with clear_full_disk(out), build_folder.opened(out, source):
        finished = build_folder.finished_shards(out, plans)
        for shard in finished.values():
            totals.add(shard)
        missing = [plan for plan in plans if plan.name not in finished]
        num_missing = sum(len(plan.rows) for plan in missing)
        if sizes is not None and shrink.shorter_side is None:
            require_space_for(out, missing, sizes)
        space = SpaceLeft(out, num_missing, num_processes)
        for shard in run_tasks(
            ShardWriter(out, load, vocabulary, max_image_megapixels, shrink, load_threads),
            missing,
            num_processes=num_processes,
            num_items=num_missing,
            description=f"writing {out.name}",
        ):
            totals.add(shard)
            space.add(shard)
            finished[shard.shard.name] = shard
        shards = [finished[plan.name] for plan in plans]
        report = totals.report(shards)
        write_atomically(out / VOCABULARY_FILE, vocabulary.to_bytes())
        write_skipped(out, report.skipped)
        content = dataset_bytes(
            {split: _shards_of(split, plans, finished) for split in splits},
            vocabulary,
            totals.num_images > 0,
            source,
            input_sha256,
        )
        write_atomically(out / DATASET_FILE, content)
    return report


@dataclass
class _Totals:
    """What is known of all shards so far."""

    out: Path
    max_skipped: int
    num_images: int = 0
    keys: UniqueKeys = field(default_factory=UniqueKeys)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def add(self, shard: FinishedShard) -> None:
        """Counts a shard in.

        Raises:
            InputError: the data set can no longer become a good one.
        """
        self.keys.add(shard.keys, shard.shard.name)
        self.num_images += shard.num_images
        self.skipped += shard.skipped
        if len(self.skipped) > self.max_skipped:
            write_skipped(self.out, self.skipped)
            key, reason = self.skipped[0]
            raise InputError(
                f"{self.out}: {len(self.skipped)} rows are bad, more than the {self.max_skipped}"
                f" allowed; the first is {key}: {reason}; mend them (all are in"
                f" {self.out / SKIPPED_FILE}) or, for tables and `datasets`, raise"
                " --max_skipped_fraction"
            )
        refuse_some_images(self.num_images, len(self.keys), str(self.out))

    def report(self, shards: Sequence[FinishedShard]) -> WriteReport:
        """The result, in the order of the rows."""
        if not self.keys:
            raise InputError(f"{self.out}: no good row; the first is bad: {self.skipped[0][1]}")
        return WriteReport(len(self.keys), [entry for shard in shards for entry in shard.skipped])


def _check_rows(splits: Mapping[str, Sequence[Any]], samples_per_shard: int) -> int:
    if samples_per_shard < 1:
        raise InputError(f"samples_per_shard {samples_per_shard}: must be at least 1")
    if set(splits) - set(SPLITS):
        raise InputError(f"splits {sorted(splits)}: may be {' and '.join(SPLITS)} only")
    num_rows = sum(map(len, splits.values()))
    if num_rows == 0:
        raise InputError("there are no rows to make a data set of: the input is empty")
    return num_rows


def _shards_of(
    split: str, plans: Sequence[ShardPlan], finished: Mapping[str, FinishedShard]
) -> tuple[Shard, ...]:
    shards = (finished[plan.name].shard for plan in plans if plan.split == split)
    return tuple(shard for shard in shards if shard.num_samples > 0)


def write_skipped(out: Path, skipped: Sequence[tuple[str, str]]) -> None:
    """Lists what is not in the data set, and why."""
    lines = (json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in skipped)
    write_atomically(out / SKIPPED_FILE, "".join(lines).encode())


def _read_report(out: Path) -> WriteReport:
    """The report of the call that wrote the data set in `out`."""
    dataset = Dataset.open(str(out))
    path = out / SKIPPED_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    skipped = [(entry["key"], entry["reason"]) for entry in map(json.loads, lines)]
    return WriteReport(sum(map(dataset.num_samples, dataset.splits)), skipped)
