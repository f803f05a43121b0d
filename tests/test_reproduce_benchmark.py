"""The paper's experiments: the grid is the paper's, is trained once, goes on, and is told truly."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision import models

import reproduce_nus_wide
from grid_launches import Launches
from magneto_dist.errors import InputError
from processes import TINY
from reproduce_ls_grid import LS
from reproduce_nus_wide_grid import NUS_WIDE
from reproduce_results import Spread, verdict_of
from reproduce_runs import Setup, jobs_of

EXPERIMENTS, RUNS = NUS_WIDE.experiments, NUS_WIDE.runs
TINY_GRID = [
    *TINY,
    "--model.backbone=squeezenet1_1",  # 5 MB
    "--train.epochs=1",
]
"""Beside these, the 22 items of validation are trained on in 2 steps."""
QUICK = ["figure3", "figure4", "figure5", "table4"]


# What is run ------------------------------------------------------------------------------------

# kind, auxiliary, loss, TAD, pre-trained; from the paper, not from the grid
EXPECTED = {
    "ff": ("ff", True, "bce-dice", 0.5, False),
    "tf-t": ("tf-t", True, "bce-dice", 0.5, False),
    "tf-it": ("tf-it", True, "bce-dice", 0.5, False),
    "magneto": ("magneto", False, "bce-dice", 0.5, False),
    "magneto-aux": ("magneto", True, "bce-dice", 0.5, False),
    "magneto-aux-bce": ("magneto", True, "bce", 0.5, False),
    "magneto-aux-no-tad": ("magneto", True, "bce-dice", 0.0, False),
    "magneto-aux-pretrained": ("magneto", True, "bce-dice", 0.5, True),
    "magneto-aux-no-tad-pretrained": ("magneto", True, "bce-dice", 0.0, True),
    "pretraining": ("magneto", True, "bce-dice", 0.3, False),  # TAD plays no part in it
}
TABLE2 = """
    ff 90.5 97.1 90.8
    tf-t 93.4 98.1 93.2
    tf-it 94.4 100.0 93.8
    magneto 93.9 97.6 93.9
    magneto-aux 94.5 96.7 94.1
"""
TABLE3 = {  # (beta, pre-trained): outlier %, F1
    (0.0, False): (39.34, 93.24),
    (0.5, False): (28.60, 93.25),
    (0.0, True): (24.98, 94.27),
    (0.5, True): (20.53, 94.30),
}


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("setup")
    return Setup(NUS_WIDE, folder / "work", folder / "data", {}, (), seeds=(0, 1), outliers=1)


def test_grid_is_what_the_paper_has(setup):
    configs = {run.name: setup.config(run, 0) for run in RUNS.values()}
    assert configs.keys() == EXPECTED.keys() == RUNS.keys()
    for name, config in configs.items():
        kind, auxiliary, loss, beta, pretrained = EXPECTED[name]
        assert (config.model.kind, config.loss.auxiliary, config.loss.kind) == (
            kind,
            auxiliary,
            loss,
        ), name
        assert (config.tags.beta_add, config.tags.beta_drop) == (beta, beta), name
        assert (config.init_from is not None) == pretrained, name
        assert config.train.objective == ("relevance" if name == "pretraining" else "important")
        appendix = (config.augment.image_size, config.train.global_batch_size, config.model.d_model)
        assert appendix == (112, 32, 128), name
        assert (config.model.backbone_weights, config.model.frozen_stages) == ("imagenet", "all")
    words = [line.split() for line in TABLE2.split("\n") if line.strip()]
    expected = {
        run: dict(zip(("precision", "recall", "f1"), map(float, numbers), strict=True))
        for run, *numbers in words
    }
    assert EXPERIMENTS["table2"].paper == expected
    for run, numbers in EXPERIMENTS["table3"].paper.items():
        key = (EXPECTED[run][3], EXPECTED[run][4])
        assert (numbers["outlier"], numbers["f1"]) == TABLE3[key]
    assert len(EXPERIMENTS["table3"].paper) == 4
    assert set(EXPERIMENTS) == {
        *("table2", "table3", "table4", "figure3", "figure4", "figure5", "figure6", "figure8")
    }


@pytest.mark.parametrize("study", [NUS_WIDE, LS], ids=lambda study: study.title)
def test_claims_hold_in_the_numbers_that_the_paper_prints(study):
    compared = 0
    for experiment in study.all_experiments:
        for claim in experiment.claims:
            printed = [experiment.paper.get(run, {}).get(m) for run, m in (claim.more, claim.less)]
            if None not in printed:
                assert printed[0] > printed[1], claim.text  # ranges: neither overlaps the other
                compared += 1
            assert {claim.more[0], claim.less[0]} <= set(experiment.runs)
            assert {claim.more[1], claim.less[1]} <= set(experiment.metrics)
    assert compared > 0


def test_runs_are_shared_and_follow_what_they_start_from(setup):
    jobs = jobs_of(setup, list(EXPERIMENTS.values()))
    trainings = [job for job in jobs if job.config is not None]
    assert len({job.leaves for job in jobs}) == len(jobs)
    assert len(trainings) == 2 * len(RUNS)
    assert {job.config.seed for job in trainings if job.config} == {0, 1}
    seen: set[str] = set()
    for job in jobs:
        for word in job.options:
            if word.startswith(("--init_from=", "--run=")):
                assert word.partition("=")[2] in seen, job.name
        seen.add(str(job.leaves.parent))
    outliers = [job for job in jobs if job.launcher == "evaluate.py"]
    assert len(outliers) == 2 * 4
    assert all("--outliers=1" in job.options for job in outliers)
    only = jobs_of(setup, [EXPERIMENTS["table3"]])
    assert len([job for job in only if job.config is not None]) == 2 * 5


# Running it -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "squeezenet.safetensors"
    torch.manual_seed(0)
    save_file(models.squeezenet1_1(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from magneto_dist.data.sources import demo

    folder = tmp_path_factory.mktemp("tiny")
    demo.build(folder, items=32, num_processes=1)
    return folder


Command = Callable[..., Launches]


@pytest.fixture(scope="module")
def command(weights: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Starts the tiny grid, always in the same folder; returns what it has launched."""
    work = tmp_path_factory.mktemp("grid") / "Läufe 1"

    def start(*more: str, launches: Launches | None = None) -> Launches:
        launches = launches or Launches()
        words = ["--data", str(tiny_data), "--work", str(work), "--seeds", "0"]
        words += ["--experiments", *QUICK, *TINY_GRID, f"--model.backbone_weights={weights}"]
        start.work = work  # type: ignore[attr-defined]
        try:
            reproduce_nus_wide.main([*words, *more], launches)
        except KeyboardInterrupt:
            assert launches.most is not None
        return launches

    return start


