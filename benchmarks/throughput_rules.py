"""What the measurements say: how fast this could be, what holds it back, which setting to try.

1. `ceiling`: what the measured stages would allow. On a CPU all of them share the cores: cores /
   core-seconds of an image over all stages. With a GPU they work side by side: the slowest.
2. `diagnose`: the bottleneck, by rules in the order in which they are written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

IN_LOADER = ("read", "prepare", "decode", "augment")
IN_TRAINING = ("copy", "forward+backward", "optimizer", "all-reduce")
WAITS = {"cpu": 0.10, "cuda": 0.05}  # data-wait from which data is what training waits for
BUSY = 0.85  # share of the attainable rate from which the cores have nothing left to give
LOOP = 0.10  # share of a step that is none of its stages' from which it is the loop's
SHARED = 0.85  # of the speed with data already there, below which the GPU has something else to do


@dataclass(frozen=True)
class Measured:
    """What `throughput_stages.measure` found, with short names."""

    found: Mapping[str, Any]
    cores: int
    """That this machine lends to all ranks on it."""

    def rate(self, stage: str) -> float:
        """Images/s over all ranks; infinite for a stage that is not there."""
        return self.found["stages"].get(stage, {}).get("images_per_s", math.inf)

    def core_ms(self, stage: str) -> float:
        """Core-milliseconds an image; 0 for a stage that is not there."""
        return self.found["stages"].get(stage, {}).get("core_ms_per_image", 0.0)

    def step_ms(self, stage: str) -> float:
        """Milliseconds an image of the training process, all ranks at work."""
        return 1e3 / self.rate(stage)

    def busy(self, stage: str) -> float:
        """Share of a stage's time in which its process computes; the rest it waits."""
        return self.core_ms(stage) * self.rate(stage) / 1e3 / self.found["ranks"]

    @property
    def is_gpu(self) -> bool:
        """Whether the model has a device of its own."""
        return self.found["device"] == "cuda"

    @property
    def all_cores(self) -> int:
        """Of all nodes, taken for equal."""
        return self.cores * self.found["ranks"] // self.found["ranks_per_node"]


class Diagnosis(NamedTuple):
    """What holds training back."""

    bottleneck: str
    """A stage, or "loop"."""
    because: str
    settings: tuple[str, ...]
    """To try, the most promising first."""


def ceiling(measured: Measured) -> tuple[float, str]:
    """Images/s over all ranks, and what it is made of."""
    if measured.is_gpu:
        slowest = min(("loader", "step", "copy"), key=measured.rate)
        return measured.rate(slowest), f"the slowest of loader, copy and step: {slowest}"
    core_ms = sum(measured.core_ms(stage) for stage in (*IN_LOADER, *IN_TRAINING))
    cores = measured.all_cores
    return cores * 1e3 / core_ms, f"{cores} cores / {core_ms:.2f} core-ms an image of all stages"


def diagnose(measured: Measured) -> Diagnosis:
    """The bottleneck.

    1. Training waits for data: the stage of the loader that takes most core time.
    2. It does not, but (CPU) the cores are busy: the stage that takes most core time of all.
    3. It does not, but (GPU) training is slower than with data already there: `dali_gpu` decodes on
       the same device.
    4. A step takes longer than its stages do: the loop, or gradients on their way.
    5. Else the longest stage of a step.
    """
    wait, limit = measured.found["data_wait"], WAITS[measured.found["device"]]
    in_loader = {name: measured.core_ms(name) for name in IN_LOADER if measured.core_ms(name)}
    if wait > limit:
        worst = max(in_loader, key=lambda name: in_loader[name])
        share = in_loader[worst] / sum(in_loader.values())
        because = (
            f"training waits for data {wait:.0%} of the time, and {worst} is {share:.0%} of a"
            " loader process's work"
        )
        return Diagnosis(worst, because, _settings_of_data(worst, measured))
    whole, most = measured.rate("whole"), ceiling(measured)[0]
    if not measured.is_gpu and whole >= BUSY * most:
        core_ms = {name: measured.core_ms(name) for name in (*IN_LOADER, *IN_TRAINING)}
        worst = max(core_ms, key=lambda name: core_ms[name])
        share = core_ms[worst] / sum(core_ms.values())
        because = f"the cores are busy, and {worst} takes {share:.0%} of their time"
        if worst in IN_LOADER:
            return Diagnosis(worst, because, _settings_of_data(worst, measured))
        return Diagnosis(worst, because, _settings_of_training(worst, measured))
    if measured.found["decoder"] == "dali_gpu" and whole < SHARED * measured.rate("step"):
        because = (
            f"training is at {whole / measured.rate('step'):.0%} of its speed with data already"
            " there and does not wait: decoding takes time of the same GPU"
        )
        return Diagnosis("decode", because, _settings_of_data("decode", measured))
    worst, share = _longest_of_a_step(measured)
    because = f"training hardly waits for data ({wait:.0%}), and {worst} is {share:.0%} of a step"
    return Diagnosis(worst, because, _settings_of_training(worst, measured))


