"""Frozen stages made fast: batch norms folded into the convolutions, in low precision if wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from magneto_dist.config import Precision

_TURING = (7, 0)  # its tensor cores came with Volta; none in the GTX 16 series, which is no slower


def fast_precision() -> Precision:
    """The 16-bit format that this machine computes convolutions fast in, or none.

    Of a GPU bf16 from Ampere on, fp16 before; of a CPU bf16 where it has instructions for it
    (AVX512_BF16: Zen 4, Cooper Lake, Sapphire Rapids and later).
    """
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        return "fp16" if torch.cuda.get_device_capability() >= _TURING else "no"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "no"


class FoldedStages:
    """Runs frozen stages through a copy whose batch norms are folded into the convolutions.

    With s = weight / sqrt(running_var + eps): kernel' = s * kernel, bias' = bias - s * running_mean
    + s * (bias of the convolution), rounded to the wanted dtype once. The copy is no part of the
    module tree, so state_dict, optimizer and sharding know the stages alone; it is made anew when
    these were loaded, moved or cast. Where that cannot be (weights sharded over ranks, compilation
    and export, which fold by themselves) the stages run as they are, under autocast. Several
    threads may call it at once, when the copy is there.
    """

    def __init__(self) -> None:
        self._made: tuple[tuple, nn.Module] = ((), nn.Identity())
        """Of what the copy was made, and the copy: replaced together."""

    @torch.no_grad()
    def __call__(
        self, stages: Sequence[nn.Module], x: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The output of `stages`, which are in evaluation mode, for `x`; without a graph.

        Args:
            stages: whose weights and statistics stand still.
            x: in the dtype of their weights.
            dtype: to compute in, float16 or bfloat16, whatever autocast says; the output has the
                dtype of what follows: autocast's or that of `x`. None: as the rest.
        """
        folded = self._folded(stages, dtype)
        if dtype is None:
            return nn.Sequential(*stages)(x) if folded is None else folded(x)
        device = x.device.type
        follows = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, dtype, enabled=folded is None):
            x = nn.Sequential(*stages)(x) if folded is None else folded(x.to(dtype))
        return x.to(follows)

    def _folded(self, stages: Sequence[nn.Module], dtype: torch.dtype | None) -> nn.Module | None:
        """The copy; None where there cannot be one."""
        tensors = [t for m in stages for t in (*m.parameters(), *m.buffers())]
        if torch.compiler.is_compiling() or not all(map(_is_whole, tensors)):
            return None
        made_of = (dtype, *((t.data_ptr(), t._version, t.dtype, t.stride()) for t in tensors))
        copied, copy = self._made
        if made_of != copied:
            copy = fuse(nn.Sequential(*stages).eval()).to(dtype=dtype)
            self._made = (made_of, copy)
        return copy

    def fold(self, stages: Sequence[nn.Module], dtype: torch.dtype | None) -> bool:
        """Makes the copy now, if there can be one, and says whether; arguments as for a call."""
        return self._folded(stages, dtype) is not None


def _is_whole(tensor: Tensor) -> bool:
    """Whether all of a tensor is here, and stays: torch's FSDP leaves a subclass.

    Those that ZeRO-3 owns (`ds_id`) come and go, and a copy of their modules would ask it for more.
    """
    return type(tensor) in (Tensor, nn.Parameter) and not hasattr(tensor, "ds_id")
