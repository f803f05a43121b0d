"""The paper's large-scale experiments: the grid is the paper's, the report says what runs say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

import reproduce_ls
from grid_launches import Launches
from magneto_dist.config_io import load_config
from magneto_dist.data.sources import demo
from magneto_dist.errors import InputError
from processes import TINY
from reproduce_ls_grid import LS
from reproduce_plots import plot_experiment
from reproduce_report import _beside
from reproduce_results import Spread
from reproduce_runs import ROOT, Setup, jobs_of

TINY_GRID = [*TINY, "--model.backbone=squeezenet1_1", "--train.epochs=2"]

# kind of loss, TAD; from the paper, not from the grid
EXPECTED = {
    "magneto-aux": ("bce-dice", 0.3),
    "magneto-aux-bce": ("bce", 0.3),
    "magneto-aux-no-tad": ("bce-dice", 0.0),
}


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(LS, tmp_path / "work", tmp_path / "data", {}, (), seeds=(0, 1), outliers=1)


def test_grid_is_what_the_paper_has(setup):
    configs = {run.name: setup.config(run, 0) for run in LS.all_runs}
    assert configs.keys() == EXPECTED.keys()
    for name, config in configs.items():
        loss, beta = EXPECTED[name]
        assert config.loss.kind == loss
        assert (config.tags.beta_add, config.tags.beta_drop) == (beta, beta)
        assert config.loss.auxiliary
        appendix = (config.augment.image_size, config.train.global_batch_size, config.tags.max_tags)
        assert appendix == (224, 256, 64)
        sizes = (config.model.image_layers, config.model.tag_layers, config.model.d_model)
        assert sizes == (2, 6, 512)
        assert (config.model.backbone, config.model.frozen_stages) == ("resnet50", 4)
        assert (config.optim.lr, config.optim.schedule) == (0.03, "plateau")
    experiments = LS.experiments
    assert experiments["abstract"].paper == {"magneto-aux": {"f1": 50}}
    assert experiments["outliers"].paper["magneto-aux-no-tad"]["outlier"] == (8, 10)
    assert experiments["outliers"].paper["magneto-aux"]["outlier"] == (0.5, 0.8)
    assert set(experiments["data"].data.values()) == {700_000, 24_056, 43}
    assert {"figure9", "figure10"} < experiments.keys()


def test_every_run_is_started_with_the_configuration_that_it_is_checked_against(setup):
    jobs = jobs_of(setup, LS.all_experiments)
    assert len(jobs) == 2 * (3 + 2)  # and outliers counted with and without TAD
    for job in jobs:
        if job.config is not None:
            named = [word for word in job.options if word.startswith("--config=")]
            assert named == [f"--config={ROOT / 'configs' / 'ls.yaml'}"]
            assert job.launcher == "train_ls.py"


def test_smoke_changes_the_size_and_not_the_kind_of_a_run():
    sizes = Setup(LS, Path("/w"), Path("/d"), LS.smoke, (), seeds=(0,), outliers=1)
    full = load_config(ROOT / "configs" / "ls.yaml")
    for run in LS.all_runs:
        small = sizes.config(run, 0)
        assert small.model.kind == full.model.kind == "magneto"
        assert small.loss.kind == EXPECTED[run.name][0]
        assert small.tags.beta_add == EXPECTED[run.name][1]
        assert (
            0 < small.model.frozen_stages < small.model.backbone_stages
        )  # the last one is trained


@pytest.mark.parametrize(
    ("ours", "paper", "shown"),
    [
        (9.0, (8, 10), ("8 to 10", "within")),
        (12.5, (8, 10), ("8 to 10", "+2.50")),
        (0.25, (0.5, 0.8), ("0.5 to 0.8", "-0.25")),
        (48.0, 50, ("50", "-2.00")),
        (50.0, 50, ("50", "+0.00")),
        (50.0, None, ("–", "–")),
    ],
)
def test_difference_is_to_the_nearer_end_of_what_the_paper_prints(ours, paper, shown):
    assert _beside(Spread((ours - 1, ours + 1)), paper) == shown
    assert _beside(None, paper) == (shown[0], "–")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ls")
    demo.build(folder / "data", items=32, num_processes=1)
    torch.manual_seed(0)
    save_file(models.squeezenet1_1(weights=None).state_dict(), folder / "weights.safetensors")
    words = ["--data", str(folder / "data"), "--work", str(folder / "Läufe"), "--seeds", "0"]
    words += [*TINY_GRID, "--model.frozen_stages=1"]
    launches = Launches()
    reproduce_ls.main(
        [*words, f"--model.backbone_weights={folder / 'weights.safetensors'}"], launches
    )
    assert launches.names == [
        "magneto-aux, seed 0",
        "magneto-aux, seed 0: outliers",
        "magneto-aux-bce, seed 0",
        "magneto-aux-no-tad, seed 0",
        "magneto-aux-no-tad, seed 0: outliers",
    ]
    return folder / "Läufe" / "report"


def test_report_says_what_the_runs_say(report):
    text = (report / "report.md").read_text("utf-8")
    run_dir = report.parent / "runs" / "magneto-aux" / "seed-0"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line["split"] == "validation"]
    best = max(evaluations, key=lambda line: line["final/paper/f1"])
    heads = [f"{100 * best[f'{head}/paper/f1']:.2f}" for head in ("final", "image", "tag")]
    assert f"| MAGNeto aux | {' | '.join(heads)} |" in text
    scores = json.loads((run_dir / "outliers-1.json").read_bytes())["validation"]
    rate = 100 * scores["outlier_rate"]
    assert f"| MAGNeto aux | {rate:.2f} | 0.5 to 0.8 | {rate - 0.8:+.2f} |" in text
    assert "| items | 40 | 700,000 | -699,960 |" in text
    assert re.search(r"\| mean number of tags \| \d\.\d\d \| 43 \| -3\d\.\d\d \|", text)
    for experiment in LS.all_experiments:
        assert f"\n## {experiment.place.split(',')[0]}: {experiment.title}" in text
    saved = json.loads((report / "report.json").read_bytes())
    assert len(saved["claims"]) == sum(len(e.claims) for e in LS.all_experiments)


def test_page_is_whole_and_asks_nothing_of_a_network(report):
    page = (report / "report.html").read_text("utf-8")
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page)
    assert len(sources) == 3 + 1 + 1 + 1
    assert all(source.startswith("data:image/png") for source in sources)
    assert page.count("<figure>") == page.count("<figcaption>") == 4
    assert str(report.parent.parent) not in page


def test_a_data_set_alone_is_told_of_without_any_run(tmp_path):
    demo.build(tmp_path / "data", items=8, num_processes=1)
    words = ["--data", str(tmp_path / "data"), "--work", str(tmp_path / "w")]
    reproduce_ls.main([*words, "--experiments", "data"], Launches(most=0))
    text = (tmp_path / "w" / "report" / "report.md").read_text("utf-8")
    assert "| items | 10 | 700,000 | -699,990 |" in text
    assert re.findall("^## (.*)", text, re.MULTILINE) == [
        "Section 4.1: The large data set",
        "Made by",
    ]


def test_figure9_has_a_line_for_each_output():
    curves = {name: ([1, 2], [1.0, 2.0]) for name in ("f1", "image_f1", "tag_f1")}
    drawn = []
    for missing in (None, "tag_f1"):
        result = SimpleNamespace(curves={k: v for k, v in curves.items() if k != missing})
        figure = plot_experiment(LS.experiments["figure9"], {"magneto-aux": [result]}, LS.runs)
        assert figure is not None
        drawn.append(figure.pictures[0].content)
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "one of --data DIR and --smoke is needed"),
        (["--data", "d", "--experiments", "table2"], "table2"),
        (["--data", "d", "--model.backbone_weights", "none"], "frozen backbone of random weights"),
    ],
)
def test_refusals_come_before_anything_is_launched(tmp_path, capsys, words, reason):
    with pytest.raises((InputError, SystemExit)) as refused:
        reproduce_ls.main(["--work", str(tmp_path), *words], Launches(most=0))
    assert reason in f"{refused.value} {capsys.readouterr().err}"
    assert not (tmp_path / "runs").exists()
