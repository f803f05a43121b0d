"""The command behind `reproduce_nus_wide.py` and `reproduce_ls.py`: a study, run and reported.

1. Options, and the smoke study's data and backbone where it is asked for.
2. Every run of the grid that is not done.
3. The report.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from command_line import at_least, folder_to_fill, parser
from harness import RESULTS, provenance, save
from magneto_dist.data.inspect import Counts, count
from magneto_dist.data.items import ShardItems
from magneto_dist.data.sample import Sample
from magneto_dist.data.shards import Dataset
from magneto_dist.errors import InputError
from magneto_dist.gallery import thumbnail
from magneto_dist.model.backbone import build_backbone
from reproduce_blocks import Picture
from reproduce_grid import Experiment, Study
from reproduce_report import Material, ShownItem, build, write
from reproduce_results import SHOWS, judge, predictions, read_result
from reproduce_runs import Job, Processes, Setup, jobs_of, run_all, runs_of, training_job
from reproduce_smoke import ITEMS, prepare_smoke

NUM_SHOWN = 6  # items with their predictions
_SETTING = re.compile(r"--[a-z]+\.\w+(=.*)?")


def reproduce(
    study: Study,
    description: str | None,
    argv: Sequence[str] | None = None,
    run: Callable[[Job, Path], int] | None = None,
) -> None:
    """Command line -> trained runs and the report.

    Args:
        study: what is run.
        description: for `--help`.
        argv: None: those of this process.
        run: how launchers are run; None: `Processes`.

    Raises:
        InputError: bad options or input, or a run that failed; one line.
    """
    given, extra = _options(study, description, argv)
    experiments = [study.experiments[name] for name in given.experiments]
    run, made_by = run or Processes(), provenance()
    setup = Setup(
        study=study,
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


def _options(
    study: Study, description: str | None, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    options = parser(description, timed=False)
    options.allow_abbrev = False
    options.add_argument("--data", help="data set: folder or URL with dataset.json")
    options.add_argument("--work", type=folder_to_fill, required=True, help="folder for runs; kept")
    options.add_argument("--smoke", action="store_true", help="small, on the demo data")
    options.add_argument(
        "--experiments",
        nargs="+",
        choices=list(study.experiments),
        default=list(study.experiments),
        metavar="NAME",
        help=f"of {', '.join(study.experiments)} (default: all)",
    )
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    options.add_argument(
        "--outliers", type=int, default=1, help="tags added to an item to fool it (default: 1)"
    )
    options.add_argument(
        "--smoke_items",
        type=at_least(4),
        default=ITEMS,
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
    for run in runs_of(setup.study, experiments):
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
        for run in runs_of(setup.study, experiments)
    }
    verdicts = [verdict for experiment in experiments for verdict in judge(experiment, results)]
    dataset = Dataset.open(str(setup.data))
    commands = {
        run.name: setup.shown(training_job(setup, run, setup.seeds[0]))
        for run in runs_of(setup.study, experiments)
    }
    told = {**made_by, "command": setup.without_folders(str(made_by["command"]))}
    material = Material(
        study=setup.study,
        title=_title(setup.study, given.smoke),
        introduction=_introduction(setup, dataset, given.smoke),
        experiments=experiments,
        results=results,
        verdicts=verdicts,
        counts=_counts(dataset, experiments),
        items=[i for e in experiments if e.shows == "items" for i in _items(setup, dataset, e)],
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


def _title(study: Study, smoke: bool) -> str:
    if smoke:
        return f"MAGNeto: the experiments on {study.title}, on generated pictures (smoke run)"
    return f"MAGNeto on {study.title}"


def _counts(dataset: Dataset, experiments: Sequence[Experiment]) -> list[Counts]:
    if not any(experiment.shows == "data" for experiment in experiments):
        return []
    return [count(dataset, split) for split in dataset.splits]


def _introduction(setup: Setup, dataset: Dataset, smoke: bool) -> list[str]:
    sizes = " and ".join(
        f"{dataset.num_samples(split):,} {split} items" for split in sorted(dataset.splits)
    )
    seeds = ("seed " if len(setup.seeds) == 1 else "seeds ") + ", ".join(map(str, setup.seeds))
    added = "1 tag" if setup.outliers == 1 else f"{setup.outliers} tags"
    what = f"{sizes}; {seeds}; {added} added to an item where outliers are counted."
    if not smoke:
        return [what]
    return [
        what,
        "A small run on generated pictures: it shows that all of it works, and which claims of the"
        " paper show here. Its numbers are not comparable with the paper's beside them; only their"
        " order is. The backbone that all runs start from was trained by launchers/train_ls.py on"
        f" {dataset.num_samples('train') * 8 // 5:,} other generated pictures, so that it knows"
        " what such pictures show, as one of ImageNet knows photographs.",
    ]


def _items(setup: Setup, dataset: Dataset, experiment: Experiment) -> list[ShownItem]:
    """Validation items with what the first seed of its run says of them."""
    lines = predictions(setup, experiment.runs[0], setup.seeds[0])
    wanted = [frozenset(tags.split()) for tags, _, _ in experiment.items]
    rank = [frozenset(line.get("tags", ())) not in wanted for line in lines]
    numbers = sorted(range(len(lines)), key=lambda number: (rank[number], number))[:NUM_SHOWN]
    samples = ShardItems(dataset, "validation", dataset.has_images).read(numbers)
    items = []
    for place, (number, sample) in enumerate(zip(numbers, samples, strict=True), start=1):
        if not isinstance(sample, Sample) or "error" in lines[number]:
            continue
        shown = sample.image and thumbnail(sample.image, 100.0)
        picture = Picture(f"{experiment.name}-{place}.jpg", shown, sample.key) if shown else None
        flags = sample.important or ()
        important = sorted(tag for tag, flag in zip(sample.tags, flags, strict=True) if flag)
        items.append(
            ShownItem(picture, sorted(sample.tags), sorted(lines[number]["predicted"]), important)
        )
    return items
