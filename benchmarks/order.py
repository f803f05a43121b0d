"""What does the order cost at full size, and how well does it shuffle?

python benchmarks/order.py --items 700000 --ranks 64

1. Cost: reaching 99 % of an epoch from nothing, a whole epoch of all ranks one after the other
   (each id is checked to come once), the memory of both, and the size of the loader's state.
2. Quality: a global batch against one drawn from a full permutation, where the data set is sorted
   (1,000 classes, one after the other, as from a folder per class). `classes` counts the different
   classes of a batch; `neighbours` is the mean distance of ids that follow each other, 1 in a full
   permutation; `shards` is the price: how many a batch reads from.
"""

from __future__ import annotations

import json
import time
import tracemalloc
from itertools import product

import numpy as np
from tqdm import tqdm

from harness import parser, save
from magneto_dist.data.order import BatchPlan, Order, micro_batch_sample_ids

NUM_CLASSES = 1000


def main() -> None:
    """Command line -> two tables, and a file with --out."""
    options = parser(__doc__)
    options.add_argument("--items", type=int, default=700_000, help="of the split")
    options.add_argument("--ranks", type=int, default=64, help="that are simulated")
    options.add_argument("--shard", type=int, default=2048, help="items per shard (default: 2048)")
    options.add_argument("--batch", type=int, default=2048, help="global (default: 2048)")
    given = options.parse_args()
    full, rest = divmod(given.items, given.shard)
    sizes = (given.shard,) * full + ((rest,) if rest else ())
    cost = measure_cost(sizes, given.batch, given.ranks)
    print(json.dumps(cost, indent=1))
    quality = [
        measure_quality(sizes, given.batch, num_streams, window)
        for num_streams, window in tqdm([*product((1, 16, 64, 256), (256, 2048, 8192)), (1, 0)])
    ]
    print("streams  window   classes  neighbours  shards")
    for q in quality:
        name = f"{q['num_streams']:7}  {q['window']:6}" if q["window"] else "full permutation"
        print(f"{name:16}  {q['classes']:7.1f}  {q['neighbours']:10.3f}  {q['shards']:6.1f}")
    if given.out:
        save(given.out, {"question": "order: cost and quality", "cost": cost, "quality": quality})


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
    for step, rank, micro_step in product(range(steps), range(num_ranks), range(plan.micro_steps)):
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
    main()
