"""The report: every table and figure of a study, ours beside the paper's.

1. `build` makes blocks (text, tables, pictures) of the results.
2. `write` has them written as Markdown, HTML and pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, mode

from magneto_dist.data.inspect import Counts
from magneto_dist.files import write_atomically
from reproduce_blocks import Block, Heading, Picture, Table, as_html, as_markdown, pictures_of
from reproduce_grid import METRICS, Experiment, Printed, Study
from reproduce_plots import plot_distribution, plot_experiment
from reproduce_results import DOES_NOT, ONE_SEED, SHOWS, Results, Spread, Verdict, spread_of


@dataclass(frozen=True)
class ShownItem:
    """An item and what is predicted of it."""

    picture: Picture | None
    tags: Sequence[str]
    predicted: Sequence[str]
    important: Sequence[str]


@dataclass(frozen=True)
class Material:
    """All that the report tells."""

    study: Study
    title: str
    introduction: Sequence[str]
    experiments: Sequence[Experiment]
    results: Results
    verdicts: Sequence[Verdict]
    counts: Sequence[Counts]
    """Of each split; empty: no experiment shows them."""
    items: Sequence[ShownItem]
    commands: Mapping[str, str]
    """How each run was made, by run."""
    provenance: Mapping[str, object]


def build(material: Material) -> list[Block]:
    """The report's blocks, in order."""
    blocks: list[Block] = [Heading(material.title, 1), *material.introduction]
    if material.verdicts:
        blocks += _claims(material.study, material.verdicts)
    for experiment in material.experiments:
        blocks.append(Heading(f"{experiment.place.split(',')[0]}: {experiment.title}"))
        blocks += _section(experiment, material)
        if experiment.note:
            blocks.append(experiment.note)
    if material.results:
        blocks += _how(material)
    return [*blocks, *_made_by(material.provenance)]


def _claims(study: Study, verdicts: Sequence[Verdict]) -> list[Block]:
    count = sum(v.verdict == SHOWS for v in verdicts)
    rows = [
        [
            v.claim.text,
            v.verdict,
            v.difference.text(METRICS[v.claim.more[1]].digits),
            _side(study, v.claim.more, v.more),
            _side(study, v.claim.less, v.less),
            v.claim.place,
        ]
        for v in verdicts
    ]
    header = ["The paper claims", "here", "difference", "this", "is more than this", "where"]
    return [
        Heading(f"What shows: {count} of {len(verdicts)} claims"),
        "Mean ± standard deviation over the seeds; the difference is taken seed by seed."
        f" “{SHOWS}”: it is above zero by a paired t-test over the seeds (one-sided, 5 %)."
        f" “{DOES_NOT}”: it is not, or points the other way. With one seed there is no spread, and"
        f" a difference of the right sign is “{ONE_SEED}”.",
        Table(header, rows),
    ]


def _side(study: Study, side: tuple[str, str], spread: Spread) -> str:
    run, metric = side
    number = spread.text(METRICS[metric].digits)
    return f"{study.runs[run].title}: {METRICS[metric].heading} {number}"


def _section(experiment: Experiment, material: Material) -> list[Block]:
    if experiment.shows == "data":
        return _distribution(experiment, material.counts)
    if experiment.shows == "items":
        return _items(experiment, material)
    blocks: list[Block] = [_numbers(experiment, material)]
    figure = plot_experiment(experiment, material.results, material.study.runs)
    if figure:
        blocks.append(figure)
    if not experiment.paper:
        blocks.append("The paper prints no numbers for this figure: its claims are what compares.")
    return blocks


def _numbers(experiment: Experiment, material: Material) -> Table:
    """Ours, the paper's and the difference where the paper prints a number; else ours."""
    header = ["Model"]
    rows = [[material.study.runs[run].title] for run in experiment.runs]
    for metric in experiment.metrics:
        heading, digits = METRICS[metric].heading, METRICS[metric].digits
        printed = {r: n[metric] for r, n in experiment.paper.items() if metric in n}
        header += [heading, *(["paper", "difference"] if printed else [])]
        for row, run in zip(rows, experiment.runs, strict=True):
            ours = spread_of(material.results, run, metric)
            row.append(ours.text(digits) if ours else "–")
            if printed:
                row += _beside(ours, printed.get(run))
    return Table(header, rows)


