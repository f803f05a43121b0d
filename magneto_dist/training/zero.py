"""What DeepSpeed is told beyond its stage, which the process launcher says: one truth, ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from magneto_dist.config import Precision
from magneto_dist.data.order import BatchPlan


def compile_no_operator() -> None:
    """Spares a run on CPU minutes of compiler time before its first step.

    DeepSpeed's process group asks this table whether it may compile an operator that serves
    inference alone; to fill it, it would start the compiler once for every operator that it knows.
    To be called before DeepSpeed joins the process group.
    """
    import deepspeed.ops  # takes seconds: only where DeepSpeed trains

    deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]


def complete_settings(
    settings: dict[str, Any], plan: BatchPlan, precision: Precision, clip_norm: float
) -> None:
    """Adds our part to DeepSpeed's configuration, in place.

    Args:
        settings: as accelerate has made it.
        plan: how a global batch is cut.
        precision: "no" or "bf16".
        clip_norm: largest global gradient norm; 0: no clipping.
    """
    settings.update(
        train_micro_batch_size_per_gpu=plan.micro_batch_size,
        gradient_accumulation_steps=plan.micro_steps,
        # Unless told otherwise DeepSpeed clips to norm 1; 0 is off.
        gradient_clipping=clip_norm,
        # accelerate would have DeepSpeed hold weights in half precision and compute all in it. So
        # weights and what travels stay as they are, and autocast decides, as in DDP.
        torch_autocast={
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    )
    # ZeRO-3 gives the whole weights away on demand alone ("16bit": in the dtype they have).
    settings.setdefault("zero_optimization", {}).update(
        stage3_gather_16bit_weights_on_model_save=True
    )


def held_part(weight: Tensor, rank: int) -> Tensor:
    """What this rank holds of a weight: under ZeRO-3 its part, else all of it.

    The last parts of a weight that cannot be cut evenly end in memory that nobody has written, and
    that may hold anything: it is left out.
    """
    if not hasattr(weight, "ds_tensor"):
        return weight
    part: Tensor = weight.ds_tensor  # type: ignore[attr-defined]
    num_left = weight.ds_numel - rank * part.numel()  # type: ignore[attr-defined]
    return part.flatten()[: max(num_left, 0)]
