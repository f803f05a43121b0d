"""The 16-bit formats by the names that our configuration has for them."""

from __future__ import annotations

import torch

HALF_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""In what `train.precision`, `model.frozen_precision`, `data.feature_dtype` and
`train.ddp_comm_hook` mean; what else these may be ("no", "power_sgd") is not among them."""


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a model trains on `device` in `precision`; "no": an idle one."""
    dtype = HALF_DTYPES.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
