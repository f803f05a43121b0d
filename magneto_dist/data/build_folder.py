"""The folder that a data set is being written to: what is planned, done, and in whose hands.

1. `plan_shards` names the shards and hashes the rows of each.
2. `is_finished`: the folder already holds exactly this data set.
3. `opened` takes the folder's lock, refuses what others have put there, and tidies up at the end.
4. `finished_shards` are kept from an interrupted build; anything half done is removed.
5. `new_file` and `finish` write one shard: a file has its final name only when it is whole.

While building, `.build/` holds the lock, temporary files, and a note for each finished shard.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import math
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from magneto_dist.data.dataset_file import DATASET_FILE, VOCABULARY_FILE, Shard
from magneto_dist.data.shard_index import ShardIndex, index_name
from magneto_dist.data.storage import Storage
from magneto_dist.errors import InputError
from magneto_dist.files import sync_file, sync_folder, write_atomically
from magneto_dist.vocabulary import Vocabulary

Row = TypeVar("Row")
_SHARD_FILE = re.compile(r"(train|validation)-[0-9]{6}\.(tar|idx)")


@dataclass(frozen=True)
class ShardPlan(Generic[Row]):
    """The rows that go into one shard."""

    split: str
    name: str
    first_row: int
    """Position in the split, from 0."""
    rows: Sequence[Row]
    input_sha256: str
    """Hash of the rows and the vocabulary."""


@dataclass(frozen=True)
class FinishedShard:
    """A shard that is written; one without samples has no file."""

    shard: Shard
    keys: Sequence[str]
    num_images: int
    skipped: list[tuple[str, str]]
    """Key and reason of the rows that are not in it."""


def plan_shards(
    splits: Mapping[str, Sequence[Row]],
    samples_per_shard: int,
    vocabulary: Vocabulary,
    sizes: Mapping[str, Sequence[int]] | None = None,
    max_bytes: float = math.inf,
) -> list[ShardPlan[Row]]:
    """Cuts the rows of every split into shards, as `cuts` says; `sizes`: of each split."""
    plans = []
    for split, rows in splits.items():
        row_bytes = [0] * len(rows) if sizes is None else sizes[split]
        for number, (first_row, end) in enumerate(cuts(row_bytes, samples_per_shard, max_bytes)):
            part = list(rows[first_row:end])
            sha256 = hashlib.sha256(vocabulary.sha256.encode())
            sha256.update(_pickled(part))
            name = f"{split}-{number:06d}.tar"
            plans.append(ShardPlan(split, name, first_row, part, sha256.hexdigest()))
    return plans


def cuts(
    row_bytes: Sequence[int], samples_per_shard: int, max_bytes: float
) -> Iterator[tuple[int, int]]:
    """First row and end of each shard: as many rows in order as keep within both limits, or one.

    Args:
        row_bytes: of each row.
        samples_per_shard: rows of a shard, at most.
        max_bytes: of a shard, at most; a row that has more gets a shard of its own.
    """
    first, total = 0, 0
    for row, num_bytes in enumerate(row_bytes):
        is_full = row - first == samples_per_shard or total + num_bytes > max_bytes
        if is_full and row > first:
            yield first, row
            first, total = row, 0
        total += num_bytes
    if first < len(row_bytes):
        yield first, len(row_bytes)


def input_sha256(plans: Sequence[ShardPlan]) -> str:
    """Hash of all that goes into a data set, apart from the content of files that rows name."""
    parts = [(plan.name, plan.input_sha256) for plan in plans]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def is_finished(out: Path, source: dict[str, Any], input_sha256: str) -> bool:
    """Whether `out` holds the data set that is about to be written.

    Raises:
        InputError: it holds another one.
    """
    try:
        content = json.loads((out / DATASET_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:
        content = {}
    if content.get("source") == _as_json(source) and content.get("input_sha256") == input_sha256:
        return True
    raise InputError(f"{out}: holds another data set: choose another folder, or delete it first")


@contextlib.contextmanager
def opened(out: Path, source: dict[str, Any]) -> Iterator[None]:
    """Holds the folder `out` for one build; leaves `.build/` behind unless it succeeds.

    Raises:
        InputError: no folder can be made there; somebody else builds there, or has put other
            shards there.
    """
    build = out / ".build"
    try:
        out.mkdir(parents=True, exist_ok=True)
        _refuse_foreign_files(out)
        build.mkdir(exist_ok=True)
        lock = (build / "lock").open("ab")
    except OSError as error:
        raise InputError(f"{out}: cannot be written to: {error}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{out}: another process is building there: wait for it, or choose another folder"
            ) from None
        _take_over(out, source)
        yield
        shutil.rmtree(build)


def finished_shards(out: Path, plans: Sequence[ShardPlan]) -> dict[str, FinishedShard]:
    """The shards by name that an interrupted build has finished; removes all other files of it."""
    finished = {}
    for plan in plans:
        shard = _read_note(out, plan)
        if shard is not None:
            finished[plan.name] = shard
    kept = {name for shard in finished for name in (shard, index_name(shard))}
    for path in [*out.iterdir(), *(out / ".build").iterdir()]:
        half_done = path.name.startswith(".") and path.suffix == ".tmp"
        if half_done or (_SHARD_FILE.fullmatch(path.name) and path.name not in kept):
            path.unlink()
    return finished


@contextlib.contextmanager
def new_file(out: Path, name: str) -> Iterator[BinaryIO]:
    """A file that gets its name in `out` when it is written to the end, and on disk."""
    temporary = out / ".build" / f".{name}.tmp"
    try:
        with temporary.open("wb") as file:
            yield file
        sync_file(temporary)
        temporary.rename(out / name)
        sync_folder(out)
    finally:
        temporary.unlink(missing_ok=True)


def finish(out: Path, plan: ShardPlan, shard: FinishedShard) -> None:
    """Notes that the files of a shard are all there."""
    note = {
        "input_sha256": plan.input_sha256,
        "shard": asdict(shard.shard),
        "num_images": shard.num_images,
        "skipped": shard.skipped,
    }
    write_atomically(_note_path(out, plan), json.dumps(note).encode())


def _pickled(rows: list[Any]) -> bytes:
    """The rows as bytes that are equal for equal rows."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=5)
    # No references to what came before: they depend on which equal strings are one object.
    pickler.fast = True
    pickler.dump(rows)
    return buffer.getvalue()


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _refuse_foreign_files(out: Path) -> None:
    if (out / ".build").exists():
        return
    for path in out.iterdir():
        if _SHARD_FILE.fullmatch(path.name) or path.name in (DATASET_FILE, VOCABULARY_FILE):
            raise InputError(f"{out}: holds {path.name}, which this build did not write")


