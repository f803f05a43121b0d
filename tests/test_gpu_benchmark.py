"""The command for a machine with a GPU: what it would run, and that no part can cost the others."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gpu
from gpu_parts import ROOT, Part, plan, read_decoders, read_tests
from gpu_runs import run_part
from magneto_dist.config_io import parse_command_line
from magneto_dist.errors import InputError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(6):
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((200, 150), Image.Resampling.BICUBIC)
        picture.save(folder / f"{seed}.jpg", quality=90)
    return folder


def python(code: str, leaves: Path, limit_s: float = 60.0) -> Part:
    return Part(
        "part", "?", ("-c", code), limit_s, leaves, lambda path: json.loads(path.read_text())
    )


# Planning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dry_run", [False, True])
def test_plan_asks_launchers_and_benchmarks_for_what_they_have(tmp_path, dry_run):
    parts = plan(tmp_path, tmp_path / "work", 64, 50, dry_run)
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    assert names[0] == "shards"
    trains = [part for part in parts if part.name.startswith("train_")]
    for part in trains:
        launcher, *options = part.command
        assert Path(launcher).is_file()
        config = parse_command_line("", ROOT / "configs" / "demo.yaml", options)
        assert config.data.path == str(tmp_path / "work" / "shards")
        assert config.model.kind == "magneto"
        assert config.model.image_layers == (1 if dry_run else 2)
        needs_gpu = config.train.precision == "fp16" or config.data.decoder == "dali_gpu"
        assert needs_gpu is False or not dry_run
        assert (config.augment.image_size, config.train.global_batch_size) == (
            (32, 16) if dry_run else (224, 256)
        )
    for part in parts:
        assert str(tmp_path) not in part.shown(tmp_path / "work")
        assert str(ROOT) not in part.shown(tmp_path / "work")
    if not dry_run:
        asked = {part.name.removeprefix("train_") for part in trains}
        assert {"fp16_dali_gpu", "fp16_dali_cpu", "fp16_cpu", "bf16_dali_gpu"} < asked


def test_without_a_gpu_nothing_but_a_dry_run_starts(photos, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--photos", str(photos)])
    with pytest.raises(InputError, match="there is no CUDA device; --dry_run"):
        gpu.main()


# Running ----------------------------------------------------------------------------------------


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    code = (
        "import signal, subprocess, sys;"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "open(sys.argv[1], 'w').write(str(child.pid));"
        "child.wait()"
    ).replace("sys.argv[1]", repr(str(tmp_path / "left.json")))
    started_at_s = time.monotonic()
    part = python(code, tmp_path / "left.json", 3.0)
    outcome = run_part(part, 600, tmp_path, watches_gpu=False, grace_s=0.5)
    assert time.monotonic() - started_at_s < 30
    assert (outcome.state, outcome.exit_code) == ("out of time", None)
    child = outcome.result  # what it has left until then
    assert isinstance(child, int)
    deadline_s = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline_s:
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}").exists()


def test_a_part_that_fails_or_leaves_nothing_is_not_done(tmp_path):
    def run(part: Part, left_s: float = 600) -> tuple[str, int | None, object]:
        outcome = run_part(part, left_s, tmp_path, watches_gpu=False)
        return outcome.state, outcome.exit_code, outcome.result

    left = tmp_path / "left.json"
    writes = f"open({str(left)!r}, 'w').write('1');"
    assert run(python(f"{writes}raise SystemExit(3)", left)) == ("failed", 3, 1)
    assert run(python(writes, left)) == ("done", 0, 1)
    assert run(python("", left)) == ("failed", 0, None)  # what an earlier run has left is gone
    assert "no result can be read: FileNotFoundError" in (tmp_path / "part.log").read_text()
    assert run(python(writes, left), left_s=-1) == ("not started", None, None)


def test_decoders_agree_below_two_of_255(tmp_path):
    def read(plain: str) -> dict:
        off = {
            "cpu": "",
            "dali_gpu": plain,
            "dali_gpu, AutoAugment": "differs from cpu by 3 of 255",
        }
        content = {"timings": [{"name": name, "note": note} for name, note in off.items()]}
        (tmp_path / "decoders.json").write_text(json.dumps(content))
        return read_decoders(tmp_path / "decoders.json")

    assert read("differs from cpu by 1.90 of 255")["decoders_agree"] is True
    assert read("differs from cpu by 2.10 of 255")["decoders_agree"] is False
    with pytest.raises(ValueError, match="dali_gpu: ''"):
        read("")


def test_counts_of_tests_name_what_failed(tmp_path):
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite errors="0" failures="1" skipped="0" tests="2">'
        '<testcase classname="test_some" name="test_good"/><testcase classname="test_some"'
        ' name="test_bad"><failure message="no"/></testcase></testsuite></testsuites>'
    )
    counts = {"tests": 2, "failures": 1, "errors": 0, "skipped": 0}
    assert read_tests(report) == {**counts, "failed": ["test_some.test_bad"]}


# All of it --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dry_run_does_every_part_and_writes_no_gpu_figures(tmp_path, photos):
    results = tmp_path / "results"
    before = sorted((ROOT / "benchmarks" / "results").iterdir())
    options = ["--photos", photos, "--results", results, "--dry_run", "--total_s", "500"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *map(str, options)],
        capture_output=True,
        text=True,
        check=False,
    )
    found = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    assert done.returncode == 0, (done.stdout, [f.get("log_tail") for f in found.values()])
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == before
    names = [part.name for part in plan(photos, tmp_path, 288, 50, dry_run=True)]
    assert sorted(found) == sorted(f"dry_run_{name}" for name in names)
    assert {part["state"] for part in found.values()} == {"done"}
    assert (results / "dry_run_memory.png").is_file()
    trained = found["dry_run_train_no_cpu"]["result"]
    assert trained["steps"] == 6
    assert trained["loss_is_finite"]
    assert trained["images_per_second"] > 0
    assert found["dry_run_decoders"]["result"]["decoders_agree"]
    assert found["dry_run_tests"]["result"]["tests"] > 3
    assert found["dry_run_memory"]["result"]["cases"][0]["tensors"] > 1e6
