"""Frozen convolutions with their batch norms folded in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse


class FoldedStages:
    """Runs frozen stages through a copy whose batch norms are folded into the convolutions.

    With s = weight / sqrt(running_var + eps): kernel' = s * kernel, bias' = bias - s * running_mean
    + s * (bias of the convolution). The copy is no part of the module tree, so state_dict,
    optimizer and sharding know the stages alone; it is made anew when these were loaded, moved or
    cast. Where that cannot be (weights sharded over ranks, compilation and export, which fold by
    themselves) the stages run as they are.
    """

    def __init__(self) -> None:
        self._made_of: tuple = ()
        self._copy: nn.Module = nn.Identity()

    @torch.no_grad()
    def __call__(self, stages: Sequence[nn.Module], x: Tensor) -> Tensor:
        """The output of `stages`, which are in evaluation mode, for `x`; without a graph."""
        tensors = [t for m in stages for t in (*m.parameters(), *m.buffers())]
        if torch.compiler.is_compiling() or not all(_is_whole(t) for t in tensors):
            return nn.Sequential(*stages)(x)
        made_of = tuple((t.data_ptr(), t._version, t.dtype, t.stride()) for t in tensors)
        if made_of != self._made_of:
            self._copy, self._made_of = fuse(nn.Sequential(*stages).eval()), made_of
        return self._copy(x)


def _is_whole(tensor: Tensor) -> bool:
    """Whether all of a tensor is here, and stays: torch's FSDP leaves a subclass.

    Those that ZeRO-3 owns (`ds_id`) come and go, and a copy of their modules would ask it for more.
    """
    return type(tensor) in (Tensor, nn.Parameter) and not hasattr(tensor, "ds_id")
