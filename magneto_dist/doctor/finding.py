"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]
"""warn: training works, but slower or in fewer ways; fail: it will not work like this."""


@dataclass(frozen=True)
class Finding:
    """What was looked at, what is there, and what to do about it."""

    name: str
    state: State
    found: str
    fix: str = ""
    """Empty where there is nothing to do."""

    def __str__(self) -> str:
        fix = f"; {self.fix}" if self.fix else ""
        return f"{self.state:<5} {self.name:<10} {' '.join((self.found + fix).split())}"
