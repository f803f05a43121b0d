"""The stages of training on this machine, each alone and all together, taken in turn.

1. `Stages` makes what they work on: samples as they lie in shards, pictures as they came and
   decoded, batches where the model is, a run with everything that a run has.
2. Each stage is a function that does `n` units of work and says what they took; every rank does it
   at the same time.
3. `measure` finds how many units fill a round, and takes the stages in turn (`harness.py`).
"""

from __future__ import annotations

import itertools
import resource
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from flops import arithmetic, flops_per_image, matrix_product_rate, published_peak
from harness import compare_measured, now
from magneto_dist.batch import Batch
from magneto_dist.config import Config
from magneto_dist.data.decode_cpu import CpuDecoder, decode_image
from magneto_dist.data.encoded_images import encoded_images
from magneto_dist.data.loader import Loader
from magneto_dist.data.micro_batch import MicroBatches
from magneto_dist.data.order import BatchPlan, micro_batch_sample_ids
from magneto_dist.data.shards import Dataset
from magneto_dist.data.workers import cores_per_rank
from magneto_dist.errors import InputError
from magneto_dist.loss import count_for_loss, ets_loss
from magneto_dist.model.norm import reset_batch_norm_statistics
from magneto_dist.recipe import derive_plan
from magneto_dist.training.checkpoint import Progress
from magneto_dist.training.loop import Job, settle_batch_norms
from magneto_dist.training.session import Session
from throughput_card import IN_LOADER, IN_TRAINING
from training_rounds import ENDLESS, Rounds, Taken, repeated, training_job

Run = Callable[[int], Taken]
"""Does so many units of a stage."""
WARM_STEPS = 2
FIXED_STEPS = 2  # whose batches lie ready
MOST_PICTURES = 64  # that lie ready to be decoded and augmented
_BUCKET_BYTES = 25 << 20  # DDP's
_MOST_UNITS = 10_000


