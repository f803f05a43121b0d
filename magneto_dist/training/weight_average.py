"""The exponential moving average of the trained weights (EMA): steadier than the last weights.

1. `update`, after every step that moved the weights: average = d * average + (1 - d) * weight.
2. In a block `with swapped_in()` the model computes with the averages: so it is evaluated.
3. Checkpoints keep both: training goes on from the weights, everything else takes the averages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from magneto_dist.errors import InputError


class WeightAverage:
    """Averages of the weights that are trained; buffers stay the model's own.

    Early averages would be full of initial weights: the n-th update has d = min(decay, (1 + n) /
    (10 + n)), the rule of TensorFlow's ExponentialMovingAverage.

    Args:
        model: on its device, whole on every rank, on which the weights are equal.
        decay: of the average, below 1; 0: keeps none, and every method does nothing.
        num_updates: so many came before, in the run that goes on.
    """

    def __init__(self, model: nn.Module, decay: float, num_updates: int = 0) -> None:
        self._decay, self._num_updates = decay, num_updates
        trained = {n: w for n, w in model.named_parameters() if w.requires_grad and decay > 0}
        self._weights = trained
        self._averages = {
            # A half-precision average would not move: the changes are below its last bit.
            name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for name, weight in trained.items()
        }

    @property
    def averages(self) -> dict[str, Tensor]:
        """By the name of the weight; at least float32."""
        return self._averages

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Goes on from averages of an earlier process; other names are passed over.

        Raises:
            InputError: one is missing, or has another shape.
        """
        for name, average in self._averages.items():
            if name not in averages or averages[name].shape != average.shape:
                raise InputError(f"the averaged weights of the checkpoint have no {name} like ours")
            average.copy_(averages[name])

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights after a step into account."""
        if not self._averages:
            return
        self._num_updates += 1
        decay = min(self._decay, (1 + self._num_updates) / (10 + self._num_updates))
        averages = list(self._averages.values())
        weights = [self._weights[name].to(a.dtype) for name, a in self._averages.items()]
        get_ema_multi_avg_fn(decay)(averages, weights, self._num_updates)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model's weights are the averages inside, and as before after it."""
        kept = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._copy_to_model(self._averages)
        try:
            yield
        finally:
            self._copy_to_model(kept)

    @torch.no_grad()
    def _copy_to_model(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._weights[name].copy_(tensor)
