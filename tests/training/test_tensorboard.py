"""What a run shows in TensorBoard, read back with TensorBoard's own reader."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from processes import TINY, losses, run, summary

STEPS, EVALUATIONS = 7, [6, 7]  # 6 steps an epoch; the end is always evaluated
PICTURES = 5
EVERYTHING = {"scalars": 0, "images": 0, "histograms": 0}


@pytest.fixture(scope="module")
def run_dir(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "gezeigt"
    options = [option for option in TINY if not option.startswith("--log.tensorboard")]
    options += [f"--data.path={demo_shards}", f"--output_dir={folder}", f"--max_steps={STEPS}"]
    run("train_ls.py", *options, f"--log.pictures={PICTURES}")
    return folder


@pytest.fixture(scope="module")
def events(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance=EVERYTHING).Reload()


def test_scalars_are_those_of_metrics_jsonl(run_dir: Path, events: EventAccumulator) -> None:
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert list(shown) == list(range(1, STEPS + 1))
    assert shown == pytest.approx(losses(run_dir))
    f1 = events.Scalars("validation/final/paper/f1")
    assert [event.step for event in f1] == EVALUATIONS
    assert f1[-1].value == pytest.approx(summary(run_dir)["validation"]["final"]["paper"]["f1"])
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = {f"{line['split']}/{name}" for line in logged for name in line}
    names -= {f"{line['split']}/{name}" for line in logged for name in ("step", "epoch", "split")}
    assert set(events.Tags()["scalars"]) == names


def test_pictures_are_one_grid_an_evaluation(events: EventAccumulator) -> None:
    assert events.Tags()["images"] == ["validation/pictures"]
    grids = events.Images("validation/pictures")
    assert [grid.step for grid in grids] == EVALUATIONS
    for grid in grids:
        image = Image.open(io.BytesIO(grid.encoded_image_string))
        assert image.size == (grid.width, grid.height)
        assert grid.height > grid.width / 2  # two rows, of four and of one
        assert len(image.convert("RGB").getcolors(2**24) or ()) > 1000  # it shows photographs


def test_histogram_is_that_of_the_gate(events: EventAccumulator) -> None:
    assert events.Tags()["histograms"] == ["validation/alpha"]
    alphas = events.Histograms("validation/alpha")
    assert [alpha.step for alpha in alphas] == EVALUATIONS
    for alpha in alphas:
        values = alpha.histogram_value
        assert 0 <= values.min < values.max <= 1
        assert PICTURES <= values.num <= 12 * PICTURES  # one value a tag, of 12 slots an item
