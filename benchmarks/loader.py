"""Which loader makes the most of the cores: this one, its decoder alone, or another project's?

python benchmarks/loader.py --photos FOLDER_OF_JPEGS [--policy] [--workers 2]

Makes 500 x 375 photographs of those given and writes them in every form. Each loader then runs in
a process of its own, in turn, and is timed from its 12th batch to the 12th before the end of an
epoch, so that starting and ending cost nothing; in a first, untimed round the memory of all its
processes is added up (PSS).
`downloaded from HTTP` begins with an empty cache: shards are read one after the other, and fetched
while those before them are decoded; what the timed part needs is not there when it begins.
`decoding alone` decodes whole pictures that lie in memory and keeps nothing: the ceiling.
With `--slice_s 0.5` all loaders of a round are started, and then run in slices of half a second:
the way to tell a few percent between two of them on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from command_line import above_zero, at_least, folder_of_jpegs, folder_to_fill, parser
from harness import Timing, compare_measured, reason_of, report, timings_of
from magneto_dist.data.sample import Sample
from magneto_dist.data.writer import write_dataset
from magneto_dist.errors import InputError, exit_with_clear_errors
from magneto_dist.vocabulary import Vocabulary
from our_loaders import OURS, SAMPLES_PER_SHARD, Setting
from photographs import HEIGHT, WIDTH, make_photographs, write_files
from slices import run_in_slices

EDGE_BATCHES = 12  # at the start, to warm up, and at the end, where processes have less to do
TAGS = tuple(f"tag-{number:02}" for number in range(20))


def main() -> None:
    """Command line -> table, and a file with --out."""
    options = parser(__doc__)
    options.add_argument("--photos", type=folder_of_jpegs, required=True, help="folder with *.jpg")
    options.add_argument(
        "--items", type=at_least(1), default=4096, help="photographs (default: 4096)"
    )
    options.add_argument("--size", type=at_least(1), default=224, help="pixels (default: 224)")
    options.add_argument("--batch_size", type=at_least(1), default=64, help="(default: 64)")
    options.add_argument(
        "--workers", type=at_least(1), default=2, help="processes or threads (default: 2)"
    )
    options.add_argument("--policy", action="store_true", help="with AutoAugment")
    options.add_argument(
        "--only", nargs="*", default=[], help="loaders of these names, or with these in their name"
    )
    options.add_argument(
        "--slice_s",
        type=above_zero,
        help="seconds that each loader runs before it is stopped for the next, all having been"
        " started (default: one after the other, whole)",
    )
    options.add_argument("--alone", help=argparse.SUPPRESS)  # one loader, in this process
    options.add_argument("--url", help=argparse.SUPPRESS)
    options.add_argument(
        "--folder", type=folder_to_fill, help="keeps the photographs (default: does not)"
    )
    given = options.parse_args()
    if given.alone:
        _run_alone(given)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        names = _names(given)
        _make(folder, given.photos, given.items, names)
        with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder)) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            given.url = f"http://127.0.0.1:{server.server_address[1]}"
            _compare(given, folder, names)
            server.shutdown()


def _names(given: argparse.Namespace) -> list[str]:
    least = (2 * EDGE_BATCHES + given.workers) * given.batch_size  # each may be left with some
    if given.items < least:
        raise InputError(f"--items {given.items}: at least {least}, most of which are not timed")
    loaders = list(_loaders())
    # A whole name means that one alone, though others begin with it.
    meant = [
        [part] if part in loaders else [n for n in loaders if part in n] for part in given.only
    ]
    names = [n for n in loaders if not meant or n in chain(*meant)]
    if not names:
        raise InputError(f"--only {' '.join(given.only)}: there are {', '.join(loaders)}")
    return names


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def _compare(given: argparse.Namespace, folder: Path, names: list[str]) -> None:
    commands = {name: _command(name, folder, given) for name in names}
    timings = (_timed_in_slices if given.slice_s else _timed_in_turn)(commands, given)
    policy = "AutoAugment" if given.policy else "no policy"
    report(
        f"{WIDTH} x {HEIGHT} photographs to {given.size} px, {policy}, {given.workers} workers",
        timings,
        given.out,
    )


def _timed_in_turn(
    commands: Mapping[str, Sequence[str]], given: argparse.Namespace
) -> list[Timing]:
    peak_mb: dict[str, float] = {}

    def measure(name: str) -> float:
        if name not in peak_mb:  # adding up memory takes time of the cores
            peak_mb[name] = _start(name, commands[name], watch_memory=True)
        return _start(name, commands[name], watch_memory=False)

    timings = compare_measured({name: partial(measure, name) for name in commands}, 1, given.rounds)
    return [replace(timing, note=f"{peak_mb[timing.name]:.0f} MB") for timing in timings]


def _timed_in_slices(
    commands: Mapping[str, Sequence[str]], given: argparse.Namespace
) -> list[Timing]:
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in tqdm(range(given.rounds), unit="round", disable=None):
        for name, ran in run_in_slices(commands, given.slice_s, _environment()).items():
            seconds[name].append(_seconds_a_picture(ran.last_line, ran.seconds))
    return timings_of(seconds, 1)


def _command(name: str, folder: Path, given: argparse.Namespace) -> list[str]:
    command = [sys.executable, __file__, "--alone", name, "--folder", str(folder)]
    for option in ("photos", "size", "batch_size", "workers", "url"):
        command += [f"--{option}", str(getattr(given, option))]
    return command + ["--policy"] * given.policy


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _start(name: str, command: Sequence[str], *, watch_memory: bool) -> float:
    """Seconds a picture of a loader in a process of its own; or the peak memory of it, in MB."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment()
    )
    peak = 0
    while watch_memory and process.poll() is None:
        peak = max(peak, _memory(psutil.Process(process.pid)))
        time.sleep(0.2)
    output, errors = process.communicate()
    if process.returncode != 0:
        raise InputError(f"{name} failed: {reason_of(errors.decode())}")
    if watch_memory:
        return peak / 1e6
    return _seconds_a_picture(output.splitlines()[-1], lambda start_s, end_s: end_s - start_s)


