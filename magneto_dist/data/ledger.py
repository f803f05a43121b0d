"""What became of the samples of a run, on disk: those trained on, and the bad ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from magneto_dist.batch import Reject
from magneto_dist.data.step_log import StepLog, read_entries


class Quarantine:
    """The bad samples of a run: each rank writes its own file, each key stands in one of them.

    In another epoch a bad sample may come to another rank. A rank therefore looks into the files of
    the others before it writes; ranks walk in step, so theirs are at most a step behind.

    Args:
        path: the file of this rank; all ranks' files lie in one folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._log = StepLog(path)
        self._start()

    @property
    def num_keys(self) -> Counter[str]:
        """Bad samples that this rank knows of by split, those of other ranks included."""
        return Counter(self._split_of_key.values())

    def write(self, *, split: str, epoch: int, step: int, reject: Reject) -> None:
        """Adds a bad sample that was met at a global step, unless it is known."""
        if reject.key in self._split_of_key:
            return
        for path in sorted(self.path.parent.glob("*.jsonl")):
            self._read_new(path)
        if reject.key in self._split_of_key:
            return
        self._split_of_key[reject.key] = split
        self._log.append(
            {
                "epoch": epoch,
                "step": step,
                "split": split,
                "key": reject.key,
                "shard": reject.shard,
                "reason": reject.reason,
            }
        )

    def flush(self) -> None:
        """Waits until all is on disk."""
        self._log.flush()

    def cut_back(self, step: int) -> None:
        """Keeps what was met up to and including a global step."""
        self._log.cut_back(step)
        self._start()

    def close(self) -> None:
        """Ends writing."""
        self._log.close()

    def _start(self) -> None:
        # Not yet the other files: their ranks may be about to cut them back.
        self._split_of_key: dict[str, str] = {}
        self._read_bytes: dict[Path, int] = {}
        self._read_new(self.path)

    def _read_new(self, path: Path) -> None:
        entries, self._read_bytes[path] = read_entries(path, self._read_bytes.get(path, 0))
        self._split_of_key.update((entry["key"], entry["split"]) for entry in entries)


class Ledger:
    """The samples that a rank has trained on, one line each.

    Args:
        path: the file of this rank.
    """

    def __init__(self, path: Path) -> None:
        self._log = StepLog(path)

    def write(self, *, epoch: int, step: int, keys: Iterable[str]) -> None:
        """Adds the valid samples of a completed optimizer step."""
        self._log.extend({"epoch": epoch, "step": step, "key": key} for key in keys)

    def flush(self) -> None:
        """Waits until all is on disk."""
        self._log.flush()

    def cut_back(self, step: int) -> None:
        """Keeps the samples of the steps up to and including a global one."""
        self._log.cut_back(step)

    def close(self) -> None:
        """Ends writing."""
        self._log.close()
