"""Ranks in words, and one error for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from magneto_dist.errors import InputError, ReportedError


def name_ranks(ranks: Iterable[int]) -> str:
    """`rank 1`, `ranks 0, 2-5`: neighbours as a range, so that a line stays a line."""
    ordered = sorted(ranks)
    runs = [[r for _, r in run] for _, run in groupby(enumerate(ordered), lambda p: p[1] - p[0])]
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' * (len(ordered) > 1)} {', '.join(words)}"


def joint_error(messages: Sequence[str], *, is_main: bool) -> InputError | None:
    """What stops all ranks where any has met an error: the same line, said by the main process.

    Args:
        messages: of all ranks, "" where one has met none.
        is_main: whether this is the main process.

    Returns:
        The first message, with the ranks that met it unless all did; None: nobody met any.
    """
    message = next(filter(None, messages), "")
    if not message:
        return None
    ranks = [rank for rank, other in enumerate(messages) if other == message]
    if len(ranks) < len(messages):
        message = f"{name_ranks(ranks)} of {len(messages)}: {message}"
    return InputError(message) if is_main else ReportedError(message)
