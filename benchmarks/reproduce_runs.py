"""The processes of the grid: which launcher with which options, what is done already, how one runs.

1. `Setup` holds what all runs share; `jobs_of` lists trainings and what is asked of trained runs.
2. `Processes` runs launchers one after the other, each a process of its own that need not import
   anything: a fork of one that has imported it all.
3. `run_all` runs what is not done. A job that was ended goes on when the same command starts again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from magneto_dist.config import Config
from magneto_dist.config_io import config_to_yaml, parse_command_line
from magneto_dist.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, InputError
from magneto_dist.files import write_atomically
from reproduce_grid import Experiment, Run, Study

ROOT = Path(__file__).parent.parent
PRELOAD = ["magneto_dist.recipe", "magneto_dist.scoring.report", "magneto_dist.inference"]
# May differ when a run goes on: they do not change what is trained, or are the grid's own.
_FREE = {"output_dir", "init_from", "resume", "data.num_workers", "data.prefetch_batches"}
_GRACE_S = 60


@dataclass(frozen=True)
class Job:
    """One call of a launcher."""

    name: str
    launcher: str
    options: tuple[str, ...]
    leaves: Path
    """File that is there when it is done."""
    config: Config | None = None
    """Of a training run; `leaves` is then its status.json, which has to say that it is done."""

    @property
    def provenance(self) -> Path:
        """Of a training run: what made it; the last file to come."""
        return self.leaves.with_name("provenance.json")

    def is_done(self) -> bool:
        """Whether nothing is left to do.

        Raises:
            InputError: the folder holds a run with other settings.
        """
        if self.config is None:
            return self.leaves.exists()
        held = self.leaves.with_name("config.yaml")
        if held.exists():
            _require_same(yaml.safe_load(held.read_text(encoding="utf-8")), self.config, held)
        return self.has_ended_well() and self.provenance.exists()

    def has_ended_well(self) -> bool:
        """Whether its launcher has left what it should."""
        if self.config is None:
            return self.leaves.exists()
        return self.leaves.exists() and json.loads(self.leaves.read_bytes())["state"] == "done"


@dataclass(frozen=True)
class Setup:
    """What all runs of a grid share."""

    study: Study
    work: Path
    """Absolute; `runs/NAME/seed-N/` are made there."""
    data: Path | str
    """Data set: absolute folder, or URL."""
    settings: Mapping[str, object]
    """Of every run."""
    extra: tuple[str, ...]
    """Options of the launchers as the user gave them, for every run."""
    seeds: tuple[int, ...]
    outliers: int
    """Tags added to each item where outliers are counted."""

    def run_dir(self, run: str, seed: int) -> Path:
        """RUN_DIR of a run."""
        return self.work / "runs" / run / f"seed-{seed}"

    def outliers_path(self, run: str, seed: int) -> Path:
        """What evaluate.py says of a run whose items got foreign tags."""
        return self.run_dir(run, seed) / f"outliers-{self.outliers}.json"

    def predictions_path(self, run: str, seed: int) -> Path:
        """What predict.py says of every tag of the validation split."""
        return self.run_dir(run, seed) / "predictions.jsonl"

    def options(self, run: Run, seed: int) -> tuple[str, ...]:
        """The run's command line; what the run is comes last, and wins."""
        own: dict[str, object] = {**run.settings, "data.path": self.data, "seed": seed}
        if run.init_from:
            own["init_from"] = self.run_dir(run.init_from, seed)
        own["output_dir"] = self.run_dir(run.name, seed)
        config = as_options({"config": ROOT / "configs" / run.config})
        return (*config, *as_options(self.settings), *self.extra, *as_options(own))

    def config(self, run: Run, seed: int) -> Config:
        """The settings of a run.

        Raises:
            InputError: a setting that there is not.
        """
        if run.name not in self._parsed:  # takes a while
            path = ROOT / "configs" / run.config
            self._parsed[run.name] = parse_command_line("", path, self.options(run, seed))
        return replace(self._parsed[run.name], seed=seed)

    @cached_property
    def _parsed(self) -> dict[str, Config]:
        return {}

    def shown(self, job: Job) -> str:
        """The command of a job without this machine's folders."""
        command = " ".join(["python", f"launchers/{job.launcher}", *job.options])
        return self.without_folders(command)

    def without_folders(self, command: str) -> str:
        """WORK and DATA in their places, and nothing of the folders of other files."""
        for folder, name in ((self.work, "WORK"), (self.data, "DATA"), (f"{ROOT}/", "")):
            command = command.replace(str(folder), name)
        return re.sub(r"(?<=[ =])/\S*/", "FOLDER/", command)


def as_options(settings: Mapping[str, object]) -> list[str]:
    """`--key=value` words; true and false as YAML has them."""
    return [
        f"--{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in settings.items()
    ]


def runs_of(study: Study, experiments: Iterable[Experiment]) -> list[Run]:
    """The runs that they need, each once, in the study's order, where init_from comes before."""
    wanted = {name for experiment in experiments for name in experiment.runs}
    wanted |= {source for name in wanted if (source := study.runs[name].init_from)}
    return [run for run in study.all_runs if run.name in wanted]


