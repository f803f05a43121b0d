"""A run whose loss or weights are no longer finite stops, before it writes over what was good."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from magneto_dist.errors import InputError, ReportedError
from magneto_dist.training.session import Session


def require_finite_loss(session: Session, step: int, loss: float, name: str = "loss") -> None:
    """Stops the run on every rank at once.

    Args:
        session: this process among its peers.
        step: global step of the loss.
        loss: reduced over ranks, so that all of them decide alike.
        name: which loss it is.

    Raises:
        InputError: the loss is infinite or not a number.
    """
    if not math.isfinite(loss):
        raise _diverged(session, f"the {name} of step {step} is {loss}")


def require_finite_state(
    session: Session, model: nn.Module, step: int, loss: Tensor | None
) -> None:
    """Before a checkpoint is written: a collective, and a device synchronisation.

    A step whose loss was finite may still have moved the weights out of all numbers; the next loss
    would tell, but its checkpoint would have been written by then.

    Args:
        session: this process among its peers.
        model: whose weights and running statistics would be saved.
        step: last global step.
        loss: this rank's part of that step's loss; None: no step was taken since the last check.

    Raises:
        InputError: the loss, a weight or a statistic is infinite or not a number, on any rank.
    """
    if loss is None:
        loss = torch.zeros((), device=session.device)
    state = (t for t in session.held_state(model) if t.is_floating_point())
    are_finite = torch.stack([t.isfinite().all() for t in state])
    packed = torch.stack([loss.double(), (~are_finite).sum().double()])
    reduced_loss, num_bad = session.reduce_sum(packed).tolist()
    require_finite_loss(session, step, reduced_loss)
    if num_bad:
        raise _diverged(session, f"step {step}, of loss {reduced_loss}, left weights not finite")


def _diverged(session: Session, what: str) -> InputError:
    message = (
        f"{what}: training has diverged and stops; lower --optim.lr, set --optim.clip_norm, or use"
        " --train.precision bf16 instead of fp16; nothing was saved since, and the last good"
        " checkpoint is kept"
    )
    return InputError(message) if session.is_main else ReportedError(message)
