"""DeepSpeed's files are pickles, and reading a pickle may run anything: so not before a look at it.

torch lists what a file would call without calling it. Nothing may be on that list but what
DeepSpeed puts into its own checkpoints.
"""

from __future__ import annotations

from pathlib import Path

from torch.serialization import get_unsafe_globals_in_checkpoint

from magneto_dist.errors import InputError

_DEEPSPEEDS_OWN = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def require_no_code(folder: Path) -> None:
    """Checks every pickle in `folder`.

    Raises:
        InputError: one of them is damaged, or would call something else when it is read.
    """
    for path in sorted(folder.rglob("*.pt")):
        try:
            called = set(get_unsafe_globals_in_checkpoint(path))
        except Exception as error:  # whatever parsers make of damage; this only looks
            reason = str(error) or type(error).__name__
            raise InputError(f"{path}: cannot be read ({reason}); use another checkpoint") from None
        foreign = sorted(called - _DEEPSPEEDS_OWN)
        if foreign:
            raise InputError(
                f"{path} would call {foreign[0]} when it is read, which DeepSpeed does not write:"
                " somebody has put code there; nothing was run"
            )
