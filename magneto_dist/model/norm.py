"""Batch norm that does not depend on how a global batch is cut into micro-batches and ranks.

1. `GhostBatchNorm2d` normalises each group of consecutive rows by the group's own statistics.
2. Every forward pass in training adds the statistics of its groups to a sum.
3. `commit_batch_norm_statistics` reduces the sums of all norms over the ranks at once, and moves
   the running statistics, once per optimizer step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class RowValidity:
    """Which rows of the micro-batch under way are samples; shared by all norms of a model.

    Norms lie deep inside backbones that pass on nothing but activations, so the owner sets `valid`
    before its forward pass and takes it back after it. None: all rows are samples.
    """

    valid: Bool[Tensor, " batch"] | None = None
    are_counted: bool = True
    """Whether forward passes add to the statistics."""

    @contextlib.contextmanager
    def repeating(self, valid: Bool[Tensor, " batch"] | None) -> Iterator[None]:
        """While a forward pass runs again for its gradients: the same rows, counted already."""
        before = self.valid, self.are_counted
        self.valid, self.are_counted = valid, False
        try:
            yield
        finally:
            self.valid, self.are_counted = before


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over groups of `group_size` consecutive rows (ghost batch norm).

    y = (x - mean_g) / sqrt(var_g + eps) * weight + bias, mean and (biased) variance over the valid
    rows and all positions of group g. A micro-batch smaller than `group_size` is one group. Rows
    that are not valid take no part: their output is the bias, and no gradient leaves them.
    Statistics are computed in float32 (float64 for float64 input), whatever autocast says; the
    output has the input's dtype. Parameters and state_dict are those of `nn.BatchNorm2d`.

    Evaluation uses the running statistics, which no forward pass moves: see
    `commit_batch_norm_statistics`.

    Args:
        num_features: channels.
        group_size: rows per group; divides every larger micro-batch.
    """

    group_statistics: Tensor
    """Sums over the groups since the last commit: their number, means, unbiased variances."""

    def __init__(
        self, num_features: int, group_size: int, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.group_size = group_size
        self.rows = RowValidity()
        self.register_buffer(
            "group_statistics", torch.zeros(1 + 2 * num_features), persistent=False
        )

    @classmethod
    def like(cls, norm: nn.BatchNorm2d, group_size: int) -> GhostBatchNorm2d:
        """A ghost batch norm with the settings, parameters and statistics of `norm`."""
        assert norm.momentum is not None, "cumulative averages are not supported"
        ghost = cls(norm.num_features, group_size, norm.eps, norm.momentum)
        ghost.load_state_dict(norm.state_dict())
        return ghost

    def forward(
        self, input: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        """Normalises `input`.

        Raises:
            ValueError: in training, a batch that is larger than a group and no multiple of it.
        """
        if self.training and self.rows.valid is None:
            with torch.autocast(input.device.type, enabled=False):
                return self._normalise_full_groups(input)
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        with torch.autocast(input.device.type, enabled=False):
            normalise = self._normalise_groups if self.training else self._normalise_all
            affine = [p.to(dtype)[:, None, None] for p in (self.weight, self.bias)]
            return (normalise(input.to(dtype)) * affine[0] + affine[1]).to(input.dtype)

    def _normalise_all(self, x: Tensor) -> Tensor:
        mean, variance = (s.to(x.dtype)[:, None, None] for s in self._running())
        return (x - mean) * (variance + self.eps).rsqrt()

    def _normalise_full_groups(self, x: Tensor) -> Tensor:
        """All rows valid, the usual case: torch's own batch norm, group by group.

        Half again as fast a training step of a small ResNet on CPU as `_normalise_groups`.
        """
        outputs = []
        for group in x.split(self._rows_per_group(len(x))):
            output, mean, inverse_std = torch.native_batch_norm(
                group, self.weight, self.bias, None, None, True, 0.0, self.eps
            )
            outputs.append(output)
            count = mean.new_full((1, 1), group.numel() / group.shape[1])
            variance = (inverse_std.detach() ** -2 - self.eps).clamp(min=0)
            self._add_to_statistics(count, mean[None], variance[None])
        return torch.cat(outputs)

    def _rows_per_group(self, batch: int) -> int:
        rows_per_group = min(self.group_size, batch)
        if batch % rows_per_group:
            raise ValueError(f"{batch} rows cannot be cut into groups of {self.group_size}")
        return rows_per_group

    def _normalise_groups(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        x = x.unflatten(0, (-1, self._rows_per_group(batch)))  # group row channel height width
        valid = self._valid_rows(x)  # group row 1 1 1
        count = (valid.sum(1, keepdim=True) * (height * width)).to(x.dtype)  # group 1 1 1 1
        divisor = count.clamp(min=1)
        # `where`, not a product: what stands in invalid rows may not even reach a sum as 0 * inf.
        mean = torch.where(valid, x, 0).sum((1, 3, 4), keepdim=True) / divisor
        centred = torch.where(valid, x - mean, 0)
        variance = centred.square().sum((1, 3, 4), keepdim=True) / divisor
        self._add_to_statistics(count.flatten(1), mean.flatten(1), variance.flatten(1))
        return (centred * (variance + self.eps).rsqrt()).flatten(0, 1)

    def _valid_rows(self, x: Float[Tensor, "group row channel height width"]) -> Tensor:
        assert self.rows.valid is not None
        return self.rows.valid.view(*x.shape[:2], 1, 1, 1)

    @torch.no_grad()
    def _add_to_statistics(
        self,
        count: Float[Tensor, "group 1"],
        mean: Float[Tensor, "group channel"],
        variance: Float[Tensor, "group channel"],
    ) -> None:
        if not self.rows.are_counted:
            return
        # A group of a single value has no variance to tell of.
        usable = count > 1
        unbiased = variance * count / (count - 1).clamp(min=1)
        rows = torch.cat([torch.ones_like(count), mean, unbiased], dim=1)
        self.group_statistics += torch.where(usable, rows, 0).sum(0)

    @torch.no_grad()
    def commit(self, statistics: Float[Tensor, " packed"]) -> None:
        """Moves the running statistics towards the average of all groups, and starts a new sum."""
        num_groups, sums = statistics[0], statistics[1:].view(2, -1)
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        for running, average in zip(self._running(), sums / num_groups.clamp(min=1), strict=True):
            moved = torch.lerp(running, average.to(running.dtype), self.momentum)
            running.copy_(torch.where(num_groups > 0, moved, running))
        self.num_batches_tracked += num_groups > 0
        self.group_statistics.zero_()

    def _running(self) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_var is not None
        return self.running_mean, self.running_var

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GhostBatchNorm2d:
        """Moves the module; statistics follow to the device, but never below float32.

        A model that is cast to 16 bit (DeepSpeed does it) would round every small step of the
        running statistics away.
        """
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype.itemsize < 4:
                self._buffers[name] = buffer.to(after.device)
        return self


def commit_batch_norm_statistics(
    model: nn.Module, reduce: Callable[[Float[Tensor, " packed"]], Tensor]
) -> None:
    """Moves the running statistics of all ghost batch norms, once per optimizer step.

    running = (1 - momentum) * running + momentum * average over all groups that had valid rows, of
    all micro-batches and ranks since the last commit.

    Args:
        model: may be wrapped (DDP and the like).
        reduce: sums a tensor over the ranks and returns it; called once with all sums packed, and
            not at all where the model has no ghost batch norm. One rank: the identity.
    """
    norms = _ghost_norms(model)
    if not norms:
        return
    packed = reduce(torch.cat([norm.group_statistics for norm in norms]))
    sizes = [norm.group_statistics.numel() for norm in norms]
    for norm, statistics in zip(norms, packed.split(sizes), strict=True):
        norm.commit(statistics)


def reset_batch_norm_statistics(model: nn.Module) -> None:
    """Drops what forward passes have added since the last commit."""
    for norm in _ghost_norms(model):
        norm.group_statistics.zero_()


def share_row_validity(module: nn.Module) -> RowValidity:
    """Gives all ghost batch norms of `module` one `RowValidity`, and returns it to its owner."""
    rows = RowValidity()
    for norm in _ghost_norms(module):
        norm.rows = rows
    return rows


def replace_batch_norms(
    module: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]
) -> nn.Module:
    """`module` with every `nn.BatchNorm2d` in it (or itself) replaced under its name."""
    if isinstance(module, nn.BatchNorm2d):
        return make(module)
    for name, child in module.named_children():
        setattr(module, name, replace_batch_norms(child, make))
    return module


def row_validity_of(module: nn.Module) -> RowValidity:
    """What the ghost batch norms of `module` share; one that nobody asks where there are none."""
    return next((norm.rows for norm in _ghost_norms(module)), RowValidity())


def _ghost_norms(model: nn.Module) -> list[GhostBatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, GhostBatchNorm2d)]
