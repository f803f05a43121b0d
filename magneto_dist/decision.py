"""From which probability a tag is predicted: as a run says, or as `evaluate.py` has chosen it.

It goes with the model: from the JSON of `evaluate.py` to predict.py, and through `export.py` into
the exported folder, where `Predictor` and other runtimes find it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magneto_dist.errors import InputError

_LARGEST_EXPONENT = 700.0  # e to that is still a float


@dataclass(frozen=True)
class Decision:
    """How a model's final output is used.

    Raises:
        InputError: no probability, or no temperature above 0.
    """

    threshold: float
    """Probability from which a tag is predicted: the model's own, before any temperature."""
    temperature: float | None = None
    """What the log-odds are divided by, for probabilities that mean what they say (beyond the
    paper); None: 1. The threshold moves with it: the same tags are predicted."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise InputError(f"threshold {self.threshold}: is a probability, between 0 and 1")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise InputError(f"temperature {self.temperature}: is a number above 0")

    @property
    def calibrated_threshold(self) -> float:
        """The threshold for probabilities at the temperature."""
        if self.temperature is None or not 0 < self.threshold < 1:
            return self.threshold
        odds = math.log(self.threshold / (1 - self.threshold))
        return 1 / (1 + math.exp(min(-odds / self.temperature, _LARGEST_EXPONENT)))

    def as_json(self) -> dict[str, float | None]:
        """For results and exported models; `from_json` reads it."""
        return {
            "threshold": self.threshold,
            "temperature": self.temperature,
            "calibrated_threshold": self.calibrated_threshold,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Decision:
        """What `as_json` gave; others may have written it.

        Raises:
            KeyError, TypeError, ValueError: that is no decision.
            InputError: as above.
        """
        threshold, temperature = content["threshold"], content["temperature"]
        return cls(float(threshold), None if temperature is None else float(temperature))


def decision_of(
    threshold: float | str | None,
    default: Decision,
    checkpoint_sha256: str,
    *,
    warns: bool = True,
) -> Decision:
    """What `--threshold` says: a number, or results of `evaluate.py` (their "decision").

    A decision that was made for another checkpoint is taken with a warning.

    Args:
        threshold: as given; None: the default.
        default: the run's.
        checkpoint_sha256: of the run.
        warns: whether this process is the one, of all that read it, to say so.

    Raises:
        InputError: no probability, or no such file.
    """
    if threshold is None:
        return default
    if not isinstance(threshold, str):
        return Decision(float(threshold))
    path = Path(threshold)
    try:
        content = json.loads(path.read_bytes())["decision"]
        is_ours = content["checkpoint_sha256"] == checkpoint_sha256
        decision = Decision.from_json(content)
    except InputError as error:
        raise InputError(f"--threshold {path}: {error}") from None
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
    if warns and not is_ours:
        print(
            f"warning: {path} was written for another checkpoint than the one in use, whose"
            " probabilities may mean something else",
            file=sys.stderr,
        )
    return decision
