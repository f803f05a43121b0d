"""How much faster than the paper's way is an epoch of its NUS-WIDE set-up, and where does it go?

python benchmarks/nus_wide_epoch.py --photos FOLDER_OF_JPEGS

The paper's way is in `nus_wide_paper.py`. Ours is `launchers/train_nuswide.py` as it is, live and
with cached features (made before). All see the same pictures (500 x 375 pixels) and tags; most
items have one tag or two. Each is tried with 1 and 2 loader processes, and with 1 and 2 threads in
the training process (OMP_NUM_THREADS), for the cores are shared by loader and model, and ours on 2
ranks as well, each of which decodes and trains; what counts is the best of them. Then
`nus_wide_split.py` takes each apart: core-seconds an image of each stage. Cores / their sum is what
is attainable on this machine.

Weights are random here: they cost the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil

from harness import compare_measured, parser, report, save
from loader import make_photographs, write_files
from magneto_dist.data.sample import Sample
from magneto_dist.data.shards import Dataset
from magneto_dist.data.writer import write_dataset
from magneto_dist.vocabulary import Vocabulary
from nus_wide_paper import (
    BATCH,
    NUM_CONCEPTS,
    batches_of_paper,
    forward_backward_of_paper,
    important,
    network_of_paper,
    optimizer_of_paper,
)
from nus_wide_split import (
    Split,
    medians,
    print_splits,
    split_of_ours,
    split_of_paper,
    with_framework,
)

REPOSITORY = Path(__file__).parent.parent
CONCEPTS = tuple(f"concept-{number:02}" for number in range(NUM_CONCEPTS))
PAPER, LIVE, CACHED = "the paper's way", "this system", "cached features"
CACHED_EPOCHS = 4  # one would be over in a second
_LOOK_S = 0.005

Cost = dict[str, float]
"""Of an image: `clock_s`, and `core_s` of the training process."""


def main() -> None:
    """Command line -> tables, and a file with --out."""
    options = parser(__doc__)
    options.add_argument("--photos", type=Path, required=True, help="folder with *.jpg")
    options.add_argument("--items", type=int, default=1024, help="of an epoch (default: 1024)")
    options.add_argument("--folder", type=Path, help="keeps the pictures (default: does not)")
    options.add_argument("--alone", help=argparse.SUPPRESS)  # one way, in this process
    options.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    options.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.alone:
        print(json.dumps(ALONE[given.alone](given.folder, given.workers, given.ranks)), flush=True)
        os._exit(0)
    if given.items < 4 * BATCH:
        options.error(f"--items {given.items}: at least {4 * BATCH}, four batches")
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        _make(folder, given.photos, given.items)
        _compare(folder, given)


def _compare(folder: Path, given: argparse.Namespace) -> None:
    ways = [(way, *how) for way in (PAPER, LIVE) for how in ((1, 1), (2, 1), (1, 2))]
    ways += [(LIVE, 0, 1, 2), (CACHED, 1, 1), (CACHED, 0, 1, 2)]
    names = {_name(*way): way for way in ways}
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    splits: dict[str, list[Split]] = {way: [] for way in (PAPER, LIVE, CACHED)}

    def measure(name: str) -> float:
        costs[name].append(_start(folder, *names[name]))
        return costs[name][-1]["clock_s"]

    timings = compare_measured({name: lambda n=name: measure(n) for name in names}, 1, given.rounds)
    for _ in range(given.rounds):
        for way, found in splits.items():
            found.append(_start(folder, f"{SPLIT}{way}", 1, 1))
    best = {
        way: max((t for t in timings if t.name.startswith(f"{way},")), key=lambda t: t.per_s)
        for way in splits
    }
    # With one thread: several wait for each other by turning in circles, which is no work.
    training_s = {way: medians(costs[_name(way, 1, 1)][1:])["core_s"] for way in splits}
    whole = {way: with_framework(medians(each), training_s[way]) for way, each in splits.items()}
    cores = len(os.sched_getaffinity(0))
    attainable = {
        way: {
            "attainable, images/s": cores / sum(split.values()),
            "reached, images/s": best[way].per_s,
            "share": best[way].per_s * sum(split.values()) / cores,
        }
        for way, split in whole.items()
    }
    live, cached = (best[way].per_s / best[PAPER].per_s for way in (LIVE, CACHED))
    question = (
        f"an epoch of NUS-WIDE's set-up: {live:.2f} times as fast as the paper's way, and"
        f" {cached:.2f} times with cached features"
    )
    report(question, timings, None)
    print_splits(whole, attainable)
    if given.out:
        save(
            given.out,
            {
                "question": question,
                "timings": [asdict(timing) for timing in timings],
                "core_s_an_image": whole,
                "attainable": attainable,
            },
        )


def _name(way: str, workers: int, threads: int, ranks: int = 1) -> str:
    name = f"{way}, loader processes: {workers}, threads: {threads}"
    return name if ranks == 1 else f"{name}, ranks: {ranks}"


def _start(folder: Path, way: str, workers: int, threads: int, ranks: int = 1) -> dict[str, float]:
    """What a way finds out, after warming up, in a process of its own."""
    command = [sys.executable, __file__, "--photos", ".", "--folder", str(folder), "--alone", way]
    done = subprocess.run(
        [*command, "--workers", str(workers), "--ranks", str(ranks)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY)},
    )
    if done.returncode != 0:
        raise SystemExit(f"{way} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# Pictures ---------------------------------------------------------------------------------------


def _make(folder: Path, photos: Path, num_items: int) -> None:
    """The same pictures as files and as shards, with tags as many as NUS-WIDE's items have."""
    if (folder / "shards/dataset.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    photographs = make_photographs(photos, num_items + BATCH)
    write_files(folder, dict(list(photographs.items())[:num_items]))
    rng = np.random.default_rng(0)
    tags = {
        key: rng.choice(NUM_CONCEPTS, min(rng.geometric(0.55), 13), replace=False).tolist()
        for key in photographs
    }
    (folder / "tags.json").write_text(json.dumps(tags))
    rows = [
        Sample(key, content, tuple(CONCEPTS[t] for t in tags[key]), important(len(tags[key])))
        for key, content in photographs.items()
    ]
    write_dataset(
        folder / "shards",
        {"train": rows[:-BATCH], "validation": rows[-BATCH:]},
        lambda row: row,
        Vocabulary(CONCEPTS),
        num_processes=1,
        source={"builder": "benchmark"},
    )


def _steps(folder: Path) -> tuple[int, int]:
    """Of an epoch; of those the first ones, which warm up."""
    steps = Dataset.open(str(folder / "shards")).num_samples("train") // BATCH
    return steps, min(8, steps // 2)


# Whole ways -------------------------------------------------------------------------------------


def _paper(folder: Path, workers: int, _: int) -> Cost:
    steps, warm = _steps(folder)
    network = network_of_paper()
    optimizer = optimizer_of_paper(network)
    for step, item in enumerate(batches_of_paper(folder, workers, steps), start=1):
        forward_backward_of_paper(network, item)
        optimizer.step()
        optimizer.zero_grad()
        if step == warm:
            started_s, core_s = time.perf_counter(), time.process_time()
    items = (steps - warm) * BATCH
    return {
        "clock_s": (time.perf_counter() - started_s) / items,
        "core_s": (time.process_time() - core_s) / items,
    }


def _ours(folder: Path, workers: int, ranks: int, *more: str, epochs: int = 1) -> Cost:
    steps, warm = _steps(folder)
    steps = epochs * steps // warm * warm
    with tempfile.TemporaryDirectory() as run_dir, tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [
                *_python(ranks),
                str(REPOSITORY / "launchers" / "train_nuswide.py"),
                f"--data.path={folder / 'shards'}",
                f"--data.num_workers={workers}",
                "--model.backbone_weights=none",
                f"--output_dir={run_dir}",
                f"--max_steps={steps}",
                f"--train.eval_every_epochs={epochs}",
                f"--log.every_steps={warm}",
                *more,
            ],
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        path = Path(run_dir) / "metrics.jsonl"
        before_s, after_s = (_core_s_when_logged(process, path, step) for step in (warm, steps))
        if process.wait() != 0:
            said.seek(0)
            raise SystemExit(said.read()[-2000:])
        lines = map(json.loads, path.read_text().splitlines())
        speeds = [line["images_per_second"] for line in lines if line["split"] == "train"]
    items = (steps - warm) * BATCH
    return {
        "clock_s": sum(1 / speed for speed in speeds[1:]) / len(speeds[1:]),
        "core_s": (after_s - before_s) / items,
    }


def _python(ranks: int) -> list[str]:
    if ranks == 1:
        return [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc_per_node", str(ranks), "--"]


def _core_s_when_logged(process: subprocess.Popen[bytes], path: Path, step: int) -> float:
    """What the training process, if alone, has taken when it logs a step; 0 if it ends before."""
    while process.poll() is None:
        if path.exists() and f'"step": {step},' in path.read_text():
            times = psutil.Process(process.pid).cpu_times()
            return times.user + times.system
        time.sleep(_LOOK_S)
    return 0.0


def _cached(folder: Path, workers: int, ranks: int) -> Cost:
    more = ["--data.feature_views=1", f"--data.cache_dir={folder / 'cache'}"]
    return _ours(folder, workers, ranks, *more, epochs=CACHED_EPOCHS)


SPLIT = "split of "
ALONE: dict[str, Callable[[Path, int, int], dict[str, float]]] = {
    PAPER: _paper,
    LIVE: _ours,
    CACHED: _cached,
    SPLIT + PAPER: lambda folder, *_: split_of_paper(folder, _steps(folder)[0]),
    SPLIT + LIVE: lambda folder, *_: split_of_ours(folder, _steps(folder)[0], cached=False),
    SPLIT + CACHED: lambda folder, *_: split_of_ours(folder, _steps(folder)[0], cached=True),
}

if __name__ == "__main__":
    main()
