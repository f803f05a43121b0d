"""Cluster templates: parsed, held against our own parser, and run where one machine can do it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from magneto_dist.config_io import parse_command_line
from processes import REPOSITORY, TINY, losses, run, status, wait_for_step
from warm import PATIENCE_S, free_port

SBATCH = REPOSITORY / "launchers/slurm/train.sbatch"
KUBERNETES = REPOSITORY / "launchers/kubernetes/train.yaml"
ACCELERATE = sorted((REPOSITORY / "configs/accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_its_files(path: Path) -> None:
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    number = re.search(r"_(\d+)$", path.stem)
    assert config.num_processes == (int(number[1]) if number else 16)
    assert config.num_machines == (1 if number else 2)


def test_sbatch_script_is_bash_and_gives_a_save_its_time() -> None:
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SBATCH)], check=True)
    text = SBATCH.read_text()
    signal_before_s = int(re.search(r"^#SBATCH --signal=B:TERM@(\d+)$", text, re.M)[1])  # type: ignore[index]
    shutdown_s = int(re.search(r"SHUTDOWN_TIMEOUT:-(\d+)", text)[1])  # type: ignore[index]
    assert 60 <= shutdown_s < signal_before_s


def start_sbatch(run_dir: Path, data: Path, *more: str) -> subprocess.Popen[str]:
    """The script as Slurm starts it, on a cluster of this machine alone."""
    slurm = {"SLURM_JOB_ID": "17", "SLURM_NNODES": "1", "SLURM_SUBMIT_DIR": str(REPOSITORY)}
    cluster = {
        **slurm,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PROCESSES_PER_NODE": "2",
        "CACHE_DIR": str(run_dir.parent / "cache"),
        "ON_EACH_NODE": "",
        "REQUEUE": "echo queued again:",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return subprocess.Popen(
        ["bash", str(SBATCH), str(run_dir), "train_ls.py", *TINY, f"--data.path={data}", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **cluster},
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sbatch_script_queues_again_what_it_stopped_and_nothing_else(
    demo_shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    long = ("--max_steps=10000", "--train.epochs=9999", "--optim.schedule=constant")
    process = start_sbatch(run_dir, demo_shards, *long)
    wait_for_step(process, run_dir, 3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    assert "queued again: 17\n" in output
    assert status(run_dir)["state"] == "preempted"
    saved = status(run_dir)["step"]

    process = start_sbatch(run_dir, demo_shards, *long, "--seed=5")
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1, output
    assert "seed" in status(run_dir)["reason"]
    assert "queued again" not in output

    process = start_sbatch(run_dir, demo_shards, *long, f"--max_steps={saved + 2}")
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    assert "queued again" not in output
    assert status(run_dir)["state"] == "done"
    assert list(losses(run_dir)) == list(range(1, saved + 3))


def test_kubernetes_job_starts_what_our_parsers_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    torchrun, *command = container["command"]
    assert torchrun == "torchrun"

    from torch.distributed.run import get_args_parser

    flags = get_args_parser().parse_args(command)
    assert int(flags.nnodes) == job["spec"]["completions"]
    assert int(flags.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    host, port = flags.rdzv_endpoint.split(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(port) == service["spec"]["ports"][0]["port"]
    shutdown_s = int(container["env"][0]["value"])
    assert 60 <= shutdown_s < pod["terminationGracePeriodSeconds"]

    monkeypatch.chdir(REPOSITORY)
    assert Path(flags.training_script).is_file()
    config = parse_command_line("", Path(), flags.training_script_args)
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for path in (config.output_dir, config.data.path, config.data.cache_dir):
        assert any(str(path).startswith(mount) for mount in mounts), path


@pytest.mark.slow
def test_torchrun_may_be_process_1_as_in_a_container(demo_shards: Path, tmp_path: Path) -> None:
    container = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*container, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("a process namespace needs root and util-linux")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    torchrun += [f"--master_port={free_port()}", "--"]
    options = [*TINY, "--max_steps=2", f"--data.path={demo_shards}", f"--output_dir={tmp_path}"]
    run("train_ls.py", *options, through=[*container, *torchrun])
    assert status(tmp_path)["state"] == "done"
