"""What only trying shows: `python -m magneto_dist.doctor.trials NAME` does one thing and ends.

Drivers and libraries for GPUs may take their process down, or never come back; so `trial_findings`
starts one process for each, with a time limit, and what happens to it is a line of the report.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from magneto_dist.doctor.finding import Finding


@dataclass(frozen=True)
class Outcome:
    """What a trial has told, or why it has not."""

    told: dict[str, Any]
    error: str = ""
    """Empty: it went well."""


def trial_findings(timeout_s: float) -> Iterator[Finding]:
    """Tries everything, two at a time; each may take `timeout_s` seconds."""
    with ThreadPoolExecutor(2) as threads:
        started = {name: threads.submit(attempt, _command(name), timeout_s) for name in TRIALS}
        outcomes = {name: future.result() for name, future in started.items()}
    yield from gpu_findings(outcomes["gpu"])
    has_gpu = bool(outcomes["gpu"].told.get("gpus"))
    for name, (wanted_on, cure) in _CONSEQUENCES.items():
        outcome = outcomes[name]
        if "absent" in outcome.told:
            continue
        if not outcome.error:
            yield Finding(name, "ok", outcome.told["works"])
        else:
            is_needed = wanted_on == "everything" or (wanted_on == "gpu" and has_gpu)
            yield Finding(name, "fail" if is_needed else "warn", outcome.error, cure)


def attempt(command: Sequence[str], timeout_s: float) -> Outcome:
    """Runs a trial, whose last line of output is JSON, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": ""}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
        process.communicate()
        return Outcome({}, f"gave no answer within {timeout_s:g} s")
    if process.returncode < 0:
        return Outcome({}, f"was ended by {signal.Signals(-process.returncode).name}")
    lines = (output if process.returncode == 0 else errors).strip().splitlines()
    if process.returncode or not lines:
        last = lines[-1].removeprefix("[rank0]: ") if lines else ""
        return Outcome({}, last or f"ended with exit code {process.returncode}")
    return Outcome(json.loads(lines[-1]))


def gpu_findings(outcome: Outcome) -> Iterator[Finding]:
    """A line for each GPU, or one that says why there is none."""
    if outcome.error:
        yield Finding("gpu", "fail", outcome.error, "nvidia-smi shows whether the driver works")
        return
    gpus = outcome.told["gpus"]
    if not gpus and outcome.told["has_driver"]:
        fix = "update the driver, look at CUDA_VISIBLE_DEVICES, or install torch's CUDA build"
        yield Finding("gpu", "fail", f"a driver, but torch {outcome.told['torch']} sees none", fix)
    elif not gpus:
        fix = "training runs on the CPU, which is for trying things out"
        yield Finding("gpu", "warn", "none", fix)
    for number, (name, memory_bytes, (major, minor)) in enumerate(gpus):
        memory = f"{memory_bytes / 1e9:.0f} GB, compute capability {major}.{minor}"
        fix = f"--train.precision {suitable_precision(major)}"
        yield Finding(f"gpu {number}", "ok", f"{name}, {memory}", fix)


def suitable_precision(major: int) -> Literal["bf16", "fp16", "no"]:
    """What a GPU of that compute capability is fast in: bf16 since Ampere, fp16 since Volta."""
    return "bf16" if major >= 8 else "fp16" if major >= 7 else "no"