def _beside(ours: Spread | None, paper: Printed | None) -> tuple[str, str]:
    """What the paper prints, and how far our mean is from it, or from the nearer end of it."""
    if paper is None:
        return "–", "–"
    least, most = paper if isinstance(paper, tuple) else (paper, paper)
    shown = f"{least:g}" if least == most else f"{least:g} to {most:g}"
    if ours is None:
        return shown, "–"
    if least < ours.mean < most:
        return shown, "within"
    return shown, f"{ours.mean - min(max(ours.mean, least), most):+.2f}"


def _distribution(experiment: Experiment, all_counts: Sequence[Counts]) -> list[Block]:
    tags = [count for counts in all_counts for count in counts.tags_per_item]
    ours = {
        "items": len(tags),
        "tags in the vocabulary": len(all_counts[0].dataset.vocabulary),
        "most tags of an item": max(tags),
        "most frequent number of tags": mode(tags),
        "mean number of tags": fmean(tags),
    }
    rows = []
    for name, value in ours.items():
        paper = experiment.data.get(name)
        digits = ",.2f" if isinstance(value, float) else ","
        beside = ("–", "–") if paper is None else (f"{paper:,}", f"{value - paper:+{digits}}")
        rows.append([name, f"{value:{digits}}", *beside])
    table = Table(["", "ours", "paper", "difference"], rows)
    return [table, plot_distribution(experiment, all_counts)]


def _items(experiment: Experiment, material: Material) -> list[Block]:
    header = ["Image", "Tags", "Prediction", "Ground truth"]
    ours = [
        [item.picture or "–", *map(", ".join, (item.tags, item.predicted, item.important))]
        for item in material.items
    ]
    paper = [["–", *(words.replace(" ", ", ") for words in row)] for row in experiment.items]
    return [
        f"Ours, {material.study.runs[experiment.runs[0]].title}, first seed. Items whose tags are"
        " those of a row of the paper come first, if there are any; the others are the first ones"
        " of the validation split.",
        Table(header, ours),
        "The paper's (it does not name its pictures):",
        Table(header, paper),
    ]


_HOW = {
    "f1": "Precision, recall and F1 are item-wise by the paper's protocol, at the evaluation with"
    " the best F1, on the split that it was chosen on (the paper speaks of no third one), so that"
    " all are a little too good.",
    "image_f1": "F1 of a stream: its own output, beside the gated one, at the same evaluation.",
    "f1_on_the_way": "“Mean over evaluations” is the mean F1 of all evaluations of a run: higher"
    " where it converges faster.",
    "alpha": "α is the weight of the picture in a tag, over all tags of the validation split; its"
    " unrest is the standard deviation of the mean α of the logged training batches in the first"
    " quarter of the steps.",
    "outlier": "Outlier % is the share of items to which tags were added of which at least one is"
    " predicted; the added tags of an item come from the run's seed, and are the same for all runs"
    " of a seed.",
}
"""By the metric that it is about."""


def _how(material: Material) -> list[Block]:
    runs, rows = material.study.runs, []
    for run, results in material.results.items():
        speed = fmean(float(str(r.summary["images_per_second"])) for r in results)
        wall = sum(float(str(r.summary["wall_s"])) for r in results)
        commits = ", ".join(sorted({str(r.summary["commit"]) for r in results}))
        steps = str(results[0].summary["step"])
        rows.append([runs[run].title, steps, f"{speed:.0f}", f"{wall:.0f}", commits])
    commands = [[runs[run].title, command] for run, command in material.commands.items()]
    told = {metric for experiment in material.experiments for metric in experiment.metrics}
    return [
        Heading("How the numbers are taken"),
        " ".join(text for metric, text in _HOW.items() if metric in told),
        Heading("Runs"),
        "The seconds of a run are those since it was last started; what was stopped before is not"
        " in them.",
        Table(["Run", "steps", "items/s", "s, all seeds", "commit"], rows),
        Table(["Run", "command, first seed"], commands),
    ]


def _made_by(provenance: Mapping[str, object]) -> list[Block]:
    made = {**provenance}
    versions = made["versions"]
    assert isinstance(versions, Mapping)
    made["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [Heading("Made by"), Table(["", ""], [[name, str(v)] for name, v in made.items()])]


def write(folder: Path, blocks: Sequence[Block], commands: Iterable[str]) -> None:
    """Writes `report.md`, the pictures that it names, and `report.html`, which holds them."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = {SHOWS: "yes", DOES_NOT: "no", **dict.fromkeys(commands, "code")}
    write_atomically(folder / "report.html", as_html(blocks, classes).encode())
    write_atomically(folder / "report.md", as_markdown(blocks).encode())
    for picture in pictures_of(blocks):
        write_atomically(folder / picture.name, picture.content)
