"""Does predict.py survive kills, with each row once, and in memory that does not grow?

python benchmarks/predict_kills.py --items 100000

1. A tiny model is trained for some steps; a table of so many small pictures is written, all of them
   different, but every 500th is missing.
2. predict.py is killed (SIGKILL, with all its processes) after a tenth and after a fifth of the
   items, and then goes on to the end.
3. The tally: rows by how often they are in the output, rows that failed; it must be each once.
4. The memory that all processes together have asked for (MB; without files that are mapped, of
   which other processes share many), from the first part of the last run on: the median in each
   tenth of the items.
"""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import simplejpeg
from tqdm import tqdm

from command_line import at_least, parser
from harness import save
from magneto_dist.errors import InputError, exit_with_clear_errors

LAUNCHERS = Path(__file__).parent.parent / "launchers"
TINY = [
    "--augment.image_size=32",
    "--tags.max_tags=8",
    "--model.d_model=16",
    "--model.num_heads=2",
    "--model.d_ff=32",
    "--model.backbone_stages=2",
    "--model.batch_norm_group_size=4",
    "--train.global_batch_size=16",
    "--optim.warmup_steps=0",
    "--log.tensorboard=false",
    "--data.num_workers=0",
    "--max_steps=2",
]
MISSING_EVERY = 500
KILLED_AFTER = (0.1, 0.2)  # of the items
LOOK_S = 0.25
PIXELS = 32


def main() -> None:
    """Command line -> tally and memory, and a file with --out."""
    options = parser(__doc__, timed=False)
    options.add_argument(
        "--items", type=at_least(1), default=100_000, help="rows (default: 100,000)"
    )
    options.add_argument("--block_items", type=at_least(1), default=1000, help="of predict.py")
    options.add_argument("--ranks", type=at_least(1), default=1, help="processes that score")
    given = options.parse_args()
    if given.items < 10 * given.block_items:
        raise InputError(f"--items {given.items}: at least ten blocks of {given.block_items}")
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), given.items, given.block_items, given.ranks)
    print(json.dumps(measured, indent=1))
    if given.out:
        save(given.out, {"question": "predict.py: kills and memory", **measured})
    if not measured["each_row_once"] or measured["failed"] != measured["failed_expected"]:
        sys.exit("rows are missing, there twice, or have failed that should not")


def measure(folder: Path, items: int, block_items: int, ranks: int) -> dict[str, object]:
    """The tally and the memory.

    Raises:
        InputError: so few items that a run has ended before it was killed or its memory seen.
    """
    run_dir, table, out = folder / "run", folder / "items.csv", folder / "out.jsonl"
    _launch([sys.executable], "train_ls.py", *TINY, f"--output_dir={run_dir}").wait()
    write_table(table, items, (run_dir / "vocabulary.txt").read_text().splitlines())
    through = [sys.executable]
    if ranks > 1:
        through = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--"]
    command = f"--run {run_dir} --input {table} --out {out} --block_items {block_items}".split()
    memory: list[tuple[float, float]] = []
    kills: list[int] = []
    started_at_s = time.perf_counter()
    for stop_at in (*KILLED_AFTER, 2.0):
        process = _launch(through, "predict.py", *command)
        memory = _watch(process, out.with_name("out.jsonl.parts"), stop_at, items, block_items)
        if stop_at < 1:
            kills.append(len(list(out.with_name("out.jsonl.parts").glob("part-*"))) * block_items)
        was_seen = not out.exists() if stop_at < 1 else bool(memory)
        if not was_seen:
            raise InputError(f"--items {items}: predicted before anybody could look; give more")
    rows: Counter[int] = Counter()
    failed = 0
    with out.open() as file:
        for line in map(json.loads, file):
            rows[line["row"]] += 1
            failed += "error" in line
    tenths = {f"{n}0 %": [mb for done, mb in memory if n <= 10 * done < n + 1] for n in range(10)}
    return {
        "items": items,
        "ranks": ranks,
        "killed_with_rows_done": kills,
        "elapsed_s": round(time.perf_counter() - started_at_s, 1),
        "rows_by_times_in_output": dict(Counter(rows.values())),
        "each_row_once": rows == Counter(range(items)),
        "failed": failed,
        "failed_expected": -(-items // MISSING_EVERY),
        "memory_MB_of_the_last_run": {n: round(median(mb)) for n, mb in tenths.items() if mb},
        "peak_memory_MB": round(max(mb for _, mb in memory)),
    }


def write_table(table: Path, items: int, vocabulary: list[str]) -> None:
    """Pictures of noise, a thousand to a folder, with five tags each."""
    rng = np.random.default_rng(0)
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "tags"])
        for number in tqdm(range(items), desc="pictures", disable=None):
            path = table.parent / f"{number // 1000:04d}" / f"{number:07d}.jpg"
            writer.writerow(
                [path.relative_to(table.parent), ",".join(rng.choice(vocabulary, 5, replace=False))]
            )
            path.parent.mkdir(exist_ok=True)
            if number % MISSING_EVERY:
                pixels = rng.integers(256, size=(PIXELS, PIXELS, 3), dtype=np.uint8)
                path.write_bytes(simplejpeg.encode_jpeg(pixels, quality=50))


def _watch(
    process: subprocess.Popen[bytes], parts: Path, stop_at: float, items: int, block_items: int
) -> list[tuple[float, float]]:
    """(share of items done, MB), until so many are done, when all is killed, or to the end."""
    seen: list[tuple[float, float]] = []
    done = begun_at = len(list(parts.glob("part-*"))) * block_items / items
    while process.poll() is None:
        # At the end there are none any more.
        done = max(done, len(list(parts.glob("part-*"))) * block_items / items)
        family = _family(process.pid)
        if done > begun_at:
            seen.append((done, sum(map(_memory_mb, family))))
        if done >= stop_at:
            for each in family:
                with suppress(psutil.NoSuchProcess):  # it has just ended by itself
                    each.send_signal(signal.SIGKILL)
            process.wait()
            return seen
        time.sleep(LOOK_S)
    assert process.returncode == 0, "predict.py failed"
    return seen


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _memory_mb(process: psutil.Process) -> float:
    """Each page counted once, though several processes may share it."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:  # it has ended
        return 0.0
    kilobytes = {name: int(size) for name, size, _ in map(str.split, lines)}
    return (kilobytes["Pss_Anon:"] + kilobytes["Pss_Shmem:"]) * 1024 / 1e6


def _launch(through: list[str], launcher: str, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*through, str(LAUNCHERS / launcher), *options], stdout=sys.stderr)


if __name__ == "__main__":
    exit_with_clear_errors(main)
