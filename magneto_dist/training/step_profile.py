"""Some steps of a run recorded by torch.profiler, as a trace that Perfetto or Chrome opens.

1. `begins` is told of each step. The one before the first is the profiler's warm-up.
2. `ends` is told that a step is done; after the last one the trace is written, complete or not at
   all, and the profiler is gone. So it is when an evaluation or a save comes between.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from tqdm import tqdm

from magneto_dist.config import LogConfig


class StepProfile:
    """Records `config.profile_steps` steps on this process.

    Args:
        folder: RUN_DIR/profile; made when there is a trace.
        config: how many steps, and after how many of this launch.
        start_step: last step that was done before this launch.
        device: where the model is.
    """

    def __init__(
        self, folder: Path, config: LogConfig, start_step: int, device: torch.device
    ) -> None:
        self._folder, self._num_steps = folder, config.profile_steps
        self._first = start_step + config.profile_after_steps + 1
        self._last_done = 0
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profiler: profile | None = None

    def begins(self, step: int) -> None:
        """Before the data of a step is waited for."""
        if step == self._first - 1:
            self._profiler = profile(
                activities=self._activities,
                schedule=schedule(wait=0, warmup=1, active=self._num_steps, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
            )
            self._profiler.start()
        elif self._profiler is not None:
            self._profiler.step()

    def waiting(self) -> AbstractContextManager:
        """Names the time inside in the trace."""
        return record_function("waiting for data")

    def ends(self, step: int) -> None:
        """After all that belongs to a step, logging included."""
        self._last_done = step
        if step == self._first + self._num_steps - 1:
            self.close()

    def interrupted(self) -> None:
        """Before an evaluation or a save, which are no part of a step and may be as long as many.

        What was recorded so far is written; where that is nothing, recording begins after it.
        """
        if self._profiler is None:
            return
        self.close()
        if self._last_done < self._first:
            self._first = self._last_done + 2

    def close(self) -> None:
        """Writes what was recorded so far, if anything was."""
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.stop()

    def _write(self, profiler: profile) -> None:
        if self._last_done < self._first:
            return
        path = self._folder / f"steps-{self._first:08d}-{self._last_done:08d}.json.gz"
        temporary = path.with_name(f".{path.name}")
        try:
            path.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(temporary))
            temporary.rename(path)
        except OSError as error:  # the run is worth more than its profile
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            tqdm.write(f"warning: {path} cannot be written: {error}", file=sys.stderr)
        else:
            tqdm.write(f"profile: {path}, to open in https://ui.perfetto.dev", file=sys.stderr)
