"""Everything that only a GPU can show, in one command and about ten minutes.

python benchmarks/gpu.py --photos FOLDER_OF_JPEGS --work FOLDER --parts shards   # anywhere, before
python benchmarks/gpu.py --photos FOLDER_OF_JPEGS --work FOLDER
python benchmarks/gpu.py --photos FOLDER_OF_JPEGS --dry_run      # on CPU, tiny: does it all work?

shards     a data set of 500 x 375 photographs, with as many tags as LS has (kept in --work)
train_*    configs/ls.yaml through launchers/train_ls.py, by precision and decoder: images/s,
           waiting for data, memory of the device, time that checkpoints take, loss, skipped steps
decoders   dali_gpu beside cpu: pictures/s, and how far their pixels differ
memory     benchmarks/memory.py --measured: the allocator beside what is predicted
loader_*   benchmarks/loader.py with dali_gpu, without and with AutoAugment
tests      the tests that need a GPU

Each part is a process of its own with a time limit, and its result is on disk before the next one
begins; a part that fails, hangs or finds no time left costs only itself. The order is that of
--parts. A dry run writes under other names, and nothing to benchmarks/results/ unless told to.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from argparse import SUPPRESS, Namespace
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from command_line import Parser, above_zero, at_least, folder_of_jpegs, folder_to_fill
from gpu_parts import Part, plan
from gpu_runs import Outcome, run_part
from harness import RESULTS, save
from magneto_dist.errors import InputError, exit_with_clear_errors

LOG_TAIL = 2000  # characters


def main() -> None:
    """Command line -> a file for each part, and a table; exit code 1 if any part is not done."""
    given = _parse()
    if given.make_shards:
        make_shards(given.photos, given.work, given.items, given.num_tags)
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = (given.work or Path(temporary)).absolute()
        results = given.results or (Path(temporary) / "results" if given.dry_run else RESULTS)
        parts = plan(given.photos.absolute(), work, given.items, given.num_tags, given.dry_run)
        chosen = [part for name in given.parts for part in _named(name, parts)]
        outcomes = _run_all(chosen, work, results, given)
    print(f"\n{'part':<22}  {'state':<12}  {'s':>5}  what it says")
    for outcome in outcomes:
        headline = "" if outcome.result is None else _headline(outcome.result)
        print(f"{outcome.part:<22}  {outcome.state:<12}  {outcome.wall_s:5.0f}  {headline}")
    sys.exit(any(outcome.state != "done" for outcome in outcomes))


def _parse() -> Namespace:
    options = Parser(__doc__)
    options.add_argument("--photos", type=folder_of_jpegs, required=True, help="folder with *.jpg")
    options.add_argument(
        "--work", type=folder_to_fill, help="keeps shards, runs, logs (default: does not)"
    )
    options.add_argument(
        "--results", type=folder_to_fill, help="for JSON (default: benchmarks/results)"
    )
    options.add_argument(
        "--parts", nargs="+", default=[""], help="whose names begin so (default: all)"
    )
    options.add_argument(
        "--total_s", type=above_zero, default=600, help="seconds for all parts (default: 600)"
    )
    options.add_argument(
        "--items", type=at_least(8), help="photographs (default: 4096; dry run: 288)"
    )
    options.add_argument("--dry_run", action="store_true", help="on CPU, tiny")
    options.add_argument("--num_tags", type=at_least(5), help=SUPPRESS)
    options.add_argument("--make_shards", action="store_true", help=SUPPRESS)
    given = options.parse_args()
    given.items = given.items or (288 if given.dry_run else 4096)
    given.num_tags = given.num_tags or (50 if given.dry_run else 24_056)
    makes_shards_alone = given.make_shards or given.parts == ["shards"]
    if not (given.dry_run or makes_shards_alone or torch.cuda.is_available()):
        raise InputError("there is no CUDA device; --dry_run tries the command out without one")
    return given


def _named(name: str, parts: list[Part]) -> list[Part]:
    named = [part for part in parts if part.name.startswith(name)]
    if not named:
        known = ", ".join(part.name for part in parts)
        raise InputError(f"--parts {name}: there are {known}")
    return named


def _run_all(parts: list[Part], work: Path, results: Path, given: Namespace) -> list[Outcome]:
    ends_at_s = time.monotonic() + given.total_s
    prefix = "dry_run" if given.dry_run else "gpu"
    outcomes = []
    for number, part in enumerate(parts, start=1):
        left_s = ends_at_s - time.monotonic()
        print(f"[{number}/{len(parts)}] {part.name}: at most {min(part.limit_s, left_s):.0f} s")
        outcome = run_part(part, left_s, work, watches_gpu=not given.dry_run)
        outcomes.append(outcome)
        print(f"    {outcome.state} after {outcome.wall_s:.0f} s", flush=True)
        _save(outcome, part, f"{prefix}_{part.name}", work, results)
    return outcomes


def _save(outcome: Outcome, part: Part, name: str, work: Path, results: Path) -> None:
    measured = {"question": part.question, **asdict(outcome)}
    if outcome.state != "done" and outcome.log.exists():
        measured["log_tail"] = outcome.log.read_text(errors="replace")[-LOG_TAIL:]
    measured["part_command"] = part.shown(work)
    del measured["log"]
    save(name, measured, results)
    for picture in part.pictures:
        if picture.exists():
            shutil.copy(picture, results / f"{name}{picture.suffix}")


def _headline(result: dict) -> str:
    """The plain numbers of a result, in one line."""
    numbers = {k: v for k, v in result.items() if isinstance(v, bool | int | float)}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in numbers.items()
    )


# The data set -----------------------------------------------------------------------------------


def make_shards(photos: Path, work: Path, num_items: int, num_tags: int) -> None:
    """Photographs as `work/shards`, with tags without meaning, and as `work/files`.

    Args:
        photos: folder with *.jpg.
        work: where the folders are made; one that is there already is left as it is.
        num_items: of which an eighth, and at most 256, are for validation.
        num_tags: of the vocabulary; an item has 4 to 60 of them.
    """
    from magneto_dist.data.sample import Sample
    from magneto_dist.data.writer import write_dataset
    from magneto_dist.vocabulary import Vocabulary
    from our_loaders import SAMPLES_PER_SHARD
    from photographs import make_photographs, write_files

    if (work / "shards" / "dataset.json").exists():
        return
    vocabulary = Vocabulary([f"tag-{number:05}" for number in range(num_tags)])

    def tagged(row: tuple[str, bytes]) -> Sample:
        key, content = row
        generator = np.random.default_rng(int(key[-6:]))
        count = int(generator.integers(4, min(60, num_tags)))
        numbers = generator.choice(num_tags, count, replace=False)
        tags = tuple(vocabulary.tags[number] for number in numbers)
        return Sample(key, content, tags, tuple(bool(n) for n in generator.integers(0, 2, count)))

    photographs = make_photographs(photos, num_items)
    rows = list(photographs.items())
    num_validation = min(256, num_items // 8)
    write_dataset(
        work / "shards",
        {"train": rows[num_validation:], "validation": rows[:num_validation]},
        tagged,
        vocabulary,
        samples_per_shard=SAMPLES_PER_SHARD,
        num_processes=1,
        source={"builder": "benchmark"},
    )
    shutil.rmtree(work / "files", ignore_errors=True)
    write_files(work, photographs)


if __name__ == "__main__":
    exit_with_clear_errors(main)
