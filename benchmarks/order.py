"""What does the order cost at full size, and how well does it shuffle?

python benchmarks/order.py --items 700000 --ranks 64

1. Cost: reaching 99 % of an epoch from nothing, a whole epoch of all ranks one after the other
   (each id is checked to come once), the memory of both, and the size of the loader's state.
2. Resume: the same on a data set on disk, down to the byte offsets of a step's samples: opens
   `dataset.json`, looks at every tar, reads the indexes that the step needs. The tars are holes of
   the right size, for nothing is read from them. Files lie in the page cache, modules are imported.
3. Quality: a global batch against one drawn from a full permutation, where the data set is sorted
   (1,000 classes, one after the other, as from a folder per class). `classes` counts the different
   classes of a batch; `neighbours` is the mean distance of ids that follow each other, 1 in a full
   permutation; `shards` is the price: how many a batch reads from.
"""

from __future__ import annotations

import json
import tempfile
import time
import tracemalloc
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
from tqdm import tqdm

from command_line import at_least, parser
from harness import save
from magneto_dist.data.dataset_file import DATASET_FILE, VOCABULARY_FILE, Shard, dataset_bytes
from magneto_dist.data.order import BatchPlan, Order, micro_batch_sample_ids
from magneto_dist.data.shard_index import Member, index_bytes, index_name
from magneto_dist.data.shards import Dataset
from magneto_dist.data.stream import SampleReader
from magneto_dist.errors import InputError, exit_with_clear_errors
from magneto_dist.vocabulary import Vocabulary

NUM_CLASSES = 1000
IMAGE_BYTES, ANNOTATION_BYTES = 50_000, 100  # of every sample, in the data set on disk


def main() -> None:
    """Command line -> three tables, and a file with --out."""
    options = parser(__doc__)
    options.add_argument("--items", type=at_least(1), default=700_000, help="of the split")
    options.add_argument("--ranks", type=at_least(1), default=64, help="that are simulated")
    options.add_argument(
        "--shard", type=at_least(1), default=2048, help="items per shard (default: 2048)"
    )
    options.add_argument("--batch", type=at_least(1), default=2048, help="global (default: 2048)")
    given = options.parse_args()
    if given.items < given.batch:
        raise InputError(f"--items {given.items}: at least one batch of {given.batch}")
    full, rest = divmod(given.items, given.shard)
    sizes = (given.shard,) * full + ((rest,) if rest else ())
    cost = measure_cost(sizes, given.batch, given.ranks)
    print(json.dumps(cost, indent=1))
    with tempfile.TemporaryDirectory() as folder:
        write_hollow(Path(folder), sizes)
        resume = [
            measure_resume(folder, given.batch, num_ranks, given.rounds)
            for num_ranks in sorted({1, given.ranks})
        ]
    print(json.dumps(resume, indent=1))
    quality = [
        measure_quality(sizes, given.batch, num_streams, window)
        for num_streams, window in tqdm([*product((1, 16, 64, 256), (256, 2048, 8192)), (1, 0)])
    ]
    print("streams  window   classes  neighbours  shards")
    for q in quality:
        name = f"{q['num_streams']:7}  {q['window']:6}" if q["window"] else "full permutation"
        print(f"{name:16}  {q['classes']:7.1f}  {q['neighbours']:10.3f}  {q['shards']:6.1f}")
    measured = {
        "question": "order: cost, resume and quality",
        "cost": cost,
        "resume": resume,
        "quality": quality,
    }
    if given.out:
        save(given.out, measured)


def measure_cost(sizes: tuple[int, ...], batch: int, num_ranks: int) -> dict[str, object]:
    """Seconds, bytes and what was checked."""
    plan = BatchPlan.derive(batch, num_ranks, max_micro_batch_size=256, group_size=16)
    num_samples = sum(sizes)
    steps = plan.steps_per_epoch(num_samples)
    tracemalloc.start()  # slows what follows
    started_at_s = time.perf_counter()
    order = Order(sizes, seed=0, shuffle=True)
    micro_batch_sample_ids(
        order, plan, epoch=7, step_in_epoch=steps * 99 // 100, rank=0, micro_step=0
    )
    seek_s = time.perf_counter() - started_at_s
    times_seen = np.zeros(num_samples, dtype=np.uint8)
    started_at_s = time.perf_counter()
    for rank, step, micro_step in product(range(num_ranks), range(steps), range(plan.micro_steps)):
        ids = micro_batch_sample_ids(order, plan, 0, step, rank, micro_step)
        times_seen[ids[ids >= 0]] += 1
    epoch_s = time.perf_counter() - started_at_s
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "samples": num_samples,
        "ranks": num_ranks,
        "seek_to_99_percent_s": round(seek_s, 3),
        "epoch_of_all_ranks_s": round(epoch_s, 2),
        "every_id_once": bool((times_seen == 1).all()),
        "peak_bytes_per_sample": round(peak_bytes / num_samples, 1),
        "state_bytes": len(json.dumps({"epoch": 7, "step": 8 * steps})),
    }


