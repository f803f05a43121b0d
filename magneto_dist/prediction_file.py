"""Predictions of any number of items in one file, made part by part: what was killed goes on.

1. In a folder that is `opened`, `begin` holds what is asked for against what is done, or was begun.
2. `missing` are the blocks of rows that a rank has still to score, `write` makes a part of one:
   whole or absent.
3. `join`: whoever finds all parts there makes the file of them, in the order of the rows. So no
   rank waits for another, and a run goes on with any number of ranks.

While FILE grows, FILE.parts/ beside it holds the parts as JSON lines; FILE.summary.json, which
stays, holds the counts and what they are of.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from magneto_dist.errors import InputError
from magneto_dist.files import atomic_file, sync_file, sync_folder, write_atomically
from magneto_dist.inference import ItemPrediction

Line = dict[str, Any]
_TEXTS, _NUMBERS = pa.list_(pa.string()), pa.list_(pa.float32())
_COLUMNS = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("predicted", _TEXTS),
        ("tags", _TEXTS),
        ("kept", pa.list_(pa.bool_())),
        ("probability", _NUMBERS),
        ("image", _NUMBERS),
        ("tag", _NUMBERS),
        ("alpha", _NUMBERS),
        ("unknown_tags", _TEXTS),
        ("cut_tags", _TEXTS),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class Plan:
    """What predictions are of: parts of different plans do not go together."""

    checkpoint_sha256: str
    input_sha256: str
    items: int
    threshold: float
    """Probability in [0, 1] from which on a tag is predicted."""
    temperature: float | None
    """What the final output's log-odds are divided by; None: nothing."""
    block_items: int
    """Items of a part, but for the last one."""


class Summary(NamedTuple):
    """Counts of a finished file."""

    items: int
    failed: int
    """Of these, the ones that could not be scored."""


