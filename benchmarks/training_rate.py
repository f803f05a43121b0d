"""How much faster than the paper's way does this system train, and how near to what is possible?

python benchmarks/training_rate.py --setting nuswide|ls --photos FOLDER_OF_JPEGS

The paper's way is in `training_rate_paper.py`. Ours is `launchers/train_nuswide.py` or
`train_ls.py` as it is, live and, where the whole backbone is frozen, with cached features (made
before). All see the same pictures (500 x 375 pixels) and tags. Each is tried with loader processes
and threads in several numbers (OMP_NUM_THREADS), for the cores are shared by loader and model, and
ours on 2 ranks as well, each of which decodes and trains; what counts is the best of them. Then
`training_rate_split.py` takes each apart: core-seconds an image of each stage. Cores / their sum is
what is attainable on this machine. What a way reaches of it is measured with way and stages in
turn, in slices of half a second: a shared machine is not as fast in one minute as in the next.

Time is taken of steps with others before and after them: what is done ahead for later steps is as
much as what earlier ones have done for these. Weights are random and the learning rate is low: they
cost the same, and nothing diverges. The global batch of `ls` is 16, so that a step takes seconds.
Settings of the configuration follow as `--section.field value`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, NoReturn

import psutil
from tqdm import tqdm

from command_line import at_least, folder_of_jpegs, folder_to_fill, parser
from harness import Timing, compare_measured, reason_of, report, save
from magneto_dist.errors import InputError, exit_with_clear_errors
from slices import run_in_slices
from training_rate_data import REPOSITORY, SET_UPS, Case
from training_rate_paper import (
    batches_of_paper,
    forward_backward_of_paper,
    network_of_paper,
    optimizer_of_paper,
)
from training_rate_split import (
    Split,
    attainable,
    medians,
    print_splits,
    split_of_ours,
    split_of_paper,
    with_framework,
)
from training_rounds import ENDLESS

PAPER, LIVE, CACHED = "the paper's way", "this system", "cached features"
TIMES = "times the paper's way"
WINDOWS, CACHED_WINDOWS = 2, 4  # of steps between two lines of the log
RANKS = 2
SLICE_S = 0.5
_LOOK_S = 0.02  # looking takes time of the cores

Cost = dict[str, float]
"""`core_s` of the training processes for an image; `start_s` and `end_s` of the timed steps, by
`time.perf_counter`, and `items` in them."""


class How(NamedTuple):
    """A way, and what it has of the machine."""

    way: str
    workers: int
    """Loader processes of a rank."""
    threads: int
    """Of a rank."""
    ranks: int = 1

    @property
    def column(self) -> str:
        """Those that have the same split."""
        return self.way if self.ranks == 1 else f"{self.way}, {self.ranks} ranks"

    def __str__(self) -> str:
        return f"{self.column}, loader processes: {self.workers}, threads: {self.threads}"


def main() -> None:
    """Command line -> tables, and a file with --out."""
    given, overrides = _parse()
    if given.alone:
        case = Case.of(given.setting, given.folder, given.items, overrides)
        _run_alone(_Starter(case, overrides), case, given)
    with tempfile.TemporaryDirectory() as temporary:
        case = Case.of(given.setting, given.folder or Path(temporary), given.items, overrides)
        if given.photos is None:
            raise InputError("--photos: a folder with *.jpg is needed")
        case.make(given.photos)
        question, result = _compare(case, given, overrides)
    print_splits(result["core_s_an_image"], result["attainable"])
    if given.out:
        save(given.out, {"question": question, **result})


def _parse() -> tuple[argparse.Namespace, list[str]]:
    options = parser(__doc__, rounds=3)
    options.add_argument("--setting", choices=SET_UPS, default="nuswide", help="(default: nuswide)")
    options.add_argument("--photos", type=folder_of_jpegs, help="folder with *.jpg")
    sizes = ", ".join(f"{name} {set_up.items}" for name, set_up in SET_UPS.items())
    options.add_argument("--items", type=at_least(1), help=f"of an epoch (default: {sizes})")
    options.add_argument(
        "--folder", type=folder_to_fill, help="keeps the pictures (default: does not)"
    )
    options.add_argument("--alone", help=argparse.SUPPRESS)  # one way, in this process
    options.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    options.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    return options.parse_known_args()


def _compare(case: Case, given: argparse.Namespace, overrides: Sequence[str]) -> tuple[str, dict]:
    hows = {str(how): how for how in _hows(case)}
    start = _Starter(case, overrides)

    def measure(name: str) -> float:
        cost = start(hows[name])
        return (cost["end_s"] - cost["start_s"]) / cost["items"]

    timings = compare_measured({name: lambda n=name: measure(n) for name in hows}, 1, given.rounds)
    best: dict[str, Timing] = {}
    for timing in sorted(timings, key=lambda timing: timing.per_s):
        best[hows[timing.name].column] = timing
    columns = {column: hows[best[column].name] for column in (h.column for h in hows.values())}
    found: dict[str, list[_Apart]] = {column: [] for column in columns}
    turns = [column for _ in range(given.rounds) for column in columns]
    for column in tqdm(turns, "core-seconds of stages", unit="call", disable=None):
        found[column].append(start.apart(columns[column]))
    whole = {column: medians([apart.split for apart in found[column]]) for column in columns}
    cores = len(os.sched_getaffinity(0))
    reached = {
        column: {
            **attainable([(apart.split, apart.per_s) for apart in found[column]], cores),
            TIMES: best[column].per_s / best[PAPER].per_s,
        }
        for column in columns
    }
    said = [
        f"{column} {found[TIMES]:.2f} {TIMES} and {found['share']:.0%} of what is attainable"
        for column, found in reached.items()
        if column != PAPER
    ]
    question = f"training of {case.name}, batch {case.batch}: {'; '.join(said)}"
    report(question, timings, None)
    return question, {
        "cores": cores,
        "items": case.steps * case.batch,
        "note": "random weights and a low learning rate, which cost the same",
        "lowered": case.set_up.lowered,
        "timings": [asdict(timing) for timing in timings],
        "core_s_an_image": whole,
        "attainable": reached,
    }


def _hows(case: Case) -> list[How]:
    tried = case.set_up.tried
    hows = [How(way, *how) for way in (PAPER, LIVE) for how in tried] + [How(LIVE, 0, 1, RANKS)]
    if case.config.model.backbone_is_frozen:
        hows += [How(CACHED, 1, 1), How(CACHED, 0, 1, RANKS)]
    return hows


class _Apart(NamedTuple):
    """A way beside its stages."""

    split: Split
    """With what is added, see `with_framework`."""
    per_s: float
    """Images/s of the way."""


class _Starter:
    """Starts ways, each in a process of its own, on the same pictures and settings."""

    def __init__(self, case: Case, overrides: Sequence[str]) -> None:
        items = case.steps * case.batch
        self._options = [f"--setting={case.name}", f"--items={items}", *overrides]
        self._options += [f"--folder={case.folder.parent}"]

    def __call__(self, how: How) -> dict[str, float]:
        """What a way finds out, after warming up."""
        return self._result(how, self._start(how))

    def apart(self, how: How) -> _Apart:
        """A way in turn with its stages, of which all cores do the same at a time."""
        # With one thread: several wait for each other by turning in circles, which is no work.
        stages = how._replace(way=f"{STAGES_OF}{how.way}", threads=1)
        commands = {"way": self._command(how), "stages": self._command(stages)}
        ran = run_in_slices(commands, SLICE_S, os.environ)
        cost, split = json.loads(ran["way"].last_line), json.loads(ran["stages"].last_line)
        clock_s = ran["way"].seconds(cost["start_s"], cost["end_s"])
        return _Apart(with_framework(split, cost["core_s"]), cost["items"] / clock_s)

    def stages(self, how: How) -> Split:
        """Those of a way, while all cores have as much to do, as in the way itself."""
        how = how._replace(way=f"{SPLIT}{how.way}")
        copies = len(os.sched_getaffinity(0)) // how.ranks
        started = [self._start(how, how.ranks) for _ in range(max(copies, 1))]
        try:
            found = [self._result(how, process) for process in started]
        finally:
            for process in started:
                process.kill()  # the others, if one has failed
        return medians(found)

    def _start(self, how: How, ranks: int = 1) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command(how, ranks), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def _command(self, how: How, ranks: int = 1) -> list[str]:
        """For `ranks` processes; a whole way starts those of its ranks itself."""
        environment = [f"OMP_NUM_THREADS={how.threads}", f"PYTHONPATH={REPOSITORY}"]
        command = ["env", *environment, *_python(ranks), __file__, *self._options]
        return [*command, f"--alone={how.way}", f"--workers={how.workers}", f"--ranks={how.ranks}"]

    def _result(self, how: How, process: subprocess.Popen[str]) -> dict[str, float]:
        said, complained = process.communicate()
        if process.returncode != 0:
            raise InputError(f"{how} failed: {reason_of(complained)}")
        return json.loads(said.splitlines()[-1])


def _python(ranks: int) -> list[str]:
    if ranks == 1:
        return [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc_per_node", str(ranks), "--"]


# Whole ways -------------------------------------------------------------------------------------


def _run_alone(start: _Starter, case: Case, given: argparse.Namespace) -> NoReturn:
    if is_first := os.environ.get("RANK", "0") == "0":
        print("begins", flush=True)  # what is stopped for others is stopped from now on
    if given.alone.startswith(STAGES_OF):
        way = given.alone.removeprefix(STAGES_OF)
        found = start.stages(How(way, given.workers, 1, given.ranks))
    else:
        found = ALONE[given.alone](case, given.workers, given.ranks)
    if is_first:
        print(json.dumps(found), flush=True)
    os._exit(0)


def _paper(case: Case, workers: int, _: int) -> Cost:
    network = network_of_paper(case)
    optimizer = optimizer_of_paper(network, case)
    warm, steps = case.warm_steps, case.steps
    clock_s, core_s = {}, {}
    for step, item in enumerate(batches_of_paper(case, workers, steps + warm), start=1):
        forward_backward_of_paper(network, case, item)
        optimizer.step()
        optimizer.zero_grad()
        clock_s[step], core_s[step] = time.perf_counter(), time.process_time()
    items = (steps - warm) * case.batch
    core_s_of_an_image = (core_s[steps] - core_s[warm]) / items
    return _cost(clock_s[warm], clock_s[steps], core_s_of_an_image, items)


def _cost(start_s: float, end_s: float, core_s: float, items: int) -> Cost:
    return {"start_s": start_s, "end_s": end_s, "core_s": core_s, "items": items}


def _ours(case: Case, workers: int, ranks: int, *more: str, windows: int = WINDOWS) -> Cost:
    first = case.set_up.log_steps
    last = first * (1 + windows)
    with tempfile.TemporaryDirectory() as run_dir, tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [
                *_python(ranks),
                str(REPOSITORY / "launchers" / f"train_{case.name}.py"),
                *case.options,
                f"--data.path={case.shards}",
                f"--data.num_workers={workers}",
                f"--output_dir={run_dir}",
                f"--max_steps={last + case.warm_steps}",
                f"--train.epochs={ENDLESS}",
                f"--train.eval_every_epochs={ENDLESS}",
                f"--log.every_steps={first}",
                *more,
            ],
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        path = Path(run_dir) / "metrics.jsonl"
        (start_s, before_s), (end_s, after_s) = (
            _when_logged(process, path, step, ranks) for step in (first, last)
        )
        if process.wait() != 0:
            said.seek(0)
            raise InputError(reason_of(said.read()))
    if not 0 < start_s < end_s:
        raise InputError(f"{case.name}: steps {first} to {last} were over before anybody looked")
    items = (last - first) * case.batch
    return _cost(start_s, end_s, (after_s - before_s) / items, items)


def _when_logged(
    process: subprocess.Popen[bytes], path: Path, step: int, ranks: int
) -> tuple[float, float]:
    """When a step is logged, and core-seconds of the training processes then; 0 if they end before.

    In a run that is stopped for others the log's own times would be of no use.
    """
    while process.poll() is None:
        if path.exists() and f'"step": {step},' in path.read_text():
            launched = psutil.Process(process.pid)
            training = [launched] if ranks == 1 else launched.children()
            times = [each.cpu_times() for each in training]
            return time.perf_counter(), sum(t.user + t.system for t in times)
        time.sleep(_LOOK_S)
    return 0.0, 0.0


def _cached(case: Case, workers: int, ranks: int) -> Cost:
    more = ["--data.feature_views=1", f"--data.cache_dir={case.folder / 'cache'}"]
    return _ours(case, workers, ranks, *more, windows=CACHED_WINDOWS)


SPLIT, STAGES_OF = "split of ", "stages of "
ALONE: dict[str, Callable[[Case, int, int], dict[str, float]]] = {
    PAPER: _paper,
    LIVE: _ours,
    CACHED: _cached,
    SPLIT + PAPER: lambda case, *_: split_of_paper(case),
    SPLIT + LIVE: lambda case, *_: split_of_ours(case, cached=False),
    SPLIT + CACHED: lambda case, *_: split_of_ours(case, cached=True),
}

if __name__ == "__main__":
    exit_with_clear_errors(main)
