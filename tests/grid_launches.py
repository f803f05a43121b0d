"""Launchers of a grid as forks of the warm process."""

from __future__ import annotations

from pathlib import Path

from processes import launch
from reproduce_runs import Job


class Launches:
    """Runs jobs as forks of the warm process; notes their names; stops after `most`, if given."""

    def __init__(self, most: int | None = None) -> None:
        self.names: list[str] = []
        self.most = most

    def __call__(self, job: Job, log: Path) -> int:
        if len(self.names) == self.most:
            raise KeyboardInterrupt
        self.names.append(job.name)
        launched = launch(job.launcher, *job.options)
        output, _ = launched.communicate()
        log.write_text(output, encoding="utf-8")
        assert launched.returncode is not None
        return launched.returncode
