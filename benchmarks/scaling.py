"""Weak and strong scaling of `throughput.py`: each world a torchrun of its own on this machine.

weak: the global batch grows with the processes; efficiency = rate(n) / (n rate(1)). strong: it
stays; efficiency = speed-up / n. What limits is the part of a rank's time for an image that has
grown most from one process to n: waiting for data, forward and backward (processes share cores,
caches and memory), the optimizer, or what the step takes beyond these (gradients on their way,
ranks that wait for each other).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tqdm import tqdm

from command_line import at_least
from harness import RESULTS, provenance, reason_of, save
from magneto_dist.config_io import parse_command_line
from magneto_dist.errors import InputError
from throughput_card import ALONE

STAGES = ("whole", "step", "forward+backward", "optimizer", "all-reduce")
_OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                 "MASTER_PORT")  # fmt: skip


class World(NamedTuple):
    """One torchrun."""

    kind: str
    """weak or strong."""
    ranks: int
    batch: int
    """Global."""


class Point(NamedTuple):
    """One world, measured."""

    kind: str
    ranks: int
    images_per_s: float
    efficiency: float
    limit: str
    """What has grown most, in words; "" for one process."""


def run_series(given: argparse.Namespace, overrides: Sequence[str]) -> None:
    """`throughput.py --scaling`: a table, a plot with --out, and JSON in the last line.

    Raises:
        InputError: no numbers of processes, or a torchrun failed.
    """
    try:
        numbers = sorted({1, *map(at_least(1), given.scaling.split(","))})
    except (ValueError, argparse.ArgumentTypeError):
        raise InputError(f"--scaling {given.scaling}: numbers of processes, e.g. 1,2,4") from None
    argv = ["--config", str(given.config), *overrides]
    batch = parse_command_line("", given.config, argv).train.global_batch_size
    worlds = worlds_of(numbers, batch)
    found: dict[World, list[dict[str, Any]]] = {world: [] for world in worlds}
    turns = [world for _ in range(given.passes) for world in worlds]
    with tqdm(turns, unit="torchrun", disable=None) as bar:
        for world in bar:
            bar.set_description(f"{world.ranks} processes, batch {world.batch}")
            found[world].append(_measure(world, given, overrides))
    points = series({world: _median(results) for world, results in found.items()})
    cores = len(os.sched_getaffinity(0))
    print(f"\n{'':<8}{'processes':>9} {'images/s':>10} {'efficiency':>11}   limited by")
    for point in points:
        speed = f"{point.images_per_s:>10.1f} {point.efficiency:>11.0%}"
        print(f"{point.kind:<8}{point.ranks:>9} {speed}   {point.limit}")
    shares = [result["cores_got"] for results in found.values() for result in results]
    got = min((share for share in shares if share is not None), default=1.0)
    if got < ALONE and numbers[-1] <= cores:
        print(f"warning: processes had a core for {got:.0%} of the time: something else runs here")
    result = {
        "question": f"scaling of {given.config.stem}, data {Path(given.data).name}",
        "cores": cores,
        "points": [point._asdict() for point in points],
        "worlds": [
            {**world._asdict(), "passes": [_kept(result) for result in results]}
            for world, results in found.items()
        ],
    }
    if given.out:
        save(given.out, result)
        plot(points, RESULTS / f"{given.out}.png")
    print(json.dumps({**provenance(), **result}), flush=True)


def worlds_of(numbers: Sequence[int], batch: int) -> list[World]:
    """Weak and strong; with one process both are the same, and measured once."""
    weak = [World("weak", ranks, batch * ranks) for ranks in numbers]
    return weak + [World("strong", ranks, batch) for ranks in numbers if ranks > 1]


def _measure(world: World, given: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    script = Path(__file__).with_name("throughput.py")
    options: list[str] = ["--config", str(given.config), "--data", given.data, "--only", *STAGES]
    options += ["--picture", "{}x{}".format(*given.picture)]
    for name in ("rounds", "round_s", "items", "num_tags", "tags_per_item", "folder"):
        if (value := getattr(given, name)) is not None:
            options += [f"--{name}", str(value)]
    environment = {name: v for name, v in os.environ.items() if name not in _OF_LAUNCHERS}
    environment.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(world.ranks), "--", str(script)),
            *(*options, *overrides, f"--train.global_batch_size={world.batch}"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = reason_of(done.stderr)
        raise InputError(f"torchrun of {world.ranks} processes failed: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def _median(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Images/s of each stage, and the share of waiting, over the passes."""
    names = results[0]["stages"]
    rates = {name: median(r["stages"][name]["images_per_s"] for r in results) for name in names}
    return {**rates, "data_wait": median(result["data_wait"] for result in results)}


def _kept(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in ("stages", "data_wait", "cores_got", "timings")}


def series(rates: Mapping[World, Mapping[str, float]]) -> list[Point]:
    """Efficiencies, and what limits them.

    Args:
        rates: images/s over all ranks by stage, and `data_wait`, of each world; one has one rank.
    """
    alone = next(found for world, found in rates.items() if world.ranks == 1)
    return [
        Point(
            world.kind,
            world.ranks,
            found["whole"],
            found["whole"] / (world.ranks * alone["whole"]),
            "" if world.ranks == 1 else limit_of(alone, found, world.ranks),
        )
        for world, found in rates.items()
    ]


def limit_of(alone: Mapping[str, float], found: Mapping[str, float], ranks: int) -> str:
    """The part of a rank's time for an image that has grown most, and by how much of the whole."""
    before, after = _parts(alone, 1), _parts(found, ranks)
    grown = {name: after[name] - before[name] for name in after}
    worst = max(grown, key=lambda name: grown[name])
    share = grown[worst] * found["whole"] / ranks
    if share < 0.02:
        return "nothing that can be told from noise"
    return f"{worst} (+{share:.0%} of the time)"


def _parts(rates: Mapping[str, float], ranks: int) -> dict[str, float]:
    """Seconds a rank takes for an image, part by part."""
    whole_s, step_s = ranks / rates["whole"], ranks / rates["step"]
    model_s, optimizer_s = (ranks / rates[name] for name in ("forward+backward", "optimizer"))
    wait_s = rates["data_wait"] * whole_s
    beyond_s = step_s - model_s - optimizer_s
    return {
        "waiting for data": wait_s,
        "forward+backward: processes share cores, caches, memory": model_s,
        "optimizer and batch-norm statistics": optimizer_s,
        "gradients on their way, and ranks that wait for each other": beyond_s,
        "loader processes on the same cores": whole_s - wait_s - step_s,
    }


def plot(points: Sequence[Point], path: Path) -> None:
    """Efficiency over processes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    alone = points[0]
    for kind in ("weak", "strong"):
        line = [point for point in points if point.kind == kind or point is alone]
        axes.plot([p.ranks for p in line], [p.efficiency for p in line], "o-", label=kind)
    axes.set(xlabel="processes", ylabel="efficiency", ylim=(0, 1.1), xscale="log")
    axes.set_xticks([p.ranks for p in points], [str(p.ranks) for p in points], minor=False)
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