def jobs_of(setup: Setup, experiments: Sequence[Experiment]) -> list[Job]:
    """Everything that has to run, seed by seed; what two experiments need, once."""
    scored = {n for e in experiments if e.needs_outliers for n in e.runs}
    predicted = {n for e in experiments if e.needs_predictions for n in e.runs}
    jobs = []
    for seed in setup.seeds:
        for run in runs_of(setup.study, experiments):
            jobs.append(training_job(setup, run, seed))
            if run.name in scored:
                jobs.append(_outliers_job(setup, run, seed))
            if run.name in predicted:
                jobs.append(_predictions_job(setup, run, seed))
    return jobs


def training_job(setup: Setup, run: Run, seed: int) -> Job:
    """Trains."""
    config = setup.config(run, seed)
    status = setup.run_dir(run.name, seed) / "status.json"
    options = setup.options(run, seed)
    return Job(f"{run.name}, seed {seed}", run.launcher, options, status, config)


def _outliers_job(setup: Setup, run: Run, seed: int) -> Job:
    out = setup.outliers_path(run.name, seed)
    options = {"run": out.parent, "outliers": setup.outliers, "out": out}
    options |= {"baselines": "false", "resamples": 0}  # their seeds give the spread
    return Job(f"{run.name}, seed {seed}: outliers", "evaluate.py", (*as_options(options),), out)


def _predictions_job(setup: Setup, run: Run, seed: int) -> Job:
    out = setup.predictions_path(run.name, seed)
    options: dict[str, object] = {"run": out.parent, "input": setup.data, "out": out}
    num_workers = setup.config(run, seed).data.num_workers
    if num_workers is not None:
        options["num_workers"] = num_workers
    return Job(f"{run.name}, seed {seed}: predictions", "predict.py", (*as_options(options),), out)


def run_all(
    jobs: Sequence[Job], run: Callable[[Job, Path], int], work: Path, made_by: dict
) -> None:
    """Runs what is not done, with a bar over all of them.

    Args:
        jobs: in order.
        run: starts a job's launcher, which writes to the given log; returns its exit code.
        work: logs go to `work/logs`.
        made_by: provenance; kept beside each training run that is done, with the seconds since it
            was last started.

    Raises:
        InputError: a job failed, or a folder holds something else.
        KeyboardInterrupt: a job was stopped.
    """
    (work / "logs").mkdir(parents=True, exist_ok=True)
    pending = [job for job in jobs if not job.is_done()]
    num_done = len(jobs) - len(pending)
    with tqdm(total=len(jobs), initial=num_done, unit="job", dynamic_ncols=True) as bar:
        for job in pending:
            bar.set_postfix_str(job.name)
            started_at_s = time.perf_counter()
            log = work / "logs" / f"{job.name.replace(', ', '_').replace(': ', '_')}.txt"
            code = run(job, log)
            _require_success(job, code, log)
            if job.config is not None:
                kept = {**made_by, "wall_s": time.perf_counter() - started_at_s}
                write_atomically(job.provenance, json.dumps(kept, indent=1).encode())
            bar.update()


class Processes:
    """Runs launchers, each in a fork of one process that has imported what they import.

    Args:
        start_method: "fork": that is this one.
    """

    def __init__(self, start_method: str = "forkserver") -> None:
        self._context: Any = multiprocessing.get_context(start_method)
        self._context.set_forkserver_preload(PRELOAD)

    def __call__(self, job: Job, log: Path) -> int:
        """Runs a job's launcher to its end; returns its exit code.

        Interrupted, it first has the launcher save and end.
        """
        process = self._context.Process(target=_become, args=(job.launcher, job.options, str(log)))
        process.start()
        try:
            process.join()
        except BaseException:
            process.terminate()
            process.join(_GRACE_S)
            process.kill()
            raise
        assert process.exitcode is not None
        return process.exitcode


def _become(launcher: str, options: Sequence[str], log: str) -> None:
    """Makes this process the launcher; what it exits with ends the process."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    path = ROOT / "launchers" / launcher
    sys.argv = [str(path), *options]
    sys.path[0] = str(path.parent)
    runpy.run_path(str(path), run_name="__main__")


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # the run saves before it ends


def _require_success(job: Job, code: int, log: Path) -> None:
    if code == 0 and job.has_ended_well():
        return
    if code in (EXIT_PREEMPTED, EXIT_INTERRUPTED):
        raise KeyboardInterrupt
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    reason = next((line for line in reversed(lines) if line.startswith("error: ")), None)
    raise InputError(
        f"{job.name}: {reason or f'exit code {code}'} (all that it said: {log}); what is done is"
        " kept, and the same command goes on with the rest"
    )


def _require_same(held: Mapping[str, Any], wanted: Config, path: Path) -> None:
    before, now = _flat(held), _flat(yaml.safe_load(config_to_yaml(wanted)))
    settled = {key for key, value in now.items() if value == "auto"}  # by the run itself
    changed = [key for key in now.keys() - _FREE - settled if before.get(key) != now[key]]
    if changed:
        key = min(changed)
        raise InputError(
            f"{path.parent} holds a run with --{key} {before.get(key)}, and now it is {now[key]}"
            f" ({len(changed)} settings differ): set them back, or choose another --work"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
