"""What a run shows in TensorBoard, read back with TensorBoard's own reader."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as AsTensors,
)
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata
from tensorboard.util.tensor_util import make_ndarray
from test_hostile_checkpoints import edit_progress

from magneto_dist.config import Config, OptimConfig
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.trained_run import load_run
from magneto_dist.training.board import Board, compared_settings
from magneto_dist.training.checkpoint import Progress
from magneto_dist.world import World
from processes import TINY, launch, losses, run, summary, wait_for_step

STEPS, EVALUATIONS = 7, [6, 7]  # 6 steps an epoch; the end is always evaluated
PICTURES = 5
EVERYTHING = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
HEADS = ("final", "image", "tag")
CURVES = [f"validation/precision_recall/{head}" for head in HEADS]
THRESHOLDS = [k / 100 for k in range(101)]
LAYOUT = "custom_scalars__config__"
NOT_COMPARED = re.compile(
    "train/(images_per_second|data_wait_fraction|checkpoint_stall_s)|validation/pictures|_hparams_"
)


def options(data: Path, run_dir: Path, *more: str) -> list[str]:
    given = [option for option in TINY if not option.startswith("--log.tensorboard")]
    given += [f"--data.path={data}", f"--output_dir={run_dir}", f"--log.pictures={PICTURES}"]
    given += ["--optim.schedule=constant"]  # whatever the last step is
    return [*given, f"--max_steps={STEPS}", *more]


def read(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance=EVERYTHING).Reload()


def arrays(events: Any, tag: str) -> dict[int, np.ndarray]:
    """Of a tag that holds tensors, by step; no step may be there twice."""
    steps = [event.step for event in events.Tensors(tag)]
    assert len(steps) == len(set(steps)), tag
    return {event.step: make_ndarray(event.tensor_proto) for event in events.Tensors(tag)}


def shown(run_dir: Path) -> dict[str, dict[int, np.ndarray]]:
    """All that TensorBoard's pages show, of whatever kind, by name and step."""
    read = AsTensors(str(run_dir / "tensorboard"), size_guidance=EVERYTHING).Reload()
    return {tag: arrays(read, tag) for tag in read.Tags()["tensors"] if tag != LAYOUT}


