"""What TensorBoard really shows of runs, in a real browser."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from browser import chromium, look_at, missing
from processes import TINY, run
from tensorboard_pages import Page, served, shot

HEADS = ("final", "image", "tag")


@pytest.fixture(scope="module")
def url(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two runs that differ in one setting."""
    if reason := missing():
        pytest.skip(reason)
    runs = tmp_path_factory.mktemp("runs")
    for name, lr in (("schnell", 0.02), ("langsam", 0.005)):
        given = [f"--data.path={demo_shards}", f"--output_dir={runs / name}", f"--optim.lr={lr}"]
        run("train_ls.py", *TINY, *given, "--log.tensorboard=true", "--max_steps=13")
    with served([sys.executable, "-m", "tensorboard.main", "--logdir", str(runs)]) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        look_at(started, 1400, height=1000)
        yield started


@pytest.fixture(autouse=True)
def _nothing_goes_wrong(url: str, browser: Any) -> Iterator[None]:
    yield
    complaints = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert complaints == []
    asked_for = [
        message["params"]["request"]["url"]
        for entry in browser.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    ]
    assert [to for to in asked_for if not to.startswith((url, "data:", "blob:", "about:"))] == []


def test_charts_that_belong_together(url: str, browser: Any, tmp_path: Path) -> None:
    charts = ["F1 of the heads, validation", "loss", "images per second", "learning rate"]
    page = Page(browser, url, "custom_scalars", ["How good", "How fast", "Optimisation", *charts])
    page.wait_for("path", 6)
    shot(browser, tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        assert image.size == (1400, 1000)
    assert (tmp_path / "page.png").stat().st_size < 300_000


def test_curves_of_every_head(url: str, browser: Any) -> None:
    names = [f"validation/precision_recall/{head}" for head in HEADS]
    page = Page(browser, url, "pr_curves", names)
    page.wait_for("path", 6)  # two runs, three heads


def test_histograms_of_alpha(url: str, browser: Any) -> None:
    page = Page(browser, url, "histograms", ["validation/alpha_of_tags"])
    page.wait_for("path", 6)  # two runs, three evaluations


def test_pictures(url: str, browser: Any) -> None:
    page = Page(browser, url, "images", ["validation/pictures"])
    page.wait_for("img", 2)


def test_runs_are_compared_by_settings_and_scores(url: str, browser: Any) -> None:
    wanted = ["schnell/tensorboard", "langsam/tensorboard", "optim.lr", "0.0050000", "0.020000"]
    Page(browser, url, "hparams", [*wanted, "validation/final/paper/f1", "validation/loss"])
