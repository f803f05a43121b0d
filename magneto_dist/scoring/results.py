"""All figures of a split that was scored, as JSON: fractions of 1 unless a name says otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from magneto_dist.errors import InputError
from magneto_dist.files import write_atomically
from magneto_dist.scoring import bootstrap, calibration
from magneto_dist.scoring.split import SplitScores


def results(scored: SplitScores) -> dict[str, Any]:
    """The figures and where they come from.

    Under the name of the split are metrics as in `summary.json`; "baselines" has the same of those.
    "comparison" sets heads and baselines beside each other; "thresholds" is the sweep of the main
    head; "decision" is what `--threshold FILE.json` reads.
    """
    scores, threshold = scored.scores, scored.threshold
    metrics, of_baselines = scores.metrics(threshold)
    return {
        **scored.origin,
        scored.origin["split"]: metrics,
        "baselines": of_baselines,
        "comparison": {
            scorer.split("/")[1]: _compared(scored, scorer) for scorer in scores.scorers
        },
        "intervals": {
            "kind": "Poisson bootstrap over items, percentiles; at a fixed threshold",
            "confidence": bootstrap.CONFIDENCE,
        },
        "decision": {
            "checkpoint_sha256": scored.checkpoint_sha256,
            **scored.decision.as_json(),
            "chosen": list(scored.chosen),
            "chosen_on": scored.chosen_on,
        },
        "thresholds": _thresholds(scored),
        "calibration": _calibration(scored),
    }


def write_results(path: Path, content: dict[str, Any]) -> None:
    """Replaces the JSON file `path`.

    Raises:
        InputError: it cannot be written.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _compared(scored: SplitScores, scorer: str) -> dict[str, Any]:
    scores, threshold = scored.scores, scored.threshold
    sweep, best = scores.sweep(scorer), scores.best(scorer)
    kind, name = scorer.split("/")
    compared: dict[str, Any] = {
        "kind": kind.removesuffix("s"),
        **{name: float(values[threshold]) for name, values in sweep.items()},
        "best": {"threshold": float(scores.thresholds[best]), "f1": float(sweep["f1"][best])},
        "intervals": scores.intervals(scorer, threshold),
    }
    if kind == "heads":
        concepts, odds = scores.concepts(name), scores.odds(name)
        compared |= {f"macro_{key}": value for key, value in concepts.macro(threshold).items()}
        compared["mean_average_precision"] = concepts.mean_average_precision
        compared["mean_average_precision_by_chance"] = concepts.chance
        compared["micro_average_precision"] = calibration.micro_average_precision(
            odds, scores.targets_cut
        )
        compared["expected_calibration_error"] = calibration.expected_calibration_error(
            calibration.reliability(odds)
        )
    return compared


def _thresholds(scored: SplitScores) -> dict[str, Any]:
    scores = scored.scores
    sweep, concepts = scores.sweep(scores.main), scores.concepts(scores.heads[0])
    best = scores.best(scores.main)
    rows = [
        {
            "threshold": float(threshold),
            **{name: float(values[number]) for name, values in sweep.items()},
            "macro_f1": concepts.macro(number)["f1"],
        }
        for number, threshold in enumerate(scores.thresholds)
    ]
    return {
        "head": scores.heads[0],
        "criterion": "highest F1 per item, the same in both protocols",
        "best_on_these_items": {"threshold": rows[best]["threshold"], "f1": rows[best]["f1"]},
        "sweep": rows,
    }


def _calibration(scored: SplitScores) -> dict[str, Any]:
    odds, temperature = scored.scores.odds(scored.scores.heads[0]), scored.decision.temperature
    before = calibration.reliability(odds)
    result: dict[str, Any] = {
        "head": scored.scores.heads[0],
        "binning": f"{calibration.NUM_BINS} bins of equal width in probability, over all tags",
        "expected_calibration_error": calibration.expected_calibration_error(before),
        "negative_log_likelihood": calibration.negative_log_likelihood(odds),
        "reliability": _rows(before),
    }
    if temperature is not None:
        after = calibration.reliability(odds, temperature)
        result["at_temperature"] = {
            "temperature": temperature,
            "expected_calibration_error": calibration.expected_calibration_error(after),
            "negative_log_likelihood": calibration.negative_log_likelihood(odds, temperature),
            "reliability": _rows(after),
        }
    return result


def _rows(binned: calibration.Reliability) -> list[dict[str, float]]:
    return [
        {"tags": int(tags), "probability": probability, "important": important}
        for tags, probability, important in zip(
            binned.tags.tolist(),
            binned.probability.tolist(),
            binned.important.tolist(),
            strict=True,
        )
        if tags
    ]
