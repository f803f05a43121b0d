"""Do two results of a benchmark differ by more than their own spread?

python benchmarks/compare.py results/A.json results/B.json

The rule, for each thing that both have measured: it differs where every round of one is faster than
every round of the other (their ranges do not overlap) and the medians are --least per cent or more
apart. Were both the same, n rounds each would lie like that once in (2n choose n) / 2 times: 10
times for 3 rounds, 126 for 5, 1,716 for 7. Fewer than 5 rounds tell nothing.

Exit code 0: nothing differs; 1: something does; 2: they cannot be compared.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_line import Parser, between
from magneto_dist.errors import InputError, exit_with_clear_errors

HARDWARE = ("cpu", "cores", "gpu")
LEAST_ROUNDS = 5
NEEDED = {"name", "per_s", "slowest_per_s", "fastest_per_s"}


@dataclass(frozen=True)
class Difference:
    """One measured thing in two results."""

    name: str
    before_per_s: float
    after_per_s: float
    verdict: str
    """faster, slower, same, or too few rounds."""

    @property
    def ratio(self) -> float:
        """Of the second's median to the first's."""
        return self.after_per_s / self.before_per_s


def main() -> None:
    """Command line -> table, one line that sums it up, exit code."""
    given = _parse()
    before, after = _read(given.before), _read(given.after)
    if not given.other_hardware:
        require_same_hardware(before, after)
    differences = compare_results(before, after, given.least / 100)
    if before.get("question") != after.get("question"):
        print(f"they answer {before.get('question')!r} and {after.get('question')!r}")
    width = max(len(difference.name) for difference in differences)
    for d in differences:
        numbers = f"{d.before_per_s:10.1f} {d.after_per_s:10.1f}  {d.ratio:6.3f}"
        print(f"{d.name:<{width}}  {numbers}  {d.verdict}")
    print(verdict(differences))
    sys.exit(any(difference.verdict in ("faster", "slower") for difference in differences))


def _parse() -> Namespace:
    options = Parser(__doc__)
    options.add_argument("before", type=Path, metavar="A.json")
    options.add_argument("after", type=Path, metavar="B.json")
    options.add_argument(
        "--least",
        type=between(0, 100),
        default=2.0,
        help="smallest difference, per cent (default: 2)",
    )
    options.add_argument(
        "--other_hardware", action="store_true", help="compare although the machines differ"
    )
    return options.parse_args()


def _read(path: Path) -> dict[str, Any]:
    """A result of the harness.

    Raises:
        InputError: there is none, or it holds no timings.
    """
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no result can be read ({error})") from None
    timings = result.get("timings") if isinstance(result, dict) else None
    if not timings or not all(isinstance(t, dict) and t.keys() >= NEEDED for t in timings):
        raise InputError(f"{path}: no timings in it; take what a benchmark wrote with --out")
    return result


def require_same_hardware(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Refuses two machines.

    Raises:
        InputError: their processors, cores or GPUs differ.
    """
    for name in HARDWARE:
        if before.get(name) != after.get(name):
            raise InputError(
                f"{name} {before.get(name)!r} and {after.get(name)!r}: results of different"
                " hardware say nothing of the code; --other_hardware compares them all the same"
            )


def compare_results(
    before: Mapping[str, Any], after: Mapping[str, Any], least: float
) -> list[Difference]:
    """What both have measured, in the order of the first.

    Args:
        before: a result.
        after: another one.
        least: smallest difference of the medians, as a fraction.

    Raises:
        InputError: they have measured nothing in common.
    """
    others = {timing["name"]: timing for timing in after["timings"]}
    differences = [
        Difference(
            timing["name"],
            timing["per_s"],
            others[timing["name"]]["per_s"],
            _verdict(timing, others[timing["name"]], least),
        )
        for timing in before["timings"]
        if timing["name"] in others
    ]
    if not differences:
        raise InputError("these results have measured nothing in common")
    return differences


def _verdict(before: Mapping[str, Any], after: Mapping[str, Any], least: float) -> str:
    # Results from before rounds were kept say nothing of their number; the default was 7.
    rounds = [len(timing.get("rounds_per_s") or ()) for timing in (before, after)]
    if any(0 < number < LEAST_ROUNDS for number in rounds):
        return "too few rounds"
    if abs(after["per_s"] / before["per_s"] - 1) < least:
        return "same"
    if after["slowest_per_s"] > before["fastest_per_s"]:
        return "faster"
    return "slower" if after["fastest_per_s"] < before["slowest_per_s"] else "same"


def verdict(differences: list[Difference]) -> str:
    """All of it in one line."""
    parts = []
    for kind in ("slower", "faster", "too few rounds"):
        found = [f"{d.name} ({d.ratio:.2f})" for d in differences if d.verdict == kind]
        if found:
            parts.append(f"{kind}: {', '.join(found)}")
    return "; ".join(parts) or f"no difference beyond the spread in {len(differences)} measured"


if __name__ == "__main__":
    exit_with_clear_errors(main)
