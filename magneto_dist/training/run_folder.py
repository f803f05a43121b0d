"""A run folder: one writer at a time, and a status that schedulers and people can read."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Literal

from magneto_dist.config import Config
from magneto_dist.config_io import config_to_yaml
from magneto_dist.errors import InputError
from magneto_dist.files import write_atomically
from magneto_dist.vocabulary import Vocabulary

LOCK_WAIT_S = 30.0

State = Literal["running", "done", "preempted", "failed"]


class RunFolder:
    """RUN_DIR, held by this process (rank 0) until it closes or dies.

    Args:
        path: RUN_DIR; made where it is absent.
        wait_s: longest time to wait for another writer to end.

    Raises:
        InputError: the folder cannot be made, or another process still writes it.
    """

    def __init__(self, path: Path, wait_s: float = LOCK_WAIT_S) -> None:
        self.path, self._has_begun = path, False
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"--output_dir {path}: cannot be written ({error.strerror}); choose another folder"
            ) from None
        _wait_for_lock(self._lock, path, wait_s)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

    def write_settings(self, config: Config, vocabulary: Vocabulary) -> None:
        """Records what this run was asked to do."""
        write_atomically(self.path / "config.yaml", config_to_yaml(config).encode())
        write_atomically(self.path / "vocabulary.txt", vocabulary.to_bytes())

    def write_failure(self, state: State, step: int, reason: str) -> None:
        """Replaces `status.json`, where that can be; one launch that is refused undoes no run."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            if not self._has_begun and self._status()["state"] == "done":
                return
        with contextlib.suppress(OSError):  # a full disk: what filled it is the error to show
            self.write_status(state, step, reason)

    def _status(self) -> dict:
        return json.loads((self.path / "status.json").read_bytes())

    def write_status(self, state: State, step: int, reason: str = "") -> None:
        """Replaces `status.json`."""
        self._has_begun = self._has_begun or state == "running"
        status = {"state": state, "step": step, "reason": reason}
        write_atomically(self.path / "status.json", json.dumps(status).encode() + b"\n")

    def has_summary_of(self, step: int) -> bool:
        """Whether `summary.json` is there, and of that step."""
        try:
            return json.loads((self.path / "summary.json").read_bytes())["step"] == step
        except (OSError, ValueError, KeyError):
            return False

    def write_summary(self, summary: dict) -> None:
        """Replaces `summary.json`."""
        content = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.path / "summary.json", content.encode())

    def close(self) -> None:
        """Lets the next writer in."""
        self._lock.close()


def _wait_for_lock(lock: IO[str], path: Path, wait_s: float) -> None:
    started_at_s = time.monotonic()
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() - started_at_s > wait_s:
                lock.seek(0)
                holder = lock.read() or "another process"
                lock.close()
                raise InputError(
                    f"{path} is being written by {holder}; end it or choose another --output_dir"
                ) from None
            time.sleep(0.2)
