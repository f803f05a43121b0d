"""The result of `throughput.py` for people: a card in plain text, a page, a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import in_figures
from throughput_rules import Measured, ceiling, diagnose

ALONE = 0.90  # of the time on a core, below which other processes disturb what is measured


def summary(measured: Measured) -> dict[str, Any]:
    """What the card says, as plain values."""
    found = measured.found
    most, made_of = ceiling(measured)
    bottleneck, because, settings = diagnose(measured)
    achieved = found["flop_per_image"] * measured.rate("whole") / found["ranks"]
    published = found["published_flop_per_s"]
    return {
        "images_per_s": measured.rate("whole"),
        "ceiling_images_per_s": most,
        "ceiling_is": made_of,
        "of_ceiling": measured.rate("whole") / most,
        "of_data_already_there": measured.rate("whole") / measured.rate("step"),
        "data_wait": found["data_wait"],
        "flop_per_s_per_rank": achieved,
        "of_matrix_product": achieved / found["matrix_product_flop_per_s"],
        "model_flop_utilisation": achieved / published if published else None,
        "bottleneck": bottleneck,
        "because": because,
        "try": list(settings),
    }


def card(measured: Measured, said: Mapping[str, Any], title: str) -> str:
    """The card in plain text."""
    found = measured.found
    lines = [title, "=" * len(title), _header(measured), ""]
    lines += [f"{'stage':<18}{'images/s':>10}  {'slowest - fastest':<20}{'core-ms':>8}"]
    for timing in found["timings"]:
        per_s, slowest, fastest = _rates(timing)
        core_ms = measured.core_ms(timing["name"])
        lines.append(
            f"{timing['name']:<18}{per_s:>10}  {slowest + ' - ' + fastest:<20}{core_ms:>8.2f}"
        )
    memory = ", ".join(f"{name} {value:.2f} GB" for name, value in found["peak_memory_gb"].items())
    lines += ["", *_said(said), f"peak memory      {memory}", ""]
    lines += _warning(measured)
    lines += [f"bottleneck       {said['bottleneck']}: {said['because']}"]
    lines += [f"try              {setting}" for setting in said["try"]]
    return "\n".join(lines)


def markdown(measured: Measured, said: Mapping[str, Any], title: str, picture: str) -> str:
    """The card as a page."""
    found = measured.found
    rows = []
    for timing in found["timings"]:
        per_s, slowest, fastest = _rates(timing)
        core_ms = measured.core_ms(timing["name"])
        rows.append(f"| {timing['name']} | {per_s} | {slowest} - {fastest} | {core_ms:.2f} |")
    memory = ", ".join(f"{name} {value:.2f} GB" for name, value in found["peak_memory_gb"].items())
    return "\n".join(
        [
            f"# {title}",
            "",
            _header(measured),
            "",
            "| stage | images/s | slowest - fastest round | core-ms an image |",
            "|---|---|---|---|",
            *rows,
            "",
            *(
                f"- {' '.join(line.split())}"
                for line in (*_said(said), f"peak memory {memory}", *_warning(measured))
            ),
            "",
            f"**Bottleneck: {said['bottleneck']}** ({said['because']}). Try:",
            "",
            *(f"- {setting}" for setting in said["try"]),
            "",
            f"![Stages]({picture})",
            "",
        ]
    )


def _rates(timing: Mapping[str, Any]) -> list[str]:
    """Median, slowest and fastest round."""
    return [in_figures(timing[name]) for name in ("per_s", "slowest_per_s", "fastest_per_s")]


def _header(measured: Measured) -> str:
    found = measured.found
    return (
        f"{found['ranks']} process(es) on {found['device']}, {measured.cores} cores,"
        f" {found['threads_per_rank']} thread(s) and {found['loader_processes_per_rank']} loader"
        f" process(es) each, decoder {found['decoder']}, {found['arithmetic']}, batch"
        f" {found['global_batch_size']}, {found['image_size']} px, policy {found['policy']}"
    )


def _warning(measured: Measured) -> list[str]:
    got = measured.found["cores_got"]
    if got is None or got >= ALONE:
        return []
    return [
        f"warning          this process had a core for {got:.0%} of the time it wanted one:"
        " something else runs on this machine; do not trust images/s"
    ]


def _said(said: Mapping[str, Any]) -> list[str]:
    utilisation = said["model_flop_utilisation"]
    of_peak = "" if utilisation is None else f", {utilisation:.1%} of the data sheet's"
    return [
        f"whole step       {in_figures(said['images_per_s'])} images/s, {said['of_ceiling']:.0%} of"
        f" the ceiling of {in_figures(said['ceiling_images_per_s'])} ({said['ceiling_is']})",
        f"data             {said['of_data_already_there']:.0%} of the speed with data already"
        f" there, {said['data_wait']:.0%} of the time waiting for it",
        f"arithmetic       {said['flop_per_s_per_rank'] / 1e9:,.1f} GFLOP/s a rank,"
        f" {said['of_matrix_product']:.0%} of a large matrix product here{of_peak}",
    ]


def plot(measured: Measured, said: Mapping[str, Any], path: Path) -> None:
    """Bars of images/s by stage with their spread; lines for the whole and for the ceiling."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    timings = measured.found["timings"][::-1]
    rates = [t["per_s"] for t in timings]
    spread = [[t["per_s"] - t["slowest_per_s"] for t in timings],
              [t["fastest_per_s"] - t["per_s"] for t in timings]]  # fmt: skip
    figure, axes = plt.subplots(figsize=(7, 0.5 * len(timings) + 1.5), layout="constrained")
    colours = ["C1" if t["name"] == said["bottleneck"] else "C0" for t in timings]
    axes.barh([t["name"] for t in timings], rates, xerr=spread, color=colours, capsize=3)
    axes.axvline(said["images_per_s"], color="black", label="whole step")
    axes.axvline(said["ceiling_images_per_s"], color="black", linestyle="--", label="ceiling")
    axes.set_xscale("log")
    axes.set_xlabel("images/s, over all ranks")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
