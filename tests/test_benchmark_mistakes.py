"""Benchmarks are told something wrong: one clear line and exit code 2, before they begin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from processes import REPOSITORY, refused

LS, DEMO = (f"--config={REPOSITORY}/configs/{name}.yaml" for name in ("ls", "demo"))
NUS_WIDE = ["--groundtruth=zip", "--concepts=zip", "--out=root"]

# command: options, and what the line says
MISTAKES = {
    "beyond_paper.py": [
        (["--work=file/of/mine"], "argument --work: file/of/mine: Not a directory"),
        (["--work=work", "--epochs=0"], "argument --epochs: 0 is less than 1"),
        (["--work=work", "--option=model.nothing=1"], "model.nothing"),
    ],
    "checkpoint.py": [
        (["--folder=file/of/mine"], "argument --folder: file/of/mine: Not a directory"),
        (["--rounds=0"], "argument --rounds: 0 is less than 1"),
    ],
    "communication.py": [
        (["--rounds=two"], "argument --rounds: invalid whole_number value: 'two'"),
        (["--overlap=1.5"], "argument --overlap: 1.5 is not between 0 and 1"),
        (["--peak_tflops=0"], "argument --peak_tflops: 0 is not a number above 0"),
        (["--link", "mine", "fast", "5"], "--link mine fast 5: could not convert"),
    ],
    "compare.py": [
        (["nowhere.json", "nowhere.json"], "nowhere.json: no result can be read"),
        (["other.json", "other.json"], "other.json: no timings in it"),
        (["other.json", "other.json", "--least=nan"], "nan is not between 0 and 100"),
    ],
    "decode.py": [
        (["--photos=nowhere", "--question=decode"], "argument --photos: nowhere: no *.jpg there"),
        (["--photos=broken", "--question=decode"], "broken/ü.jpg: picture is neither JPEG"),
        (["--photos=broken", "--question=speed"], "argument --question: invalid choice: 'speed'"),
        (["--photos=broken", "--question=decode", "--size=-1"], "--size: -1 is less than 1"),
    ],
    "export.py": [
        (["--photos=nowhere.csv"], "nowhere.csv"),
        (["--photos=nowhere.csv", "--epochs=0"], "argument --epochs: 0 is less than 1"),
    ],
    "features.py": [
        (["--views", "1", "0"], "argument --views: 0 is less than 1"),
        (["--items=4", "--backbone=mine"], "model.backbone"),
    ],
    "frozen.py": [
        (["--items=3"], "argument --items: 3 is less than 4"),
        (["--items=4", "--backbone=mine"], "model.backbone"),
    ],
    "gpu.py": [
        (["--photos=nowhere"], "argument --photos: nowhere: no *.jpg there"),
        (["--photos=broken", "--total_s=-1"], "argument --total_s: -1 is not a number above 0"),
        (["--photos=broken", "--dry_run", "--parts=lunch"], "--parts lunch: there are shards"),
        (["--photos=broken", "--make_shards", "--work=work"], "broken/ü.jpg: no picture"),
    ],
    "loader.py": [
        (["--photos=nowhere"], "argument --photos: nowhere: no *.jpg there"),
        (["--photos=broken"], "broken/ü.jpg: no picture can be read"),
        (["--photos=broken", "--items=64"], "--items 64: at least 1664"),
        (["--photos=broken", "--only=mine"], "--only mine: there are decoding alone"),
    ],
    "memory.py": [
        (["--config=nowhere.yaml"], "no configuration file nowhere.yaml"),
        (["--micro_batches", "0"], "argument --micro_batches: 0 is less than 1"),
        (
            [LS, "--micro_batches", "7"],
            "--model.batch_norm_group_size",
        ),
        (["--precisions=fp8"], "argument --precisions: invalid choice: 'fp8'"),
    ],
    "nus_wide_tags.py": [
        ([*NUS_WIDE, "--images=list.gz"], "zip: there is no such file"),
        ([*NUS_WIDE, "--images=list.gz", "--seed=-1"], "argument --seed: -1 is less than 0"),
        (["--images=list.gz"], "the following arguments are required: --groundtruth"),
    ],
    "order.py": [
        (["--items=0"], "argument --items: 0 is less than 1"),
        (["--items=100"], "--items 100: at least one batch of 2048"),
    ],
    "predict_kills.py": [
        (["--items=100"], "--items 100: at least ten blocks of 1000"),
        (["--ranks=0"], "argument --ranks: 0 is less than 1"),
    ],
    "reproduce_ls.py": [
        (["--work=work"], "one of --data DIR and --smoke is needed"),
        (["--work=work", "--data=nowhere", "--model.backbone_weights=nowhere.pt"], "nowhere"),
    ],
    "reproduce_nus_wide.py": [
        (["--work=work", "--smoke", "--lunch"], "unknown option --lunch"),
        (["--work=work", "--smoke", "--smoke_items=1"], "argument --smoke_items: 1 is less than 4"),
    ],
    "throughput.py": [
        (["--data=nowhere"], "nowhere"),
        (["--data=synthetic", "--picture=0x0"], "argument --picture: "),
        (["--round_s=0"], "argument --round_s: 0 is not a number above 0"),
        (["--only=lunch"], "--only lunch: there are"),
        (["--scaling=0"], "--scaling 0: numbers of processes"),
    ],
    "train_step.py": [
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--steps=0"], "argument --steps: 0 is less than 1"),
        (
            [DEMO, "--data.path=nowhere"],
            "nowhere: no data set there",
        ),
    ],
    "training_rate.py": [
        (["--photos=nowhere"], "argument --photos: nowhere: no *.jpg there"),
        (["--photos=broken", "--items=1"], "--items 1: at least"),
        (["--photos=broken"], "broken/ü.jpg: no picture can be read"),
        ([], "--photos: a folder with *.jpg is needed"),
    ],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command is started: what it is told of lies there, and is not what it should be."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "ü.jpg").write_bytes(b"no picture")
    (tmp_path / "other.json").write_text(json.dumps({"timings": ["none"]}))
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_benchmarks_is_here():
    files = (REPOSITORY / "benchmarks").glob("*.py")
    assert MISTAKES.keys() == {path.name for path in files if "\nif __name__" in path.read_text()}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("command", "options", "said"),
    [(command, *mistake) for command, mistakes in MISTAKES.items() for mistake in mistakes],
)
def test_a_mistake_is_one_clear_line(command: str, options: list[str], said: str):
    assert said in refused(f"../benchmarks/{command}", *options)
