"""The user's own stages: named in the configuration, run in loader processes."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import cast

from magneto_dist.data.stream import Record, Stage
from magneto_dist.errors import InputError


@dataclass(frozen=True)
class NamedStage:
    """A `Stage` by its name; picklable, whatever stands behind the name.

    Args:
        name: `module:function`; the module is an installed one, or lies in the working folder.
    """

    name: str

    def __call__(self, records: Iterator[Record]) -> Iterator[Record]:
        """The records that the stage makes of `records`.

        Raises:
            InputError: the stage raised anything, or gave what is no sound record.
        """
        try:
            for record in self.function()(records):
                self._check(record)
                yield record
        except InputError:
            raise
        except Exception as error:
            *_, frame = traceback.extract_tb(error.__traceback__)
            raise InputError(
                f"--data.stages {self.name}: failed with {_told(error)}"
                f" ({frame.filename}, line {frame.lineno})"
            ) from None

    def function(self) -> Stage:
        """What the name means.

        Raises:
            InputError: no such module or function, or the module cannot be imported.
        """
        module, _, attribute = self.name.partition(":")
        folder = str(Path.cwd())
        if folder not in sys.path:
            sys.path.append(folder)  # last: a file there must not hide an installed package
        try:
            found = getattr(import_module(module), attribute, None)
        except Exception as error:
            raise InputError(
                f"--data.stages {self.name}: module {module!r} cannot be imported ({_told(error)});"
                f" it has to be an installed one, or lie in the working folder {folder}"
            ) from None
        if not callable(found):
            what = "has no" if found is None else "has no callable"
            raise InputError(f"--data.stages {self.name}: module {module!r} {what} {attribute!r}")
        return cast(Stage, found)

    def _check(self, record: object) -> None:
        """Nobody looks at tags once more after the stages."""
        if not isinstance(record, Record):
            raise InputError(
                f"--data.stages {self.name}: gave a {type(record).__name__}, not a Record"
            )
        tags, important = record.sample.tags, record.sample.important
        wrong = None
        if len(set(tags)) != len(tags):
            wrong = "with a tag twice"
        elif important is not None and len(important) != len(tags):
            wrong = f"with {len(tags)} tags but {len(important)} 'important' flags"
        if wrong is not None:
            raise InputError(f"--data.stages {self.name}: gave sample {record.sample.key} {wrong}")


def load_stages(names: Sequence[str]) -> tuple[Stage, ...]:
    """The stages of these names, in order, each found once before any process starts.

    Raises:
        InputError: see `NamedStage.function`.
    """
    stages = tuple(map(NamedStage, names))
    for stage in stages:
        stage.function()
    return stages


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