def _command(name: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", __name__, name]


# In the process of a trial ---------------------------------------------------------------------


def _gpu() -> dict[str, Any]:
    import torch

    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    gpus = [(p.name, p.total_memory, (p.major, p.minor)) for p in properties]
    for number in range(len(gpus)):
        device = f"cuda:{number}"
        assert float(torch.ones(64, 64, device=device).mm(torch.ones(64, 64, device=device)).sum())
    has_driver = os.path.exists("/proc/driver/nvidia/version")  # noqa: PTH110
    return {"gpus": gpus, "has_driver": has_driver, "torch": torch.__version__}


def _cpu_decoder() -> dict[str, str]:
    from magneto_dist.config import AugmentConfig
    from magneto_dist.data.augment import evaluation_augmentation
    from magneto_dist.data.decode_cpu import CpuDecoder

    decoded = CpuDecoder(32, 1.0)([_picture()], [evaluation_augmentation(AugmentConfig())])
    return _seen(decoded, "simplejpeg decodes a picture")


def _dali(device: Literal["cpu", "gpu"]) -> dict[str, str]:
    import torch

    if device == "gpu" and not torch.cuda.is_available():
        return {"absent": "no GPU"}
    from magneto_dist.config import AugmentConfig
    from magneto_dist.data.augment import evaluation_augmentation
    from magneto_dist.data.decode_cpu import CpuDecoder
    from magneto_dist.data.decode_dali import DaliDecoder
    from magneto_dist.data.encoded_images import encoded_images

    cpu = CpuDecoder(32, 1.0)
    images = encoded_images([_picture()], [evaluation_augmentation(AugmentConfig())], cpu)
    decoded = DaliDecoder(cpu, device=device, num_threads=1)(images)
    with_what = "with nvJPEG on the GPU" if device == "gpu" else "on the CPU"
    return _seen(decoded, f"DALI decodes a picture {with_what}")


def _picture() -> bytes:
    import numpy as np

    from magneto_dist.data.sources.demo_pictures import draw, encode, random_scene

    rng = np.random.default_rng(0)
    return encode(draw(random_scene(rng), rng), rng)


def _seen(decoded: Any, works: str) -> dict[str, str]:
    if decoded.errors[0]:
        raise RuntimeError(decoded.errors[0])
    if decoded.pixels.float().std() < 1:
        raise RuntimeError("a picture came out in one colour")
    return {"works": works}


def _deepspeed() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    from magneto_dist.training.zero import compile_no_operator

    compile_no_operator()
    import deepspeed

    _be_alone()
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    model = torch.nn.Linear(4, 4)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,  # SGD
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), config=settings
    )
    before = [weight.detach().clone() for weight in model.parameters()]
    engine.backward(engine(torch.ones(1, 4, device=engine.device)).sum())
    engine.step()
    if all(map(torch.equal, before, model.parameters())):
        raise RuntimeError("a step of ZeRO-2 moved no weight")
    return {"works": f"a step of ZeRO-2, DeepSpeed {deepspeed.__version__}"}


def _collective(backend: Literal["gloo", "nccl"]) -> dict[str, str]:
    import torch
    from torch import distributed

    if backend == "nccl" and not torch.cuda.is_available():
        return {"absent": "no GPU"}
    _be_alone()
    distributed.init_process_group(backend)
    numbers = torch.ones(8, device="cuda" if backend == "nccl" else "cpu")
    distributed.all_reduce(numbers)
    assert numbers.sum() == 8
    return {"works": f"an all-reduce over {backend}, one process"}


def _be_alone() -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")


TRIALS = {
    "gpu": _gpu,
    "decoder": _cpu_decoder,
    "dali_cpu": lambda: _dali("cpu"),
    "dali_gpu": lambda: _dali("gpu"),
    "deepspeed": _deepspeed,
    "gloo": lambda: _collective("gloo"),
    "nccl": lambda: _collective("nccl"),
}
_CONSEQUENCES = {
    "decoder": ("everything", "python -m pip install --force-reinstall simplejpeg"),
    "dali_cpu": ("nothing", "only --data.decoder dali_cpu needs it; the default on a CPU is cpu"),
    "dali_gpu": ("gpu", "--data.decoder cpu, or install the DALI that fits the driver's CUDA"),
    "deepspeed": ("nothing", "only configs/accelerate/zero*.yaml need it"),
    "gloo": ("everything", "look at GLOO_SOCKET_IFNAME and at what this machine's name leads to"),
    "nccl": ("gpu", "NCCL_DEBUG=INFO says what it misses; NCCL_SOCKET_IFNAME names the network"),
}

if __name__ == "__main__":
    told = TRIALS[sys.argv[1]]()
    print(json.dumps(told), flush=True)
    os._exit(0)  # threads of what was tried may abort a process that goes down
