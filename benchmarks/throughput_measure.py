"""Takes the stages of training in turn, on all ranks at once, and puts together what was found.

1. `measure` makes a run and its stages (`throughput_stages.py`).
2. `_Ledger` finds how many units of a stage fill a round, and keeps count of time, core time and
   waiting over all ranks.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from flops import arithmetic, flops_per_image, matrix_product_rate, published_peak
from harness import compare_measured
from magneto_dist.config import Config
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.errors import InputError
from magneto_dist.model.backbone import frozen_precision
from magneto_dist.parts import derive_plan
from magneto_dist.training.checkpoint import Progress
from magneto_dist.training.session import Session
from throughput_rules import IN_LOADER, IN_TRAINING
from throughput_stages import Run, Stages
from training_rounds import Taken, training_job

_MOST_UNITS = 10_000


def measure(
    config: Config,
    session: Session,
    dataset: Dataset,
    folder: Path,
    *,
    rounds: int,
    round_s: float,
    only: tuple[str, ...] = (),
) -> dict[str, Any]:
    """What the stages take here, as plain numbers, the same on all ranks; every rank calls it.

    Args:
        config: of the run, see `training_rounds.endless`.
        session: this process among its peers.
        dataset: what it trains on.
        folder: for the run.
        rounds: timed calls of each stage.
        round_s: how long a call is to take, seconds.
        only: stages wanted; none: all.
    """
    plan = derive_plan(config, session, Progress())
    loader = Loader(dataset, "train", config, session.world, plan, training=True)
    with training_job(config, session, dataset, plan, loader, folder) as job:
        stages = Stages(job, dataset)
        wants_loader = not only or bool({*only} & {*IN_LOADER})
        runs = _chosen(stages.all(of_loader=wants_loader), only)
        ledger = _Ledger(session, runs, round_s)
        timings = compare_measured(ledger.calls(), 1, rounds, shows_bar=session.is_main)
        peak_memory_gb = _peak_memory(session)
        num_tags = len(dataset.vocabulary)
        computing = _computing(stages, num_tags) if "forward+backward" in runs else {}
        return {
            **_setting(config, session, plan, loader),
            **computing,
            "stages": {
                timing.name: {
                    "images_per_s": timing.per_s,
                    "core_ms_per_image": 1e3 * median(ledger.core_s[timing.name][1:]),
                }
                for timing in timings
            },
            "cores_got": ledger.cores_got(),
            "data_wait": median(ledger.waiting["whole"][1:]) if "whole" in runs else None,
            "slots_used": _mean([batch.tag_mask for step in stages.fixed for batch in step]),
            "peak_memory_gb": peak_memory_gb,
            "timings": [asdict(timing) for timing in timings],
        }


def _chosen(runs: Mapping[str, Run], only: tuple[str, ...]) -> dict[str, Run]:
    """Those wanted that are there: not every machine has every stage."""
    unknown = set(only) - {"whole", "loader", "step", *IN_LOADER, *IN_TRAINING}
    if unknown:
        raise InputError(f"--only {' '.join(sorted(unknown))}: there are {', '.join(runs)}")
    return {name: run for name, run in runs.items() if not only or name in only}


class _Ledger:
    """Calls stages on all ranks at once, for as many units as fill a round, and keeps count."""

    def __init__(self, session: Session, runs: Mapping[str, Run], round_s: float) -> None:
        self._session, self._runs = session, runs
        self._num_units: dict[str, int] = {}
        self._round_s = round_s
        self.core_s: dict[str, list[float]] = {name: [] for name in runs}
        """Per image, of all ranks."""
        self._got: dict[str, list[float]] = {name: [] for name in runs}
        self.waiting: dict[str, list[float]] = {name: [] for name in runs}
        """Share of the time in which a rank waits for data."""

    def calls(self) -> dict[str, Callable[[], float]]:
        """By name; each does a round of its stage and returns seconds an image."""
        return {name: lambda name=name: self._round(name) for name in self._runs}

    def _round(self, name: str) -> float:
        if name not in self._num_units:
            self._together(name, 1)  # what is only done once
            wall_s, _, _, _ = self._together(name, 1)
            self._num_units[name] = min(max(round(self._round_s / wall_s), 2), _MOST_UNITS)
        wall_s, core_s, wait_s, images = self._together(name, self._num_units[name])
        self.core_s[name].append(core_s / images)
        self.waiting[name].append(wait_s / wall_s)
        self._got[name].append(core_s / (wall_s * self._session.world.num_ranks))
        return wall_s / images

    def cores_got(self) -> float | None:
        """Share of the time for which a process that computes had its cores, at worst.

        Of stages that do nothing but compute, on the CPU; None: there is none. Less than 1 where
        other processes run on this machine.
        """
        by_dali = "prepare" in self._runs  # its own threads, or the GPU, decode
        threads = {"prepare": 1} if by_dali else {"decode": 1, "augment": 1}
        threads["forward+backward"] = torch.get_num_threads()
        if self._session.device.type == "cuda":
            del threads["forward+backward"]
        shares = [median(self._got[n]) / threads[n] for n in threads if n in self._got]
        return min(shares, default=None)

    def _together(self, name: str, num_units: int) -> Taken:
        """The slowest rank's time and wait, all ranks' work."""
        self._session.barrier()
        taken = self._session.gather(self._runs[name](num_units))
        wall_s, core_s, wait_s, images = zip(*taken, strict=True)
        return Taken(max(wall_s), sum(core_s), max(wait_s), sum(images))


def _setting(config: Config, session: Session, plan: BatchPlan, loader: Loader) -> dict[str, Any]:
    return {
        "device": session.device.type,
        "ranks": session.world.num_ranks,
        "ranks_per_node": session.world.ranks_per_node,
        "threads_per_rank": torch.get_num_threads(),
        "loader_processes_per_rank": loader.num_workers,
        "decoder": loader.decoder,
        "arithmetic": arithmetic(config.train),
        "global_batch_size": plan.global_batch_size,
        "micro_batch_size": plan.micro_batch_size,
        "micro_steps": plan.micro_steps,
        "image_size": config.augment.image_size,
        "policy": config.augment.policy,
        "backbone_is_frozen": config.model.sees_pictures
        and config.model.backbone_is_frozen
        and config.model.frozen_batch_norm == "fixed",
        "frozen_precision": config.model.frozen_precision,
        "frozen_precision_auto": _auto_precision(config),
        "trims_padding": config.tags.trim_padding,
        "compiles": config.train.compile,
        "comm_hook": config.train.ddp_comm_hook,
    }


def _auto_precision(config: Config) -> str:
    """What the frozen stages could compute in; "no": there are none, or not in 16 bits here."""
    model = config.model
    if not model.sees_pictures or model.frozen_stages == 0 or config.train.precision != "no":
        return "no"
    return frozen_precision(replace(model, frozen_precision="auto"))


def _computing(stages: Stages, num_tags: int) -> dict[str, Any]:
    """FLOP of an image, and FLOP/s that this device has for them, on each rank."""
    device, config = stages.session.device, stages.config
    kind = arithmetic(config.train)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "flop_per_image": flops_per_image(stages.fixed[0][0], config, num_tags),
        "published_flop_per_s": published_peak(name, kind),
        "matrix_product_flop_per_s": matrix_product_rate(device, kind),
    }


def _peak_memory(session: Session) -> dict[str, float]:
    """GB (1e9 bytes) of the first rank: its process, what it holds ready here included."""
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    if session.device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(session.device) / 1e9
    return peak


def _mean(masks: list[torch.Tensor]) -> float:
    return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