@pytest.fixture(scope="module")
def report(command: Command) -> Path:
    stopped = command(launches=Launches(most=2))
    assert stopped.names == ["magneto, seed 0", "magneto, seed 0: predictions"]
    work: Path = command.work  # type: ignore[attr-defined]
    assert not (work / "report").exists()
    rest = command()
    assert rest.names == [
        "magneto-aux, seed 0",
        "magneto-aux, seed 0: predictions",
        "magneto-aux-bce, seed 0",
    ]
    return work / "report"


def test_what_is_done_is_not_done_again(report, command):
    lost = report.parent / "runs" / "magneto" / "seed-0" / "predictions.jsonl"
    lost.unlink()
    changes_nothing_trained = "--data.prefetch_batches=2"
    assert command(changes_nothing_trained).names == ["magneto, seed 0: predictions"]
    with pytest.raises(InputError, match=r"--optim\.lr 0\.01, and now it is 0\.5 .*other --work"):
        command("--optim.lr", "0.5")


def test_report_holds_every_table_and_figure_and_needs_no_network(report):
    page, text = ((report / f"report.{kind}").read_text("utf-8") for kind in ("html", "md"))
    for name in QUICK:
        heading = EXPERIMENTS[name].place.split(",")[0]
        assert f"<h2>{heading}: " in page
        assert f"\n## {heading}: " in text
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page)
    assert len(sources) == 1 + 2 + 3 + 6  # panels of figures, and the pictures of Table 4
    assert all(source.startswith("data:image/") for source in sources)
    assert "@import" not in page
    assert "url(" not in page
    named = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert len(named) == len(sources)
    assert all((report / name).stat().st_size > 500 for name in named)
    for shown in (page, text, (report / "report.json").read_text("utf-8")):
        assert str(report.parent.parent) not in shown
    assert page.count("26,559") == text.count("26,559") == 1
    assert "WORK/runs/magneto-aux-bce/seed-0" in text