def _seconds_a_picture(said: str | bytes, between: Callable[[float, float], float]) -> float:
    """From what a loader has said at its end; `between` two moments it has run so many seconds."""
    timed = json.loads(said)
    return between(timed["start_s"], timed["end_s"]) / timed["pictures"]


def _memory(process: psutil.Process) -> int:
    total = 0
    with suppress(psutil.NoSuchProcess):
        for member in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += member.memory_full_info().pss
    return total


def _run_alone(given: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    setting = Setting(
        given.folder, given.size, given.policy, given.batch_size, given.workers, given.url
    )
    loader = OURS.get(given.alone) or _loaders()[given.alone]
    batches = loader(setting)
    arrived = [(next(batches), time.perf_counter()) for _ in range(EDGE_BATCHES)]
    print("warm", flush=True)
    arrived += ((pictures, time.perf_counter()) for pictures in batches)
    timed = arrived[EDGE_BATCHES - 1 : -EDGE_BATCHES]
    start_s, end_s = timed[0][1], timed[-1][1]
    pictures = sum(number for number, _ in timed[1:])
    print(json.dumps({"start_s": start_s, "end_s": end_s, "pictures": pictures}), flush=True)
    os._exit(0)  # some loaders take seconds to end, and some never do


# Data sets --------------------------------------------------------------------------------------


def _make(folder: Path, photos: Path, num_items: int, names: list[str]) -> None:
    """Writes the photographs in the forms that these loaders read, as far as they are not there."""
    from other_loaders import OTHERS, convert

    forms: dict[str, Callable[[Path, dict[str, bytes]], None]] = {
        "shards/dataset.json": _write_shards,
        "files": write_files,
    }
    if OTHERS.keys() & set(names):
        forms["mds"] = convert
    missing = [write for form, write in forms.items() if not (folder / form).exists()]
    photographs = make_photographs(photos, num_items) if missing else {}
    for write in missing:
        write(folder, photographs)


def _write_shards(folder: Path, photographs: dict[str, bytes]) -> None:
    write_dataset(
        folder / "shards",
        {"train": list(photographs.items())},
        _sample,
        Vocabulary(TAGS),
        samples_per_shard=SAMPLES_PER_SHARD,
        num_processes=1,
        source={"builder": "benchmark"},
    )


def _sample(row: tuple[str, bytes]) -> Sample:
    key, content = row
    first = int(key[-6:]) % (len(TAGS) - 8)
    return Sample(key, content, TAGS[first : first + 8], (True, False) * 4)


def _loaders() -> dict[str, Callable[[Setting], Iterator[int]]]:
    # Not above: loader processes import this module, and would count the other projects' packages.
    from other_loaders import OTHERS

    ours = dict(OURS)
    if not torch.cuda.is_available():
        del ours["magneto_dist, dali_gpu"]
    return ours | OTHERS


if __name__ == "__main__":
    exit_with_clear_errors(main)
