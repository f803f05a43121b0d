"""Runs that train on cached features: kills, ranks, every way of training, full disks."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_feature_cache import CONFIG, VIEWS, build, files_of, model_of, with_

from magneto_dist.data.shards import Dataset
from magneto_dist.errors import InputError
from processes import REPOSITORY, TINY, launch, losses, run, status, summary, wait_for_step
from warm import PATIENCE_S, Warm

STEPS = 12
OPTIONS = [
    *TINY,
    "--model.dropout=0",  # drawn per rank, so that it alone may differ
    "--model.frozen_stages=all",
    f"--data.feature_views={VIEWS}",
    "--train.param_dtype=float64",
    f"--max_steps={STEPS}",
    "--checkpoint.every_steps=4",
    "--train.eval_every_epochs=9",
    "--optim.schedule=constant",
]


def options(data: Path, folder: Path, *more: str) -> list[str]:
    cache, run_dir = folder / "cache", folder / "run"
    return [
        *OPTIONS,
        f"--data.path={data}",
        f"--output_dir={run_dir}",
        f"--data.cache_dir={cache}",
        *more,
    ]


@pytest.fixture(scope="module")
def finished(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run("train_ls.py", *options(demo_shards, folder))
    return folder


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / f"run/checkpoints/step-{STEPS:08d}/model.safetensors")


def test_kills_while_features_are_made_and_while_they_are_read_change_nothing(
    demo_shards: Path, tmp_path: Path, finished: Path
) -> None:
    command = options(demo_shards, tmp_path)
    process = launch("train_ls.py", *command)
    deadline_s = time.monotonic() + PATIENCE_S
    while not list(tmp_path.glob("cache/features/*/.train-0000.log")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    assert not list(tmp_path.glob("cache/features/*/*.npy"))
    process = launch("train_ls.py", *command)
    wait_for_step(process, tmp_path / "run", 6)
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    run("train_ls.py", *command)
    assert files_of(tmp_path / "cache") == files_of(finished / "cache")
    assert losses(tmp_path / "run") == losses(finished / "run")
    ours, theirs = final_weights(tmp_path), final_weights(finished)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_two_ranks_make_the_features_and_have_the_losses_of_one(
    warm: Warm, demo_shards: Path, tmp_path: Path, finished: Path, environment: dict[str, str]
) -> None:
    warm.run("train_ls.py", *options(demo_shards, tmp_path), ranks=2, environment=environment)
    assert files_of(tmp_path / "cache") == files_of(finished / "cache")
    ours, theirs = losses(tmp_path / "run"), losses(finished / "run")
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    for step, loss in theirs.items():
        assert ours[step] == pytest.approx(loss, rel=1e-9), step


@pytest.fixture(scope="module")
def in_float32(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float32")
    run("train_ls.py", *options(demo_shards, folder, "--train.param_dtype=float32"))
    return folder


def assert_trained_alike(folder: Path, other: Path) -> None:
    """In float32: the same features, and losses but for rounding."""
    assert files_of(folder / "cache") == files_of(other / "cache")
    ours, theirs = losses(folder / "run"), losses(other / "run")
    assert list(ours) == list(range(1, STEPS + 1))
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_on_them(
    demo_shards: Path, tmp_path: Path, in_float32: Path, stage: int
) -> None:
    topology = REPOSITORY / "configs" / "accelerate" / f"zero{stage}_cpu_2.yaml"
    through = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(topology)]
    given = options(demo_shards, tmp_path, "--train.param_dtype=float32")
    run("train_ls.py", *given, through=through)
    assert_trained_alike(tmp_path, in_float32)


@pytest.mark.slow
def test_a_compiled_model_trains_on_them(
    demo_shards: Path, tmp_path: Path, in_float32: Path
) -> None:
    more = ["--train.param_dtype=float32", "--train.compile=true"]
    run("train_ls.py", *options(demo_shards, tmp_path, *more))
    assert_trained_alike(tmp_path, in_float32)


@pytest.mark.slow
def test_two_ranks_train_on_features_of_pictures_that_dali_decoded(
    demo_shards: Path, tmp_path: Path
) -> None:
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")
    for ranks in (1, 2):
        given = options(demo_shards, tmp_path / str(ranks), "--data.decoder=dali_cpu")
        run("train_ls.py", *given, ranks=ranks)
    assert files_of(tmp_path / "1/cache") == files_of(tmp_path / "2/cache")
    ours, theirs = losses(tmp_path / "2/run"), losses(tmp_path / "1/run")
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_no_run_removes_what_another_process_reads(demo_shards: Path, tmp_path: Path) -> None:
    process = launch("train_ls.py", *options(demo_shards, tmp_path, "--max_steps=100000"))
    wait_for_step(process, tmp_path / "run", 1)
    before = files_of(tmp_path / "cache")
    dataset = Dataset.open(str(demo_shards))
    size_gb = sum(map(len, before.values())) / 1e9
    more = {"cache_dir": str(tmp_path / "cache"), "feature_cache_gb": 1.5 * size_gb}
    config = with_(CONFIG, "data", **more)
    with pytest.raises(InputError, match="that other runs use"):
        build(config, dataset, model_of(config, dataset))
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    build(config, dataset, model_of(config, dataset))
    after = files_of(tmp_path / "cache")  # of the one folder that is left
    assert after.keys() == before.keys()
    assert after != before


def test_a_trained_run_is_evaluated_from_pictures(
    demo_shards: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores.json"
    run("evaluate.py", f"--run={finished / 'run'}", f"--data.path={demo_shards}", f"--out={out}")
    cached = summary(finished / "run")["validation"]
    live = json.loads(out.read_text())["validation"]
    assert live["items"] == cached["items"]
    assert live["loss"] == pytest.approx(cached["loss"], rel=1e-3)
    assert not math.isclose(live["loss"], cached["loss"], rel_tol=1e-12)  # other bits: rounded
    names = set(final_weights(finished))
    assert any(name.startswith("image_stream.backbone.") for name in names)


def test_a_disk_that_fills_up_is_one_clear_line(demo_shards: Path, tmp_path: Path) -> None:
    process = launch("train_ls.py", *options(demo_shards, tmp_path), largest_file_bytes=100_000)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2, output
    assert output.count("\nerror: ") == 1
    assert "cached features cannot be written or removed there" in output
    assert "Traceback" not in output
    assert status(tmp_path / "run")["state"] == "failed"
    assert not list(tmp_path.glob("cache/features/*/*.npy"))
