"""The paper's experiments on NUS-WIDE, reproduced: one report, ours beside the paper's numbers.

python benchmarks/reproduce_nus_wide.py --data DIR --work FOLDER
python benchmarks/reproduce_nus_wide.py --data DIR --work FOLDER --experiments table2 figure3
python benchmarks/reproduce_nus_wide.py --smoke --work FOLDER          # minutes, on the demo data

DIR is what `launchers/shards.py build nus-wide` has made. Runs lie in FOLDER/runs; what is done is
not done again, and what was stopped goes on when the same command is started again. The report,
Markdown and one page of HTML, comes to FOLDER/report, with --out to benchmarks/results/OUT.

Options of the form --section.field VALUE go to every training run, where they do not contradict
what the run is: --train.epochs 60, --data.decoder dali_gpu, --model.backbone_weights resnet18.pth.

--smoke trains everything on generated pictures, with a backbone that train_ls.py has trained on
other generated pictures before (by the same options, but for the model's). Numbers are then not
those of the paper; what can be seen is which of its claims show.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from harness import RESULTS, parser, provenance, save
from magneto_dist.data.inspect import count
from magneto_dist.data.items import ShardItems
from magneto_dist.data.sample import Sample
from magneto_dist.data.shards import Dataset
from magneto_dist.errors import InputError, exit_with_clear_errors
from magneto_dist.gallery import thumbnail
from magneto_dist.model.backbone import build_backbone
from reproduce_blocks import Picture
from reproduce_grid import (
    EXPERIMENTS,
    SMOKE_ITEMS,
    TABLE4,
    Experiment,
)
from reproduce_report import Material, ShownItem, build, write
from reproduce_results import SHOWS, judge, predictions, read_result
from reproduce_runs import Job, Processes, Setup, jobs_of, run_all, runs_of, training_job
from reproduce_smoke import prepare_smoke

NUM_SHOWN = 6  # items in Table 4
_SETTING = re.compile(r"--[a-z]+\.\w+(=.*)?")


def main(argv: Sequence[str] | None = None, run: Callable[[Job, Path], int] | None = None) -> None:
    """Command line -> trained runs and the report.

    Args:
        argv: None: those of this process.
        run: how launchers are run; None: `Processes`.

    Raises:
        InputError: bad options or input, or a run that failed; one line.
    """
    given, extra = _options(argv)
    experiments = [EXPERIMENTS[name] for name in given.experiments]
    run, made_by = run or Processes(), provenance()
    setup = Setup(
        work=given.work.absolute(),
        data=given.data if "://" in (given.data or "") else Path(given.data or "").absolute(),
        settings={},
        extra=tuple(extra),
        seeds=tuple(given.seeds),
        outliers=given.outliers,
    )
    if given.smoke:
        setup = prepare_smoke(setup, given.smoke_items, run, made_by)
    _refuse_blind_backbones(setup, experiments)
    run_all(jobs_of(setup, experiments), run, setup.work, made_by)
    _report(setup, experiments, given, made_by)


def _options(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    options = parser(__doc__, timed=False)
    options.allow_abbrev = False
    options.add_argument("--data", help="data set: folder or URL with dataset.json")
    options.add_argument("--work", type=Path, required=True, help="folder for runs; kept")
    options.add_argument("--smoke", action="store_true", help="small, on the demo data")
    options.add_argument(
        "--experiments",
        nargs="+",
        choices=list(EXPERIMENTS),
        default=list(EXPERIMENTS),
        metavar="NAME",
        help=f"of {', '.join(EXPERIMENTS)} (default: all)",
    )
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    options.add_argument(
        "--outliers", type=int, default=1, help="tags added to an item for Table 3 (default: 1)"
    )
    options.add_argument(
        "--smoke_items",
        type=int,
        default=SMOKE_ITEMS,
        help="to train on in --smoke (default: %(default)s; the backbone: 8/5 as many)",
    )
    given, extra = options.parse_known_args(argv)
    if bool(given.data) == given.smoke:
        raise InputError("one of --data DIR and --smoke is needed, and not both")
    if len(set(given.seeds)) < len(given.seeds) or min(given.seeds) < 0 or given.outliers < 1:
        raise InputError("--seeds must be different and at least 0, --outliers at least 1")
    return given, list(_settings(extra))


def _settings(words: Sequence[str]) -> Iterator[str]:
    """`--section.field=VALUE` of each pair of words or word of this form."""
    left = iter(words)
    for word in left:
        if not _SETTING.fullmatch(word):
            raise InputError(f"unknown option {word}; see --help")
        yield word if "=" in word else f"{word}={next(left, '')}"


def _refuse_blind_backbones(setup: Setup, experiments: Sequence[Experiment]) -> None:
    """A frozen backbone needs weights that have seen something, and they must be there."""
    waiting = []
    for run in runs_of(experiments):
        model = setup.config(run, setup.seeds[0]).model
        if not model.sees_pictures:
            continue
        if model.backbone_weights == "none" and model.frozen_stages != 0:
            raise InputError(
                "--model.backbone_weights none: a frozen backbone of random weights sees nothing,"
                " and proves nothing; give imagenet or the path of a state_dict"
            )
        if not all(training_job(setup, run, seed).is_done() for seed in setup.seeds):
            waiting.append(model)
    if waiting:
        build_backbone(waiting[0])


# The report -------------------------------------------------------------------------------------


def _report(
    setup: Setup, experiments: Sequence[Experiment], given: argparse.Namespace, made_by: dict
) -> None:
    results = {
        run.name: [read_result(setup, run.name, seed) for seed in setup.seeds]
        for run in runs_of(experiments)
    }
    verdicts = [verdict for experiment in experiments for verdict in judge(experiment, results)]
    wanted = {experiment.name for experiment in experiments}
    dataset = Dataset.open(str(setup.data))
    commands = {
        run.name: setup.shown(training_job(setup, run, setup.seeds[0]))
        for run in runs_of(experiments)
    }
    told = {**made_by, "command": setup.without_folders(str(made_by["command"]))}
    material = Material(
        title="MAGNeto on " + ("generated pictures (smoke run)" if given.smoke else "NUS-WIDE"),
        introduction=_introduction(setup, dataset, given.smoke),
        experiments=experiments,
        results=results,
        verdicts=verdicts,
        counts=[count(dataset, s) for s in dataset.splits] if "figure5" in wanted else [],
        items=_shown_items(setup, dataset) if "table4" in wanted else [],
        commands=commands,
        provenance=told,
    )
    folder = RESULTS / given.out if given.out else setup.work / "report"
    write(folder, build(material), commands.values())
    numbers = {
        "question": "which of the paper's claims show, over these seeds?",
        **told,
        "seeds": setup.seeds,
        "outliers": setup.outliers,
        "claims": [asdict(verdict) for verdict in verdicts],
        "runs": {
            name: [
                {"seed": seed, **r.numbers, "made_by": r.summary}
                for seed, r in zip(setup.seeds, of_run, strict=True)
            ]
            for name, of_run in results.items()
        },
    }
    save("report", numbers, folder)
    for verdict in verdicts:
        print(f"{verdict.verdict:<20} {verdict.claim.text}")
    shown = sum(verdict.verdict == SHOWS for verdict in verdicts)
    print(f"{shown} of {len(verdicts)} claims show; report: {folder / 'report.html'}")


def _introduction(setup: Setup, dataset: Dataset, smoke: bool) -> list[str]:
    sizes = " and ".join(
        f"{dataset.num_samples(split):,} {split} items" for split in sorted(dataset.splits)
    )
    seeds = ", ".join(map(str, setup.seeds))
    added = "1 tag" if setup.outliers == 1 else f"{setup.outliers} tags"
    what = f"{sizes}; seeds {seeds}; {added} added to an item for Table 3."
    if not smoke:
        return [what]
    return [
        what,
        "A small run on generated pictures: it shows that all of it works, and which claims of the"
        " paper show here. Its numbers are not comparable with the paper's beside them; only their"
        " order is. The frozen backbone was trained by launchers/train_ls.py on"
        f" {dataset.num_samples('train') * 8 // 5:,} other generated pictures, so that it knows"
        " what such pictures show, as one of ImageNet knows photographs.",
    ]


def _shown_items(setup: Setup, dataset: Dataset) -> list[ShownItem]:
    """Validation items with what the first seed's MAGNeto aux says of them."""
    lines = predictions(setup, "magneto-aux", setup.seeds[0])
    wanted = [frozenset(tags.split()) for tags, _, _ in TABLE4]
    rank = [frozenset(line.get("tags", ())) not in wanted for line in lines]
    numbers = sorted(range(len(lines)), key=lambda number: (rank[number], number))[:NUM_SHOWN]
    samples = ShardItems(dataset, "validation", dataset.has_images).read(numbers)
    items = []
    for place, (number, sample) in enumerate(zip(numbers, samples, strict=True), start=1):
        if not isinstance(sample, Sample) or "error" in lines[number]:
            continue
        shown = sample.image and thumbnail(sample.image, 100.0)
        picture = Picture(f"table4-{place}.jpg", shown, sample.key) if shown else None
        flags = sample.important or ()
        important = sorted(tag for tag, flag in zip(sample.tags, flags, strict=True) if flag)
        items.append(
            ShownItem(picture, sorted(sample.tags), sorted(lines[number]["predicted"]), important)
        )
    return items


if __name__ == "__main__":
    exit_with_clear_errors(main)