def test_report_says_what_the_runs_say(report):
    saved = json.loads((report / "report.json").read_text("utf-8"))
    runs = report.parent / "runs"
    f1 = {}
    for name in ("magneto", "magneto-aux", "magneto-aux-bce"):
        lines = (runs / name / "seed-0" / "metrics.jsonl").read_text().splitlines()
        evaluations = [line for line in map(json.loads, lines) if line["split"] == "validation"]
        f1[name] = 100 * max(line["final/paper/f1"] for line in evaluations)
        assert saved["runs"][name][0]["f1"] == pytest.approx(f1[name])
    text = (report / "report.md").read_text("utf-8")
    assert f"| MAGNeto aux, BCE | {f1['magneto-aux-bce']:.2f} |" in text
    claims = {claim["claim"]["text"]: claim for claim in saved["claims"]}
    raises = claims["BCE-Dice raises F1"]
    assert raises["difference"]["values"] == [
        pytest.approx(f1["magneto-aux"] - f1["magneto-aux-bce"])
    ]
    for claim in claims.values():
        (difference,) = claim["difference"]["values"]
        expected = "one seed: not told" if difference > 0 else "does not show"
        assert claim["verdict"] == expected
        row = next(line for line in text.splitlines() if claim["claim"]["text"] in line)
        assert row.startswith(f"| {claim['claim']['text']} | {expected} |")
    predicted = (runs / "magneto" / "seed-0" / "predictions.jsonl").read_text().splitlines()
    alpha = torch.tensor([a for line in predicted for a in json.loads(line)["alpha"]])
    found = saved["runs"]["magneto"][0]
    assert found["alpha_std"] == pytest.approx(float(alpha.std(correction=0)), rel=1e-4)
    assert found["alpha"] == pytest.approx(float(alpha.mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((1.0, 2.0, 3.0), "shows"),  # t = 3.46
        ((0.0, 2.0, 3.0), "does not show"),  # t = 1.89
        ((-1.0, -2.0, -3.0), "does not show"),
        ((0.0, 0.0), "does not show"),
        ((2.0,), "one seed: not told"),
        ((-2.0,), "does not show"),
    ],
)
def test_verdict_is_that_of_a_paired_t_test(differences, verdict):
    assert verdict_of(Spread(differences)) == verdict


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "one of --data DIR and --smoke is needed"),
        (["--data", "d", "--smoke"], "and not both"),
        (["--data", "d", "--seed", "3"], "unknown option --seed"),
        (["--data", "d", "--model.kindness", "3"], "model.kindness"),
        (["--data", "d", "--seeds", "1", "1"], "--seeds must be different"),
        (["--data", "d", "--outliers", "0"], "--outliers at least 1"),
        (["--data", "d", "--model.backbone_weights", "none"], "frozen backbone of random weights"),
        (["--data", "d", "--model.backbone_weights=w.pth"], "w.pth: no such file"),
    ],
)
def test_refusals_are_one_line_before_anything_is_launched(tmp_path, words, reason):
    launches = Launches(most=0)
    words = ["--work", str(tmp_path), "--experiments", "figure3", *words]
    with pytest.raises(InputError, match=re.escape(reason)) as refused:
        reproduce_nus_wide.main(words, launches)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_a_run_that_fails_is_named_with_its_reason(tmp_path, weights):
    words = ["--data", str(tmp_path / "nowhere"), "--work", str(tmp_path), "--experiments"]
    words += ["figure3", *TINY_GRID, f"--model.backbone_weights={weights}"]
    with pytest.raises(InputError, match=r"magneto-aux, seed 0: error: .*nowhere.*logs"):
        reproduce_nus_wide.main(words, Launches())


# All of it --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_smoke_end_to_end(tmp_path):
    """Two seeds, through its own processes, with the backbone that it trains."""
    work = tmp_path / "wörk"
    words = ["--smoke", "--smoke_items", "48", "--work", str(work), "--seeds", "0", "1"]
    reproduce_nus_wide.main([*words, *TINY, "--train.epochs=1", "--model.backbone_stages=3"])
    page = (work / "report" / "report.html").read_text("utf-8")
    for experiment in EXPERIMENTS.values():
        assert f"<h2>{experiment.place.split(',')[0]}: " in page
    saved = json.loads((work / "report" / "report.json").read_text("utf-8"))
    assert saved["runs"].keys() == RUNS.keys()
    assert all(len(of_run) == 2 for of_run in saved["runs"].values())
    assert len(saved["claims"]) == sum(len(e.claims) for e in EXPERIMENTS.values())
    for name in EXPERIMENTS["table3"].runs:
        scores = json.loads((work / "runs" / name / "seed-1" / "outliers-1.json").read_text())
        assert scores["outliers"] == 1
        assert saved["runs"][name][1]["outlier"] == 100 * scores["validation"]["outlier_rate"]

    def newest(run_dir: Path) -> dict[str, torch.Tensor]:
        return load_file(max(run_dir.glob("checkpoints/step-*")) / "model.safetensors")

    trained, used = newest(work / "backbone-48"), newest(work / "runs" / "magneto-aux" / "seed-0")
    key = "image_stream.backbone.stages.layer2.0.conv1.weight"
    assert torch.equal(trained[key], used[key])
    before = {path: path.stat().st_mtime_ns for path in (work / "runs").rglob("*.json*")}
    reproduce_nus_wide.main([*words, *TINY, "--train.epochs=1", "--model.backbone_stages=3"])
    assert before == {path: path.stat().st_mtime_ns for path in (work / "runs").rglob("*.json*")}
