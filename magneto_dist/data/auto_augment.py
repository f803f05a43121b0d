"""AutoAugment's ImageNet policy: which operations may follow each other, how often, how strong.

The table is that of Cubuk et al., AutoAugment: Learning Augmentation Policies from Data (2019),
with the magnitudes of torchvision, which a test compares it with. It stands here because importing
torchvision takes longer, and more memory, than all else that a loader process needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

_LARGEST_BIN = 9  # magnitudes are given as bins from 0 on


class Operation(NamedTuple):
    """One operation of a pair; see `Augmentation.operations` for the units of magnitudes."""

    name: str
    probability: float
    magnitude: float
    """0 where an operation has none."""
    signed: bool
    """Applied with either sign."""

    def with_sign(self, negative: bool) -> float:
        """The magnitude; of a signed operation, negated where `negative`."""
        return -self.magnitude if self.signed and negative else self.magnitude


_SIGNED = {"ShearX", "Rotate", "Color", "Contrast", "Sharpness"}
_MAGNITUDES: dict[str, Callable[[int], float]] = {
    "ShearX": lambda bin_: 0.3 * bin_ / _LARGEST_BIN,
    "Rotate": lambda bin_: 30 * bin_ / _LARGEST_BIN,
    "Color": lambda bin_: 0.9 * bin_ / _LARGEST_BIN,
    "Contrast": lambda bin_: 0.9 * bin_ / _LARGEST_BIN,
    "Sharpness": lambda bin_: 0.9 * bin_ / _LARGEST_BIN,
    "Posterize": lambda bin_: float(8 - round(4 * bin_ / _LARGEST_BIN)),
    "Solarize": lambda bin_: 255 * (1 - bin_ / _LARGEST_BIN),
}
# Two operations a line, each a name, the probability that it is applied, and its bin.
_TABLE = """
    Posterize 0.4 8     Rotate 0.6 9
    Solarize 0.6 5      AutoContrast 0.6 -
    Equalize 0.8 -      Equalize 0.6 -
    Posterize 0.6 7     Posterize 0.6 6
    Equalize 0.4 -      Solarize 0.2 4
    Equalize 0.4 -      Rotate 0.8 8
    Solarize 0.6 3      Equalize 0.6 -
    Posterize 0.8 5     Equalize 1.0 -
    Rotate 0.2 3        Solarize 0.6 8
    Equalize 0.6 -      Posterize 0.4 6
    Rotate 0.8 8        Color 0.4 0
    Rotate 0.4 9        Equalize 0.6 -
    Equalize 0.0 -      Equalize 0.8 -
    Invert 0.6 -        Equalize 1.0 -
    Color 0.6 4         Contrast 1.0 8
    Rotate 0.8 8        Color 1.0 2
    Color 0.8 8         Solarize 0.8 7
    Sharpness 0.4 7     Invert 0.6 -
    ShearX 0.6 5        Equalize 1.0 -
    Color 0.4 0         Equalize 0.6 -
    Equalize 0.4 -      Solarize 0.2 4
    Solarize 0.6 5      AutoContrast 0.6 -
    Invert 0.6 -        Equalize 1.0 -
    Color 0.6 4         Contrast 1.0 8
    Equalize 0.8 -      Equalize 0.6 -
"""


def _operation(name: str, probability: str, bin_: str) -> Operation:
    magnitude = 0.0 if bin_ == "-" else _MAGNITUDES[name](int(bin_))
    return Operation(name, float(probability), magnitude, name in _SIGNED)


def _pair(words: Sequence[str]) -> tuple[Operation, Operation]:
    return _operation(*words[:3]), _operation(*words[3:])


IMAGENET_POLICY = tuple(_pair(line.split()) for line in _TABLE.strip().splitlines())
"""The 25 pairs of operations; a picture gets one of them, all equally likely."""


def imagenet_operations(
    draws: Float64[np.ndarray, "batch 5"],
) -> list[tuple[tuple[str, float], ...]]:
    """Names and signed magnitudes of the operations of each sample, in the order of application.

    Args:
        draws: uniform in [0, 1): which pair; whether its first and second are applied; their signs.
    """
    pair = (draws[:, :1] * len(IMAGENET_POLICY)).astype(np.int64)
    applied = draws[:, 1:3] < _PROBABILITIES[pair[:, 0]]
    outcome = np.concatenate([pair, applied, draws[:, 3:5] < 0.5], axis=1) @ (16, 8, 4, 2, 1)
    return [_OUTCOMES[number] for number in outcome.tolist()]


def _outcome(
    pair: Sequence[Operation], applied: Sequence[bool], negated: Sequence[bool]
) -> tuple[tuple[str, float], ...]:
    return tuple(
        (operation.name, operation.with_sign(minus))
        for operation, is_applied, minus in zip(pair, applied, negated, strict=True)
        if is_applied
    )


_YES_NO = tuple(product((False, True), repeat=2))
_OUTCOMES = [_outcome(*case) for case in product(IMAGENET_POLICY, _YES_NO, _YES_NO)]
_PROBABILITIES = np.array([[one.probability for one in pair] for pair in IMAGENET_POLICY])
