"""Train MAGNeto, and use what was trained: `from magneto_dist import Magneto, Predictor`.

Importing this package imports nothing else: the public names are looked up when they are used (PEP
562), for loader processes and launchers should not pay for what they do not need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magneto_dist.hub import Magneto
    from magneto_dist.predictor import Predictor

__all__ = ["Magneto", "Predictor"]
_MODULES = {"Magneto": "magneto_dist.hub", "Predictor": "magneto_dist.predictor"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'magneto_dist' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
