"""The doctor: it says what is wrong, and what it tries cannot take it down."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from magneto_dist.doctor import machine
from magneto_dist.doctor.finding import Finding
from magneto_dist.doctor.trials import Outcome, attempt, gpu_findings, suitable_precision
from warm import REPOSITORY

GB = 1_000_000_000


def doctor(*options: str, first_on_path: Path | None = None, open_files: int = 0, **more: str):
    """The doctor as people start it, its findings by name, and its exit code."""

    def limit() -> None:
        if open_files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))

    paths = [str(path) for path in (first_on_path, REPOSITORY) if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}
    command = [sys.executable, "-m", "magneto_dist.doctor", "--json", *options]
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, preexec_fn=limit
    )
    assert ended.returncode in (0, 1), ended.stderr
    report: dict[str, Any] = json.loads(ended.stdout)
    return {finding["name"]: finding for finding in report["findings"]}, report, ended.returncode


def broken(folder: Path, package: str, line: str) -> Path:
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(line)
    return folder


def test_a_torch_that_aborts_is_a_line_and_not_the_end(tmp_path: Path) -> None:
    path = broken(tmp_path, "torch", "import os\nos.abort()\n")
    found, report, code = doctor(first_on_path=path, open_files=200)
    assert (code, report["state"]) == (1, "fail")
    assert found["python"]["state"] == "ok"
    for name in ("gpu", "decoder", "gloo"):
        assert (found[name]["state"], found[name]["found"]) == ("fail", "was ended by SIGABRT")
        assert found[name]["fix"]
    assert found["deepspeed"]["state"] == "warn"  # most people do without
    assert (found["open files"]["state"], found["open files"]["fix"]) == ("warn", "ulimit -n 200")


def test_trials_that_hang_are_given_up(tmp_path: Path) -> None:
    path = broken(tmp_path, "torch", "import time\ntime.sleep(600)\n")
    started_s = time.monotonic()
    found, _, code = doctor("--timeout_s", "0.5", first_on_path=path)
    assert time.monotonic() - started_s < 60
    assert code == 1
    assert found["gloo"]["found"] == "gave no answer within 0.5 s"


def test_lines_for_people_are_one_a_finding(tmp_path: Path) -> None:
    path = broken(tmp_path, "torch", "raise ImportError('libcudart.so.99 is\\nnot there')\n")
    environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{REPOSITORY}"}
    command = [sys.executable, "-m", "magneto_dist.doctor", "--output_dir", str(tmp_path / "où")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    lines = ended.stdout.splitlines()
    assert all(line.split()[0] in ("ok", "warn", "fail") for line in lines)
    assert f"in {tmp_path / 'où'}" in next(line for line in lines if " disk " in line)
    assert not (tmp_path / "où").exists()


def test_packages_that_the_doctor_itself_needs_may_be_missing(tmp_path: Path) -> None:
    for package in ("psutil", "packaging", "torch"):
        broken(tmp_path, package, f"raise ModuleNotFoundError(\"No module named '{package}'\")\n")
    found, _, code = doctor(first_on_path=tmp_path)
    assert code == 1
    for name, package in (("packages", "packaging"), ("memory", "psutil"), ("network", "psutil")):
        assert found[name]["state"] == "fail"
        assert found[name]["found"] == f"cannot be looked up: No module named '{package}'"
        assert "pip install" in found[name]["fix"]
    assert found["python"]["state"] == found["open files"]["state"] == "ok"


@pytest.mark.slow
def test_this_machine_trains(tmp_path: Path) -> None:
    found, report, code = doctor("--output_dir", str(tmp_path), "--timeout_s", "300")
    assert code == 0, report
    for name in ("packages", "decoder", "dali_cpu", "deepspeed", "gloo"):
        assert found[name]["state"] == "ok", found[name]


@pytest.mark.slow
def test_an_interface_that_is_not_there_fails(tmp_path: Path) -> None:
    found, _, code = doctor("--timeout_s", "300", GLOO_SOCKET_IFNAME="nosuch0")
    assert code == 1
    assert found["network"]["state"] == found["gloo"]["state"] == "fail"


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("import os; os.kill(os.getpid(), 11)", "was ended by SIGSEGV"),
        ("raise ValueError('why')", "ValueError: why"),
        ("import sys; sys.exit(3)", "ended with exit code 3"),
        ("print('noise'); print('{\"works\": \"yes\"}')", ""),
    ],
)
def test_attempt(script: str, error: str) -> None:
    outcome = attempt([sys.executable, "-c", script], 60)
    assert outcome == Outcome({} if error else {"works": "yes"}, error)


@pytest.mark.parametrize(
    ("finding", "state", "said"),
    [
        (machine.python_finding((3, 10, 4)), "fail", "3.11"),
        (machine.python_finding((3, 13, 0)), "ok", ""),
        (machine.packages_finding(["nosuchpackage>1"]), "fail", "nosuchpackage is missing"),
        (machine.packages_finding(["torch>=2000"]), "fail", "torch .* is not >=2000"),
        (machine.packages_finding(["torch>=2", "nosuch; extra == 's3'"]), "ok", "torch 2"),
        (machine.memory_finding(1 * GB), "fail", "1.0 GB"),
        (machine.memory_finding(3 * GB), "warn", "num_workers"),
        (machine.memory_finding(64 * GB), "ok", ""),
        (machine.disk_finding(Path("/tmp"), 0.5 * GB), "fail", "--output_dir"),
        (machine.disk_finding(Path("/tmp"), 5 * GB), "warn", "may not fit"),
        (machine.disk_finding(Path("/tmp/a/b/c"), 500 * GB), "ok", "500.0 GB free in /tmp/a/b/c"),
        (machine.shared_memory_finding(64_000_000, 8), "warn", "--shm-size"),
        (machine.shared_memory_finding(8 * GB, 8), "ok", ""),
        (machine.open_files_finding((24, 100)), "fail", "ulimit -n 100"),
        (machine.open_files_finding((128, 4096)), "warn", "ulimit -n 4096"),
        (machine.open_files_finding((1024, 4096)), "ok", "at most 1024"),
        (machine.open_files_finding((resource.RLIM_INFINITY,) * 2), "ok", "no limit"),
    ],
)
def test_thresholds(finding: Finding, state: str, said: str) -> None:
    assert finding.state == state, finding
    assert re.search(said, str(finding))
    assert bool(finding.fix) == (state != "ok")


LO, ETH = {"lo": ["127.0.0.1"]}, {"eth0": ["10.0.0.2"]}


@pytest.mark.parametrize(
    ("addresses", "own", "environment", "state", "fix"),
    [
        (LO | ETH, "10.0.0.2", {}, "ok", ""),
        (LO | ETH, "127.0.1.1", {}, "warn", "GLOO_SOCKET_IFNAME=eth0"),
        (LO | ETH, None, {}, "warn", "GLOO_SOCKET_IFNAME=eth0"),
        (LO | ETH, "127.0.1.1", {"GLOO_SOCKET_IFNAME": "eth0"}, "ok", ""),
        (LO | ETH, "10.0.0.2", {"GLOO_SOCKET_IFNAME": "ib0"}, "fail", "one of eth0"),
        (LO | ETH, "10.0.0.2", {"NCCL_SOCKET_IFNAME": "=ib0"}, "fail", "one of eth0"),
        (LO | ETH, "10.0.0.2", {"NCCL_SOCKET_IFNAME": "eth"}, "ok", ""),  # a prefix
        (LO, "127.0.0.1", {}, "warn", "several nodes"),
    ],
)
def test_network(addresses: dict, own: str | None, environment: dict, state: str, fix: str) -> None:
    finding = machine.network_finding(addresses, own, environment)
    assert finding.state == state
    assert fix in finding.fix


def test_gpus_and_what_they_are_fast_in() -> None:
    told = {"gpus": [["RTX 2080 Ti", 11 * GB, [7, 5]], ["H200", 141 * GB, [9, 0]]]}
    turing, hopper = gpu_findings(Outcome(told))
    assert "--train.precision fp16" in turing.fix
    assert "11 GB, compute capability 7.5" in turing.found
    assert "--train.precision bf16" in hopper.fix
    assert suitable_precision(6) == "no"
    (unseen,) = gpu_findings(Outcome({"gpus": [], "has_driver": True, "torch": "2.15"}))
    assert (unseen.state, "CUDA_VISIBLE_DEVICES" in unseen.fix) == ("fail", True)
    (crashed,) = gpu_findings(Outcome({}, "was ended by SIGSEGV"))
    assert crashed.state == "fail"