class Stages:
    """What the stages work on, on this rank.

    Args:
        job: of `training_rounds.training_job`.
        dataset: what it trains on.

    Raises:
        InputError: the ranks are not DDP's, or features are cached, so that there are other stages.
    """

    def __init__(self, job: Job, dataset: Dataset) -> None:
        session, config = job.session, job.config
        if session.world.num_ranks > 1 and not session.is_ddp:
            raise InputError("stages are measured one by one with DDP: no FSDP2, no DeepSpeed")
        if config.data.feature_views:
            raise InputError("--data.feature_views: cached features are measured by features.py")
        self.job, self.config, self.session = job, config, session
        self._decoder, self._dataset = job.loader.decoder, dataset
        self._rounds = Rounds(job, WARM_STEPS)
        plan = job.plan
        self._images_per_step = plan.global_batch_size / plan.num_ranks
        made = job.loader.batches(1, FIXED_STEPS)
        self.fixed = [list(itertools.islice(made, plan.micro_steps)) for _ in range(FIXED_STEPS)]
        """Micro-batches of some steps, as they come from the loader."""

    def all(self) -> dict[str, Run]:
        """By name: all together first, then what a loader does, then what training does."""
        return {
            "whole": self._whole,
            "loader": self._loader,
            "step": lambda n: self._rounds.loop(repeated(self.fixed), n),
            **self._stages_of_loader(),
            **self._stages_of_training(),
        }

    def _repeat(self, unit: Callable[[int], object], images: float) -> Run:
        def run(num_units: int) -> Taken:
            start = now(self.session.device)
            for number in range(num_units):
                unit(number)
            end = now(self.session.device)
            return Taken(
                end.wall_s - start.wall_s, end.core_s - start.core_s, 0.0, images * num_units
            )

        return run

    # Together -----------------------------------------------------------------------------------

    def _whole(self, num_steps: int) -> Taken:
        """Endless, so that loader processes have as much to do at the end of a round as before."""
        return self._rounds.loop(
            lambda first, _: self.job.loader.batches(first, ENDLESS), num_steps
        )

    def _loader(self, num_steps: int) -> Taken:
        """All of the loader with its processes, and nobody who uses what it makes."""
        loader, micro_steps = self.job.loader, self.job.plan.micro_steps
        num_warm = max(2 * loader.num_workers, WARM_STEPS * micro_steps)
        with closing(loader.batches(1, ENDLESS)) as batches:  # type: ignore[type-var]
            for _ in itertools.islice(batches, num_warm):
                pass
            start = now(self.session.device)
            for _ in itertools.islice(batches, num_steps * micro_steps):
                pass
            end = now(self.session.device)
        images = num_steps * self._images_per_step
        return Taken(end.wall_s - start.wall_s, end.core_s - start.core_s, 0.0, images)

    # What a loader does -------------------------------------------------------------------------

    def _stages_of_loader(self) -> dict[str, Run]:
        micro = self._micro_batches()
        rows = self.job.plan.micro_batch_size
        per_epoch = self.job.plan.steps_per_epoch(micro.order.num_samples)

        def encode(number: int) -> Any:
            epoch, step = divmod(number, per_epoch)
            rank = self.session.world.rank
            ids = micro_batch_sample_ids(micro.order, self.job.plan, epoch, step, rank, 0)
            return micro.encode(ids, step=number + 1, micro_step=0, epoch=epoch)

        stages = {"read": self._repeat(encode, rows)}
        if self._decoder == "none":
            return stages
        encoded = encode(0)
        images = encoded.images[:MOST_PICTURES]
        augmentations = encoded.augmentations[:MOST_PICTURES]
        cpu = CpuDecoder(self.config.augment.image_size, self.config.data.max_image_megapixels)
        if self._decoder.startswith("dali"):
            decode = self._dali(cpu)
            stages["prepare"] = self._repeat(
                lambda _: encoded_images(images, augmentations, cpu), len(images)
            )
            ready = encoded_images(images, augmentations, cpu)
            return {**stages, "decode": self._repeat(lambda _: decode(ready), len(images))}
        decoded = [decode_image(image, cpu.max_megapixels)[0] for image in images]

        def decode_all(_: int) -> None:
            for image in images:
                decode_image(image, cpu.max_megapixels)

        def augment_all(_: int) -> None:
            for image, augmentation in zip(decoded, augmentations, strict=True):
                cpu.augment(image, augmentation)

        stages["decode"] = self._repeat(decode_all, len(images))
        return {**stages, "augment": self._repeat(augment_all, len(images))}

    def _micro_batches(self) -> MicroBatches:
        return MicroBatches(
            self._dataset,
            "train",
            self.config,
            self.session.world.rank,
            self.job.plan,
            training=True,
            pictures="none" if self._decoder == "none" else "encoded",
        )

    def _dali(self, cpu: CpuDecoder) -> Callable[[Any], object]:
        from magneto_dist.data.decode_dali import DaliDecoder  # seconds to import

        threads = cores_per_rank(self.session.world.ranks_per_node)
        device = "gpu" if self._decoder == "dali_gpu" else "cpu"
        return DaliDecoder(cpu, device=device, num_threads=threads)

    # What training does -------------------------------------------------------------------------

    def _stages_of_training(self) -> dict[str, Run]:
        device, images = self.session.device, self._images_per_step
        on_device = [[batch.to(device) for batch in step] for step in self.fixed]

        def copy(number: int) -> None:
            for batch in self.fixed[number % FIXED_STEPS]:
                batch.to(device)

        def compute(number: int) -> None:
            self._forward_backward(on_device[number % FIXED_STEPS])

        stages = {"copy": self._repeat(copy, images)} if device.type == "cuda" else {}
        stages["forward+backward"] = self._repeat(compute, images)
        stages["optimizer"] = self._optimizer
        if self.session.world.num_ranks > 1:
            stages["all-reduce"] = self._repeat(self._all_reduce(), images)
        return stages

    def _forward_backward(self, micro_batches: list[Batch]) -> None:
        """Without the gradients' way to the other ranks."""
        job = self.job
        counts = torch.stack([count_for_loss(batch) for batch in micro_batches]).sum(0)
        for batch in micro_batches:
            with self.session.micro_step(job.model, is_last=False):
                prediction = job.model(**batch.inputs())
                self.session.backward(ets_loss(prediction, batch, counts, self.config.loss).total)
        job.optimizer.zero_grad()
        reset_batch_norm_statistics(self.session.unwrap(job.model))

    def _optimizer(self, num_steps: int) -> Taken:
        """Clipping, weights and momentum, statistics, average; on gradients of zero."""
        job = self.job
        weights = [weight for weight in job.model.parameters() if weight.requires_grad]
        gradients = [torch.zeros_like(weight) for weight in weights]

        def step(_: int) -> None:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            self.session.step(job.model, job.optimizer)
            settle_batch_norms(self.session, job.model, skipped=False)
            job.average.update()

        return self._repeat(step, self._images_per_step)(num_steps)

    def _all_reduce(self) -> Callable[[int], None]:
        """As many bytes as the gradients have, in pieces as large as DDP's."""
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(
            self.config.train.ddp_comm_hook, torch.float32
        )
        trained = (weight for weight in self.job.model.parameters() if weight.requires_grad)
        count, piece = sum(weight.numel() for weight in trained), _BUCKET_BYTES // dtype.itemsize
        sizes = [min(piece, count - start) for start in range(0, count, piece)]
        buckets = [torch.zeros(size, dtype=dtype, device=self.session.device) for size in sizes]

        def reduce(_: int) -> None:
            for bucket in buckets:
                dist.all_reduce(bucket)

        return reduce


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
        runs = _chosen(stages.all(), only)
        ledger = _Ledger(session, runs, round_s)
        timings = compare_measured(ledger.calls(), 1, rounds, shows_bar=session.is_main)
        computing = _computing(stages) if "forward+backward" in runs else {}
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
            "peak_memory_gb": _peak_memory(session),
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
        threads = {"decode": 1, "augment": 1, "forward+backward": torch.get_num_threads()}
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
        "backbone_is_frozen": config.model.sees_pictures and config.model.backbone_is_frozen,
        "trims_padding": config.tags.trim_padding,
        "compiles": config.train.compile,
        "comm_hook": config.train.ddp_comm_hook,
    }


def _computing(stages: Stages) -> dict[str, Any]:
    """FLOP of an image, and FLOP/s that this device has for them, on each rank."""
    device, config = stages.session.device, stages.config
    kind = arithmetic(config.train)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    model = stages.session.unwrap(stages.job.model)
    return {
        "flop_per_image": flops_per_image(model, stages.fixed[0][0].to(device), config),
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
