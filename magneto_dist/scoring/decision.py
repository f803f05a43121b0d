"""From which probability a tag is predicted, chosen by `evaluate.py` and handed on in its JSON."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magneto_dist.errors import InputError

_LARGEST_EXPONENT = 700.0  # e to that is still a float


@dataclass(frozen=True)
class Decision:
    """How a model's final output is used."""

    threshold: float
    """Probability from which a tag is predicted: the model's own, before any temperature."""
    temperature: float | None = None
    """What the log-odds are divided by, for probabilities that mean what they say (beyond the
    paper); None: 1. The threshold moves with it: the same tags are predicted."""

    @property
    def calibrated_threshold(self) -> float:
        """The threshold for probabilities at the temperature."""
        if self.temperature is None or not 0 < self.threshold < 1:
            return self.threshold
        odds = math.log(self.threshold / (1 - self.threshold))
        return 1 / (1 + math.exp(min(-odds / self.temperature, _LARGEST_EXPONENT)))

    def as_json(self, checkpoint_sha256: str) -> dict[str, Any]:
        """For the results; `decision_of` reads it."""
        return {
            "checkpoint_sha256": checkpoint_sha256,
            "threshold": self.threshold,
            "temperature": self.temperature,
            "calibrated_threshold": self.calibrated_threshold,
        }


def decision_of(threshold: float | str | None, default: float, checkpoint_sha256: str) -> Decision:
    """What `--threshold` says: a number, or results of `evaluate.py` (their "decision").

    A decision that was made for another checkpoint is taken with a warning.

    Args:
        threshold: as given; None: the default.
        default: the run's.
        checkpoint_sha256: of the run.

    Raises:
        InputError: no probability, or no such file.
    """
    if threshold is None:
        return Decision(default)
    if isinstance(threshold, str):
        return _read(Path(threshold), checkpoint_sha256)
    _require_probability(threshold, "--threshold")
    return Decision(float(threshold))


def _read(path: Path, checkpoint_sha256: str) -> Decision:
    try:
        content = json.loads(path.read_bytes())["decision"]
        threshold, temperature = content["threshold"], content["temperature"]
        is_ours = content["checkpoint_sha256"] == checkpoint_sha256
        decision = Decision(float(threshold), None if temperature is None else float(temperature))
    except OSError as error:
        raise InputError(
            f"--threshold {path}: {error.strerror}; give a probability in [0, 1], or the JSON that"
            " evaluate.py wrote with --out"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"--threshold {path}: holds no decision; write it with evaluate.py --threshold best"
            f" --out {path.name}"
        ) from None
    _require_probability(decision.threshold, f"--threshold {path}:")
    if temperature is not None and not 0 < float(temperature) < math.inf:
        raise InputError(f"--threshold {path}: temperature {temperature} is not above 0")
    if not is_ours:
        print(
            f"warning: {path} was written for another checkpoint than the one in use, whose"
            " probabilities may mean something else",
            file=sys.stderr,
        )
    return decision


def _require_probability(value: float, where: str) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{where} {value}: a threshold is a probability, between 0 and 1")
