"""The stages of training on this machine, each alone and all together, taken in turn.

1. `Stages` makes what they work on: samples as they lie in shards, pictures as they came and
   decoded, batches where the model is, a run with everything that a run has.
2. Each stage is a function that does `n` units of work and says what they took.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from harness import now
from magneto_dist.batch import Batch
from magneto_dist.data.augment import Augmentation
from magneto_dist.data.decode_cpu import CpuDecoder, check_image_decodes, decode_image
from magneto_dist.data.encoded_images import encoded_images
from magneto_dist.data.micro_batch import MicroBatches
from magneto_dist.data.order import micro_batch_sample_ids
from magneto_dist.data.sample import BadSample
from magneto_dist.data.shards import Dataset
from magneto_dist.data.workers import cores_per_rank
from magneto_dist.errors import InputError
from magneto_dist.loss import count_for_loss, ets_loss
from magneto_dist.model.norm import reset_batch_norm_statistics
from magneto_dist.precision import HALF_DTYPES
from magneto_dist.training.loop import Job, settle_batch_norms
from training_rounds import ENDLESS, Rounds, Taken, ready

Run = Callable[[int], Taken]
"""Does so many units of a stage."""
WARM_STEPS = 2
FIXED_STEPS = 2  # whose batches lie ready
MOST_PICTURES = 64  # that lie ready to be decoded and augmented
_BUCKET_BYTES = 25 << 20  # DDP's


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
        self._decoder, self._dataset = job.feed.loader.decoder, dataset
        self._rounds = Rounds(job, WARM_STEPS)
        plan = job.plan
        made = job.feed.loader.batches(1, FIXED_STEPS)
        self.fixed = [list(itertools.islice(made, plan.micro_steps)) for _ in range(FIXED_STEPS)]
        """Micro-batches of some steps, as they come from the loader."""
        self._images_per_step = sum(_items(b) for step in self.fixed for b in step) / FIXED_STEPS

    def all(self, *, of_loader: bool = True) -> dict[str, Run]:
        """By name: all together first, then what a loader does, then what training does."""
        return {
            "whole": self._rounds.loop,
            "loader": self._loader,
            "step": lambda n: self._rounds.loop(n, ready(self.job, self.fixed)),
            **(self._stages_of_loader() if of_loader else {}),
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

    def _loader(self, num_steps: int) -> Taken:
        """All of the loader with its processes, and nobody who uses what it makes."""
        loader, micro_steps = self.job.feed.loader, self.job.plan.micro_steps
        num_warm = max(2 * loader.num_workers, WARM_STEPS * micro_steps)
        with closing(loader.batches(1, ENDLESS)) as batches:  # type: ignore[type-var]
            for _ in itertools.islice(batches, num_warm):
                pass
            start = now(self.session.device)
            images = sum(map(_items, itertools.islice(batches, num_steps * micro_steps)))
            end = now(self.session.device)
        return Taken(end.wall_s - start.wall_s, end.core_s - start.core_s, 0.0, images)

    # What a loader does -------------------------------------------------------------------------

    def _stages_of_loader(self) -> dict[str, Run]:
        micro = self._micro_batches()
        per_epoch = self.job.plan.steps_per_epoch(micro.order.num_samples)

        def encode(number: int) -> Any:
            epoch, step = divmod(number, per_epoch)
            rank = self.session.world.rank
            ids = micro_batch_sample_ids(micro.order, self.job.plan, epoch, step, rank, 0)
            return micro.encode(ids, step=number + 1, micro_step=0, epoch=epoch)

        encoded = encode(0)
        stages = {"read": self._repeat(encode, _items(encoded.batch))}
        if self._decoder == "none":
            return stages
        cpu = CpuDecoder(self.config.augment.image_size, self.config.data.max_image_megapixels)
        pairs = zip(encoded.images, encoded.augmentations, strict=True)
        images, augmentations = zip(*_sound(pairs, cpu.max_megapixels), strict=True)
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
        reset_batch_norm_statistics(job.model)

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
        hook = self.config.train.ddp_comm_hook
        buckets = gradient_buckets(self.job.model, hook, self.session.device)

        def reduce(_: int) -> None:
            for bucket in buckets:
                dist.all_reduce(bucket)

        return reduce


def gradient_buckets(
    model: nn.Module, comm_hook: str, device: torch.device
) -> list[Float[Tensor, " element"]]:
    """Zeros of as many bytes as the gradients of `model` send, in pieces as large as DDP's."""
    dtype = HALF_DTYPES.get(comm_hook, torch.float32)
    trained = (weight for weight in model.parameters() if weight.requires_grad)
    count, piece = sum(weight.numel() for weight in trained), _BUCKET_BYTES // dtype.itemsize
    sizes = [min(piece, count - start) for start in range(0, count, piece)]
    return [torch.zeros(size, dtype=dtype, device=device) for size in sizes]


def _items(batch: Batch) -> int:
    return int(batch.sample_valid.sum())


def _sound(
    pairs: Iterable[tuple[bytes, Augmentation]], max_megapixels: float
) -> list[tuple[bytes, Augmentation]]:
    """Some pictures that decode; a batch may have damaged ones, and rows without any."""
    found = []
    for content, augmentation in pairs:
        with contextlib.suppress(BadSample):
            check_image_decodes(content, max_megapixels)
            found.append((content, augmentation))
        if len(found) == MOST_PICTURES:
            break
    if not found:
        raise InputError(
            "a rank has no picture that decodes in its first micro-batch: take a smaller"
            " --train.global_batch_size or more items, or ask `launchers/shards.py verify`"
        )
    return found