def _take_over(out: Path, source: dict[str, Any]) -> None:
    """Claims `.build/` for this source, or goes on with what it has begun."""
    claim = out / ".build" / "source.json"
    try:
        begun = json.loads(claim.read_bytes())
    except FileNotFoundError:
        if not (out / ".build").exists():  # the lock's last holder has just finished
            raise InputError(f"{out}: was just written by another process") from None
        write_atomically(claim, json.dumps(source).encode())
        return
    if begun != _as_json(source):
        raise InputError(
            f"{out}: holds an unfinished build of other input ({json.dumps(begun)[:300]}): repeat"
            " that command, choose another folder, or delete this one"
        )


def _note_path(out: Path, plan: ShardPlan) -> Path:
    return out / ".build" / f"{plan.name}.json"


def _read_note(out: Path, plan: ShardPlan) -> FinishedShard | None:
    try:
        note = json.loads(_note_path(out, plan).read_bytes())
    except FileNotFoundError:
        return None
    shard = Shard(**note["shard"])
    skipped = [(key, reason) for key, reason in note["skipped"]]
    if note["input_sha256"] != plan.input_sha256:
        return None
    if shard.num_samples == 0:
        return FinishedShard(shard, [], 0, skipped)
    storage = Storage(str(out), sha256={index_name(shard.name): shard.index_sha256})
    if not storage.exists(shard.name) or storage.size(shard.name) != shard.num_bytes:
        return None
    try:
        index = ShardIndex.read(storage, shard.name)
    except InputError:
        return None
    return FinishedShard(shard, index.keys, note["num_images"], skipped)