def _longest_of_a_step(measured: Measured) -> tuple[str, float]:
    """Stage and its share; gradients count for what they add to the step, not for their own."""
    parts = {name: measured.step_ms(name) for name in ("copy", "forward+backward", "optimizer")}
    rest = measured.step_ms("step") - sum(parts.values())
    reduce_ms = measured.step_ms("all-reduce")
    parts["all-reduce"] = min(max(rest, 0.0), reduce_ms)
    beyond = rest - parts["all-reduce"]
    # A bit more than the sum is noise, or a cache that another stage has emptied.
    parts["loop"] = beyond if beyond > LOOP * measured.step_ms("step") else 0.0
    worst = max(parts, key=lambda name: parts[name])
    # Where frozen stages run beside the step, its parts are longer than it.
    return worst, parts[worst] / max(measured.step_ms("step"), sum(parts.values()))


def _settings_of_data(stage: str, measured: Measured) -> tuple[str, ...]:
    found, ranks_per_node = measured.found, measured.found["ranks_per_node"]
    settings = []
    by_dali = found["decoder"].startswith("dali")  # which decodes in the training process
    in_workers = ("read", "prepare") if by_dali else IN_LOADER
    core_ms = sum(measured.core_ms(name) for name in in_workers)
    own_cores = max(measured.cores // ranks_per_node, 1)
    workers = found["loader_processes_per_rank"]
    # GPUs leave the cores to the loader; on a CPU the training process keeps what it computes on.
    most = own_cores if measured.is_gpu else own_cores - found["threads_per_rank"]
    wanted = math.ceil(measured.rate("step") / found["ranks"] * core_ms / 1e3)
    if min(wanted, most) > workers and stage in in_workers:
        settings.append(
            f"--data.num_workers {min(wanted, most)} (now {workers}; to keep up with training, each"
            f" rank needs {wanted} at {core_ms:.2f} ms an image)"
        )
    if stage in ("decode", "augment") and measured.is_gpu and found["decoder"] != "dali_gpu":
        settings.append("--data.decoder dali_gpu (decodes and augments on the GPU)")
    if stage == "read" and measured.busy("read") < 0.5 * (found["cores_got"] or 1.0):
        settings.append("faster storage, or a copy on a local disk: reading waits, not computes")
    if stage == "read":
        settings.append("--data.num_streams lower (a batch reads from fewer places)")
    if stage in ("decode", "prepare"):
        settings.append(
            "build the data set with --shrink.shorter_side"
            f" {math.ceil(found['image_size'] * 8 / 7)} or so (smaller pictures decode faster)"
        )
    if found["backbone_is_frozen"]:
        settings.append("--data.feature_views 4 (the backbone is frozen: no pictures in training)")
    if stage == "augment" and found["policy"] != "none":
        settings.append("--augment.policy none (less augmentation: look at F1)")
    if stage in ("augment", "decode"):
        settings.append(f"--augment.image_size below {found['image_size']} (look at F1)")
    return tuple(settings)


def _settings_of_training(stage: str, measured: Measured) -> tuple[str, ...]:
    found = measured.found
    settings = []
    if stage in ("forward+backward", "optimizer") and not measured.is_gpu:
        ranks, threads = found["ranks_per_node"], found["threads_per_rank"]
        spare = measured.cores - ranks * threads
        if spare > 0 and measured.rate("whole") < BUSY * ceiling(measured)[0]:
            settings.append(
                f"torchrun --nproc_per_node {measured.cores}, or OMP_NUM_THREADS="
                f"{measured.cores // ranks} (what is trained has {ranks * threads} of"
                f" {measured.cores} cores)"
            )
    if stage == "forward+backward":
        if found["slots_used"] < 0.5 and not found["trims_padding"]:
            settings.append(
                f"--tags.trim_padding true ({found['slots_used']:.0%} of the tag slots are used)"
            )
        if found["backbone_is_frozen"]:
            settings.append("--data.feature_views 4 (the backbone is frozen: run it once a view)")
        if found["frozen_precision"] == "no" and found["frozen_precision_auto"] != "no":
            settings.append(
                f"--model.frozen_precision auto ({found['frozen_precision_auto']} in the frozen"
                " stages)"
            )
        if measured.is_gpu and found["arithmetic"] in ("float32", "tf32"):
            settings.append("--train.precision fp16 (Turing) or bf16 (Ampere and later)")
        if measured.is_gpu and found["arithmetic"] == "float32":
            settings.append("--train.tf32 true (Ampere and later, where float32 is to stay)")
        if measured.is_gpu and not found["compiles"]:
            settings.append("--train.compile true (minutes to start)")
        if not found["backbone_is_frozen"]:
            settings.append("--model.frozen_stages higher (fewer trained layers: look at F1)")
        settings.append(f"--augment.image_size below {found['image_size']} (look at F1)")
    if stage == "all-reduce":
        if found["comm_hook"] == "none":
            settings.append("--train.ddp_comm_hook bf16 (half the bytes; fp16 on Turing)")
        settings.append("--train.global_batch_size higher (fewer steps an epoch: scale optim.lr)")
    if stage in ("optimizer", "copy", "loop"):
        settings.append("--train.global_batch_size higher (what a step costs, less often)")
    if stage == "loop":
        settings.append("--log.every_steps higher, --data.ledger false, --log.tensorboard false")
    return tuple(settings)