class PredictionFile:
    """One file of predictions, done or on its way.

    Args:
        path: .jsonl, .csv or .parquet, in a folder that is there.

    Raises:
        InputError: another format, or no such folder.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix.lower() not in _WRITERS:
            raise InputError(f"--out {path}: must be one of {', '.join(_WRITERS)}")
        if not path.parent.is_dir():
            raise InputError(f"{path}: there is no folder {path.parent}; make it first")
        self.path = path
        self.parts = path.with_name(f"{path.name}.parts")
        self._plan: Plan
        self._summary_path = path.with_name(f"{path.name}.summary.json")

    @contextlib.contextmanager
    def opened(self) -> Iterator[Path]:
        """The folder of the parts, where files may be put that are needed as long as it is open.

        When the file is done, or nothing was begun, the last one to leave removes it.
        """
        with self._shared_lock() as lock:
            try:
                yield self.parts
            finally:
                begun = self._begun()
                if begun is None or self._summary(begun):
                    with contextlib.suppress(BlockingIOError):  # others are still in there
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        # Whoever comes just now makes it anew, and removes it as the last one.
                        shutil.rmtree(self.parts, ignore_errors=True)

    def begin(self, plan: Plan) -> Summary | None:
        """Starts, or goes on; the counts of a file that is done, None: there is something to do.

        Raises:
            InputError: what was begun there is something else.
        """
        self._plan = plan
        if (summary := self._summary(asdict(plan))) is not None:
            return summary
        claim, wanted = self.parts / "plan.json", asdict(plan)
        if not claim.exists():
            write_atomically(claim, json.dumps(wanted).encode())
        begun = self._begun() or {}
        other = [name for name in wanted if begun.get(name) != wanted[name]]
        if other:
            names = " and ".join(name.removesuffix("_sha256") for name in other)
            raise InputError(
                f"{self.parts}: holds an unfinished prediction with another {names}: repeat its"
                " command to finish it, choose another --out, or delete that folder"
            )
        return None

    def missing(self, rank: int = 0, num_ranks: int = 1) -> list[range]:
        """The blocks of rows that this rank has still to score."""
        blocks = enumerate(self._blocks())
        mine = (block for number, block in blocks if number % num_ranks == rank)
        return [block for block in mine if not self._part(block).exists()]

    def write(self, block: range, predictions: Iterator[ItemPrediction]) -> None:
        """Takes the predictions of a block's rows, in their order, and makes a part of them."""
        with atomic_file(self._part(block)) as file:
            for row in block:
                line = {"row": row, **next(predictions).as_json(self._plan.threshold)}
                text = json.dumps(line, ensure_ascii=False)
                file.write(text.encode("utf-8", "replace") + b"\n")

    def join(self) -> Summary | None:
        """Makes the file if all parts are there; None: another rank has done it, or will.

        Raises:
            InputError: a part is damaged.
        """
        with (self.parts / "joining").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            is_complete = all(self._part(block).exists() for block in self._blocks())
            done = asdict(self._plan)
            if not is_complete or self._summary(done) is not None:
                return None
            self._join()
            return self._summary(done)

    def _shared_lock(self) -> BinaryIO:
        while True:
            self.parts.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # somebody is just tidying up
                lock = (self.parts / "lock").open("ab")
                fcntl.flock(lock, fcntl.LOCK_SH)
                if os.path.samestat(os.fstat(lock.fileno()), (self.parts / "lock").stat()):
                    return lock
                lock.close()

    def _begun(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.parts / "plan.json").read_bytes())
        except FileNotFoundError:
            return None

    def _summary(self, plan: dict[str, Any]) -> Summary | None:
        try:
            noted = json.loads(self._summary_path.read_bytes())
            is_whole = self.path.stat().st_size == noted["bytes"]
        except (FileNotFoundError, ValueError, KeyError):
            return None
        is_ours = noted.get("plan") == plan and is_whole
        return Summary(noted["items"], noted["failed"]) if is_ours else None

    def _join(self) -> None:
        joined, num_failed = self.parts / "joined.tmp", 0

        def checked_parts() -> Iterator[_Part]:
            nonlocal num_failed
            for block in self._blocks():
                part = self._read(block)
                num_failed += sum("error" in line for line in part.lines)
                yield part

        _WRITERS[self.path.suffix.lower()](joined, checked_parts())
        sync_file(joined)
        joined.replace(self.path)
        sync_folder(self.path.parent)
        counts = Summary(self._plan.items, num_failed)._asdict()
        summary = {**counts, "bytes": self.path.stat().st_size, "plan": asdict(self._plan)}
        write_atomically(self._summary_path, (json.dumps(summary, indent=2) + "\n").encode())

    def _blocks(self) -> Iterator[range]:
        size = self._plan.block_items
        rows = range(self._plan.items)
        return (rows[first : first + size] for first in range(0, len(rows), size))

    def _part(self, block: range) -> Path:
        return self.parts / f"part-{block.start // self._plan.block_items:08d}.jsonl"

    def _read(self, block: range) -> _Part:
        path = self._part(block)
        content = path.read_bytes()
        try:
            lines = [json.loads(line) for line in content.splitlines()]
            rows = [line["row"] for line in lines]
        except (ValueError, KeyError, TypeError):
            rows = []
        if rows != list(block):
            raise InputError(f"{path}: is damaged: delete it and start the same command again")
        return _Part(content, lines)


class _Part(NamedTuple):
    content: bytes
    lines: list[Line]


def _write_jsonl(path: Path, parts: Iterator[_Part]) -> None:
    with path.open("wb") as file:
        file.writelines(part.content for part in parts)


def _write_csv(path: Path, parts: Iterator[_Part]) -> None:
    """Lists are JSON in their cells: a tag may hold any separator."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS.names)
        writer.writeheader()
        for part in parts:
            writer.writerows({name: _cell(line[name]) for name in line} for line in part.lines)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


def _write_parquet(path: Path, parts: Iterator[_Part]) -> None:
    with pq.ParquetWriter(path, _COLUMNS) as writer:
        for part in parts:
            writer.write_table(pa.Table.from_pylist(part.lines, _COLUMNS))


_WRITERS: dict[str, Callable[[Path, Iterator[_Part]], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