def write_hollow(folder: Path, sizes: tuple[int, ...]) -> None:
    """A data set of pictures without any: true indexes, and tars of zeros that take no space."""
    shards = []
    for number, size in enumerate(sizes):
        name = f"train-{number:06}.tar"
        num_bytes = _write_index(folder / index_name(name), number, size)
        with (folder / name).open("wb") as file:
            file.truncate(num_bytes)
        shards.append(Shard(name, size, size, num_bytes, "0" * 64))
    vocabulary = Vocabulary(["tag"])
    (folder / VOCABULARY_FILE).write_bytes(vocabulary.to_bytes())
    content = dataset_bytes({"train": tuple(shards)}, vocabulary, True, {}, "")
    (folder / DATASET_FILE).write_bytes(content)


def _write_index(path: Path, shard: int, num_samples: int) -> int:
    """Returns the bytes of its tar."""
    samples, offset = [], 0
    for row in range(num_samples):
        members = []
        for kind, size in (("jpg", IMAGE_BYTES), ("json", ANNOTATION_BYTES)):
            members.append(Member(kind, offset + 512, size, f"sample_{shard}_{row:06}.{kind}"))
            offset += 512 - (-size // 512 * 512)  # header, content, padding
        samples.append(members)
    path.write_bytes(index_bytes(samples))
    return offset + 1024


def measure_resume(folder: str, batch: int, num_ranks: int, rounds: int) -> dict[str, object]:
    """From the path of a data set to the bytes of a rank's samples at 99 % of an epoch."""
    plan = BatchPlan.derive(batch, num_ranks, max_micro_batch_size=256, group_size=16)
    seconds, found, files = [], [], set()
    for epoch in range(rounds):  # another one each time: nothing of it has been computed before
        started_at_s = time.perf_counter()
        dataset = Dataset.open(folder)
        order = Order(dataset.shard_sizes("train"), seed=0, shuffle=True)
        reader = SampleReader(dataset, "train", with_images=True)
        step = plan.steps_per_epoch(order.num_samples) * 99 // 100
        ids = np.concatenate(
            [
                micro_batch_sample_ids(order, plan, epoch, step, 0, micro_step)
                for micro_step in range(plan.micro_steps)
            ]
        )
        located = reader.locate(ids[ids >= 0])
        found = [(shard.file, index.members(row)) for _, shard, index, row in located]
        seconds.append(time.perf_counter() - started_at_s)
        files = {file for file, _ in found}
    return {
        "ranks": num_ranks,
        "samples_of_this_rank": len(found),
        "shards_of_this_rank": len(files),
        "resume_at_99_percent_s": round(median(seconds), 3),
        "slowest_s": round(max(seconds), 3),
    }


def measure_quality(
    sizes: tuple[int, ...], batch: int, num_streams: int, window: int
) -> dict[str, float]:
    """How mixed global batches are; window 0: of a full permutation."""
    num_samples = sum(sizes)
    if window:
        order = Order(sizes, seed=0, shuffle=True, num_streams=num_streams, window=window)
        ids = order.sample_ids(0, np.arange(num_samples))
    else:
        ids = np.random.default_rng(0).permutation(num_samples)
    batches = ids[: num_samples // batch * batch].reshape(-1, batch)
    class_of = np.arange(num_samples) * NUM_CLASSES // num_samples
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    return {
        "num_streams": num_streams,
        "window": window,
        "classes": float(np.mean([np.unique(class_of[row]).size for row in batches])),
        # 1 in a full permutation, where the mean distance is a third of all.
        "neighbours": float(np.abs(np.diff(ids)).mean() / (num_samples / 3)),
        "shards": float(np.mean([np.unique(shard_of[row]).size for row in batches])),
    }


if __name__ == "__main__":
    exit_with_clear_errors(main)
