"""SGD and its learning rate, as a function of the step and of past evaluations (appendix A.4)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from magneto_dist.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with momentum over the parameters that are trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(
        trained, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )


class Schedule:
    """lr(step) = lr * warm-up(step) * decay, stepped by us and by nobody else.

    warm-up(step) = min(1, step / warmup_steps); decay is 1 (constant), a half cosine from the end
    of the warm-up to `total_steps` (cosine), or plateau_factor ** reductions (plateau), where a
    reduction follows plateau_patience + 1 evaluations in a row without a validation loss at least
    0.01 % below the best, as torch's ReduceLROnPlateau counts them.
    """

    def __init__(self, config: OptimConfig, total_steps: int) -> None:
        self._config = config
        self._total_steps = total_steps
        self._best = math.inf
        self._num_bad = 0
        self._reductions = 0

    def lr(self, step: int) -> float:
        """Learning rate of a global step, from 1."""
        config = self._config
        warmup = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
        return config.lr * warmup * self._decay(step)

    def apply(self, optimizer: Any, step: int) -> float:
        """Sets the learning rate of `step` and returns it."""
        lr = self.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        return lr

    def observe(self, validation_loss: float) -> None:
        """Takes the global loss of an evaluation; call it once for each."""
        if validation_loss < self._best * (1 - 1e-4):
            self._best, self._num_bad = validation_loss, 0
        else:
            self._num_bad += 1
        if self._num_bad > self._config.plateau_patience:
            self._reductions, self._num_bad = self._reductions + 1, 0

    def state_dict(self) -> dict[str, float]:
        """What past evaluations left behind; plain numbers."""
        return {"best": self._best, "num_bad": self._num_bad, "reductions": self._reductions}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores `state_dict`."""
        self._best = state["best"]
        self._num_bad = int(state["num_bad"])
        self._reductions = int(state["reductions"])

    def _decay(self, step: int) -> float:
        if self._config.schedule == "cosine":
            warmup_steps = self._config.warmup_steps
            part = (step - warmup_steps) / max(1, self._total_steps - warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * min(max(part, 0.0), 1.0)))
        if self._config.schedule == "plateau":
            return self._config.plateau_factor**self._reductions
        return 1.0
