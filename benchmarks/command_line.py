"""Options of benchmarks: what is wrong with one is told in one line, before anything is measured.

Commands end by `exit_with_clear_errors(main)`, which prints that line.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from magneto_dist.errors import InputError


class Parser(argparse.ArgumentParser):
    """As argparse's, but a wrong option raises InputError, and usage is left to --help."""

    def __init__(self, doc: str | None) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Whatever argparse finds wrong comes here."""
        raise InputError(f"{message}; see --help")


def parser(doc: str | None, *, timed: bool = True, rounds: int = 7) -> Parser:
    """The options that most benchmarks have; `--rounds` those that take times."""
    made = Parser(doc)
    if timed:
        said = f"timed calls of each (default: {rounds})"
        made.add_argument("--rounds", type=at_least(1), default=rounds, help=said)
    made.add_argument("--out", help="write benchmarks/results/OUT.json (default: only print)")
    return made


def at_least(least: int) -> Callable[[str], int]:
    """The type of a whole number that may not be less."""

    def whole_number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return whole_number


def between(least: float, most: float) -> Callable[[str], float]:
    """The type of a number within bounds."""

    def number(text: str) -> float:
        if not least <= float(text) <= most:  # nor is nan
            raise argparse.ArgumentTypeError(f"{text} is not between {least:g} and {most:g}")
        return float(text)

    return number


def above_zero(text: str) -> float:
    """The type of a number that is finite and above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return float(text)


def folder_of_jpegs(text: str) -> Path:
    """The type of a folder with *.jpg."""
    if not any(Path(text).glob("*.jpg")):
        raise argparse.ArgumentTypeError(f"{text}: no *.jpg there; give a folder of photographs")
    return Path(text)


def folder_to_fill(text: str) -> Path:
    """The type of a folder that is written into; it is made, so that what forbids it shows now."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None
    return Path(text)
