"""What `accelerate launch` was told, held against our configuration: a contradiction is an error.

accelerate hands its flags and its configuration file to the processes as environment variables.
Topology and ZeRO stage are theirs; precision, accumulation, clipping and compilation are ours.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from magneto_dist.config import TrainConfig
from magneto_dist.errors import InputError, ReportedError

_UNSET = ("none", "auto")
_NOT_IN_FSDP = {
    "FSDP_OFFLOAD_PARAMS": "weights stay on the GPU; set fsdp_offload_params: false",
    "FSDP_ACTIVATION_CHECKPOINTING": "use --train.activation_checkpointing true instead",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "all processes share one model; leave it out",
}
"""What accelerate's files may ask of FSDP and ours does not do, and what to do instead."""


def check_launch(config: TrainConfig, clip_norm: float | None, has_gpu: bool) -> None:
    """Refuses processes that accelerate was asked for and did not start, and what contradicts us.

    Args:
        config: ours.
        clip_norm: ours; None: nothing is trained.
        has_gpu: whether this machine has one.

    Raises:
        InputError: there are fewer processes than accelerate was asked for; or a flag of the
            process launcher, or of a DeepSpeed file that it names, says something else than our
            configuration, or does not fit this machine.
    """
    _warn_of_restarts()
    _warn_of_no_gpu(has_gpu)
    _check_precision(config, has_gpu, trains=clip_norm is not None)
    _check_accumulation(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"), "accelerate")
    if uses_fsdp():
        _check_fsdp(config, trains=clip_norm is not None)
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() != "no":
        raise refusal(
            f"accelerate was launched with dynamo backend {compiler.lower()}: leave it at no, and"
            " use --train.compile true"
        )
    if clip_norm is not None:
        _check_comm_hook(config.ddp_comm_hook)
    if uses_deepspeed():
        _check_clipping(os.environ.get("ACCELERATE_GRADIENT_CLIPPING"), clip_norm, "accelerate")
        _check_deepspeed_file(config, clip_norm)
    if _is_alone_against_order():
        raise refusal(
            "`accelerate launch` starts one process on CPU, however many it is asked for: use"
            " `torchrun --nproc_per_node N` instead, or --num_processes 1"
        )


def _warn_of_restarts() -> None:
    """Processes that torchrun starts anew may find addresses of dead ones in a store it shares."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts and shares_store and os.environ.get("RANK") == "0":
        print(
            "warning: --max-restarts may fail: start torchrun with --rdzv_backend c10d and"
            " TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment (docs/multi_node.md)",
            file=sys.stderr,
        )


def _warn_of_no_gpu(has_gpu: bool) -> None:
    """accelerate goes on without a GPU, whatever its configuration says of them."""
    wants_gpu = os.environ.get("ACCELERATE_USE_CPU", "true").lower() == "false"
    if wants_gpu and not has_gpu and os.environ.get("RANK", "0") == "0":
        print(
            "warning: no GPU is seen here, and all runs on the CPU, many times slower: `python -m"
            " magneto_dist.doctor` says why (with --cpu this line does not come)",
            file=sys.stderr,
        )


def uses_deepspeed() -> bool:
    """Whether accelerate was told to train with DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"


def uses_fsdp() -> bool:
    """Whether accelerate was told to train with FSDP."""
    return _is_true("ACCELERATE_USE_FSDP")


def fsdp_keeps_gathered() -> bool:
    """Whether gathered weights stay until the backward pass (fsdp_reshard_after_forward: false)."""
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false"


def _check_fsdp(config: TrainConfig, *, trains: bool) -> None:
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise refusal(
            f"accelerate was configured for FSDP version {version}: set fsdp_version: 2"
            " (configs/accelerate/fsdp2_gpu_8.yaml)"
        )
    for name, instead in _NOT_IN_FSDP.items():
        if _is_true(name):
            raise refusal(f"accelerate was launched with {name}=true under FSDP: {instead}")
    if trains and config.ema_decay:
        raise refusal(
            "--train.ema_decay needs whole weights on every process, and FSDP keeps them in parts:"
            " use DDP or ZeRO-2, or set it to 0"
        )


def _is_true(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _check_precision(config: TrainConfig, has_gpu: bool, *, trains: bool) -> None:
    launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched_with not in ("no", config.precision):
        raise refusal(
            f"accelerate was launched with mixed precision {launched_with}, our configuration says"
            f" --train.precision {config.precision}: set it in our configuration alone"
        )
    if config.precision == "fp16" and not has_gpu:
        raise refusal("--train.precision fp16 needs a GPU; on CPU use bf16 or no")
    if config.precision == "fp16" and trains and uses_deepspeed():
        raise refusal(
            "--train.precision fp16 is for DDP; with DeepSpeed use bf16, or no (its loss scaling"
            " does not tell of the steps that it skips)"
        )


def _check_accumulation(given: object, who: str) -> None:
    if not _is_unset(given) and str(given) != "1":
        raise refusal(
            f"{who} says {given} gradient accumulation steps; ours follow from"
            " --train.global_batch_size and --train.max_micro_batch_size: leave them at 1"
        )


def _check_comm_hook(hook: str) -> None:
    if hook == "none":
        return
    if uses_deepspeed() or uses_fsdp():
        other = "DeepSpeed" if uses_deepspeed() else "FSDP"
        raise refusal(
            f"--train.ddp_comm_hook {hook} is for DDP, and {other} moves gradients its own way:"
            " set it to none"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        print(
            f"warning: --train.ddp_comm_hook {hook} does nothing: there is one process, and no"
            " gradient travels",
            file=sys.stderr,
        )


def _check_clipping(given: Any, clip_norm: float | None, who: str) -> None:
    if clip_norm is None or _is_unset(given):
        return
    try:
        is_ours = float(given) == clip_norm
    except (TypeError, ValueError):
        is_ours = False
    if not is_ours:
        raise refusal(
            f"{who} says gradient clipping {given}, our configuration says --optim.clip_norm"
            f" {clip_norm}: set it in our configuration alone"
        )


def _check_deepspeed_file(config: TrainConfig, clip_norm: float | None) -> None:
    name = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if name == "none":
        return
    who = f"the DeepSpeed file {name}"
    try:
        settings = json.loads(Path(name).read_bytes())
    except (OSError, ValueError) as error:
        raise refusal(f"{who} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise refusal(f"{who} is no JSON object")
    _check_clipping(settings.get("gradient_clipping"), clip_norm, who)
    _check_accumulation(settings.get("gradient_accumulation_steps"), who)
    for precision in ("fp16", "bf16"):
        section = settings.get(precision)
        enabled = section.get("enabled") if isinstance(section, dict) else None
        if not _is_unset(enabled) and bool(enabled):
            raise refusal(
                f"{who} says {precision} enabled true, our configuration says --train.precision"
                f" {config.precision}: set it in our configuration alone"
            )


def _is_unset(given: object) -> bool:
    return given is None or str(given).lower() in _UNSET


def refusal(message: str) -> InputError:
    """All processes meet the same contradiction; the main one says it."""
    is_main = os.environ.get("RANK", "0") == "0"
    return InputError(message) if is_main else ReportedError(message)


def _is_alone_against_order() -> bool:
    """accelerate prepares a meeting of several processes on CPU, then starts a single one."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    # What says in which of the processes we are: torchrun's, then those of MPI launchers.
    ranks = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}
    return on_cpu and "MASTER_PORT" in os.environ and not ranks & set(os.environ)