@pytest.fixture(scope="module")
def run_dir(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "gezeigt"
    run("train_ls.py", *options(demo_shards, folder))
    return folder


@pytest.fixture(scope="module")
def events(run_dir: Path) -> EventAccumulator:
    return read(run_dir)


@pytest.fixture(scope="module")
def tags(run_dir: Path, demo_shards: Path) -> dict[str, list[tuple[float, bool]]]:
    """By head, and "alpha": what the model says of each tag of the split, and what is true."""
    trained, dataset = load_run(run_dir), Dataset.open(str(demo_shards))
    plan = BatchPlan.derive(16, 1, 16, group_size=1)  # as in training: the same bits
    loader = Loader(dataset, "validation", trained.config, World(), plan, training=False)
    said: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    for batch in loader.batches(1, loader.steps_per_epoch):
        with torch.no_grad():
            prediction = trained.model(**batch.inputs())
        values = {head: prediction.probability(head) for head in HEADS}
        for name, of_batch in {**values, "alpha": prediction.alpha}.items():
            kept = batch.tag_mask
            said[name] += zip(of_batch[kept].tolist(), batch.target[kept].tolist(), strict=True)
    return said


@pytest.fixture(scope="module")
def step(run_dir: Path) -> int:
    """Of the checkpoint whose model `tags` asked."""
    return int(load_run(run_dir).checkpoint.name.removeprefix("step-"))


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
    wanted = {"images_per_second", "data_wait_fraction", "lr", "gradient_norm"}
    assert {f"train/{name}" for name in wanted} <= names
    assert all(event.value > 0 for event in events.Scalars("train/gradient_norm"))


def test_pictures_are_one_grid_an_evaluation(events: EventAccumulator) -> None:
    assert events.Tags()["images"] == ["validation/pictures"]
    grids = events.Images("validation/pictures")
    assert [grid.step for grid in grids] == EVALUATIONS
    for grid in grids:
        image = Image.open(io.BytesIO(grid.encoded_image_string))
        assert image.size == (grid.width, grid.height)
        assert grid.height > grid.width / 2  # two rows, of four and of one
        assert len(image.convert("RGB").getcolors(2**24) or ()) > 1000  # it shows photographs


def test_curves_are_those_of_every_tag_of_the_split(
    events: EventAccumulator, tags: dict[str, list[tuple[float, bool]]], step: int
) -> None:
    for head, name in zip(HEADS, CURVES, strict=True):
        curves = arrays(events, name)
        assert list(curves) == EVALUATIONS
        num_targets = sum(target for _, target in tags[head])
        assert num_targets > 22  # each item has several
        rows = []
        for threshold in THRESHOLDS:
            predicted = [target for p, target in tags[head] if p >= threshold]
            hits = sum(predicted)
            wrong, missed = len(predicted) - hits, num_targets - hits
            left_out = len(tags[head]) - len(predicted) - missed
            precision = hits / max(len(predicted), 1)
            rows.append([hits, wrong, left_out, missed, precision, hits / num_targets])
        np.testing.assert_allclose(curves[step], np.array(rows).T, rtol=1e-6)
        assert len(set(curves[step][5])) > 5  # of the recall: it is a curve


def test_histogram_of_alpha_is_that_of_every_tag_of_the_split(
    events: EventAccumulator, tags: dict[str, list[tuple[float, bool]]], step: int
) -> None:
    assert events.Tags()["histograms"] == ["validation/alpha_of_tags"]
    histograms = {e.step: e.histogram_value for e in events.Histograms("validation/alpha_of_tags")}
    assert list(histograms) == EVALUATIONS
    got, alphas = histograms[step], [alpha for alpha, _ in tags["alpha"]]
    assert (got.min, got.max, got.num) == (0, 1, len(alphas))
    assert got.sum == pytest.approx(sum(alphas))
    assert got.sum_squares == pytest.approx(sum(alpha**2 for alpha in alphas))
    assert list(got.bucket_limit) == THRESHOLDS[1:]
    assert list(got.bucket) == np.histogram(alphas, [*THRESHOLDS[:-1], 1.001])[0].tolist()


def test_every_name_is_of_one_kind(run_dir: Path) -> None:
    """TensorBoard takes the first for granted, and what comes as another is not shown."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for path in (run_dir / "tensorboard").iterdir():
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                kinds[value.tag].add(value.metadata.plugin_data.plugin_name)
    assert {name: kind for name, kind in kinds.items() if len(kind) != 1} == {}
    assert set(chain(*kinds.values())) >= {"scalars", "images", "histograms", "pr_curves"}


def test_every_chart_of_the_layout_has_something_to_show(events: EventAccumulator) -> None:
    content = arrays(events, LAYOUT)[0].item()
    charts = [chart for c in Layout.FromString(content).category for chart in c.chart]
    assert len(charts) == 6
    for chart in charts:
        shown = [
            tag
            for pattern in chart.multiline.tag
            for tag in events.Tags()["scalars"]
            if re.match(pattern, tag)
        ]
        assert len(shown) == {"F1 of the heads, validation": 3, "loss": 2}.get(chart.title, 1)


# Settings ---------------------------------------------------------------------------------------


def hparams(run_dir: Path) -> tuple[dict[str, Any], list[str]]:
    """Settings of a run and names of its metrics; the run has one file with them."""
    assert len(list((run_dir / "tensorboard").glob("*.hparams"))) == 1
    assert not [path for path in (run_dir / "tensorboard").iterdir() if path.is_dir()]
    content = read(run_dir).PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    metadata.parse_session_end_info_plugin_data(content[metadata.SESSION_END_INFO_TAG])
    kinds = {name: value.WhichOneof("kind") for name, value in start.hparams.items()}
    settings = {name: getattr(value, kinds[name]) for name, value in start.hparams.items()}
    assert {info.name for info in experiment.hparam_infos} == set(settings)
    assert len([info for info in experiment.hparam_infos if info.differs]) == 5  # shown unasked
    return settings, [info.name.tag for info in experiment.metric_infos]


def test_a_finished_run_is_listed_by_its_settings_f1_and_loss(
    run_dir: Path, events: EventAccumulator
) -> None:
    settings, metrics = hparams(run_dir)
    assert settings == compared_settings(load_run(run_dir).config)
    assert (settings["model.d_model"], settings["augment.image_size"]) == (16, 32)
    assert settings["train.compile"] == "False"
    assert set(metrics) == {*(f"validation/{h}/paper/f1" for h in HEADS), "validation/loss"}
    assert set(metrics) <= set(events.Tags()["scalars"])


def test_a_setting_is_of_one_type_whatever_it_is() -> None:
    settings = compared_settings(Config())
    assert settings["model.frozen_stages"] == "4"  # it may be "all"
    assert settings["optim.lr"] == 0.01
    assert "data.path" not in settings
    assert compared_settings(Config(optim=OptimConfig(lr=1.0)))["optim.lr"] == 1.0


def test_a_run_that_is_trained_on_is_listed_once_with_its_settings_of_now(
    demo_shards: Path, run_dir: Path, tmp_path: Path
) -> None:
    longer = shutil.copytree(run_dir, tmp_path / "run")
    run("train_ls.py", *options(demo_shards, longer))  # it is finished
    assert hparams(longer)[0]["optim.weight_decay"] == 0
    more = [f"--max_steps={STEPS + 1}", "--optim.weight_decay=0.01"]
    run("train_ls.py", *options(demo_shards, longer, *more))
    assert hparams(longer)[0]["optim.weight_decay"] == 0.01
    (longer / "summary.json").unlink()  # as if killed before it was written
    run("train_ls.py", *options(demo_shards, longer, *more))
    assert hparams(longer)[0]["optim.weight_decay"] == 0.01


# Ranks and kills --------------------------------------------------------------------------------


def assert_shown_alike(got: Path, expected: Path, **tolerance: float) -> None:
    """The same, step by step; of what takes time, and of pictures, the steps."""
    values, wanted = shown(got), shown(expected)
    assert values.keys() == wanted.keys()
    for name in wanted:
        assert list(values[name]) == list(wanted[name]), name
        if not NOT_COMPARED.match(name):
            for step in wanted[name]:
                np.testing.assert_allclose(
                    values[name][step], wanted[name][step], **tolerance, err_msg=name
                )


def test_two_ranks_show_what_one_shows(demo_shards: Path, tmp_path: Path) -> None:
    double = ["--train.param_dtype=float64", "--model.dropout=0"]
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        run("train_ls.py", *options(demo_shards, folder, *double), ranks=ranks)
    assert_shown_alike(tmp_path / "2", tmp_path / "1", rtol=1e-6)


def test_a_killed_run_shows_no_step_twice(demo_shards: Path, run_dir: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    given = options(demo_shards, killed, "--checkpoint.every_steps=4", "--checkpoint.keep=9")
    process = launch("train_ls.py", *given, "--max_steps=1000000")
    wait_for_step(process, killed, 9)
    process.kill()
    process.communicate()
    assert max(shown(killed)["train/loss"]) >= 8
    run("train_ls.py", *given, f"--resume={killed / 'checkpoints/step-00000004'}")
    assert_shown_alike(killed, run_dir)
    assert hparams(killed) == hparams(run_dir)


def test_an_evaluation_that_a_kill_kept_from_its_checkpoint_is_shown_once(
    demo_shards: Path, run_dir: Path, tmp_path: Path
) -> None:
    again = shutil.copytree(run_dir, tmp_path / "run")
    edit_progress(again / f"checkpoints/step-{STEPS:08d}", evaluated=False)
    run("train_ls.py", *options(demo_shards, again))
    assert_shown_alike(again, run_dir)


def test_what_goes_on_within_the_same_second_is_shown_last(tmp_path: Path) -> None:
    def write(start: int, end: int, value: float) -> None:
        board = Board(tmp_path / "tensorboard", Progress(step=start, evaluated=True), [])
        for step in range(start + 1, end + 1):
            board.scalars(step, "train", {"loss": value})
        board.close()

    time.sleep(1 - time.time() % 1)  # a second begins
    write(0, 8, 1.0)
    (stopped,) = (tmp_path / "tensorboard").iterdir()
    words = stopped.name.split(".")
    words[-2] = "99999999"  # as if its process had a larger number
    stopped.rename(stopped.with_name(".".join(words)))
    write(4, 7, 2.0)
    expected = {step: 1.0 if step <= 4 else 2.0 for step in range(1, 8)}
    assert {event.step: event.value for event in read(tmp_path).Scalars("train/loss")} == expected
    assert shown(tmp_path)["train/loss"] == expected


def test_a_model_without_a_gate_has_no_histogram(demo_shards: Path, tmp_path: Path) -> None:
    run("train_ls.py", *options(demo_shards, tmp_path, "--model.kind=tf-t", "--max_steps=1"))
    shown = read(tmp_path)
    assert shown.Tags()["histograms"] == []
    assert list(arrays(shown, CURVES[0])) == [1]
